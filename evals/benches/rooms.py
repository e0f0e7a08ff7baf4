"""Rooms: the game of workbench.evals.environments.rooms on one map of 6 x 6; a third of the walks is the test."""

from __future__ import annotations

from workbench.evals.benches.base import Split, split_of
from workbench.evals.environments.rooms import Rooms
from workbench.evals.verifiers import END_STATE as GRADER
from workbench.policies.tasks import Environment, Task

MAX_TOKENS = 32


def load(split: Split) -> list[Task]:
    """Pairs of start and goal."""
    return [task for task in Rooms().tasks() if split_of(task.id, test_share=1 / 3) == split]


def make_environment() -> Environment:
    """The game."""
    return Rooms()


__all__ = ["GRADER", "MAX_TOKENS", "load", "make_environment"]
