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
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import duckdb
import numpy as np
from numpy.typing import NDArray

from workbench.errors import NotFound
from workbench.memory import postings as index
from workbench.memory.fusion import Arm, best, top
from workbench.memory.postings import Layer, Postings

# A warm index is read anew when more than these documents have changed.
_CHANGED_SHARE, _CHANGED_MIN = 0.1, 1_000
_MAX_SEGMENTS = 8
# Postings of a term from which on it is frequent, and of all frequent terms together that are kept (12 bytes each).
_FREQUENT, _MAX_KEPT = 10_000, 16_000_000
_COLUMNS = ("back", "length", "length_user", "revision")
Piece = tuple[int, NDArray, NDArray, NDArray]  # term, positions of documents, tf, tf_user
Match = tuple[NDArray, NDArray[np.float64], float]  # positions of documents, factor * tf / (tf + K), factor
Found = tuple[NDArray, NDArray]  # positions of documents, term frequencies


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
        # By position: of ascending doc in a cold index, in a warm one in the order of their coming.
        self._documents: dict[str, NDArray] = {"doc": np.empty(0, np.int32)}
        self._alive: NDArray[np.bool_] | None = None  # None: all
        self._norms: dict[Bm25Options, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
        self._means: list[float] = []
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
            self._norms, self._means, self._links = {}, [], None

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
        docs = self._documents["doc"]
        terms = Counter(self._layer.tokenizer.hashes(query))
        matches = self._matches(terms, options) if self._count else {}
        scores, is_positive = np.zeros(len(docs)), True
        for term in [term for term in terms if term in matches]:
            positions, weights, factor = matches[term]
            np.add.at(scores, positions, weights if terms[term] == 1 else terms[term] * weights)
            is_positive &= factor > 0
        matched = scores > 0
        if not is_positive:
            for positions, _, _ in matches.values():
                matched[positions] = True
        if allowed is not None:
            matched &= np.isin(docs, allowed)
        at = best(scores if allowed is None and is_positive else np.where(matched, scores, -np.inf), n)
        at = at[matched[at]]
        return top(docs[at], scores[at], n)

    def _load(self, layer: Layer) -> None:
        raise NotImplementedError

    def _find(self, terms: list[int], options: Bm25Options) -> list[Piece]:
        # A term may come in several pieces.
        raise NotImplementedError

    @property
    def _count(self) -> int:
        return len(self._documents["doc"]) if self._alive is None else int(np.count_nonzero(self._alive))

    def _matches(self, terms: Iterable[int], options: Bm25Options) -> dict[int, Match]:
        (norm, gain_once), pieces = self._norm(options), {}
        for term, positions, tf, tf_user in self._find(list(terms), options):
            if self._alive is not None:
                keep = self._alive[positions]
                positions, tf, tf_user = positions[keep], tf[keep], tf_user[keep]
            weighted = _by_role(tf, tf_user, options)
            if not (options.weight_user and options.weight_assistant):
                positions, weighted = positions[weighted > 0], weighted[weighted > 0]
            if len(positions):
                pieces.setdefault(term, []).append((positions, weighted))
        matches = {}
        for term, found in pieces.items():
            positions, tf = (found[0][i] if len(found) == 1 else np.concatenate([f[i] for f in found]) for i in (0, 1))
            df = len(positions)
            if options.window:
                positions, tf = self._windowed(positions, tf)
            factor = self._idf(df, options) * (options.k1 + 1 if options.variant == "okapi" else 1)
            weights = gain_once[positions]
            often = np.flatnonzero(tf != 1)
            weights[often] = tf[often] / (tf[often] + norm[positions[often]])
            weights *= factor
            matches[term] = positions, weights, factor
        return matches

    def _idf(self, df: int, options: Bm25Options) -> float:
        count = self._count
        if options.variant == "lucene":
            return float(np.log1p((count - df + 0.5) / (df + 0.5)))
        idf = float(np.log(count - df + 0.5) - np.log(df + 0.5))
        return idf if idf >= 0 else options.epsilon * self._mean_idf()

    def _mean_idf(self) -> float:
        if not self._means:
            assert self._layer is not None
            df, terms = index.df_histogram(self._con, self._layer.id)
            idf = np.log(self._count - df + 0.5) - np.log(df + 0.5)
            self._means.append(float(idf @ terms / terms.sum()))
        return self._means[0]

    def _column(self, name: str) -> NDArray:
        return self._documents[name]

    def _norm(self, options: Bm25Options) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        # Of every document K(d), and 1 / (1 + K(d)): what most terms gain there, occurring once.
        if options not in self._norms:
            length = self._column("length")
            if not _is_plain(options):
                length = _by_role(length, self._column("length_user"), options)
            if self._alive is not None:
                length = np.where(self._alive, length, 0)
            if options.window:
                before, after = self._neighbours()
                padded = np.append(length, 0)  # what is behind the last, no neighbour, adds nothing
                length = length + padded[before] + padded[after]
            per_term = options.k1 * options.b * self._count / max(float(length.sum()), 1e-300)
            norm = length * per_term
            norm += options.k1 * (1 - options.b)
            self._norms[options] = norm, 1 / (1 + norm)
        return self._norms[options]

    def _neighbours(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        # Positions of the document before and of the one after; behind the last where there is none.
        if self._links is None:
            self._links = _neighbours(self._documents["doc"], self._column("back"), self._alive)
        return self._links

    def _windowed(self, positions: NDArray[np.int32], tf: NDArray) -> Found:
        before, after = self._neighbours()
        count = len(before)
        tf = tf.astype(np.float64)  # np.add.at is fast when the types are the same
        around = np.concatenate([before[positions], after[positions]])
        total = np.zeros(count + 1)
        total[positions] = tf
        np.add.at(total, around, np.concatenate([tf, tf]))
        total[count] = 0  # where those without a neighbour point to
        if len(positions) > count // 16:
            reached = np.flatnonzero(total > 0)
        else:
            reached = np.unique(np.concatenate([positions, around]))
            reached = reached[total[reached] > 0]
        return reached, total[reached]


class ColdBm25(_Bm25):
    """For a short-lived process: reads the lengths of all documents once, and of postings what a query needs."""

    def _load(self, layer: Layer) -> None:
        self._documents = index.read_documents(self._con, layer.id, "length")
        self._found: tuple[tuple[list[int], bool], list[Piece]] = (([], False), [])

    def _column(self, name: str) -> NDArray:
        if name not in self._documents:
            assert self._layer is not None
            self._documents |= index.read_documents(self._con, self._layer.id, name)
        return self._documents[name]

    def _find(self, terms: list[int], options: Bm25Options) -> list[Piece]:
        assert self._layer is not None
        wanted = (terms, not _is_plain(options))
        if self._found[0] != wanted:  # the arms of one recall ask for the same terms
            pieces = index.read_postings(self._con, self._layer.id, terms, roles=wanted[1])
            docs = self._documents["doc"]
            self._found = wanted, [(term, _positions(docs, doc), tf, user) for term, doc, tf, user in pieces]
        return self._found[1]


class _Segment:
    """Postings in memory, by position of the document, found by term."""

    def __init__(self, parts: Iterable[tuple[Postings, NDArray]]) -> None:
        none = np.empty(0, np.int32)
        columns = [(none.astype(np.uint64), none, none, none.astype(np.uint8), none.astype(np.uint8))]
        for found, positions in parts:
            starts = _starts(found.term)
            counts = np.diff(np.append(starts, len(found.term)))
            columns.append((found.term[starts], counts, positions, _narrow(found.tf), _narrow(found.tf_user)))
        self.terms, counts, self.positions, self.tf, self.tf_user = map(np.concatenate, zip(*columns, strict=True))
        self.bounds = np.concatenate([[0], np.cumsum(counts)])

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
        self._kept: dict[tuple[int, Bm25Options], Match] = {}
        self.refresh()

    def _load(self, layer: Layer) -> None:
        self._kept = {}
        if not len(self._documents["doc"]) or not self._load_changes(layer):
            self._documents, self._alive = index.read_documents(self._con, layer.id, *_COLUMNS), None
            docs, self._segments = self._documents["doc"], []
            for table in ("postings", "recent"):
                self._segments.append(
                    _Segment(
                        (each, _positions(docs, each.doc))
                        for each in index.read_all_postings(self._con, layer.id, table)
                    )
                )

    def _matches(self, terms: Iterable[int], options: Bm25Options) -> dict[int, Match]:
        matches = {term: match for term in terms if (match := self._kept.get((term, options))) is not None}
        new = super()._matches([term for term in terms if term not in matches], options)
        # Frequent terms cost most and come again: what they gain is kept.
        for term, match in new.items():
            if len(match[0]) > _FREQUENT:
                self._kept[term, options] = match
        while sum(len(positions) for positions, _, _ in self._kept.values()) > _MAX_KEPT:
            del self._kept[next(iter(self._kept))]
        return matches | new

    def _load_changes(self, layer: Layer) -> bool:
        # False: so much changed that everything is better read anew. A document is known by its doc and the revision
        # that added it: so replaced ones are seen, and those of a transaction that was rolled back are gone.
        mine, now = self._documents, index.read_documents(self._con, layer.id, "revision")
        if not len(now["doc"]):
            return False
        at = np.minimum(np.searchsorted(now["doc"], mine["doc"]), len(now["doc"]) - 1)
        kept = (now["doc"][at] == mine["doc"]) & (now["revision"][at] == mine["revision"])
        kept &= True if self._alive is None else self._alive
        is_new = np.ones(len(now["doc"]), bool)
        is_new[at[kept]] = False
        changed = int(np.count_nonzero(~kept)) + int(np.count_nonzero(is_new))
        if changed > _CHANGED_SHARE * len(is_new) + _CHANGED_MIN:
            return False
        since = int(now["revision"][is_new].min(initial=layer.revision))
        added = index.read_documents(self._con, layer.id, *_COLUMNS, since=since)
        chosen = np.isin(added["doc"], now["doc"][is_new])
        added = {name: column[chosen] for name, column in added.items()}
        found = index.read_postings_of(self._con, layer.id, added["doc"])
        if len(found.term):
            positions = _positions(added["doc"], found.doc) + np.int32(len(mine["doc"]))
            self._segments.append(_Segment([(found, positions)]))
        self._alive = np.concatenate([kept, np.ones(len(added["doc"]), bool)])
        self._documents = {name: np.concatenate([mine[name], added[name]]) for name in mine}
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
        self._segments[1:] = [_Segment([(Postings(term[order], positions, tf, tf_user), positions)])]

    def _find(self, terms: list[int], options: Bm25Options) -> list[Piece]:
        found = ((term, segment.find(term)) for term in terms for segment in self._segments)
        return [(term, *piece) for term, piece in found if piece is not None]


def _is_plain(options: Bm25Options) -> bool:
    return options.weight_user == options.weight_assistant == 1


def _by_role(count: NDArray, count_user: NDArray, options: Bm25Options) -> NDArray:
    user, assistant = options.weight_user, options.weight_assistant
    return count if _is_plain(options) else assistant * count + (user - assistant) * count_user.astype(np.float64)


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
    order = None  # positions by ascending doc; None: as they are
    if alive is not None:
        order = np.argsort(docs, kind="stable")
        order = order[alive[order]]
    linked = np.flatnonzero(back if alive is None else np.where(alive, back, 0)).astype(np.int32)
    wanted = docs[linked] - back[linked]
    ascending = docs if order is None else docs[order]
    at = _positions(ascending, wanted)
    known = (at >= 0) & (at < len(ascending))
    known[known] = ascending[at[known]] == wanted[known]
    linked, target = linked[known], at[known] if order is None else order[at[known]]
    before, after = (np.full(len(docs), len(docs), np.int32) for _ in range(2))
    # Were two documents to name the same one before them, the later of the two is its neighbour.
    after[target] = linked
    kept = after[target] == linked
    before[linked[kept]] = target[kept]
    return before, after
