"""The arena: methods train the same student from the same teacher on the same tasks, and the best is told from luck.

Every method starts from the same weights, with the same settings and seeds, and is judged on the same held-out tasks,
sampled with the same random numbers. Intervals are over seeds and tasks together: seeds are drawn with replacement,
then tasks; the tests between methods are paired by seed and task, and corrected for the number of comparisons.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.errors import InputError
from workbench.evals.stats import holm, paired_randomisation
from workbench.policies.lm.episodes import encode, local_writer, roll_out
from workbench.policies.lm.rollout import Rollout
from workbench.policies.lm.run import run_method
from workbench.policies.lm.settings import Settings
from workbench.policies.nouns import Method
from workbench.policies.tasks import Environment, Task

_DRAWS = 2_000


@dataclass(frozen=True, slots=True)
class Ring:
    """What all methods share for one seed.

    Args:
        start: the student's weights before any method; never changed.
        models: role -> model, "teacher" at least.
        stored: policy -> task id -> rollouts.
        train, test: tasks; no test task is in `train`.
    """

    seed: int
    start: Any
    models: Mapping[str, Any]
    stored: Mapping[str, Mapping[str, Sequence[Rollout]]]
    tokenizer: Any
    train: Sequence[Task]
    test: Sequence[Task]
    environment: Environment


@dataclass(slots=True)
class Result:
    """Rewards of a method on every test task, seed by seed, and what it cost."""

    name: str
    rewards: list[NDArray[np.float64]] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def by_seed(self) -> list[float]:
        """The mean reward of each seed."""
        return [float(values.mean()) for values in self.rewards]


def judge(model: Any, ring: Ring, max_tokens: int, seed: int = 12345) -> NDArray[np.float64]:
    """Reward of every test task, one sample each at temperature 1; the same random numbers for every model."""
    return np.array([r.reward for r in play(model, ring, ring.test, max_tokens, seed)], np.float64)


def play(model: Any, ring: Ring, tasks: Sequence[Task], max_tokens: int, seed: int) -> list[Rollout]:
    """One rollout a task, without touching torch's random state."""
    import torch

    prompts = [encode(ring.tokenizer, task.prompt("prompt")) for task in tasks]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        write = local_writer(model, ring.tokenizer, batch_size=1000)
        return roll_out(write, ring.tokenizer, tasks, prompts, max_tokens, ring.environment)


def fight(
    rings: Sequence[Ring],
    methods: Mapping[str, Method],
    settings: Settings,
    told: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """Trains and judges every method in every ring; the untrained start comes first in the list.

    Raises: InputError if a test task is a training task.
    """
    results = {name: Result(name) for name in ("start", *methods)}
    for ring in rings:
        if shared := {task.id for task in ring.train} & {task.id for task in ring.test}:
            raise InputError(f"The test task {min(shared)!r} is a training task too: nothing could be concluded.")
        for name, result in results.items():
            told(f"seed {ring.seed}: {name}")
            before = time.process_time()
            model = ring.start if name == "start" else train(ring, methods[name], settings)
            result.cpu_seconds.append(time.process_time() - before)
            result.rewards.append(judge(model, ring, settings.max_completion_tokens))
            told(f"seed {ring.seed}: {name} {result.by_seed[-1]:.3f}")
    return list(results.values())


def train(ring: Ring, method: Method, settings: Settings) -> Any:
    """A copy of the ring's start, trained by the method with the ring's seed."""
    with tempfile.TemporaryDirectory() as folder:
        return run_method(
            copy.deepcopy(ring.start), ring.tokenizer, method, ring.train, replace(settings, seed=ring.seed),
            Path(folder), models=ring.models, stored=ring.stored, environment=ring.environment,
        )  # fmt: skip


def interval(rewards: Sequence[NDArray[np.float64]], seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean, seeds and then tasks drawn with replacement."""
    rng = np.random.default_rng(seed)
    table = np.stack(rewards)
    seeds, tasks = table.shape
    means = [
        table[rng.integers(seeds, size=seeds)[:, None], rng.integers(tasks, size=(seeds, tasks))].mean()
        for _ in range(_DRAWS)
    ]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def compare(results: Sequence[Result], baseline: str) -> list[dict[str, Any]]:
    """A row for each method: mean, interval, difference from the baseline with its interval, and Holm's p.

    The p is of sign flips of the differences, paired by seed and task.
    """
    named = {result.name: result for result in results}
    base = named[baseline].rewards
    others = [result for result in results if result.name != baseline]
    p_values = holm(
        [paired_randomisation(np.concatenate(other.rewards), np.concatenate(base)).p for other in others]
    ).tolist()
    rows = []
    for result in results:
        row: dict[str, Any] = {
            "method": result.name, "mean": float(np.mean(result.by_seed)), "ci95": interval(result.rewards),
            "by_seed": result.by_seed, "cpu_seconds": float(np.mean(result.cpu_seconds)),
        }  # fmt: skip
        if result.name != baseline:
            differences = [ours - theirs for ours, theirs in zip(result.rewards, base, strict=True)]
            row["difference"] = float(np.mean(differences))
            row["difference_ci95"] = interval(differences)
            row["p_holm"] = p_values[others.index(result)]
        rows.append(row)
    return rows
