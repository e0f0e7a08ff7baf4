"""Tasks, rollouts and teacher scores in the store. Doing anything twice adds nothing.

The caller holds the transaction.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np

from workbench.data.columns import viewed
from workbench.data.records import digest
from workbench.errors import NotFound
from workbench.policies.tasks import Task

if TYPE_CHECKING:
    from workbench.policies.lm.rollout import Rollout, Scores


def save_tasks(con: duckdb.DuckDBPyConnection, task_set: str, split: str, tasks: Sequence[Task]) -> int:
    """Adds the tasks that the store does not have; returns how many."""
    rows = {
        "task_id": [task.id for task in tasks],
        "prompts": [json.dumps(dict(task.prompts), ensure_ascii=False) for task in tasks],
        "answer": [task.answer for task in tasks],
        "meta": [json.dumps(dict(task.meta), ensure_ascii=False) for task in tasks],
    }
    return _insert(
        con, rows,
        "INSERT INTO tasks BY NAME SELECT *, ? AS task_set, ? AS split, now() AS created_at FROM new_rows n "
        "WHERE NOT EXISTS (SELECT 1 FROM tasks t WHERE t.task_id = n.task_id AND t.task_set = ?)",
        [task_set, split, task_set],
    )  # fmt: skip


def load_tasks(con: duckdb.DuckDBPyConnection, task_set: str, split: str) -> list[Task]:
    """The tasks of a set, by id, without pass rates.

    Raises: NotFound, with the sets that there are.
    """
    rows = con.execute(
        "SELECT task_id, prompts, answer, meta FROM tasks WHERE task_set = ? AND split = ? ORDER BY task_id",
        [task_set, split],
    ).fetchall()
    if not rows:
        known = con.execute("SELECT DISTINCT task_set || ' (' || split || ')' FROM tasks ORDER BY 1").fetchall()
        there = ", ".join(name for (name,) in known) or "none"
        raise NotFound(f"The store has no tasks {task_set!r} of the split {split!r}; there are {there}.")
    return [Task(tid, json.loads(prompts), answer, None, json.loads(meta)) for tid, prompts, answer, meta in rows]


def save_rollouts(
    con: duckdb.DuckDBPyConnection, policy: str, rollouts: Sequence[Rollout], texts: Sequence[str], *,
    model_version: str, tokenizer: str, sampling: Mapping[str, Any], verified: str | None = None,
    run_id: str | None = None, step: int | None = None, first_sample: int = 0,
) -> int:  # fmt: skip
    """Adds the rollouts that the store does not have; returns how many.

    Args: texts: the completions decoded; first_sample: number of each task's first rollout here, where it has earlier
        ones; the other names as the columns of `rollouts`.
    """
    samples: dict[str, int] = {}
    numbers = []
    for rollout in rollouts:
        numbers.append(samples.setdefault(rollout.task_id, first_sample))
        samples[rollout.task_id] += 1
    settings = json.dumps(dict(sampling), sort_keys=True)
    # of the settings too: the same words at another temperature are another rollout, and are asked for by it
    origin = (policy, model_version, tokenizer, settings, str(step))
    ids = [
        digest("rollout", r.task_id, *origin, str(n), json.dumps(r.completion_ids))
        for r, n in zip(rollouts, numbers, strict=True)
    ]
    rows = {
        "rollout_id": ids, "task_id": [r.task_id for r in rollouts], "sample": numbers,
        "prompt_ids": [r.prompt_ids for r in rollouts], "completion_ids": [r.completion_ids for r in rollouts],
        "mask": [r.mask for r in rollouts], "logprobs": [r.logprobs for r in rollouts],
        "reward": [r.reward for r in rollouts], "text": list(texts),
    }  # fmt: skip
    return _insert(
        con, rows,
        "INSERT INTO rollouts BY NAME SELECT *, ? AS policy, ? AS model_version, ? AS tokenizer, ? AS sampling, "
        "? AS verified, ? AS run_id, ?::INTEGER AS step, now() AS created_at FROM new_rows n "
        "WHERE NOT EXISTS (SELECT 1 FROM rollouts r WHERE r.rollout_id = n.rollout_id)",
        [policy, model_version, tokenizer, settings, verified, run_id, step],
    )  # fmt: skip


def load_rollouts(
    con: duckdb.DuckDBPyConnection, policy: str, task_ids: Sequence[str], tokenizer: str, *,
    model_version: str | None = None, sampling: Mapping[str, Any] | None = None,
) -> dict[str, list[Rollout]]:  # fmt: skip
    """Task -> a policy's rollouts, in the order of sample and id. What another tokenizer wrote is left out.

    Args: model_version, sampling: only what was written by these weights, and with these settings; None = any.
    """
    from workbench.policies.lm.rollout import Rollout

    settings = None if sampling is None else json.dumps(dict(sampling), sort_keys=True)
    rows = con.execute(
        "SELECT task_id, prompt_ids, completion_ids, mask, logprobs, reward FROM rollouts "
        "WHERE policy = ? AND tokenizer = ? AND task_id IN (SELECT unnest(?::VARCHAR[])) "
        "AND model_version = coalesce(?, model_version) AND sampling::VARCHAR = coalesce(?, sampling::VARCHAR) "
        "ORDER BY task_id, sample, rollout_id",
        [policy, tokenizer, list(task_ids), model_version, settings],
    ).fetchall()
    found: dict[str, list[Rollout]] = {}
    for row in rows:
        found.setdefault(row[0], []).append(Rollout(*row))
    return found


def score_id(teacher: str, k: int, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> str:
    """The key of a teacher's scores of one completion after one prompt."""
    return digest("score", teacher, str(k), json.dumps([list(prompt_ids), list(completion_ids)]))


