"""Ranking metrics of recall, per query and averaged over queries.

One order counts for all of them: descending score, equal scores by ascending document id (code points). trec_eval
breaks ties by descending id and other libraries by input order, so tied runs differ between libraries (evals.md P3).

Keys name the variant; `@k` looks at the first k results:
    recall@k         relevant documents found / relevant documents
    hit@k            1 if any relevant document is found (also called success@k)
    full_coverage@k  1 if all relevant documents are found
    precision@k      relevant documents found / k, also where fewer than k came back (trec_eval)
    r_precision      precision at the number of relevant documents
    mrr, mrr@k       1 / rank of the first relevant document; 0 without one
    ap, ap@k         mean over the relevant documents of the precision at their ranks (trec_eval)
    ap_mink@k        the same, divided by min(k, relevant documents)
    ndcg, ndcg@k     gain = grade, discount 1 / log2(rank + 1), ideal over all judged documents (trec_eval)
    ndcg_exp, …@k    gain = 2**grade - 1 (Burges et al. 2005)
    ndcg_jk, …@k     gain = grade, discount 1 / max(1, log2(rank)): ranks 1 and 2 count the same (Järvelin and
                     Kekäläinen 2002; what LongMemEval prints as nDCG)
Binary metrics call a document relevant from grade `relevant_from` on; nDCG uses every grade. Unjudged = grade 0.

Verified by: tests/evals/test_metrics.py (against ir-measures and pytrec_eval, and ranx where it is installed).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from workbench.errors import InputError

#: Results of one query: (document id, score), in any order.
Results = Iterable[tuple[str, float]]
#: Grades of one query: document id -> grade >= 0.
Grades = Mapping[str, float]

DEFAULT_METRICS = (
    "mrr", "ndcg@10", "recall@5", "recall@10", "recall@20", "hit@1", "hit@10", "ap@10", "precision@5", "r_precision",
    "full_coverage@10",
)  # fmt: skip
_WITHOUT_K = ("r_precision",)
_WITH_K = ("recall", "hit", "full_coverage", "precision", "ap_mink")
_EITHER = ("mrr", "ap", "ndcg", "ndcg_exp", "ndcg_jk")
_KEY = re.compile(r"([a-z_]+)(?:@([1-9][0-9]*))?")


class Metric(NamedTuple):
    """A parsed key; `k` is None where the whole list counts."""

    name: str
    k: int | None


def parse_metric(key: str) -> Metric:
    """The metric of a key; raises InputError, which lists the keys, for an unknown one."""
    match = _KEY.fullmatch(key)
    name, k = (match[1], int(match[2]) if match[2] else None) if match else (key, None)
    if name in _EITHER or (name in _WITH_K and k) or (name in _WITHOUT_K and k is None):
        return Metric(name, k)
    known = [*(f"{n}@k" for n in _WITH_K), *(f"{n}[@k]" for n in _EITHER), *_WITHOUT_K]
    raise InputError(f"Unknown metric {key!r}. There are {', '.join(known)}, with a whole number from 1 on for k.")


def rank(results: Results) -> list[tuple[str, float]]:
    """The results in the one order that counts: descending score, then ascending id.

    Raises: InputError for a document that comes twice and for a score that is not a number.
    """
    listed = [(doc, float(score)) for doc, score in results]
    seen: set[str] = set()
    for doc, score in listed:
        if doc in seen:
            raise InputError(f"Document {doc!r} comes twice in one result list. Keep its best score only.")
        if math.isnan(score):
            raise InputError(f"The score of document {doc!r} is not a number (nan). Give it a score or leave it out.")
        seen.add(doc)
    return sorted(listed, key=lambda result: (-result[1], result[0]))


class _Found(NamedTuple):
    """What the metrics need of one query: ranks and grades of what was found, all grades, and the binary view."""

    graded: list[tuple[int, float]]
    ideal: list[float]
    relevant_ranks: list[int]
    num_relevant: int


def score_query(
    results: Results, grades: Grades, metrics: Sequence[str] = DEFAULT_METRICS, *, relevant_from: float = 1.0
) -> dict[str, float]:
    """Metric values of one query, by key.

    Args: grades: of the judged documents, at least one of them >= relevant_from; relevant_from: > 0.
    Raises: InputError for unknown keys, duplicate documents, scores or grades that cannot be meant, no relevant one.
    """
    parsed = {key: parse_metric(key) for key in metrics}
    return _values(_find(rank(results), _checked(grades, relevant_from), relevant_from), parsed)


def _checked(grades: Grades, relevant_from: float) -> dict[str, float]:
    if not relevant_from > 0:
        raise InputError(f"relevant_from must be above 0, not {relevant_from}.")
    for doc, grade in grades.items():
        if not (math.isfinite(grade) and grade >= 0):
            raise InputError(f"The grade of document {doc!r} is {grade}; grades are numbers from 0 on.")
    return {doc: float(grade) for doc, grade in grades.items() if grade > 0}


def _find(ordered: list[tuple[str, float]], grades: dict[str, float], relevant_from: float) -> _Found:
    num_relevant = sum(grade >= relevant_from for grade in grades.values())
    if not num_relevant:
        raise InputError(f"No document of the query has grade {relevant_from} or more; no metric is defined for it.")
    graded = [(at, grades[doc]) for at, (doc, _) in enumerate(ordered, 1) if doc in grades]
    ranks = [at for at, grade in graded if grade >= relevant_from]
    return _Found(graded, sorted(grades.values(), reverse=True), ranks, num_relevant)


def _values(found: _Found, parsed: Mapping[str, Metric]) -> dict[str, float]:
    return {key: _value(found, metric) for key, metric in parsed.items()}


def _value(found: _Found, metric: Metric) -> float:
    name, k, total = metric.name, metric.k, found.num_relevant
    if name.startswith("ndcg"):
        return _ndcg(found, name, k)
    if name == "r_precision":
        k = total
    ranks = found.relevant_ranks if k is None else [at for at in found.relevant_ranks if at <= k]
    if name == "mrr":
        return 1 / ranks[0] if ranks else 0.0
    if name in ("ap", "ap_mink"):
        precisions = sum(num / at for num, at in enumerate(ranks, 1))
        return precisions / (min(k, total) if name == "ap_mink" and k else total)
    if name == "hit":
        return float(bool(ranks))
    if name == "full_coverage":
        return float(len(ranks) == total)
    assert k is not None
    return len(ranks) / (k if name == "precision" else total)


def _ndcg(found: _Found, name: str, k: int | None) -> float:
    def dcg(graded: Iterable[tuple[int, float]]) -> float:
        return sum(
            (2**grade - 1 if name == "ndcg_exp" else grade)
            / (max(1.0, math.log2(at)) if name == "ndcg_jk" else math.log2(at + 1))
            for at, grade in graded
            if k is None or at <= k
        )

    return dcg(found.graded) / dcg(enumerate(found.ideal, 1))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Metric values of a run, query by query.

    Args:
        query_ids: the queries that count, ascending; every array of `values` is parallel to it.
        values: metric key -> value per query.
        num_empty: of these, how many got no result at all (they count 0).
        num_tied: of these, how many have equal scores on documents of different grade, so that only the order by id
            decides their values.
        num_judged_empty: queries without a relevant document; they are left out, not counted as 0.
        num_unjudged: queries of the run that have no judgements; they are left out.
    """

    query_ids: tuple[str, ...]
    values: dict[str, NDArray[np.float64]]
    num_empty: int
    num_tied: int
    num_judged_empty: int
    num_unjudged: int

    def means(self, query_ids: Iterable[str] | None = None) -> dict[str, float]:
        """Mean over the queries (None: all) of each metric; raises InputError for unknown queries or none."""
        where = {query: at for at, query in enumerate(self.query_ids)}
        wanted = list(self.query_ids if query_ids is None else query_ids)
        unknown = [query for query in wanted if query not in where]
        if unknown or not wanted:
            raise InputError(f"No value for query {unknown[0]!r}." if unknown else "A mean needs at least one query.")
        at = [where[query] for query in wanted]
        return {key: math.fsum(values[at].tolist()) / len(at) for key, values in self.values.items()}

    def as_json(self) -> dict[str, Any]:
        """Means and counts."""
        names = ("num_empty", "num_tied", "num_judged_empty", "num_unjudged")
        return {"means": self.means(), "num_queries": len(self.query_ids)} | {n: getattr(self, n) for n in names}


