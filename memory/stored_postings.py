"""Postings of one term, asked for by SQL when a query needs them: all of them, or those of some documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import duckdb
import numpy as np
from numpy.typing import NDArray

from workbench.memory.arrays import fetch
from workbench.memory.maxscore import Positions
from workbench.memory.segments import positions_in
from workbench.memory.weights import LOOK_UP, Piece, Source

_SORTED = "SELECT doc, tf FROM lexical_postings WHERE layer = ? AND term = ?"
_TERMS_AT_ONCE = 40
# Measured at 1,000,000 documents: seconds of a statement, of a posting fetched, of one compared with the documents
# asked for, of one of these.
_STATEMENT, _FETCH, _COMPARE, _ASKED = 6e-4, 9e-9, 2.5e-9, 4e-7


class Stored:
    """See weights.Source; what was read once stays in memory.

    Args:
        term: its hash.
        docs: all documents of the layer, ascending.
        num_sorted: how many postings it has in lexical_postings.
        recent: its postings in lexical_recent.
    """

    def __init__(
        self, con: duckdb.DuckDBPyConnection, layer: int, term: int, docs: NDArray[np.int32], num_sorted: int,
        recent: Piece | None,
    ) -> None:  # fmt: skip
        self.df = num_sorted + (0 if recent is None else len(recent.positions))
        self.is_in_memory = not num_sorted
        self._con, self._layer, self._term, self._docs, self._num_sorted = con, layer, term, docs, num_sorted
        self._recent = [] if recent is None else [recent]
        self._pieces = self._recent

    def read(self) -> Sequence[Piece]:
        """See weights.Source."""
        if not self.is_in_memory:
            self._keep(fetch(self._con, _SORTED, [self._layer, self._term]))
        return self._pieces

    @staticmethod
    def read_together(sources: Sequence[Stored]) -> None:
        """Reads several terms of one layer, in one statement."""
        con, layer = sources[0]._con, sources[0]._layer
        sql = " UNION ALL ".join([_SORTED] * len(sources))
        found = fetch(con, sql, [value for source in sources for value in (layer, source._term)])
        # UNION ALL keeps the order of its parts: their sizes tell them apart.
        bounds = np.cumsum([0, *(source._num_sorted for source in sources)])
        assert bounds[-1] == len(found["doc"]), "lexical_terms does not agree with lexical_postings"
        for source, (start, end) in zip(sources, pairwise(bounds.tolist()), strict=True):
            source._keep({name: column[start:end] for name, column in found.items()})

    def read_at(self, positions: Positions) -> Sequence[Piece]:
        """See weights.Source."""
        if self.is_in_memory:
            return self._pieces
        sql = (
            "SELECT doc, tf FROM lexical_postings JOIN (SELECT unnest(?::INTEGER[]) AS doc) USING (doc)"
            " WHERE layer = ? AND term = ?"
        )
        return self._with_recent(fetch(self._con, sql, [self._docs[positions], self._layer, self._term]))

    def read_seconds(self) -> float:
        """See weights.Source."""
        return 0.0 if self.is_in_memory else _STATEMENT + _FETCH * self._num_sorted

    def read_at_seconds(self) -> tuple[float, float]:
        """See weights.Source."""
        return LOOK_UP if self.is_in_memory else (2 * _STATEMENT + _COMPARE * self._num_sorted, _ASKED)

    def _keep(self, found: dict[str, NDArray]) -> None:
        self._pieces, self.is_in_memory = self._with_recent(found), True

    def _with_recent(self, found: dict[str, NDArray]) -> list[Piece]:
        doc, tf = found["doc"], found["tf"]
        if np.any(doc[1:] < doc[:-1]):
            order = np.argsort(doc)
            doc, tf = doc[order], tf[order]
        positions = positions_in(self._docs, doc)
        for recent in self._recent:  # has a compaction moved them in the meantime?
            if np.any(moved := np.isin(positions, recent.positions)):
                positions, tf = positions[~moved], tf[~moved]
        return [Piece(positions, tf), *self._recent]


def stored(
    con: duckdb.DuckDBPyConnection, layer: int, terms: Sequence[int], docs: NDArray[np.int32], at_once: int
) -> dict[int, Source]:
    """The terms that the layer has. How often is known; their postings are read when they are needed.

    Args:
        docs: all documents of the layer, ascending.
        at_once: terms with no more postings than this are read now, all together, which costs least.
    """
    recent = _recent(con, layer, terms, docs)
    counts = _counts(con, layer, terms)
    known = [term for term in terms if counts.get(term) or term in recent]
    sources = {term: Stored(con, layer, term, docs, counts.get(term, 0), recent.get(term)) for term in known}
    rare = [source for source in sources.values() if source.df <= at_once and not source.is_in_memory]
    for start in range(0, len(rare), _TERMS_AT_ONCE):
        Stored.read_together(rare[start : start + _TERMS_AT_ONCE])
    return dict(sources)


def _recent(
    con: duckdb.DuckDBPyConnection, layer: int, terms: Sequence[int], docs: NDArray[np.int32]
) -> dict[int, Piece]:
    if not con.execute("SELECT 1 FROM lexical_recent WHERE layer = ? LIMIT 1", [layer]).fetchall():
        return {}
    sql = (
        "SELECT number, doc, tf FROM lexical_recent"
        " JOIN (SELECT unnest(?::UBIGINT[]) AS term, unnest(?::INTEGER[]) AS number) USING (term)"
        " WHERE layer = ? ORDER BY number, doc"
    )
    found = fetch(con, sql, [terms, list(range(len(terms))), layer])
    bounds = np.searchsorted(found["number"], np.arange(len(terms) + 1)).tolist()
    return {
        term: Piece(positions_in(docs, found["doc"][start:end]), found["tf"][start:end])
        for term, (start, end) in zip(terms, pairwise(bounds), strict=True)
        if start < end
    }


def _counts(con: duckdb.DuckDBPyConnection, layer: int, terms: Sequence[int]) -> Counter[int]:
    # One comparison for each term, for which zone maps leave a row group or two. Removals are rows of -1.
    counts: Counter[int] = Counter()
    for start in range(0, len(terms), _TERMS_AT_ONCE):
        some = terms[start : start + _TERMS_AT_ONCE]
        sql = " UNION ALL ".join(["SELECT term, df FROM lexical_terms WHERE layer = ? AND term = ?"] * len(some))
        for term, df in con.execute(sql, [value for each in some for value in (layer, each)]).fetchall():
            counts[term] += df
    return counts