def save_scores(con: duckdb.DuckDBPyConnection, teacher: str, scores: Mapping[str, Scores]) -> int:
    """Adds a teacher's scores by `score_id`; returns how many were new."""
    rows = {
        "score_id": list(scores),
        "k": [s.ids.shape[1] for s in scores.values()],
        "num_tokens": [s.ids.shape[0] for s in scores.values()],
        "ids": [s.ids.astype("<i4").tobytes() for s in scores.values()],
        "logprobs": [s.logprobs.astype("<f2").tobytes() for s in scores.values()],
    }
    return _insert(
        con, rows,
        "INSERT INTO teacher_scores BY NAME SELECT *, ? AS teacher, now() AS created_at FROM new_rows n "
        "WHERE NOT EXISTS (SELECT 1 FROM teacher_scores s WHERE s.score_id = n.score_id)", [teacher],
    )  # fmt: skip


def load_scores(con: duckdb.DuckDBPyConnection, score_ids: Sequence[str]) -> dict[str, Scores]:
    """The scores that the store has, by id."""
    from workbench.policies.lm.rollout import Scores

    rows = con.execute(
        "SELECT score_id, k, num_tokens, ids, logprobs FROM teacher_scores "
        "WHERE score_id IN (SELECT unnest(?::VARCHAR[]))", [list(score_ids)]
    ).fetchall()  # fmt: skip
    return {
        key: Scores(np.frombuffer(ids, "<i4").reshape(n, k), np.frombuffer(logprobs, "<f2").reshape(n, k))
        for key, k, n, ids, logprobs in rows
    }


def _insert(
    con: duckdb.DuckDBPyConnection, rows: Mapping[str, Sequence[Any]], sql: str, parameters: Sequence[Any]
) -> int:
    """Runs an INSERT that reads `new_rows`; returns how many rows it added."""
    columns: dict[str, Any] = {}
    for name, values in rows.items():
        columns[name] = column = np.empty(len(values), object)
        for at, value in enumerate(values):  # an assignment at once would take lists of one length for a matrix
            column[at] = value
    with viewed(con, "new_rows", columns):
        return con.execute(sql, parameters).fetchall()[0][0]
