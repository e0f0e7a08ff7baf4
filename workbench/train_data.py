"""What a training run reads: tasks, stored rollouts and pass rates; what the store lacks is made, and kept there."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.data.records import digest
from workbench.data.store import Store
from workbench.errors import InputError, NotFound
from workbench.evals.benches import load_bench
from workbench.evals.benches.base import split_of
from workbench.policies.nouns import Mixed, Phase, Stored
from workbench.policies.store import load_rollouts, load_tasks, save_rollouts, save_tasks
from workbench.policies.tasks import Task, pass_rate
from workbench.recipes import Recipe
from workbench.train_scores import ScoreSupply, Scoring, scored_policies

if TYPE_CHECKING:
    from workbench.evals.verifiers import Verify
    from workbench.policies.lm.local_models import LocalModel
    from workbench.policies.lm.remote_models import RemoteModel
    from workbench.policies.lm.rollout import Rollout

TEST_SHARE = 1 / 3  # of an environment's own tasks; for rooms the split of the bench of that name
LABELS = "labels"
BASE = "student-base"
WORKED = "worked"  # the model version of worked answers
_CHUNK, _SERVED_CHUNK = 256, 32  # rollouts between two commits: what a failure loses, and a served one is paid for
Stock = dict[str, list["Rollout"]]


@dataclass(frozen=True, slots=True)
class Supply:
    """Where the rollouts of a policy came from.

    Args: num: rollouts that the run reads; tasks: tasks with one; reused, made: of them found in the store, and written
        now; versions: of the models that wrote them; digest: of all of them.
    """

    policy: str
    num: int
    tasks: int
    reused: int
    made: int
    versions: tuple[str, ...]
    digest: str

    def as_json(self) -> dict[str, Any]:
        """All fields by name."""
        return {name: getattr(self, name) for name in self.__slots__} | {"versions": list(self.versions)}


@dataclass(slots=True)
class Data:
    """Tasks (with pass rates where the method asks for them) and rollouts by policy."""

    tasks: list[Task]
    stored: dict[str, Stock] = field(default_factory=dict)
    supplies: list[Supply] = field(default_factory=list)
    scores: list[ScoreSupply] = field(default_factory=list)

    def tasks_digest(self) -> str:
        """Of everything in the tasks, pass rates included."""
        parts = [(t.id, dict(t.prompts), t.answer, t.pass_rate, dict(t.meta)) for t in self.tasks]
        return digest("tasks", json.dumps(parts, sort_keys=True))


@dataclass(frozen=True, slots=True)
class Judge:
    """What answers a policy or judges it.

    Args: environment: of multi-turn tasks; verify: of single completions; name: and version, kept with rewards;
        settings: of the environment, kept with rollouts.
    """

    environment: Any = None
    verify: Verify | None = None
    name: str | None = None
    settings: Mapping[str, Any] | None = None


def choose_judge(recipe: Recipe) -> Judge:
    """The recipe's environment, or its bench's environment or verifier; neither for a set of the store alone."""
    if recipe.environment:
        chosen = recipe.environment
        return Judge(chosen.make(), None, chosen.name, {"name": chosen.name, **chosen.options})
    if recipe.tasks.bench is None:
        return Judge()
    bench = load_bench(recipe.tasks.bench, recipe.tasks.split)
    environment = bench.make_environment() if bench.make_environment else None
    return Judge(environment, bench.verify, bench.grader, {"name": bench.name} if environment else None)


def choose_tasks(recipe: Recipe, judge: Judge, store: Path) -> list[Task]:
    """The recipe's tasks, in the order of a hash of their ids, so that `limit` is a sample; raises NotFound."""
    choice, name = recipe.tasks, set_name(recipe)
    splits = ("train", "test") if choice.split == "all" else (choice.split,)
    with Store(store) as opened:
        if choice.set is None:
            for split in splits:
                with opened.transaction() as con:
                    save_tasks(con, name, split, _made(recipe, judge, split))
        found = [task for split in splits for task in load_tasks(opened.con, name, split)]
    return sorted(found, key=lambda task: digest("order", task.id))[: choice.limit]


def _made(recipe: Recipe, judge: Judge, split: str) -> Sequence[Task]:
    if recipe.tasks.bench:
        return load_bench(recipe.tasks.bench, split).tasks
    tasks: list[Task] = judge.environment.tasks()
    return [task for task in tasks if split_of(task.id, TEST_SHARE) == split]


def set_name(recipe: Recipe) -> str:
    """The name under which the store has the recipe's tasks."""
    if recipe.tasks.set or recipe.tasks.bench or recipe.environment is None:
        return recipe.tasks.set or recipe.tasks.bench or ""
    options = recipe.environment.options
    return "-".join([recipe.environment.name, *(str(options[key]) for key in ("size", "seed") if key in options)])


