"""Fusion of ranked lists: pure functions over arms, each a pair (docs, scores) of parallel arrays.

An arm may be in any order; all results are sorted by descending score, equal scores by ascending doc.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workbench.memory.arrays import distinct

Docs = NDArray[np.int64]
Scores = NDArray[np.float64]
Arm = tuple[Docs, Scores]

_PERCENTILE_FROM = 10  # shorter lists are divided by their maximum (card 001)


def top(docs: NDArray[np.integer], scores: NDArray[np.floating], n: int | None = None) -> Arm:
    """The n best (None: all), by descending score and, where scores are equal, ascending doc."""
    if n is not None and n < len(docs):
        if n <= 0:
            return np.empty(0, np.int64), np.empty(0, np.float64)
        last = np.partition(scores, len(scores) - n)[len(scores) - n]
        above, equal = np.flatnonzero(scores > last), np.flatnonzero(scores == last)
        missing = n - len(above)
        if missing < len(equal):
            equal = equal[np.argsort(docs[equal], kind="stable")[:missing]]
        chosen = np.concatenate([above, equal])
        docs, scores = docs[chosen], scores[chosen]
    order = np.lexsort((docs, -scores))
    return docs[order].astype(np.int64), scores[order].astype(np.float64)


def best(scores: NDArray[np.floating], n: int | None) -> NDArray[np.intp]:
    """Positions of the n best scores, and of some more: all that are not below a bound that n reach; all for None."""
    if n is None or n >= len(scores):
        return np.arange(len(scores))
    if n <= 0:
        return np.empty(0, np.intp)
    # Of every 16th score, the one that about 2 n of all scores reach: sorting those costs a 16th.
    sample = scores[::16]
    rank = min(2 * n // 16 + 2, len(sample))
    at = np.flatnonzero(scores >= np.partition(sample, len(sample) - rank)[len(sample) - rank])
    return at if len(at) >= n else np.flatnonzero(scores >= np.partition(scores, len(scores) - n)[len(scores) - n])


def reciprocal_rank(arms: Sequence[Arm], k: float = 60.0, weights: Sequence[float] | None = None) -> Arm:
    """Sum over the arms of weight / (k + rank), rank counted from 1.

    Source: Cormack, Clarke, Büttcher 2009, "Reciprocal rank fusion outperforms Condorcet".
    """
    ranked = []
    for docs, scores in arms:
        docs, scores = top(docs, scores)
        ranked.append((docs, 1.0 / (k + np.arange(1, len(docs) + 1))))
    return _total(ranked, weights)


def comb_mnz(arms: Sequence[Arm]) -> Arm:
    """Sum of the arms' normalised scores, times the number of arms that hold the document.

    Each arm is normalised by `normalise_p95`. Source: Fox and Shaw 1994; normalisation of card 001.
    """
    union, table, present = _aligned([(docs, normalise_p95(scores)) for docs, scores in arms])
    return top(union, table.sum(axis=0) * present.sum(axis=0))


def comb_sum(arms: Sequence[Arm], weights: Sequence[float] | None = None) -> Arm:
    """Weighted sum of the arms' min-max normalised scores; a document that an arm lacks gets 0 from it."""
    return _total([(docs, normalise_min_max(scores)) for docs, scores in arms], weights)


def within_layer(keyword: Arm, vector: Arm, weight_keyword: float = 0.6, weight_vector: float = 0.4) -> Arm:
    """Card 001's hybrid of one layer: w_k keyword + w_s vector, each normalised, times 1.2 when in both lists."""
    union, table, present = _aligned([(docs, normalise_p95(scores)) for docs, scores in (keyword, vector)])
    scores = weight_keyword * table[0] + weight_vector * table[1]
    return top(union, scores * np.where(present.all(axis=0), 1.2, 1.0))


def across_layers(
    distilled: Arm, verbatim: Arm, weight_distilled: float = 0.5, weight_verbatim: float = 0.5, boost: float = 1.2
) -> Arm:
    """Card 001's fusion of two layers: weighted sum, times `boost` on the intersection, whose best is then scaled to 1.

    When no document is in both, scores are left as they are.
    """
    union, table, present = _aligned([distilled, verbatim])
    both = present.all(axis=0)
    scores = (weight_distilled * table[0] + weight_verbatim * table[1]) * np.where(both, boost, 1.0)
    best = scores[both].max(initial=0.0)
    return top(union, scores / best if best > 0 else scores)


def normalise_p95(scores: Scores) -> Scores:
    """Scores over their 95th percentile (fewer than 10: their maximum), not above 1; as they are if that is not > 0.

    Source: card 001.
    """
    if not len(scores):
        return scores
    scale = float(np.percentile(scores, 95)) if len(scores) >= _PERCENTILE_FROM else float(scores.max())
    return np.minimum(scores / scale, 1.0) if scale > 0 else np.minimum(scores, 1.0)


def normalise_min_max(scores: Scores) -> Scores:
    """Scores stretched over 0 to 1; all 1 if they are equal."""
    if not len(scores):
        return scores
    low, high = float(scores.min()), float(scores.max())
    return (scores - low) / (high - low) if high > low else np.ones(len(scores))


def _aligned(arms: Sequence[Arm]) -> tuple[Docs, NDArray[np.float64], NDArray[np.bool_]]:
    # The union of the docs, and per arm a row of scores (0 where it lacks the doc) and of presence.
    union = distinct(np.concatenate([docs for docs, _ in arms])) if arms else np.empty(0, np.int64)
    table, present = np.zeros((len(arms), len(union))), np.zeros((len(arms), len(union)), bool)
    for row, (docs, scores) in enumerate(arms):
        at = np.searchsorted(union, docs)
        table[row, at] = scores
        present[row, at] = True
    return union, table, present


def _total(arms: Sequence[Arm], weights: Sequence[float] | None) -> Arm:
    union, table, _ = _aligned(arms)
    return top(union, np.asarray([1.0] * len(arms) if weights is None else weights, np.float64) @ table)
