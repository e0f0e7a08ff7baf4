"""What an evaluation says: scores with intervals, pass@k, majority votes, and what failed; and two compared.

The unit is the task: its samples are averaged first (evals.md R12). A sample that could not be judged counts 0 in
`score` and not at all in `score_completed`; both are given, and how many there are (R5).

Verified by: tests/evals/test_bench_run.py.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import duckdb

from workbench.data.store import Store
from workbench.errors import InputError, NotFound
from workbench.evals.bench_run import Evaluation, StorePath
from workbench.evals.stats import (
    Interval,
    paired_bootstrap,
    paired_randomisation,
    pass_at_k,
    pass_hat_k,
    score_interval,
)


class _Row(NamedTuple):
    task_id: str
    status: str
    score: float | None
    extracted: str | None
    tokens: int


def report(path: StorePath, evaluation: Evaluation, *, is_partial: bool = False) -> dict[str, Any]:
    """The figures of an evaluation, JSON-able.

    Args: is_partial: it was made with a limit.
    Raises: InputError if samples are missing.
    """
    with Store(path, read_only=True) as store:
        about = _about(store.con, evaluation.eval_id)
        rows = _rows(store.con, evaluation.eval_id, evaluation.num_samples)
    planned = len(evaluation.task_ids) * evaluation.num_samples
    if len(rows) != planned:
        raise InputError(f"{len(rows):,} of {planned:,} samples are there. Run the same evaluation again to go on.")
    counts = Counter(row.status for row in rows)
    failed = sum(row.score is None for row in rows)
    completed = [row for row in rows if row.status in ("ok", "wrong_format")]
    by_task: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        by_task[row.task_id].append(row)
    found: dict[str, Any] = {
        **about, "is_partial": is_partial, "tasks": len(by_task), "samples": planned,
        "by_status": dict(sorted(counts.items())), "not_judged": failed,
        "drawn": evaluation.num_drawn, "stored": evaluation.num_stored,
        "score": _mean(rows), "score_completed": _mean(completed),
        "tokens": sum(row.tokens for row in rows), "mean_tokens": sum(row.tokens for row in rows) / planned,
    }  # fmt: skip
    if evaluation.num_samples > 1:
        right = [sum((row.score or 0.0) >= 1 for row in task) for task in by_task.values()]
        sizes = _powers(evaluation.num_samples)
        for name, formula in (("pass_at", pass_at_k), ("pass_hat", pass_hat_k)):
            found[name] = {str(k): _interval([formula(evaluation.num_samples, num, k) for num in right]) for k in sizes}
        if any(row.extracted for row in rows):
            found["majority"] = _interval([_majority(task) for task in by_task.values()])
    return found


def mean_score(con: duckdb.DuckDBPyConnection, eval_id: str) -> dict[str, Any] | None:
    """`score` of what an evaluation has by now, complete or not; None where it has nothing."""
    return _mean(_rows(con, eval_id))


def _about(con: duckdb.DuckDBPyConnection, eval_id: str) -> dict[str, Any]:
    names = ("eval_id", "task_set", "split", "data_digest", "model", "model_version", "sampling", "grader")
    rows = con.execute(f"SELECT {', '.join(names)} FROM eval_benches WHERE eval_id = ?", [eval_id]).fetchall()
    if not rows:
        raise NotFound(f"The store has no evaluation {eval_id!r}.")
    about = dict(zip(names, rows[0], strict=True))
    return {**about, "sampling": json.loads(about["sampling"])}


def _rows(con: duckdb.DuckDBPyConnection, eval_id: str, num_samples: int | None = None) -> list[_Row]:
    rows = con.execute(
        "SELECT task_id, status, score, extracted, tokens FROM evaluations "
        "WHERE eval_id = ? AND sample < coalesce(?, sample + 1) ORDER BY task_id, sample",
        [eval_id, num_samples],
    ).fetchall()
    return [_Row(*row) for row in rows]


def _mean(rows: Sequence[_Row]) -> dict[str, Any] | None:
    """Mean score with its interval; the unit is the task."""
    return _interval([row.score or 0.0 for row in rows], [row.task_id for row in rows]) if rows else None


def _interval(values: Sequence[float], clusters: Sequence[str] | None = None) -> dict[str, Any]:
    if len(set(clusters or range(len(values)))) < 2:
        return {"estimate": sum(values) / len(values), "low": None, "high": None, "method": "one task: no interval"}
    return _shown(score_interval(values, clusters))


def _shown(interval: Interval) -> dict[str, Any]:
    return {"estimate": interval.estimate, "low": interval.low, "high": interval.high, "method": interval.method}


def _powers(largest: int) -> list[int]:
    """1, 2, 4, … and the largest."""
    return sorted({2**n for n in range(largest.bit_length()) if 2**n < largest} | {largest})


def _majority(samples: Sequence[_Row]) -> float:
    """Score of the answer that most samples gave; of several, their mean. Right answers are one, however written."""
    votes: Counter[str] = Counter()
    scores: dict[str, float] = {}
    for row in samples:
        if row.status == "ok" and row.extracted:
            key = "right" if row.score == 1 else f"other: {row.extracted}"
            votes[key] += 1
            scores[key] = row.score or 0.0
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [scores[key] for key, count in votes.items() if count == most]
    return sum(winners) / len(winners)


def compare(path: StorePath, first: str, second: str) -> dict[str, Any]:
    """Mean difference (first - second) of two evaluations of the same tasks, paired by task.

    A task's score is the mean of its samples, failures as 0; the interval draws tasks.

    Returns: the difference with its interval, p of sign flips, both mean scores, how many tasks the first did better
        and worse and equally, how the sampling differs, and the scores of every task.
    Raises: NotFound; InputError if tasks or graders differ.
    """
    with Store(path, read_only=True) as store:
        abouts = [_about(store.con, eval_id) for eval_id in (first, second)]
        means = [_task_means(store.con, eval_id) for eval_id in (first, second)]
    for name in ("data_digest", "grader"):
        if abouts[0][name] != abouts[1][name]:
            raise InputError(f"{first} and {second} cannot be compared: their {name.replace('_', ' ')}s differ.")
    if means[0].keys() != means[1].keys():
        raise InputError(f"{first} and {second} are not both complete. Run them again to go on.")
    tasks = sorted(means[0])
    a, b = ([mean[task_id] for task_id in tasks] for mean in means)
    test = paired_randomisation(a, b)
    gaps = [round(x - y, 12) for x, y in zip(a, b, strict=True)]  # means of equal samples differ by rounding
    settings = [about["sampling"] for about in abouts]
    return {
        "first": first, "second": second, "models": [about["model"] for about in abouts], "tasks": len(a),
        "task_set": abouts[0]["task_set"], "split": abouts[0]["split"], "scores": [sum(a) / len(a), sum(b) / len(b)],
        "difference": _difference(a, b), "p": test.p, "equal_tasks": gaps.count(0),
        "better_tasks": sum(gap > 0 for gap in gaps), "worse_tasks": sum(gap < 0 for gap in gaps),
        "sampling_differs": {
            name: [one[name] for one in settings] for name in settings[0] if settings[0][name] != settings[1][name]
        },
        "items": [{"task_id": task, "first": x, "second": y} for task, x, y in zip(tasks, a, b, strict=True)],
    }  # fmt: skip


def _difference(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    if len(a) < 2:
        return {"estimate": a[0] - b[0], "low": None, "high": None, "method": "one task: no interval"}
    return _shown(paired_bootstrap(a, b))


def _task_means(con: duckdb.DuckDBPyConnection, eval_id: str) -> dict[str, float]:
    return dict(
        con.execute(
            "SELECT task_id, avg(coalesce(score, 0)) FROM evaluations WHERE eval_id = ? GROUP BY task_id", [eval_id]
        ).fetchall()
    )
