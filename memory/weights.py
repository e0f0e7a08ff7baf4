"""What the documents gain by one term of a BM25 query: `maxscore.Term` over postings in memory or asked for by SQL."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from workbench.memory.arrays import distinct
from workbench.memory.maxscore import Gains, Positions

# Seconds at 1,000,000 documents: to look documents up in postings in memory (once, and for each); of a posting added
# up; read and added up, alone and in windows; and of an array for windows. They decide what is done, not what is found.
LOOK_UP = (5e-6, 7e-8)
_ADD, _READ, _READ_WINDOW, _ZERO_WINDOW = 3e-9, 7e-9, 25e-9, 5e-4
# A term with so many postings is frequent; of all frequent terms together so many are kept (12 to 16 bytes each).
_FREQUENT, _MAX_KEPT = 10_000, 16_000_000
# So many gains are worked out in advance at most.
_MAX_TABLE = 1 << 16
# A term in a document more often than this is looked at to know how much it may gain there.
_SELDOM = 3


class Piece(NamedTuple):
    """Postings of one term, parallel arrays.

    Args:
        positions: of the documents, ascending.
        tf: how often the term counts there.
        lengths: of the documents; None: not at hand.
    """

    positions: Positions
    tf: NDArray
    lengths: NDArray[np.integer] | None = None


class Source(Protocol):
    """The postings of one term."""

    @property
    def df(self) -> int:
        """In how many documents it is."""
        ...

    @property
    def is_in_memory(self) -> bool:
        """No SQL is needed."""
        ...

    def read(self) -> Sequence[Piece]:
        """All postings, no document in two pieces; with those of documents that are gone by now."""
        ...

    def read_at(self, positions: Positions) -> Sequence[Piece]:
        """The postings of the documents at these ascending positions; there may be others among them."""
        ...

    def read_seconds(self) -> float:
        """About what `read` costs."""
        ...

    def read_at_seconds(self) -> tuple[float, float]:
        """About what `read_at` and finding the documents costs: once, and for each document."""
        ...


@dataclass(frozen=True, slots=True)
class Held:
    """Postings in memory."""

    pieces: Sequence[Piece]
    df: int
    is_in_memory: bool = True

    def read(self) -> Sequence[Piece]:
        """See Source."""
        return self.pieces

    def read_at(self, positions: Positions) -> Sequence[Piece]:
        """See Source."""
        return self.pieces

    def read_seconds(self) -> float:
        """See Source."""
        return 0.0

    def read_at_seconds(self) -> tuple[float, float]:
        """See Source."""
        return LOOK_UP


@dataclass(frozen=True, slots=True)
class Norms:
    """K of every document: one value for each length, where lengths are whole numbers, else one for each document."""

    values: NDArray[np.float64]
    lengths: NDArray[np.integer] | None

    def at(self, positions: Positions) -> NDArray[np.float64]:
        """K of the documents at these positions."""
        return self.values.take(positions if self.lengths is None else self.lengths.take(positions))

    def least(self, length: int) -> float:
        """No document that is at least so long has a smaller one."""
        return float(self.values.min() if self.lengths is None else self.values[min(length, len(self.values) - 1)])


class Kept:
    """What documents gain by frequent terms, which cost most to read and come again."""

    def __init__(self) -> None:
        self._gains: dict[Hashable, list[tuple[Positions, Gains]]] = {}
        self._num_kept = 0

    def get(self, key: Hashable) -> list[tuple[Positions, Gains]] | None:
        """What was put in under this key, None if it is not there any more."""
        return self._gains.get(key)

    def put(self, key: Hashable, read: list[tuple[Positions, Gains]]) -> None:
        """Keeps it if it is large, and lets the oldest go where all together becomes too much."""
        size = _num_postings(read)
        if size >= _FREQUENT:
            self._gains[key] = read
            self._num_kept += size
            while self._num_kept > _MAX_KEPT:
                self._num_kept -= _num_postings(self._gains.pop(next(iter(self._gains))))


def _num_postings(read: list[tuple[Positions, Gains]]) -> int:
    return sum(len(positions) for positions, _ in read)


@dataclass(frozen=True, slots=True)
class ScoredTerm:
    """A term of a query under some options: see `maxscore.Term`.

    Args:
        source: its postings.
        count: how often the query says it.
        factor: idf, times (k1 + 1) for okapi.
        norms: K of the documents (of their windows).
        links: positions of the document before each one and of the one after it, len(documents) for none;
            None: no windows.
        share: of the factor; no document gains more, each time the query says the term.
        kept: where what was read stays, by key; None: it does not stay.
    """

    source: Source
    count: int
    factor: float
    norms: Norms
    links: tuple[NDArray[np.int32], NDArray[np.int32]] | None
    share: float
    kept: Kept | None = None
    key: Hashable = None

    @property
    def bound(self) -> float:
        """See maxscore.Term."""
        return self.count * self.factor * self.share

    @property
    def is_in_memory(self) -> bool:
        """See maxscore.Term."""
        return self.source.is_in_memory

    def read(self) -> Iterable[tuple[Positions, Gains]]:
        """See maxscore.Term."""
        read = None if self.kept is None else self.kept.get(self.key)
        if read is None:
            pieces = self.source.read()
            pieces = pieces if self.links is None else [self._windows(pieces)]
            read = [(piece.positions, self._gains_of(piece)) for piece in pieces]
            if self.kept is not None:
                self.kept.put(self.key, read)
        for positions, gains in read:
            yield positions, gains if self.count == 1 else gains * self.count

    def look_up(self, positions: Positions) -> Gains:
        """See maxscore.Term."""
        gains = np.zeros(len(positions))
        if self.links is None:
            tf = tf_at(self.source.read_at(positions), positions)
        else:
            before, after = (link.take(positions) for link in self.links)
            size, wanted = len(self.links[0]), positions
            if not self.source.is_in_memory:
                wanted = distinct(np.concatenate([positions, before, after]))
                wanted = wanted[wanted < size]
            pieces = self.source.read_at(wanted)
            # In the order in which `_windows` adds.
            tf = tf_at(pieces, positions) + tf_at(pieces, after) + tf_at(pieces, before)
        found = np.flatnonzero(tf)
        gains[found] = self._gains_once(self.norms.at(positions[found]), tf[found])
        if self.count != 1:
            gains *= self.count
        return gains

    @property
    def num_affordable(self) -> int:
        """See maxscore.Term."""
        own = _READ * self.source.df if self.links is None else _ZERO_WINDOW + _READ_WINDOW * self.source.df
        if self.kept is not None and (read := self.kept.get(self.key)) is not None:
            own = _ADD * _num_postings(read)
        fixed, each = self.source.read_at_seconds()
        return int(max(self.source.read_seconds() + own - fixed, 0) / (each if self.links is None else 3 * each))

    def _gains_of(self, piece: Piece) -> Gains:
        width, tf = len(self.norms.values), piece.tf
        size = width * (int(tf.max(initial=0)) + 1)
        if self.norms.lengths is None or piece.lengths is None or size > min(len(tf), _MAX_TABLE):
            return self._gains_once(self.norms.at(piece.positions), tf)
        # Lengths and frequencies are few: what is gained by each pair of them is worked out once and looked up.
        tfs = np.arange(size // width, dtype=tf.dtype)
        table = self._gains_once(np.tile(self.norms.values, len(tfs)), np.repeat(tfs, width))
        return table.take(piece.lengths + tf * np.int32(width))

    def _gains_once(self, norms: NDArray[np.float64], tf: NDArray) -> Gains:
        norms += tf
        np.divide(tf, norms, out=norms)
        norms *= self.factor
        return norms

    def _windows(self, pieces: Sequence[Piece]) -> Piece:
        # Every document that has the term or stands beside one that has it, and how often it counts in its window.
        assert self.links is not None
        before, after = self.links
        total = np.zeros(len(before) + 1, np.result_type(np.int32, *(piece.tf.dtype for piece in pieces)))
        pieces = [Piece(piece.positions, piece.tf.astype(total.dtype)) for piece in pieces]
        for positions, tf, _ in pieces:
            total[positions] = tf
        for link in (before, after):
            for positions, tf, _ in pieces:
                np.add.at(total, link.take(positions), tf)
        reached = np.flatnonzero(total[:-1] != 0)  # the last is where those without a neighbour point to
        return Piece(reached, total[reached])


def largest_share(source: Source, norms: Norms, window: bool) -> float:
    """Of what the factor is multiplied with in any document, tf / (tf + K), an upper bound below or equal to 1."""
    if not source.is_in_memory:
        return 1.0
    largest = 0.0
    for positions, tf, _ in source.read():
        most = float(tf.max(initial=0)) * (3 if window else 1)
        if most > _SELDOM and not window:
            # The few documents that hold the term often are long, as a rule, and gain little more by it.
            often = np.flatnonzero(tf > _SELDOM)
            largest = max(largest, float((tf[often] / (tf[often] + norms.at(positions[often]))).max()))
            most = _SELDOM
        largest = max(largest, most / (most + norms.least(int(most))))
    return largest


def tf_at(pieces: Sequence[Piece], positions: Positions) -> NDArray:
    """What the pieces say of the documents at these positions, 0 where they are silent."""
    tf = np.zeros(len(positions), np.result_type(np.int32, *(piece.tf.dtype for piece in pieces)))
    for piece in pieces:
        if len(piece.positions):
            at = np.searchsorted(piece.positions, positions.astype(piece.positions.dtype, copy=False))
            at[at == len(piece.positions)] = 0
            found = np.flatnonzero(piece.positions.take(at) == positions)
            tf[found] = piece.tf.take(at[found])
    return tf
