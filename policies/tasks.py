"""A training task: prompts by context, and what is needed to judge a completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from workbench.errors import InputError

#: A plain text, or chat messages of {"role", "content"}.
Prompt = str | Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Task:
    """One problem.

    Args:
        id: unique; rollouts and scores are kept under it.
        prompts: context -> prompt. "prompt" is what the student reads; a teacher may read another ("privileged", a
            skill, a worked answer).
        answer: for verifiers; "" if there is none.
        pass_rate: share of a policy's rollouts that were right, in [0, 1]; None = not measured.
        meta: what the task's environment needs.
    """

    id: str
    prompts: Mapping[str, Prompt]
    answer: str = ""
    pass_rate: float | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompts.get("prompt"):
            raise InputError(f"Task {self.id!r} has no prompt under the name 'prompt'.")

    def prompt(self, context: str) -> Prompt:
        """Its prompt for roles of this context; raises InputError if it has none."""
        if context not in self.prompts:
            raise InputError(
                f"Task {self.id!r} has no prompt {context!r}, only {', '.join(self.prompts)}. A role that reads "
                f"{context!r} needs it in every task."
            )
        return self.prompts[context]


def pass_rate(rewards: Sequence[float], prior: float = 0.5) -> float:
    """Share of tries with a reward of 1 or more, in [0, 1].

    Args: prior: added to the tries that were right and to those that were wrong: a rate of exactly 0 or 1 would give
        the task no weight.
    """
    return (sum(reward >= 1 for reward in rewards) + prior) / (len(rewards) + 2 * prior)


class Environment(Protocol):
    """What answers a policy in a multi-turn task, in text.

    Attributes:
        max_turns: a longer episode is ended.
        max_turn_tokens: of the policy, a turn.
    """

    max_turns: int
    max_turn_tokens: int

    def reset(self, task: Task) -> Any:
        """A new episode; its state is passed to the other methods."""
        ...

    def step(self, state: Any, said: str) -> tuple[str, bool]:
        """(what the environment answers, whether the episode is over); changes the state."""
        ...

    def reward(self, state: Any) -> float:
        """Of the episode so far, in [0, 1]."""
        ...