def stored_policies(phases: Sequence[Phase]) -> list[str]:
    """The policies whose stored rollouts the phases read, sorted."""
    parts = [
        part
        for phase in phases
        for source in phase.sources.values()
        for part in ((source.first, source.second) if isinstance(source, Mixed) else (source,))
    ]
    return sorted({part.policy for part in parts if isinstance(part, Stored)})


class Gatherer:
    """Brings together what a run reads.

    Args: models: role or policy -> model that may write its rollouts; say: told what is being done.
    """

    def __init__(
        self, recipe: Recipe, store: Path, student: LocalModel, models: Mapping[str, LocalModel | RemoteModel],
        judge: Judge, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.recipe, self.store, self.student, self.models = recipe, store, student, models
        self.judge, self.say = judge, say
        self.phases: list[Phase] = recipe.config.phases()

    def gather(self, tasks: list[Task]) -> Data:
        """Raises: NotFound for a policy that the store lacks and nobody can write; InputError without rewards."""
        data = Data(tasks)
        for policy in stored_policies(self.phases):
            stock, supply = self._supply(policy, tasks, self.recipe.rollouts.per_task)
            data.stored[policy] = stock
            data.supplies.append(supply)
        scoring = Scoring(self.store, self.student, self.models, tasks, self.recipe.rollouts.top_k, self.say)
        for policy, role in scored_policies(self.phases).items():
            data.stored[policy], scores = scoring.add(policy, role, data.stored[policy])
            data.scores.append(scores)
        if any(phase.task_weight for phase in self.phases):
            stock, supply = self._supply(BASE, tasks, self.recipe.rollouts.tries)
            data.tasks = [replace(task, pass_rate=self._rate(task, stock)) for task in tasks]
            data.supplies.append(replace(supply, policy=f"{BASE} (pass rates)"))
        return data

    def _rate(self, task: Task, stock: Stock) -> float:
        rewards = [rollout.reward for rollout in stock.get(task.id, []) if rollout.reward is not None]
        if not rewards:
            raise InputError(
                f"The method weights tasks by pass rate, and nothing judges the student's rollouts of {task.id!r}: "
                f"name a bench or an environment, or store some of {BASE!r} with rewards (rollouts.any_version: true)."
            )
        return pass_rate(rewards, self.recipe.rollouts.prior)

    # -- one policy --------------------------------------------------------------------------------------------------

    def _supply(self, policy: str, tasks: list[Task], each: int) -> tuple[Stock, Supply]:
        writer = self.student if policy == BASE else self.models.get(policy)
        can_write = (writer is not None or policy == LABELS) and not self.recipe.rollouts.any_version
        version = sampling = None
        made = 0
        if can_write:
            version, sampling = writer.version if writer else WORKED, self._sampling(policy, writer)
            made = sum(
                self._write(policy, writer, lacking, version, sampling, number)
                for number, lacking in self._shortages(policy, tasks, each, version, sampling)
            )
        stock, versions = self._load(policy, tasks, version, sampling)
        stock = {task: rollouts[:each] for task, rollouts in stock.items()}
        if not stock:
            raise NotFound(
                f"The method reads rollouts of the policy {policy!r}; the store has none of these tasks in the "
                f"student's vocabulary, and the recipe no model to write them. Add models.{policy}, or store some."
            )
        num = sum(map(len, stock.values()))
        supply = Supply(policy, num, len(stock), max(0, num - made), min(made, num), versions, _digest(stock))
        return stock, supply

    def _load(
        self, policy: str, tasks: Sequence[Task], version: str | None, sampling: Any
    ) -> tuple[Stock, tuple[str, ...]]:
        ids = [task.id for task in tasks]
        with Store(self.store, read_only=True) as opened:
            stock = load_rollouts(
                opened.con, policy, ids, self.student.tokens, model_version=version, sampling=sampling
            )
            versions = opened.con.execute(
                "SELECT DISTINCT model_version FROM rollouts WHERE policy = ? AND tokenizer = ? "
                "AND model_version = coalesce(?, model_version) AND task_id IN (SELECT unnest(?::VARCHAR[])) "
                "ORDER BY 1",
                [policy, self.student.tokens, version, ids],
            ).fetchall()
        return stock, tuple(name for (name,) in versions)

    def _shortages(
        self, policy: str, tasks: Sequence[Task], each: int, version: str, sampling: Any
    ) -> Iterator[tuple[int, list[Task]]]:
        """(number of the sample, tasks that lack it) in chunks; a kill between two of them loses neither."""
        source = self.recipe.models.get(policy)
        chunk = _SERVED_CHUNK if source and source.served else _CHUNK
        there, _ = self._load(policy, tasks, version, sampling)
        counts = {task: len(rollouts) for task, rollouts in there.items()}
        for number in range(each):
            lacking = [task for task in tasks if counts.get(task.id, 0) <= number]
            for start in range(0, len(lacking), chunk):
                self.say(f"{policy}: rollout {number + 1} of {each}, task {start + 1:,} of {len(lacking):,}")
                yield number, lacking[start : start + chunk]

    def _write(
        self,
        policy: str,
        writer: LocalModel | RemoteModel | None,
        tasks: list[Task],
        version: str,
        sampling: Any,
        number: int,
    ) -> int:
        seed = f"{self.recipe.settings.seed}/{number}"
        if writer is None:
            rollouts = [one for task in tasks if (one := self._worked(task, f"{seed}/{task.id}"))]
        else:
            mixed = digest("rollouts", policy, version, seed, tasks[0].id)
            rollouts = self._rolled_out(policy, writer, tasks, int(mixed, 16) % 2**63)
        tokenizer = self.student.tokenizer
        texts = [tokenizer.decode(rollout.completion_ids, skip_special_tokens=True) for rollout in rollouts]
        if not rollouts:
            return 0
        with Store(self.store) as opened, opened.transaction() as con:
            return save_rollouts(
                con, policy, rollouts, texts, model_version=version, tokenizer=self.student.tokens, sampling=sampling,
                verified=self.judge.name if writer else None, first_sample=number,
            )  # fmt: skip

    def _sampling(self, policy: str, writer: LocalModel | RemoteModel | None) -> dict[str, Any]:
        where = dict(self.judge.settings) if self.judge.settings else None
        if writer is None:
            return {"environment": where, "noise": self.recipe.rollouts.noise}
        found = {
            "environment": where, "temperature": self.recipe.rollouts.temperature, "context": self._context(policy),
            "max_tokens": self.recipe.settings.max_completion_tokens,
        }  # fmt: skip
        # its text was cut into tokens again
        return found if writer.tokens == self.student.tokens else {**found, "vocabulary": writer.tokens}

    def _context(self, policy: str) -> str:
        if policy == BASE:
            return "prompt"
        roles = [role.context for phase in self.phases for role in phase.roles if role.name == policy]
        return self.recipe.rollouts.context or (roles[0] if roles else "prompt")

    def _worked(self, task: Task, seed: str) -> Rollout | None:
        """The environment's worked answer, else the task's own; None if it has none."""
        from workbench.policies.lm.episodes import encode
        from workbench.policies.lm.rollout import Rollout

        tokenizer = self.student.tokenizer
        if hasattr(self.judge.environment, "walks"):
            found = self.judge.environment.walks(tokenizer, [task], random.Random(seed), self.recipe.rollouts.noise)
            return found[task.id][0] if task.id in found else None
        if not task.answer or self.judge.environment is not None:
            return None
        answer = tokenizer(task.answer, add_special_tokens=False)["input_ids"]
        return Rollout(task.id, encode(tokenizer, task.prompt("prompt")), [*answer, tokenizer.eos_token_id])

    def _rolled_out(self, policy: str, writer: LocalModel | RemoteModel, tasks: list[Task], seed: int) -> list[Rollout]:
        is_foreign = writer.tokens != self.student.tokens
        if is_foreign and self.judge.environment is not None:
            raise InputError(
                f"The model of the policy {policy!r} ({writer.source}) has another vocabulary than the student: its "
                "turns in an environment cannot be cut into the student's tokens. Take one with the same tokenizer."
            )
        context = self._context(policy)
        rollouts = writer.roll_out(
            tasks, context=context, max_tokens=self.recipe.settings.max_completion_tokens,
            temperature=self.recipe.rollouts.temperature, seed=seed, environment=self.judge.environment,
        )  # fmt: skip
        if self.judge.verify:
            for rollout, task in zip(rollouts, tasks, strict=True):
                said = writer.tokenizer.decode(rollout.completion_ids, skip_special_tokens=True)
                rollout.reward = self.judge.verify(said, task).score
        if not is_foreign:
            return rollouts
        return [self._encoded_again(r, t, writer, context) for r, t in zip(rollouts, tasks, strict=True)]

    def _encoded_again(self, rollout: Rollout, task: Task, writer: LocalModel | RemoteModel, context: str) -> Rollout:
        """The same text in the student's tokens."""
        from workbench.policies.lm.episodes import encode

        tokenizer, ids = self.student.tokenizer, rollout.completion_ids
        text = writer.tokenizer.decode(ids, skip_special_tokens=True)
        again = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if ids and ids[-1] == writer.tokenizer.eos_token_id:
            again.append(tokenizer.eos_token_id)
        return replace(
            rollout, prompt_ids=encode(tokenizer, task.prompt(context)), completion_ids=again, mask=None, logprobs=None
        )


def _digest(stock: Stock) -> str:
    rows = [
        (r.task_id, r.prompt_ids, r.completion_ids, r.mask, r.reward) for task in sorted(stock) for r in stock[task]
    ]
    return digest("stock", json.dumps(rows))
