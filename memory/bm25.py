"""BM25 over the postings in DuckDB: `ColdBm25` asks them by SQL, `WarmBm25` holds them in memory.

score(d) = sum over the query's terms, repetitions counted, of idf(t) * tf(t, d) * (k1 + 1) / (tf(t, d) + K(d)),
K(d) = k1 * (1 - b + b * length(d) / mean length).

okapi: idf = ln(N - df + 1/2) - ln(df + 1/2); a negative one is replaced by epsilon times the mean idf of all terms.
       Equals rank_bm25.BM25Okapi.
lucene: idf = ln(1 + (N - df + 1/2) / (df + 1/2)), without the factor (k1 + 1). Equals bm25s with method="lucene".
Source: Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework"; Kamphuis et al. 2020.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import duckdb
import numpy as np
from numpy.typing import NDArray

from workbench.errors import NotFound
from workbench.memory import postings as index
from workbench.memory.fusion import Arm, top
from workbench.memory.postings import Documents, Layer, Postings

# A warm index is read anew when more than these documents have changed.
_CHANGED_SHARE, _CHANGED_MIN = 0.1, 1_000
_MAX_SEGMENTS = 8
_EMPTY = np.empty(0, np.int32)
Piece = tuple[int, NDArray, NDArray, NDArray]  # term, positions of documents, tf, tf_user
Found = tuple[NDArray[np.int32], NDArray[np.float64]]  # positions of documents, term frequencies


@dataclass(frozen=True, kw_only=True, slots=True)
class Bm25Options:
    """How documents are scored.

    Args:
        variant, k1, b, epsilon: as in the module's headnote; epsilon is for okapi.
        weight_user, weight_assistant: the role prior, >= 0: how often a term in that role's words counts, in term
            frequencies and lengths alike (1, 1: plain BM25; a weight of 0 leaves the role's words out).
        window: a document is read together with its neighbours, the document before and the one after it in its
            thread; df and the mean idf stay those of single documents.
    """

    variant: Literal["okapi", "lucene"] = "okapi"
    k1: float = 1.5
    b: float = 0.75
    epsilon: float = 0.25
    weight_user: float = 1.0
    weight_assistant: float = 1.0
    window: bool = False


DEFAULT = Bm25Options()


class _Bm25:
    """Scoring; the subclasses say where postings come from. Sees what its connection sees at the time of a search."""

    def __init__(self, con: duckdb.DuckDBPyConnection, layer: str) -> None:
        self._con, self._name = con, layer
        self._layer: Layer | None = None
        self._documents = Documents(
            _EMPTY, _EMPTY, _EMPTY, _EMPTY, _EMPTY
        )  # by position; warm ones not in order of doc
        self._alive: NDArray[np.bool_] | None = None  # None: all
        self._cache: dict[object, NDArray[np.float64] | float] = {}
        self._links: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None

    def attach(self, con: duckdb.DuckDBPyConnection) -> None:
        """Look through this connection to the same store from now on; what is in memory stays."""
        self._con = con

    def __len__(self) -> int:
        self.refresh()
        return self._count

    def refresh(self) -> None:
        """Take in what changed in the layer since the last look; every search begins with it (0.3 ms)."""
        layer = index.find_layer(self._con, self._name)
        if layer is None:
            raise NotFound(f"the store has no index of layer {self._name!r}: run `workbench distill` or `ingest` first")
        if self._layer is None or layer.revision != self._layer.revision:
            self._load(layer)
            self._layer = layer
            self._cache.clear()
            self._links = None

    def search(
        self,
        query: str,
        n: int | None = None,
        *,
        allowed: NDArray[np.integer] | None = None,
        options: Bm25Options = DEFAULT,
    ) -> Arm:
        """The documents that hold a term of the query, best first, equal scores by ascending doc.

        Args:
            query: text, for the layer's own tokenizer.
            n: at most so many; None for all.
            allowed: only these docs (statistics stay those of the whole layer); None for all.

        Returns: (docs, scores), parallel arrays.

        Raises: NotFound if the layer has no index.
        """
        self.refresh()
        assert self._layer is not None
        if not self._count:
            return top(_EMPTY, np.empty(0), n)
        terms = Counter(self._layer.tokenizer.hashes(query))
        scores, matched = np.zeros(len(self._documents.doc)), np.zeros(len(self._documents.doc), bool)
        norm = self._norm(options)
        found = self._postings(terms, options)
        for term in [term for term in terms if term in found]:
            positions, tf = found[term]
            idf = self._idf(len(positions), options) * terms[term]
            if options.window:
                positions, tf = self._windowed(positions, tf)
            gain = tf / (tf + norm[positions])
            scores[positions] += idf * ((options.k1 + 1) * gain if options.variant == "okapi" else gain)
            matched[positions] = True
        at = np.flatnonzero(matched)
        docs = self._documents.doc[at]
        if allowed is not None:
            keep = np.isin(docs, allowed)
            at, docs = at[keep], docs[keep]
        return top(docs, scores[at], n)

    def _load(self, layer: Layer) -> None:
        raise NotImplementedError

    def _find(self, terms: Counter[int]) -> list[Piece]:
        # A term may come in several pieces.
        raise NotImplementedError

    @property
    def _count(self) -> int:
        return len(self._documents.doc) if self._alive is None else int(np.count_nonzero(self._alive))

    def _postings(self, terms: Counter[int], options: Bm25Options) -> dict[int, Found]:
        pieces: dict[int, list[Found]] = {}
        for term, positions, tf, tf_user in self._find(terms) if terms else []:
            if self._alive is not None:
                keep = self._alive[positions]
                positions, tf, tf_user = positions[keep], tf[keep], tf_user[keep]
            weighted = _by_role(tf, tf_user, options)
            if not (options.weight_user and options.weight_assistant):
                positions, weighted = positions[weighted > 0], weighted[weighted > 0]
            if len(positions):
                pieces.setdefault(term, []).append((positions, weighted))
        return {term: _joined(found) for term, found in pieces.items()}

    def _idf(self, df: int, options: Bm25Options) -> float:
        count = self._count
        if options.variant == "lucene":
            return float(np.log1p((count - df + 0.5) / (df + 0.5)))
        idf = float(np.log(count - df + 0.5) - np.log(df + 0.5))
        return idf if idf >= 0 else options.epsilon * self._mean_idf()

    def _mean_idf(self) -> float:
        if "mean idf" not in self._cache:
            assert self._layer is not None
            df, terms = index.df_histogram(self._con, self._layer.id)
            idf = np.log(self._count - df + 0.5) - np.log(df + 0.5)
            self._cache["mean idf"] = float(idf @ terms / terms.sum())
        return self._cache["mean idf"]  # type: ignore[return-value]

    def _norm(self, options: Bm25Options) -> NDArray[np.float64]:
        key = (options.k1, options.b, options.weight_user, options.weight_assistant, options.window)
        if key not in self._cache:
            length = _by_role(self._documents.length, self._documents.length_user, options)
            if self._alive is not None:
                length = np.where(self._alive, length, 0.0)
            if options.window:
                before, after = self._neighbours()
                padded = np.append(length, 0.0)  # position -1, no neighbour, adds nothing
                length = length + padded[before] + padded[after]
            mean = length.sum() / self._count
            self._cache[key] = options.k1 * (1 - options.b + options.b * length / mean) if mean else length
        return self._cache[key]  # type: ignore[return-value]

    def _neighbours(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        # Positions of the document before and of the one after; -1 where there is none.
        if self._links is None:
            self._links = _neighbours(self._documents.doc, self._documents.back, self._alive)
        return self._links

    def _windowed(self, positions: NDArray[np.int32], tf: NDArray[np.float64]) -> Found:
        before, after = self._neighbours()
        total = np.zeros(len(self._documents.doc))
        total[positions] = tf
        new = [positions]
        for link in (before, after):
            target = link[positions]
            linked = target >= 0
            target = target[linked]
            total_before = total[target]
            total[target] = total_before + tf[linked]
            new.append(target[total_before == 0])
        reached = np.concatenate(new)
        return reached, total[reached]


class ColdBm25(_Bm25):
    """For a short-lived process: reads the lengths of all documents once and of postings only what a query needs."""

    def _load(self, layer: Layer) -> None:
        self._documents = index.read_lengths(self._con, layer.id)
        self._found = (frozenset(), [])

    def _find(self, terms: Counter[int]) -> list[Piece]:
        assert self._layer is not None
        wanted = frozenset(terms)
        if self._found[0] != wanted:  # the arms of one recall ask for the same terms
            found = index.read_postings(self._con, self._layer.id, list(terms))
            positions = _positions(self._documents.doc, found.doc)
            bounds = np.append(_starts(found.term), len(found.term)).tolist()
            pieces = [
                (int(found.term[a]), positions[a:b], found.tf[a:b], found.tf_user[a:b]) for a, b in pairwise(bounds)
            ]
            self._found = (wanted, pieces)
        return self._found[1]


class _Segment:
    """Postings in memory, by position of the document, found by term."""

    def __init__(self, found: Postings, positions: NDArray[np.int32]) -> None:
        starts = _starts(found.term)
        self.terms, self.bounds = found.term[starts], np.append(starts, len(found.term))
        self.positions, self.tf, self.tf_user = positions, _narrow(found.tf), _narrow(found.tf_user)

    def find(self, term: int) -> tuple[NDArray, NDArray, NDArray] | None:
        at = int(np.searchsorted(self.terms, np.uint64(term)))
        if at == len(self.terms) or int(self.terms[at]) != term:
            return None
        part = slice(int(self.bounds[at]), int(self.bounds[at + 1]))
        return self.positions[part], self.tf[part], self.tf_user[part]


class WarmBm25(_Bm25):
    """For a long-lived process: all postings in memory (6 to 12 bytes each); what changes is added by `refresh`."""

    def __init__(self, con: duckdb.DuckDBPyConnection, layer: str) -> None:
        super().__init__(con, layer)
        self._segments: list[_Segment] = []
        self.refresh()

    def _load(self, layer: Layer) -> None:
        if not len(self._documents.doc) or not self._load_changes(layer):
            self._documents, self._alive = index.read_documents(self._con, layer.id), None
            parts = index.read_all_postings(self._con, layer.id)
            docs = self._documents.doc
            self._segments = [_Segment(part, _positions(docs, part.doc)) for part in parts if len(part.term)]

    def _load_changes(self, layer: Layer) -> bool:
        # False: so much changed that everything is better read anew. A document is known by its doc and the revision
        # that added it: so replaced ones are seen, and those of a transaction that was rolled back are gone.
        now, revision = index.read_revisions(self._con, layer.id)
        if not len(now):
            return False
        at = np.minimum(np.searchsorted(now, self._documents.doc), len(now) - 1)
        kept = (now[at] == self._documents.doc) & (revision[at] == self._documents.revision)
        kept &= True if self._alive is None else self._alive
        is_new = np.ones(len(now), bool)
        is_new[at[kept]] = False
        changed = int(np.count_nonzero(~kept)) + int(np.count_nonzero(is_new))
        if changed > _CHANGED_SHARE * len(now) + _CHANGED_MIN:
            return False
        since = int(revision[is_new].min(initial=layer.revision))
        added = index.read_documents(self._con, layer.id, since=since)
        added = added.select(np.isin(added.doc, now[is_new]))
        found = index.read_postings_of(self._con, layer.id, added.doc)
        if len(found.term):
            positions = _positions(added.doc, found.doc) + np.int32(len(self._documents.doc))
            self._segments.append(_Segment(found, positions))
        self._alive = np.concatenate([kept, np.ones(len(added.doc), bool)])
        self._documents = Documents(*map(np.concatenate, zip(self._documents, added, strict=True)))
        if len(self._segments) > _MAX_SEGMENTS:
            self._merge_segments()
        return True

    def _merge_segments(self) -> None:
        # The first is by far the largest; those of later changes become one.
        later = self._segments[1:]
        term = np.concatenate([np.repeat(segment.terms, np.diff(segment.bounds)) for segment in later])
        order = np.argsort(term, kind="stable")
        positions, tf, tf_user = (
            np.concatenate([getattr(segment, name) for segment in later])[order]
            for name in ("positions", "tf", "tf_user")
        )
        self._segments[1:] = [_Segment(Postings(term[order], positions, tf, tf_user), positions)]

    def _find(self, terms: Counter[int]) -> list[Piece]:
        found = ((term, segment.find(term)) for term in terms for segment in self._segments)
        return [(term, *piece) for term, piece in found if piece is not None]


def _joined(pieces: list[Found]) -> Found:
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate([positions for positions, _ in pieces]), np.concatenate([tf for _, tf in pieces])


def _by_role(count: NDArray, count_user: NDArray, options: Bm25Options) -> NDArray:
    user, assistant = options.weight_user, options.weight_assistant
    return count if user == assistant == 1 else assistant * count + (user - assistant) * count_user.astype(np.float64)


def _positions(docs: NDArray[np.int32], wanted: NDArray[np.int32]) -> NDArray[np.int32]:
    # Where each wanted doc stands in the ascending docs; numbers without a gap need no search.
    if len(docs) and int(docs[-1]) - int(docs[0]) + 1 == len(docs):
        return wanted - docs[0]
    return np.searchsorted(docs, wanted).astype(np.int32)


def _starts(term: NDArray[np.uint64]) -> NDArray[np.int64]:
    # Where in the sorted array each term begins.
    changes = np.flatnonzero(term[1:] != term[:-1]) + 1
    return np.concatenate([[0], changes]) if len(term) else changes


def _narrow(values: NDArray) -> NDArray:
    return values.astype(np.min_scalar_type(int(values.max(initial=0))), copy=False)


def _neighbours(
    docs: NDArray[np.int32], back: NDArray[np.int32], alive: NDArray[np.bool_] | None
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    order = np.argsort(docs, kind="stable").astype(np.int32)
    if alive is not None:
        order = order[alive[order]]
    ascending = docs[order]
    linked = order[back[order] != 0]
    wanted = docs[linked] - back[linked]
    at = np.minimum(_positions(ascending, wanted), len(order) - 1)
    known = (at >= 0) & (ascending[at] == wanted) if len(at) else np.zeros(0, bool)
    linked, target = linked[known], order[at[known]]
    before, after = np.full(len(docs), -1, np.int32), np.full(len(docs), -1, np.int32)
    # Were two documents to name the same one before them, the later of the two is its neighbour.
    after[target] = linked
    kept = after[target] == linked
    before[linked[kept]] = target[kept]
    return before, after
