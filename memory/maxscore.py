"""MaxScore: the n best documents of a sum over terms, without adding up the postings of the most frequent terms.

Terms are read from the rarest on. As soon as the terms that are left cannot lift a document that no term has named
above the n-th best score so far, only those documents stay candidates that the terms left can still lift over it, and
the terms left are looked up in these alone. The result is that of adding up everything, to the last bit: every
document's gains are added in the order of the terms, and what a term does not hold gains 0.
Terms in memory are treated so range by range of the documents; the n-th best score found so far holds for the next one.

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
_WORTH_A_LOOK = 1_000
# Documents in memory are looked at by ranges of so many, whose scores stay in the CPU's cache (1.6 MB); what the first
# ranges have found tells soon which documents of the next ones are not worth a look.
_RANGE = 200_000
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


def best_documents(
    terms: Sequence[Term], size: int, n: int, *, allowed: Positions | None = None, blocked: Positions | None = None
) -> tuple[Positions, Gains]:
    """Positions and scores of the n best documents that gain something, in no order, and of more that are no better.

    Args:
        terms: in the order in which gains are added; those that cost most for their bound stand last.
        size: how many documents there are.
        n: > 0.
        allowed: ascending positions of the documents that count, None for all.
        blocked: ascending positions that do not count.
    """
    left = np.cumsum([0.0, *(term.bound for term in reversed(terms))])[::-1]
    slack = _ROUNDING * left[0]
    if allowed is not None and len(allowed) < max(term.num_affordable for term in terms):
        return _look_up(terms, left, slack, 0.0, n, allowed, np.zeros(len(allowed)))
    # A statement for each range would cost more than the ranges save.
    length = _RANGE if all(term.is_in_memory for term in terms) else size
    parts = _Parts(terms)
    buffer, bar = np.empty(min(length, size)), 0.0  # the bar: a score that n documents are known to reach
    found_at, found = np.empty(0, np.int64), np.empty(0)
    for start in range(0, size, length):
        end = min(start + length, size)
        scores = buffer[: end - start]
        scores.fill(0.0 if allowed is None else -np.inf)
        if allowed is not None:
            scores[_between(allowed, start, end) - start] = 0
        if blocked is not None:
            scores[_between(blocked, start, end) - start] = -np.inf
        at, some = _best_in_range(terms, parts, left, slack, bar, n, scores, start, (end - start) / size)
        found_at, found = np.concatenate([found_at, at]), np.concatenate([found, some])
        if len(found) >= n:
            bar = max(bar, _nth(found, n))
    return found_at, found


class _Parts:
    """Takes out of what each term's documents gain what concerns a range of positions; a term is read once."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self._terms = terms
        self._read: dict[int, list[tuple[Positions, Gains]]] = {}

    def add(self, number: int, scores: Gains, start: int) -> None:
        """Adds the gains of a term to the scores of the documents from start on."""
        if number not in self._read:
            self._read[number] = list(self._terms[number].read())
        for positions, gains in self._read[number]:
            low, high = np.searchsorted(positions, np.array([start, start + len(scores)], positions.dtype))
            np.add.at(scores, positions[low:high] - positions.dtype.type(start), gains[low:high])


def _between(positions: Positions, start: int, end: int) -> Positions:
    low, high = np.searchsorted(positions, (start, end))
    return positions[low:high]


def _best_in_range(
    terms: Sequence[Term], parts: _Parts, left: Gains, slack: float, bar: float, n: int, scores: Gains, start: int,
    share: float,
) -> tuple[Positions, Gains]:  # fmt: skip
    # Of the documents from start on, whose scores begin as given: those that can be among the n best of all.
    for number, term in enumerate(terms):
        num_affordable = int(share * term.num_affordable)
        if number and n < len(scores) and num_affordable >= _WORTH_A_LOOK:
            sample, rest = scores[::_SAMPLED].copy(), left[number]
            num = len(sample)
            ranks = num - min(1 + num_affordable // _SAMPLED, num), num - max(1, n // _SAMPLED)
            sample.partition(ranks)
            # The score down to which there are about as many documents as can be looked up at the cost of reading.
            low = max(float(sample[ranks[0]]), slack)
            if max(bar, float(sample[ranks[1]]) + _HOPE * rest) - rest - slack >= low:
                at = np.flatnonzero(scores >= max(low, bar - rest - slack))
                some = scores[at]
                if bar - rest - slack < low:
                    bar = max(bar, _reached(terms[number:], n, at + start, some))
                if (limit := bar - rest - slack) >= low:
                    kept = some >= limit
                    return _look_up(terms[number:], left[number:], slack, bar, n, at[kept] + start, some[kept])
        parts.add(number, scores, start)
    at = np.flatnonzero(scores >= bar) if bar else best(scores, n)
    at = at[scores[at] > 0]
    return at + start, scores[at]


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
