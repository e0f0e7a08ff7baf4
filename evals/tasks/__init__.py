"""One file per task. The table is static: listing tasks imports no task and reads no data."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

from workbench.errors import InputError

if TYPE_CHECKING:
    from workbench.evals.tasks.base import RecallTask

#: Name (of the task and of its module here) -> what it asks.
TASKS = {
    "locomo": "a question about a long conversation -> the turns that hold the evidence (10 conversations)",
    "agentlog": "a commit's subject -> the exchanges with a coding agent that made the commit",
    "skills": "a task's instruction -> the skills that it needs",
}


def load_task(name: str) -> RecallTask:
    """The task of that name from the shared data; raises InputError for an unknown name or missing data."""
    if name not in TASKS:
        near = get_close_matches(name, TASKS, 1)
        raise InputError(
            f"Unknown task {name!r}{f', did you mean {near[0]!r}?' if near else '.'} There are {', '.join(TASKS)}."
        )
    return import_module(f"workbench.evals.tasks.{name}").load()
