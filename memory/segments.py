"""What a BM25 index holds in memory: postings by position of the document, and which documents stand beside which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from workbench.memory.postings import Postings


class Segment:
    """Postings in memory, by position of the document, found by term.

    Args: parts: postings by ascending term, and the position of each one's document.
    """

    def __init__(self, parts: Iterable[tuple[Postings, NDArray]]) -> None:
        none = np.empty(0, np.int32)
        columns = [(none.astype(np.uint64), none, none, none.astype(np.uint8), none.astype(np.uint8))]
        for found, positions in parts:
            is_same = found.term[1:] == found.term[:-1]
            if np.any(is_same & (positions[1:] < positions[:-1])):
                order = np.lexsort((positions, found.term))
                found, positions = Postings(*(column[order] for column in found)), positions[order]
            starts = np.flatnonzero(np.append(True, ~is_same)[: len(found.term)])
            counts = np.diff(np.append(starts, len(found.term)))
            columns.append((found.term[starts], counts, positions, _narrow(found.tf), _narrow(found.tf_user)))
        self.terms, counts, self.positions, self.tf, self.tf_user = map(np.concatenate, zip(*columns, strict=True))
        self.bounds = np.concatenate([[0], np.cumsum(counts)])
        self.lengths: NDArray[np.integer] | None = None

    def note_lengths(self, lengths: NDArray[np.integer]) -> None:
        """Puts the length of its document beside every posting, given the lengths by position."""
        if self.lengths is None:
            self.lengths = _narrow(lengths).take(self.positions)

    def find(self, term: int) -> tuple[NDArray, NDArray, NDArray, NDArray | None] | None:
        """The term's postings (ascending positions, tf, tf_user, lengths), None if it has none here."""
        at = int(np.searchsorted(self.terms, np.uint64(term)))
        if at == len(self.terms) or int(self.terms[at]) != term:
            return None
        part = slice(int(self.bounds[at]), int(self.bounds[at + 1]))
        lengths = None if self.lengths is None else self.lengths[part]
        return self.positions[part], self.tf[part], self.tf_user[part], lengths


def merged(segments: Sequence[Segment]) -> Segment:
    """One segment with the postings of several."""
    term = np.concatenate([np.repeat(segment.terms, np.diff(segment.bounds)) for segment in segments])
    order = np.argsort(term, kind="stable")
    positions, tf, tf_user = (
        np.concatenate([getattr(segment, name) for segment in segments])[order]
        for name in ("positions", "tf", "tf_user")
    )
    return Segment([(Postings(term[order], positions, tf, tf_user), positions)])


def positions_in(docs: NDArray[np.int32], wanted: NDArray[np.integer]) -> NDArray[np.int32]:
    """Where each wanted doc stands in the ascending docs; of one that is not there, anything, beyond both ends too."""
    if len(docs) and int(docs[-1]) - int(docs[0]) + 1 == len(docs):
        return wanted - docs[0]  # numbers without a gap need no search
    return np.searchsorted(docs, wanted).astype(np.int32)


def known_positions(
    docs: NDArray[np.int32], wanted: NDArray[np.integer], order: NDArray[np.integer] | None
) -> tuple[NDArray[np.integer], NDArray[np.bool_]]:
    """Positions of those wanted docs that are there, and which these are.

    Args: order: the positions to be searched, by ascending doc; None if docs ascend.
    """
    ascending = docs if order is None else docs[order]
    at = positions_in(ascending, wanted)
    is_known = (at >= 0) & (at < len(ascending))
    is_known[is_known] = ascending[at[is_known]] == wanted[is_known]
    return (at[is_known] if order is None else order[at[is_known]]), is_known


def neighbours(
    docs: NDArray[np.int32], back: NDArray[np.int32], alive: NDArray[np.bool_] | None, order: NDArray | None
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Positions of the document before each one and of the one after it in its thread; len(docs) where there is none.

    Args:
        back: each doc's number minus that of the doc before it, 0 if there is none.
        alive: which documents count, None for all.
        order: positions of these by ascending doc, None if docs ascend.
    """
    linked = np.flatnonzero(back if alive is None else np.where(alive, back, 0)).astype(np.int32)
    target, is_known = known_positions(docs, docs[linked] - back[linked], order)
    linked = linked[is_known]
    before, after = (np.full(len(docs), len(docs), np.int32) for _ in range(2))
    # Were two documents to name the same one before them, the later of the two is its neighbour.
    after[target] = linked
    kept = after[target] == linked
    before[linked[kept]] = target[kept]
    return before, after


def _narrow(values: NDArray) -> NDArray:
    return values.astype(np.min_scalar_type(int(values.max(initial=0))), copy=False)
