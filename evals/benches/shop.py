"""Shop: the tool-use task of workbench.evals.environments.shop."""

from __future__ import annotations

from workbench.evals.benches.base import Split, split_of
from workbench.evals.environments.shop import Shop, make_task
from workbench.evals.verifiers import END_STATE as GRADER
from workbench.policies.tasks import Environment, Task

__all__ = ["GRADER", "MAX_TOKENS", "load", "make_environment"]
MAX_TOKENS = 768
NUM_MADE = 1500


def load(split: Split) -> list[Task]:
    """Four of five requests are for training; the same request comes with several databases."""
    made = (make_task(number) for number in range(NUM_MADE))
    return [task for task in made if split_of(str(task.prompts["prompt"]), test_share=0.2) == split]


def make_environment() -> Environment:
    """The shop."""
    return Shop()