def evaluate(
    run: Mapping[str, Results],
    judgements: Mapping[str, Grades],
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    relevant_from: float = 1.0,
) -> Evaluation:
    """Metric values of every judged query.

    Args: run: query id -> results, an empty list where nothing was found; judgements: query id -> grades.
    Raises: InputError as `score_query` does, with the query's id; also if the run lacks a judged query (a query that
        was not run must not pass for one that found nothing) and if no query has a relevant document.
    """
    parsed = {key: parse_metric(key) for key in metrics}
    counted = sorted(q for q, grades in judgements.items() if any(g >= relevant_from for g in grades.values()))
    if not counted:
        raise InputError(f"None of the {len(judgements)} queries has a relevant document.")
    if missing := [query for query in counted if query not in run]:
        raise InputError(
            f"The run lacks {len(missing)} of {len(counted)} judged queries, the first is {missing[0]!r}. "
            "Run them, or give them an empty list if nothing was found."
        )
    columns: dict[str, list[float]] = {key: [] for key in parsed}
    num_empty = num_tied = 0
    for query in counted:
        try:
            ordered, grades = rank(run[query]), _checked(judgements[query], relevant_from)
            values = _values(_find(ordered, grades, relevant_from), parsed)
        except InputError as e:
            raise InputError(f"Query {query!r}: {e}") from e
        num_empty += not ordered
        num_tied += _is_tied(ordered, grades)
        for key, value in values.items():
            columns[key].append(value)
    return Evaluation(
        query_ids=tuple(counted),
        values={key: np.array(column) for key, column in columns.items()},
        num_empty=num_empty,
        num_tied=num_tied,
        num_judged_empty=len(judgements) - len(counted),
        num_unjudged=sum(query not in judgements for query in run),
    )


def _is_tied(ordered: list[tuple[str, float]], grades: Mapping[str, float]) -> bool:
    return any(
        a_score == b_score and grades.get(a, 0.0) != grades.get(b, 0.0)
        for (a, a_score), (b, b_score) in pairwise(ordered)
    )


def paired(a: Evaluation, b: Evaluation, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One metric of two runs, query by query, for a paired test.

    Raises: InputError if they are not over the same queries (an inner join would hide what one of them failed on) or
        one lacks the metric.
    """
    if a.query_ids != b.query_ids:
        only = sorted(set(a.query_ids) ^ set(b.query_ids))
        raise InputError(
            f"The two runs differ in {len(only)} queries, for example {only[0]!r}. Compare runs over the same queries."
        )
    for evaluation in (a, b):
        if key not in evaluation.values:
            raise InputError(f"A run has no metric {key!r}; it has {', '.join(evaluation.values)}.")
    return a.values[key], b.values[key]
