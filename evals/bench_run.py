"""Runs a policy over the tasks of a bench and keeps every sample in the store.

An evaluation's id is a digest of everything that a sample depends on: the tasks, the policy's weights and tokenizer,
the sampling settings, the grader's version. So a sample is taken from the store only if nothing of that changed
(evals.md P1), and changed weights are another evaluation. Samples are drawn in batches with a seed of their own and
committed batch by batch: what a kill left undone is drawn again with the same seeds, so that a resumed evaluation
equals an undisturbed one. More samples of the same tasks go under the same id.

A failure is a status, not a 0 that looks like an answer: policy_error (the policy raised), grader_error and timeout
(the verifier did). `truncated`, score 0: the policy did not end within its tokens, or its turns.

Verified by: tests/evals/test_bench_run.py.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import duckdb

from workbench.data.columns import Kind, insert_rows, registered
from workbench.data.records import digest
from workbench.data.store import Store
from workbench.errors import EndpointError, InputError, MissingExtra
from workbench.evals.benches.base import Bench
from workbench.evals.graders import Status
from workbench.policies.lm.endpoint import Refused
from workbench.policies.tasks import Environment, Prompt, Task

if TYPE_CHECKING:
    from workbench.policies.lm.episodes import Write

StorePath = str | os.PathLike[str] | None


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy to be evaluated.

    Args:
        name: what people call it.
        version: digest of all that decides what it writes but for the sampling: weights, tokenizer, engine, dtype.
        tokenizer: as of transformers.
        writer: (temperature, seed) -> what writes completions. A local one may draw from torch's global random state,
            which is seeded before every batch.
        weights: digest of a model folder, by which the store knows the training run that made it; None = no folder.
    """

    name: str
    version: str
    tokenizer: Any
    writer: Callable[[float, int], Write]
    weights: str | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How samples are drawn; all of it is part of the evaluation's id.

    Args: max_tokens: of a completion, the environment's words included; batch_size: samples that are drawn and
        committed together; is_chat: prompts go through the tokenizer's chat template as a user's message.
    """

    temperature: float = 0.0
    max_tokens: int = 512
    seed: int = 0
    batch_size: int = 32
    is_chat: bool = False

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.max_tokens >= 1 and self.batch_size >= 1):
            raise InputError(f"Needs temperature >= 0, max_tokens >= 1 and batch_size >= 1: {self}.")

    def as_json(self) -> str:
        """All fields by name, sorted."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__}, sort_keys=True)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a call is: `done` of `total` samples are stored, `failed` of those drawn now could not be judged."""

    done: int
    total: int
    failed: int
    score: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a call brought about: `num_drawn` samples now, `num_stored` were there before."""

    eval_id: str
    task_ids: tuple[str, ...]
    num_samples: int
    num_drawn: int
    num_stored: int


@dataclass(frozen=True, slots=True)
class _Sample:
    task_id: str
    status: Status
    score: float | None
    text: str = ""
    extracted: str | None = None
    tokens: int = 0
    seconds: float = 0.0
    error: str | None = None


def run_bench(
    path: StorePath, bench: Bench, policy: Policy, sampling: Sampling, *, num_samples: int = 1,
    limit: int | None = None, retry: bool = False, progress: Callable[[Progress], None] | None = None,
) -> Evaluation:  # fmt: skip
    """Brings samples of every task of a bench into the store; those that are there are not drawn again.

    Args:
        path: of the store; None = $WORKBENCH_STORE or the default. It is open only while something is read or written.
        num_samples: for each task.
        limit: only the first so many tasks: another evaluation, and a partial one.
        retry: draw again what failed before (policy_error, grader_error, timeout).
    Raises: InputError for settings that cannot be meant; EndpointError and MissingExtra end the run, and what was
        committed stays; StoreError.
    """
    if num_samples < 1 or (limit is not None and limit < 1):
        raise InputError(f"num_samples ({num_samples}) and limit ({limit}) must be 1 or more.")
    if num_samples > 1 and sampling.temperature == 0:
        raise InputError("At temperature 0 all samples of a task are the same. Give a temperature, or take one sample.")
    bench = bench if limit is None else replace(bench, tasks=bench.tasks[:limit])
    eval_id = digest("bench", bench.data_digest(), policy.version, sampling.as_json(), bench.grader)
    with Store(path) as store, store.transaction() as con:
        _register(con, eval_id, bench, policy, sampling)
        if retry:
            con.execute("DELETE FROM evaluations WHERE eval_id = ? AND score IS NULL", [eval_id])
        stored = _stored(con, eval_id)
    tasks = list(bench.tasks)
    planned = {(task.id, sample) for sample in range(num_samples) for task in tasks}
    done, drawn, failed, total = len(planned & stored.keys()), 0, 0, 0.0
    total = sum(score for key, score in stored.items() if key in planned)
    for sample in range(num_samples):
        for start in range(0, len(tasks), sampling.batch_size):
            batch = tasks[start : start + sampling.batch_size]
            missing = {task.id for task in batch if (task.id, sample) not in stored}
            if not missing:
                continue
            found = [s for s in _draw(bench, policy, sampling, batch, sample) if s.task_id in missing]
            _save(path, eval_id, bench.grader, sample, found)
            drawn += len(found)
            failed += sum(s.score is None for s in found)
            total += sum(s.score or 0.0 for s in found)
            if progress:
                now = done + drawn
                progress(Progress(now, len(planned), failed, total / now))
    return Evaluation(eval_id, tuple(task.id for task in tasks), num_samples, drawn, done)


# --- drawing ----------------------------------------------------------------------------------------------------------


def _draw(bench: Bench, policy: Policy, sampling: Sampling, batch: Sequence[Task], sample: int) -> list[_Sample]:
    """Samples of a batch; where the policy raises, its tasks are tried one by one."""
    import torch

    from workbench.policies.lm.episodes import encode, roll_out

    seed = int(digest("sample", str(sampling.seed), str(sample), *(task.id for task in batch)), 16) % 2**63
    environment = _Watched(bench.make_environment()) if bench.make_environment else None
    started = time.perf_counter()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            write = policy.writer(sampling.temperature, seed)
            prompts = [encode(policy.tokenizer, _prompt(task, sampling.is_chat)) for task in batch]
            rollouts = roll_out(write, policy.tokenizer, batch, prompts, sampling.max_tokens, environment)
    except Exception as error:
        if isinstance(error, EndpointError | MissingExtra) and not isinstance(error, Refused):
            raise  # nothing would come of the other batches either
        if len(batch) > 1:
            return [s for task in batch for s in _draw(bench, policy, sampling, [task], sample)]
        status: Status = "grader_error" if isinstance(error, _EnvironmentFailed) else "policy_error"
        return [_Sample(batch[0].id, status, None, seconds=time.perf_counter() - started, error=_told(error))]
    seconds = (time.perf_counter() - started) / len(batch)
    samples = []
    for at, (task, rollout) in enumerate(zip(batch, rollouts, strict=True)):
        ids = rollout.completion_ids
        text = policy.tokenizer.decode(ids, skip_special_tokens=True)
        tokens = len(ids) if rollout.mask is None else sum(rollout.mask)
        drawn = _Sample(task.id, "ok", rollout.reward, text, tokens=tokens, seconds=seconds)
        if environment:
            samples.append(drawn if environment.ended[at] else replace(drawn, status="truncated"))
        elif not ids or ids[-1] != policy.tokenizer.eos_token_id:
            samples.append(replace(drawn, status="truncated", score=0.0))
        else:
            samples.append(_judge(bench, task, drawn))
    return samples


def _prompt(task: Task, is_chat: bool) -> Prompt:
    prompt = task.prompt("prompt")
    return [{"role": "user", "content": prompt.strip()}] if is_chat and isinstance(prompt, str) else prompt


def _judge(bench: Bench, task: Task, drawn: _Sample) -> _Sample:
    assert bench.verify
    try:
        verdict = bench.verify(drawn.text, task)
    except MissingExtra:
        raise
    except Exception as error:  # a failure of the verifier says nothing of the policy
        return replace(drawn, status="grader_error", error=_told(error))
    return replace(drawn, score=verdict.score, status=verdict.status, extracted=verdict.extracted)


class _EnvironmentFailed(Exception):
    """The environment raised, not the policy."""


class _Watched:
    """An environment that remembers which episodes it ended, in the order of their resets."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self.max_turns, self.max_turn_tokens = environment.max_turns, environment.max_turn_tokens
        self.ended: list[bool] = []

    def reset(self, task: Task) -> Any:
        self.ended.append(False)
        return len(self.ended) - 1, self._asked(self._environment.reset, task)

    def step(self, state: Any, said: str) -> tuple[str, bool]:
        at, inner = state
        answer, is_over = self._asked(self._environment.step, inner, said)
        self.ended[at] = is_over
        return answer, is_over

    def reward(self, state: Any) -> float:
        return self._asked(self._environment.reward, state[1])

    @staticmethod
    def _asked(ask: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return ask(*arguments)
        except Exception as error:
            raise _EnvironmentFailed(_told(error)) from error


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# --- the store --------------------------------------------------------------------------------------------------------

_BENCHES: dict[str, Kind] = {
    "eval_id": "valid", "task_set": "text", "split": "text", "data_digest": "valid", "model": "text",
    "model_version": "text", "sampling": "text", "grader": "text", "run_id": "text", "created_at": "time",
}  # fmt: skip
_SAMPLES: dict[str, Kind] = {
    "eval_id": "valid", "task_id": "text", "sample": "int", "status": "valid", "score": "real", "text": "text",
    "extracted": "text", "grader": "text", "tokens": "int", "seconds": "real", "error": "text",
}  # fmt: skip


def _register(con: duckdb.DuckDBPyConnection, eval_id: str, bench: Bench, policy: Policy, sampling: Sampling) -> None:
    run_id = _made_by(con, policy)
    if not con.execute("SELECT 1 FROM eval_benches WHERE eval_id = ?", [eval_id]).fetchall():
        row = (eval_id, bench.name, bench.split, bench.data_digest(), policy.name, policy.version, sampling.as_json(),
               bench.grader, run_id, time.time_ns() // 1000)  # fmt: skip
        insert_rows(con, "eval_benches", _BENCHES, [row])
    elif run_id:  # evaluated before the store knew the run
        con.execute("UPDATE eval_benches SET run_id = ? WHERE eval_id = ? AND run_id IS NULL", [run_id, eval_id])


def _made_by(con: duckdb.DuckDBPyConnection, policy: Policy) -> str | None:
    """The training run that made these weights: of several the one that the model is named by, else the latest."""
    rows = con.execute(
        "SELECT a.run_id FROM artifacts a JOIN runs r USING (run_id) WHERE a.kind = 'model' AND a.digest = ? "
        "ORDER BY contains(?, a.run_id) DESC, r.created_at DESC LIMIT 1",
        [policy.weights, policy.name],
    ).fetchall()
    return rows[0][0] if rows else None


def _stored(con: duckdb.DuckDBPyConnection, eval_id: str) -> dict[tuple[str, int], float]:
    rows = con.execute("SELECT task_id, sample, score FROM evaluations WHERE eval_id = ?", [eval_id]).fetchall()
    return {(task_id, sample): score or 0.0 for task_id, sample, score in rows}


def _save(path: StorePath, eval_id: str, grader: str, sample: int, found: Sequence[_Sample]) -> None:
    rows = [
        (eval_id, s.task_id, sample, s.status, s.score, s.text, s.extracted, grader, s.tokens, s.seconds, s.error)
        for s in found
    ]
    with Store(path) as store, store.transaction() as con, registered(con, "new_samples", _SAMPLES, rows):
        con.execute(  # another process may have drawn the same meanwhile: its rows stay
            "INSERT INTO evaluations BY NAME "
            "SELECT * FROM new_samples ANTI JOIN evaluations USING (eval_id, task_id, sample)"
        )
