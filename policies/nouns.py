"""The four nouns of every distillation method: Role, Source, Term, Phase. A method is a function that returns phases.

Nothing here imports torch: a catalog of methods can be listed, and a method's phases printed, on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from workbench.errors import InputError

Origin = Literal["given", "live", "snapshot", "ema", "copy", "adapter", "new"]
#: Origins of roles that train by terms of their own: the loop engine has them, TRL's has not.
TRAINED = ("copy", "adapter", "new")


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """Who predicts. The student is always there and needs no Role, unless it is an adapter on another role's weights.

    Args:
        name: how terms and sources call it.
        origin: "given" (a frozen model that train() receives under this name), "live" (the student as it is, without
            gradient), "snapshot" (the student as the phase found it), "ema" (a moving average of the student). These
            train themselves, by the phase's `role_terms`: "copy" (of the role `of`), "adapter" (low-rank adapters of
            `rank` on the weights of `of`, which stay as they are and are not copied), "new" (what `modules` makes
            under the role's name).
        context: which of a task's prompts it reads: "prompt", or the name of another one ("privileged", …).
        decay: of "ema", a step: weight of the old average, in [0, 1).
        of: the role that a copy or an adapter begins with.
        rank: of an adapter.
        learning_rate: of a role that trains: factor on the recipe's.
    """

    name: str
    origin: Origin = "given"
    context: str = "prompt"
    decay: float = 0.0
    of: str = "teacher"
    rank: int = 0
    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        if self.origin == "ema" and not 0 <= self.decay < 1:
            raise InputError(f"Role {self.name!r}: the decay of a moving average must be in [0, 1), not {self.decay}.")
        if (self.origin == "adapter") != (self.rank > 0):
            raise InputError(f"Role {self.name!r}: adapters, and only they, have a rank of 1 or more, not {self.rank}.")


@dataclass(frozen=True, slots=True)
class Stored:
    """Rollouts of the store (off-policy), by the name of the policy that wrote them; several of a task take turns.

    Args: with_scores: name of the teacher whose stored top-k scores come along; None = no scores.
    """

    policy: str = "teacher"
    with_scores: str | None = None


@dataclass(frozen=True, slots=True)
class Fresh:
    """Rollouts that a role writes for the batch, as it is at that moment (on-policy if it is the student)."""

    role: str = "student"


@dataclass(frozen=True, slots=True)
class Mixed:
    """With probability `fraction` a batch comes from `first`, else from `second` (GKD's lambda)."""

    first: Stored | Fresh
    second: Stored | Fresh
    fraction: float

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise InputError(f"The fraction of a mixture must be in [0, 1], not {self.fraction}.")


@runtime_checkable
class Maker(Protocol):
    """A source that makes its batch itself: prior noise, a generator's samples, a teacher's trajectory."""

    def __call__(self, view: Any) -> Mapping[str, Any]:
        """The rows of a micro-batch (`view` is a `workbench.policies.loop.view.View`): name -> tensor."""
        ...


Source = Stored | Fresh | Mixed | Maker


def parts(source: Source) -> tuple[Stored | Fresh | Maker, ...]:
    """The sources that a batch may come from."""
    return (source.first, source.second) if isinstance(source, Mixed) else (source,)


class Term(Protocol):
    """A differentiable loss over roles' predictions on one micro-batch.

    Its means are over the whole optimiser step (`view.mean`, `view.sequence_mean`), so that gradient accumulation and
    several processes give what one large batch gives.
    """

    @property
    def coefficient(self) -> float:
        """Factor of the term in the loss."""
        ...

    def __call__(self, view: Any) -> Any:
        """The share of the micro-batch (the engine's `View`) in the loss: a scalar tensor."""
        ...


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Which terms train whom, on which rollouts, for how long.

    Args:
        sources: segment -> where its rollouts come from. Most methods have one segment, "main"; a preference has
            "chosen" and "rejected". All segments of a batch are of the same tasks, padded each by itself.
        terms: of the student.
        roles: who predicts beside the student.
        role_terms: role -> terms that train it, with an optimiser and a turn of its own after the student's.
        every: role -> it has its turn at every n-th step, the first included; 1 where none is named.
        share: of the recipe's steps, in (0, 1]; the shares of a method's phases may sum to more than 1.
        contexts: segment -> the prompt that the student reads there; "prompt" where none is named.
        learning_rate: factor on the recipe's.
        modules: role name -> module of the model; returns further modules, by name: "name" trains with the student
            (projectors, a discriminator), "critic.name" with the role critic; terms find them by `view.module`.
        task_weight: task -> weight >= 0 of its sequences in every term; None = 1. Tasks of weight 0 are left out.
        state: numbers that change during training and are saved with it.
        after_step: called with (state, mean loss of the step, step, steps); changes `state`.
    """

    name: str
    sources: Mapping[str, Source]
    terms: Sequence[Term]
    roles: Sequence[Role] = ()
    role_terms: Mapping[str, Sequence[Term]] = field(default_factory=dict)
    every: Mapping[str, int] = field(default_factory=dict)
    share: float = 1.0
    contexts: Mapping[str, str] = field(default_factory=dict)
    learning_rate: float = 1.0
    modules: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    task_weight: Callable[[Any], float] | None = None
    state: dict[str, float] = field(default_factory=dict)
    after_step: Callable[[dict[str, float], float, int, int], None] | None = None

    def __post_init__(self) -> None:
        if not self.terms:
            raise InputError(f"Phase {self.name!r} has no term: nothing would train.")
        if not 0 < self.share <= 1:
            raise InputError(f"Phase {self.name!r}: the share of the steps must be in (0, 1], not {self.share}.")
        if not self.sources:
            raise InputError(f"Phase {self.name!r} has no source.")
        names = [role.name for role in self.roles]
        origins = {role.name: role.origin for role in self.roles}
        if len(origins) < len(names) or origins.get("student", "adapter") != "adapter":
            raise InputError(
                f"Phase {self.name!r}: roles need different names, and one named 'student' must be an adapter; "
                f"got {names}."
            )
        known = {"student", *names}
        trained = {name for name, origin in origins.items() if origin in TRAINED} - {"student"}
        if trained != set(self.role_terms) or not all(self.role_terms.values()):
            raise InputError(
                f"Phase {self.name!r}: roles that train ({', '.join(sorted(trained)) or 'none'}) and roles with terms "
                f"({', '.join(sorted(self.role_terms)) or 'none'}) must be the same."
            )
        if set(self.every) - trained - {"student"} or any(n < 1 for n in self.every.values()):
            raise InputError(
                f"Phase {self.name!r}: `every` must give roles that train a number from 1; got {self.every}."
            )
        for segment, source in self.sources.items():
            for part in parts(source):
                if isinstance(part, Fresh) and part.role not in known:
                    raise InputError(
                        f"Phase {self.name!r}: segment {segment!r} is written by {part.role!r}, which is no role of it "
                        f"({', '.join(sorted(known))})."
                    )


class Method(Protocol):
    """The hyper-parameters of a method: a frozen dataclass that knows its phases."""

    def phases(self) -> list[Phase]:
        """What to do, in order."""
        ...
