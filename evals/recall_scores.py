"""From stored answers to scores: metrics with intervals for every run, and paired comparisons with a baseline.

Failed queries count 0 in `mean` and are left out of `completed`; both are always given (evals.md P5). Intervals and the
sign-flip test resample whole clusters (conversations, sessions) where a task has them: queries of one are not
independent (P12). Nothing here depends on time or on the order of rows.

Verified by: tests/evals/test_recall_report.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from workbench.data.store import Store
from workbench.errors import InputError
from workbench.evals import stats
from workbench.evals.metrics import Evaluation, evaluate, paired
from workbench.evals.recall_run import StorePath
from workbench.evals.tasks.base import Query, RecallTask, judgements
from workbench.memory.tokens import count_tokens

METRICS = ("mrr", "ndcg@10", "recall@10", "hit@10", "full_coverage@10")
#: What runs are compared by.
COMPARED = ("mrr", "ndcg@10")
#: Hits that are shown, and whose tokens are counted where there is no budget.
SHOWN = 10
_LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Answer:
    """What one query got. `hits` are the first SHOWN; `ranks` has every relevant document that came back, by its rank
    before the budget; `num_within` hits are within the budget.
    """

    status: str
    error: str | None
    hits: list[tuple[str, float]]
    ranks: dict[str, int]
    num_within: int


@dataclass(frozen=True, slots=True)
class Scored:
    """A run, scored.

    Args:
        is_verbatim: what it returns are the documents' own texts (at least 99 of 100 hits have as many tokens).
        tokens: mean over the answered queries of the tokens of the first SHOWN hits, or of those within the budget.
        compression: tokens of these hits' documents / tokens returned for them; None if nothing came back.
        build_seconds, query_ms, query_ms_p95: CPU.
    """

    name: str
    run_id: str
    fingerprint: str
    packages: dict[str, str]
    created_at: int
    evaluation: Evaluation
    completed: dict[str, float] | None
    intervals: dict[str, stats.Interval]
    answers: dict[str, Answer]
    is_verbatim: bool
    tokens: float
    compression: float | None
    index_bytes: int
    num_unindexed: int
    build_seconds: float
    query_ms: float
    query_ms_p95: float

    def statuses(self) -> dict[str, int]:
        """How many queries ended how."""
        return dict(sorted(Counter(answer.status for answer in self.answers.values()).items()))

    def first_error(self) -> str | None:
        """What the first failed query, by id, says."""
        failed = sorted(query for query, answer in self.answers.items() if answer.status != "ok")
        return self.answers[failed[0]].error if failed else None

    def as_json(self, times: bool) -> dict[str, Any]:
        """Everything but the answers; figures rounded to 6 digits."""
        metrics = {
            key: {
                "mean": _rounded(interval.estimate), "low": _rounded(interval.low), "high": _rounded(interval.high),
                "completed": _rounded(self.completed[key]) if self.completed else None,
            }
            for key, interval in self.intervals.items()
        }  # fmt: skip
        found: dict[str, Any] = {
            "name": self.name, "run_id": self.run_id, "fingerprint": self.fingerprint, "metrics": metrics,
            "statuses": self.statuses(), "first_error": self.first_error(), "is_verbatim": self.is_verbatim,
            "num_empty": self.evaluation.num_empty, "num_tied": self.evaluation.num_tied,
            "tokens": _rounded(self.tokens), "compression": _rounded(self.compression),
            "index_bytes": self.index_bytes, "num_unindexed": self.num_unindexed,
        }  # fmt: skip
        if times:
            found["times"] = {
                "created_at": self.created_at, "build_seconds": _rounded(self.build_seconds),
                "query_ms": _rounded(self.query_ms), "query_ms_p95": _rounded(self.query_ms_p95),
            }  # fmt: skip
        return found


@dataclass(frozen=True, slots=True)
class Stored:
    """A run as the store has it; `rows` are (query, status, error, docs, scores, tokens, ms) by query id."""

    run_id: str
    name: str
    fingerprint: str
    packages: dict[str, str]
    created_at: int
    rows: list[tuple[Any, ...]]
    build_seconds: float
    index_bytes: int
    num_unindexed: int


def fetch(path: StorePath, run_id: str) -> Stored:
    """Reads a run; the store is open only meanwhile."""
    with Store(path) as store:
        head = store.con.execute(
            "SELECT retriever, retriever_fingerprint, packages::VARCHAR, epoch_us(created_at) FROM eval_runs "
            "WHERE run_id = ?", [run_id]
        ).fetchall()[0]  # fmt: skip
        rows = store.con.execute(
            "SELECT query_id, status, error, docs, scores, tokens, cpu_ms FROM eval_results WHERE run_id = ? "
            "QUALIFY row_number() OVER (PARTITION BY query_id ORDER BY attempt DESC) = 1 ORDER BY query_id", [run_id]
        ).fetchall()  # fmt: skip
        ((seconds, size, lost),) = store.con.execute(
            "SELECT coalesce(sum(cpu_seconds), 0), coalesce(sum(index_bytes), 0), coalesce(sum(num_unindexed), 0) "
            "FROM eval_builds WHERE run_id = ?", [run_id]
        ).fetchall()  # fmt: skip
    return Stored(run_id, head[0], head[1], orjson.loads(head[2]), head[3], rows, float(seconds), int(size), int(lost))


def score(
    stored: Stored, task: RecallTask, queries: Sequence[Query], document_tokens: dict[str, int],
    budget: int | None = None,
) -> Scored:  # fmt: skip
    """Scores a run.

    Args:
        document_tokens: of `tokens_of(task)`.
        budget: tokens; a list ends before the hit that would exceed it. A first hit that exceeds it alone is kept, as
            if cut to the budget.
    Raises: InputError if the run lacks a query.
    """
    by_id = {query.id: query for query in queries}
    verbatim = _Verbatim(document_tokens)
    run: dict[str, list[tuple[str, float]]] = {}
    answers: dict[str, Answer] = {}
    returned: list[int] = []
    for query_id, status, error, docs, scores, tokens, _ in stored.rows:
        if query_id not in by_id:
            continue
        within, counted = _within(tokens, budget)
        run[query_id] = list(zip(docs[:within], scores[:within], strict=True))
        ranks = {doc: at for at, doc in enumerate(docs, 1) if doc in by_id[query_id].relevance}
        answers[query_id] = Answer(status, error, run[query_id][:SHOWN], ranks, within)
        if status == "ok":
            returned.append(counted)
            verbatim.look(docs, tokens, within if budget is not None else min(within, SHOWN))
    evaluation = evaluate(run, judgements(queries), METRICS, relevant_from=task.relevant_from)
    good = [query for query in evaluation.query_ids if answers[query].status == "ok"]
    clusters = clusters_of(evaluation, by_id)
    times = [row[6] for row in stored.rows if row[1] == "ok"] or [0.0]
    return Scored(
        name=stored.name, run_id=stored.run_id, fingerprint=stored.fingerprint, packages=stored.packages,
        created_at=stored.created_at, evaluation=evaluation, completed=evaluation.means(good) if good else None,
        intervals={key: interval(values, clusters) for key, values in evaluation.values.items()}, answers=answers,
        is_verbatim=verbatim.holds(), tokens=math.fsum(returned) / max(1, len(returned)),
        compression=verbatim.compression(), index_bytes=stored.index_bytes,
        num_unindexed=stored.num_unindexed, build_seconds=stored.build_seconds,
        query_ms=math.fsum(times) / len(times), query_ms_p95=float(np.percentile(times, 95)),
    )  # fmt: skip


def tokens_of(task: RecallTask) -> dict[str, int]:
    """Document id -> tokens of its text."""
    return {document.id: count_tokens(document.text) for document in task.documents}


class _Verbatim:
    """Compares the tokens that were returned with those of the documents themselves."""

    def __init__(self, document_tokens: dict[str, int]) -> None:
        self._tokens = document_tokens
        self.num_hits = self.num_same = self.of_documents = self.returned = 0

    def look(self, docs: list[str], tokens: list[int], num: int) -> None:
        for doc, count in zip(docs[:num], tokens[:num], strict=True):
            self.num_hits += 1
            self.num_same += count == self._tokens[doc]
            self.of_documents += self._tokens[doc]
            self.returned += count

    def holds(self) -> bool:
        return self.num_hits > 0 and self.num_same >= 0.99 * self.num_hits

    def compression(self) -> float | None:
        return self.of_documents / self.returned if self.returned else None


def _within(tokens: list[int], budget: int | None) -> tuple[int, int]:
    """How many hits are within the budget, and the tokens that are counted."""
    if budget is None:
        return len(tokens), sum(tokens[:SHOWN])
    total = 0
    for at, count in enumerate(tokens):
        if total + count > budget:
            return (1, budget) if at == 0 else (at, total)
        total += count
    return len(tokens), total


def clusters_of(evaluation: Evaluation, queries: dict[str, Query]) -> list[Hashable] | None:
    """The cluster of each evaluated query; None if no query shares one with another."""
    found: list[Hashable] = [(queries[q].cluster, "") if queries[q].cluster else ("", q) for q in evaluation.query_ids]
    return found if 1 < len(set(found)) < len(found) else None


def interval(
    values: NDArray[np.float64], clusters: list[Hashable] | None, level: float = _LEVEL, is_difference: bool = False
) -> stats.Interval:
    """Interval of a mean score, or of a mean difference; for a single query, which has none, the mean itself."""
    if len(values) < 2:
        return stats.Interval(float(values[0]), float(values[0]), float(values[0]), level, 1, "none: one query")
    found = stats.bootstrap_mean if is_difference else stats.score_interval
    tail = (1 - level) / 2
    return found(values, clusters, level=level, num_resamples=max(10_000, math.ceil(10 / tail)))


# --- comparisons ------------------------------------------------------------------------------------------------------


def pick_baseline(runs: Sequence[Scored], metric: str, named: str | None = None) -> Scored:
    """The named run, else the best by this metric of those that return verbatim text, else the best of all.

    Raises: InputError for a name that no run has.
    """
    if named is not None:
        for run in runs:
            if run.name == named:
                return run
        raise InputError(f"The baseline {named!r} is none of the runs: {', '.join(run.name for run in runs)}.")
    candidates = [run for run in runs if run.is_verbatim] or list(runs)
    return min(candidates, key=lambda run: (-run.intervals[metric].estimate, run.name))


def compare(
    runs: Sequence[Scored], queries: Sequence[Query], metric: str, baseline_name: str | None = None
) -> dict[str, Any]:
    """Every run against the baseline by one metric; p is corrected for the number of these comparisons.

    `is_one_cluster`: all queries are of one cluster, so that there is nothing to resample but the queries in it.
    """
    baseline, by_id = pick_baseline(runs, metric, baseline_name), {query.id: query for query in queries}
    others = [run for run in runs if run is not baseline]
    ids, clusters = baseline.evaluation.query_ids, clusters_of(baseline.evaluation, by_id)
    named = {by_id[id].cluster for id in ids}
    rows = [_compared(run, baseline, metric, clusters, len(others)) for run in others]
    if rows:
        raw = [row["p"] for row in rows]
        for row, holm, bonferroni in zip(rows, stats.holm(raw), stats.bonferroni(raw), strict=True):
            row["p_holm"], row["p_bonferroni"] = _rounded(float(holm)), _rounded(float(bonferroni))
    return {
        "metric": metric, "baseline": baseline.name, "chosen": "named" if baseline_name else
        "best verbatim" if baseline.is_verbatim else "best (none returns verbatim text)",
        "num_comparisons": len(others), "num_clusters": len(set(clusters)) if clusters else None,
        "is_one_cluster": len(ids) > 1 and len(named) == 1 and "" not in named,
        "rows": rows,
    }  # fmt: skip


def _compared(
    run: Scored, baseline: Scored, metric: str, clusters: list[Hashable] | None, num_comparisons: int
) -> dict[str, Any]:
    ours, theirs = paired(run.evaluation, baseline.evaluation, metric)
    difference = ours - theirs
    is_enough = len(difference) > 1
    plain = interval(difference, clusters, is_difference=True)
    corrected = interval(difference, clusters, 1 - (1 - _LEVEL) / num_comparisons, is_difference=True)
    by_query = stats.paired_randomisation(ours, theirs)
    by_cluster = by_query
    if clusters:
        number: dict[Hashable, int] = {}
        sums = np.bincount([number.setdefault(cluster, len(number)) for cluster in clusters], difference)
        by_cluster = stats.paired_randomisation(sums, np.zeros(len(sums)))
    wins, losses = int(np.sum(np.round(difference, 12) > 0)), int(np.sum(np.round(difference, 12) < 0))
    return {
        "name": run.name, "difference": _rounded(plain.estimate), "low": _rounded(plain.low),
        "high": _rounded(plain.high), "low_corrected": _rounded(corrected.low),
        "high_corrected": _rounded(corrected.high), "p": by_cluster.p, "p_by_query": by_query.p,
        "d_z": _rounded(stats.cohens_d_z(ours, theirs)) if is_enough else None, "wins": wins,
        "ties": len(difference) - wins - losses, "losses": losses, "num_tied_scores": run.evaluation.num_tied,
        "smallest_detectable": _smallest(difference, num_comparisons),
    }  # fmt: skip


def _smallest(difference: NDArray[np.float64], num_comparisons: int) -> float | None:
    """The smallest mean difference that so many queries show with power 0.8 after Bonferroni; None if unknowable."""
    if len(difference) < 2 or not (sd := float(difference.std(ddof=1))):
        return None
    try:
        return _rounded(stats.smallest_difference(len(difference), sd, alpha=0.05 / num_comparisons))
    except InputError:  # too few queries for any statement
        return None


def _rounded(value: float | None) -> float | None:
    if value is None:
        return None
    return round(value, 6) if math.isfinite(value) else None


def by_category(runs: Sequence[Scored], queries: Sequence[Query]) -> list[dict[str, Any]]:
    """Means of the compared metrics of every run for each category; nothing for a task without categories."""
    found: list[dict[str, Any]] = []
    for category in sorted({query.category for query in queries}):
        chosen = {query.id for query in queries if query.category == category}
        ids = [query for query in runs[0].evaluation.query_ids if query in chosen]
        if ids:
            means = {run.name: run.evaluation.means(ids) for run in runs}
            rows = {name: {key: _rounded(values[key]) for key in COMPARED} for name, values in means.items()}
            found.append({"category": category or "(none)", "num_queries": len(ids), "runs": rows})
    return found if len(found) > 1 or any(row["category"] != "(none)" for row in found) else []
