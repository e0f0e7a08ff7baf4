"""What a bench is: tasks of a split, and a verifier or an environment that judges what a policy writes for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from workbench.data.records import digest
from workbench.errors import InputError
from workbench.evals.verifiers import Verify
from workbench.policies.tasks import Environment, Task

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
#: For the number and exact verifiers.
FINAL_LINE = "Work it out, then end with one line: #### and the answer."


@dataclass(frozen=True, slots=True)
class Bench:
    """A bench, ready to run.

    Args:
        split: train, test, or all (both, where published figures are over all items).
        grader: name and version of what judges; another version is another evaluation.
        max_tokens: of a completion, by default.
        verify: judges single completions; None where an environment does.
        make_environment: a fresh environment; None for single completions.

    Raises: InputError for no task, and for two tasks of one id.
    """

    name: str
    split: str
    tasks: Sequence[Task]
    grader: str
    max_tokens: int
    verify: Verify | None = None
    make_environment: Callable[[], Environment] | None = None

    def __post_init__(self) -> None:
        if not self.tasks or (self.verify is None) == (self.make_environment is None):
            raise InputError(f"Bench {self.name!r} ({self.split}) needs tasks, and a verifier or an environment.")
        seen: set[str] = set()
        for task in self.tasks:
            if task.id in seen:
                raise InputError(f"Bench {self.name!r} has two tasks with the id {task.id!r}.")
            seen.add(task.id)

    def data_digest(self) -> str:
        """Of all that the tasks say, in order."""
        return digest(
            "tasks",
            *(json.dumps([t.id, dict(t.prompts), t.answer, dict(t.meta)], sort_keys=True) for t in self.tasks),
        )


def split_of(key: str, test_share: float = 0.5, seed: int = 0) -> Split:
    """The split of a problem, by its content alone: equal problems never fall into both."""
    number = int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "big")
    return "test" if number < test_share * 2**64 else "train"


def prompts(question: str, worked: str = "") -> dict[str, str]:
    """The contexts of a task: the question, and, where there is one, the question with a worked answer."""
    found = {"prompt": question}
    if worked:
        found["privileged"] = f"{question}\n\nA worked answer, for your eyes only:\n{worked}"
    return found
