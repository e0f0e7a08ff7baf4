"""A teacher's top-k of stored rollouts for a training run: what the store lacks is scored once, and kept there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.data.store import Store
from workbench.errors import InputError
from workbench.policies.nouns import Phase, Role, Stored, parts
from workbench.policies.store import load_scores, save_scores
from workbench.policies.tasks import Task

if TYPE_CHECKING:
    from workbench.policies.lm.local_models import LocalModel
    from workbench.policies.lm.remote_models import RemoteModel
    from workbench.policies.lm.rollout import Rollout, Scores
    from workbench.policies.lm.scoring import Pair

_CHUNK = 64  # rollouts between two commits


@dataclass(frozen=True, slots=True)
class ScoreSupply:
    """Where a teacher's scores of a policy's rollouts came from.

    Args: version: of the teacher's weights; k: words of each token; context: the prompt that it read; num: rollouts;
        reused, made: of their different texts, found in the store and scored now.
    """

    teacher: str
    policy: str
    version: str
    k: int
    context: str
    num: int
    reused: int
    made: int

    def as_json(self) -> dict[str, Any]:
        """All fields by name."""
        return {name: getattr(self, name) for name in self.__slots__}


def scored_policies(phases: Sequence[Phase]) -> dict[str, Role]:
    """Policy -> the teacher whose scores of its rollouts the phases read; raises InputError for two of one policy."""
    found: dict[str, Role] = {}
    for phase in phases:
        roles = {role.name: role for role in phase.roles}
        for part in (part for source in phase.sources.values() for part in parts(source)):
            if not isinstance(part, Stored) or part.with_scores is None:
                continue
            role = roles.get(part.with_scores, Role(name=part.with_scores))
            if found.setdefault(part.policy, role) != role:
                raise InputError(
                    f"The rollouts of {part.policy!r} are to come with the scores of {found[part.policy].name!r} "
                    f"({found[part.policy].context}) and of {role.name!r} ({role.context}): they can have those of one."
                )
    return found


class Scoring:
    """Adds scores to stored rollouts.

    Args: models: role -> model; its weights are read only where something has to be scored; k: words of each token;
        say: told what is being done.
    """

    def __init__(
        self, store: Path, student: LocalModel, models: Mapping[str, LocalModel | RemoteModel], tasks: Sequence[Task],
        k: int, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.store, self.student, self.models, self.tasks, self.k, self.say = store, student, models, tasks, k, say

    def add(
        self, policy: str, role: Role, stock: Mapping[str, list[Rollout]]
    ) -> tuple[dict[str, list[Rollout]], ScoreSupply]:
        """The rollouts with the role's scores; raises InputError for a teacher that cannot score them."""
        from workbench.policies.lm.scoring import keyed, prompts_of, with_scores

        teacher = self._teacher(role)
        rollouts = [rollout for some in stock.values() for rollout in some]
        prompts = prompts_of(teacher.tokenizer, [task for task in self.tasks if task.id in stock], role.context)
        keys, pairs = keyed(teacher.version, rollouts, self.k, prompts)
        with Store(self.store, read_only=True) as opened:
            found = load_scores(opened.con, list(pairs))
        reused = len(found)
        found |= self._made(role.name, teacher, {key: pair for key, pair in pairs.items() if key not in found})
        scored = with_scores(rollouts, [found[key] for key in keys], role.name, teacher.version)
        again: dict[str, list[Rollout]] = {task: [] for task in stock}
        for rollout in scored:
            again[rollout.task_id].append(rollout)
        supply = ScoreSupply(
            role.name, policy, teacher.version, self.k, role.context, len(rollouts), reused, len(pairs) - reused
        )
        return again, supply

    def _teacher(self, role: Role) -> LocalModel | RemoteModel:
        if role.name not in self.models:
            raise InputError(
                f"The method reads stored scores of {role.name!r}, which are known by its weights, and the recipe has "
                f"no such model. Add models.{role.name}."
            )
        teacher = self.models[role.name]
        if teacher.tokens != self.student.tokens:
            raise InputError(
                f"{role.name!r} ({teacher.source}) has another vocabulary than the student: its scores are of other "
                "words. Take one with the student's tokenizer, or a method that needs only its text (sequence-kd)."
            )
        if self.k > len(teacher.tokenizer):
            raise InputError(
                f"rollouts.top_k is {self.k}, and the vocabulary has {len(teacher.tokenizer)} words. Lower it; at the "
                "whole vocabulary nothing is lost."
            )
        return teacher

    def _made(self, name: str, teacher: LocalModel | RemoteModel, missing: Mapping[str, Pair]) -> dict[str, Scores]:
        """Scores chunk by chunk; the store is held only for the moment of a commit, and a kill loses one chunk."""
        from workbench.policies.lm.scoring import score

        found: dict[str, Scores] = {}
        if not missing:
            return found
        scorer, keys = teacher.scorer(), list(missing)
        for start in range(0, len(keys), _CHUNK):
            self.say(f"{name}: scores of rollout {start + 1:,} of {len(keys):,}")
            fresh = score(scorer, {key: missing[key] for key in keys[start : start + _CHUNK]}, self.k)
            with Store(self.store) as opened, opened.transaction() as con:
                save_scores(con, teacher.version, fresh)
            found |= fresh
        return found
