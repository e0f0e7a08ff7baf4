"""MaxScore: the n best documents of a sum over terms, without adding up the postings of the most frequent terms.

Terms are read from the rarest on. As soon as the terms that are left cannot lift a document that no term has named
above the n-th best score so far, only those documents stay candidates that the terms left can still lift over it, and
the terms left are looked up in these alone. The result is that of adding up everything, to the last bit: every
document's gains are added in the order of the terms, and what a term does not hold gains 0.

Source: Turtle and Flood 1995, "Query evaluation: strategies and optimizations".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from workbench.memory.fusion import best

Positions = NDArray[np.integer]
Gains = NDArray[np.float64]

# Of so many of the most promising documents the whole score is looked up, to learn early what the n-th best will be.
_WATCHED_PER_BEST, _WATCHED_MIN = 2, 100
# How many documents have a score is estimated from every so many-th.
_SAMPLED = 127
# Share of the bounds of the terms left that the n-th best document may gain, as a rule, from them and from being known
# better. A guess that decides only whether to look.
_HOPE = 0.4
# A term that is read in the time of fewer look-ups is read: to think about it would take as long.
_WORTH_A_LOOK = 3_000
# Share of the largest possible score that rounding could change, with room to spare.
_ROUNDING = 1e-9


class Term(Protocol):
    """A term of the query: what each document gains by it."""

    @property
    def bound(self) -> float:
        """No document gains more; > 0."""
        ...

    @property
    def is_in_memory(self) -> bool:
        """Looking up costs time only for the documents that are asked for."""
        ...

    def read(self) -> Iterable[tuple[Positions, Gains]]:
        """All documents that gain, in pieces without a document in common, and their gains."""
        ...

    def look_up(self, positions: Positions) -> Gains:
        """What the documents at these ascending positions gain, 0 where the term is not."""
        ...

    @property
    def num_affordable(self) -> int:
        """About how many documents are looked up in the time that reading and adding up takes."""
        ...


def add_up(terms: Sequence[Term], scores: Gains) -> Gains:
    """Adds to the scores of all documents what they gain."""
    for term in terms:
        for positions, gains in term.read():
            np.add.at(scores, positions, gains)
    return scores


def best_documents(
    terms: Sequence[Term], size: int, n: int, *, allowed: Positions | None = None, blocked: Positions | None = None
) -> tuple[Positions, Gains]:
    """Positions and scores of the n best documents that gain something, in no order, and of more that are no better.

    Args:
        terms: in the order in which gains are added; those that cost most for their bound stand last.
        size: how many documents there are.
        n: > 0.
        allowed: ascending positions of the documents that count, None for all.
        blocked: positions that do not count.
    """
    left = np.cumsum([0.0, *(term.bound for term in reversed(terms))])[::-1]
    slack = _ROUNDING * left[0]
    if allowed is not None and len(allowed) < max(term.num_affordable for term in terms):
        return _look_up(terms, left, slack, 0.0, n, allowed, np.zeros(len(allowed)))
    scores = np.zeros(size)
    if allowed is not None:
        scores.fill(-np.inf)
        scores[allowed] = 0
    if blocked is not None:
        scores[blocked] = -np.inf
    bar = 0.0  # a score that n documents are known to reach
    for number, term in enumerate(terms):
        if number and n < size and term.num_affordable >= _WORTH_A_LOOK:
            sample, rest = scores[::_SAMPLED].copy(), left[number]
            num = len(sample)
            ranks = num - min(1 + term.num_affordable // _SAMPLED, num), num - max(1, n // _SAMPLED)
            sample.partition(ranks)
            # The score down to which there are about as many documents as can be looked up at the cost of reading.
            low = max(float(sample[ranks[0]]), slack)
            if max(bar, float(sample[ranks[1]]) + _HOPE * rest) - rest - slack >= low:
                at = np.flatnonzero(scores >= low)
                some = scores[at]
                bar = max(bar, _reached(terms[number:], n, at, some))
                if (limit := bar - rest - slack) >= low:
                    kept = some >= limit
                    return _look_up(terms[number:], left[number:], slack, bar, n, at[kept], some[kept])
        for positions, gains in term.read():
            np.add.at(scores, positions, gains)
    at = best(scores, n)
    at = at[scores[at] > 0]
    return at, scores[at]


def _reached(terms: Sequence[Term], n: int, at: Positions, scores: Gains) -> float:
    # A score that n of the documents `at` reach in the end, 0 if none is known: the n-th best of their scores so far,
    # or of the whole scores of the most promising ones, where these cost little.
    if len(at) < n:
        return 0.0
    if all(term.is_in_memory for term in terms):
        count = max(_WATCHED_MIN, _WATCHED_PER_BEST * n)
        if len(at) > count:
            some = np.sort(np.argpartition(scores, len(scores) - count)[-count:])
            at, scores = at[some], scores[some]
        for term in terms:
            scores = scores + term.look_up(at)
    return _nth(scores, n)


def _look_up(
    terms: Sequence[Term], left: Gains, slack: float, bar: float, n: int, at: Positions, scores: Gains
) -> tuple[Positions, Gains]:
    # The candidates `at` have these scores before the first of these terms.
    for number, term in enumerate(terms):
        if len(at) > n:
            bar = max(bar, _nth(scores, n))
            kept = scores >= bar - left[number] - slack
            at, scores = at[kept], scores[kept]
        scores = scores + term.look_up(at)
    return at[scores > 0], scores[scores > 0]


def _nth(scores: Gains, n: int) -> float:
    return float(np.partition(scores, len(scores) - n)[len(scores) - n])
