"""BM25 over the postings in DuckDB: `ColdBm25` asks them by SQL, `WarmBm25` holds them in memory.

score(d) = sum over the query's terms, repetitions counted, of idf(t) * tf(t, d) * (k1 + 1) / (tf(t, d) + K(d)),
K(d) = k1 * (1 - b + b * length(d) / mean length).

okapi: idf = ln(N - df + 1/2) - ln(df + 1/2); a negative one is replaced by epsilon times the mean idf of all terms.
       Equals rank_bm25.BM25Okapi.
lucene: idf = ln(1 + (N - df + 1/2) / (df + 1/2)), without the factor (k1 + 1). Equals bm25s with method="lucene".
The n best are found by `maxscore`, with the scores that a search for all gives.
Source: Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework"; Kamphuis et al. 2020.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import duckdb
import numpy as np
from numpy.typing import NDArray

from workbench.errors import NotFound
from workbench.memory import postings as index
from workbench.memory.fusion import Arm, top
from workbench.memory.maxscore import best_documents
from workbench.memory.postings import Layer
from workbench.memory.segments import Segment, known_positions, merged, neighbours, positions_in
from workbench.memory.stored_postings import stored
from workbench.memory.weights import Held, Kept, Norms, Piece, ScoredTerm, Source, largest_share, tf_at

# A warm index is read anew when more than these documents have changed.
_CHANGED_SHARE, _CHANGED_MIN = 0.1, 1_000
_MAX_SEGMENTS = 8
# From so many documents on, a cold index reads of terms that are in more than one in so many documents what is needed.
_LARGE, _SOME = 200_000, 8
_COLUMNS = ("back", "length", "length_user", "revision")


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
        self._name = layer
        self._layer: Layer | None = None
        self.attach(con)
        # By position: of ascending doc in a cold index, in a warm one in the order of their coming.
        self._documents: dict[str, NDArray] = {"doc": np.empty(0, np.int32)}
        self._alive: NDArray[np.bool_] | None = None  # None: all
        self._kept: Kept | None = None
        self._forget()

    def _forget(self) -> None:
        # What is derived from the documents.
        self._gone = None if self._alive is None else np.flatnonzero(~self._alive).astype(np.int32)
        self._count = len(self._documents["doc"]) - (0 if self._gone is None else len(self._gone))
        self._norms: dict[Bm25Options, Norms] = {}
        self._means: list[float] = []
        self._links: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None
        self._by_doc: list[NDArray | None] = []

    def attach(self, con: duckdb.DuckDBPyConnection) -> None:
        """Look through this connection to the same store from now on; what is in memory stays."""
        self._con, self._is_current = con, False
        self._is_read_only = _is_read_only(con)

    def __len__(self) -> int:
        self.refresh()
        return self._count

    def refresh(self) -> None:
        """Take in what changed in the layer since the last look; every search begins with it.

        Nothing changes in a file that is open read-only: there one look for each connection is enough (0.3 to 0.7 ms).
        """
        if self._is_current:
            return
        layer = index.find_layer(self._con, self._name)
        if layer is None:
            raise NotFound(f"the store has no index of layer {self._name!r}: run `workbench distill` or `ingest` first")
        if self._layer is None or layer.revision != self._layer.revision:
            self._load(layer)
            self._layer = layer
            self._forget()
        self._is_current = self._is_read_only

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

        Returns: (docs, scores), parallel arrays; scores do not depend on n and allowed, to the last bit.

        Raises: NotFound if the layer has no index.
        """
        self.refresh()
        assert self._layer is not None
        docs = self._documents["doc"]
        terms = self._terms(Counter(self._layer.tokenizer.hashes(query)), options) if self._count else []
        within = None
        if allowed is not None:
            within = np.unique(known_positions(docs, np.asarray(allowed), self._order())[0])
        if n is not None and n > 0 and terms and all(term.bound > 0 for term in terms):
            at, scores = best_documents(terms, len(docs), n, allowed=within, blocked=self._gone)
        else:
            at, scores = self._all(terms, within)
        return top(docs[at], scores, n)

    def _all(self, terms: list[ScoredTerm], within: NDArray | None) -> tuple[NDArray, NDArray[np.float64]]:
        # Every document with a term, also where Okapi's floor makes what it gains 0 or less.
        size = len(self._documents["doc"])
        scores, matched = np.zeros(size), np.zeros(size, bool)
        for term in terms:
            for positions, gains in term.read():
                np.add.at(scores, positions, gains)
                matched[positions] = True
        if self._alive is not None:
            matched &= self._alive
        at = np.flatnonzero(matched) if within is None else within[matched[within]]
        return at, scores[at]

    def _load(self, layer: Layer) -> None:
        raise NotImplementedError

    def _find(self, terms: list[int], options: Bm25Options) -> dict[int, Source]:
        raise NotImplementedError

    def _terms(self, counts: Counter[int], options: Bm25Options) -> list[ScoredTerm]:
        # In the order in which scores are added up: rising cost for what a term is worth (see maxscore).
        links = self._neighbours() if options.window else None
        norms, terms = self._norm(options), []
        for term, source in self._find(list(counts), options).items():
            if source.df:
                factor = self._idf(source.df, options) * (options.k1 + 1 if options.variant == "okapi" else 1)
                share = self._share(term, source, norms, options)
                terms.append(ScoredTerm(source, counts[term], factor, norms, links, share, self._kept, (term, options)))
        return sorted(terms, key=lambda term: term.source.df / max(term.count * term.factor, 1e-9))

    def _share(self, term: int, source: Source, norms: Norms, options: Bm25Options) -> float:
        return largest_share(source, norms, options.window)

    def _held(self, pieces: Sequence[tuple[NDArray, NDArray, NDArray, NDArray | None]], options: Bm25Options) -> Held:
        # Postings in memory: (ascending positions, tf, tf_user, lengths).
        held = []
        for positions, tf, tf_user, lengths in pieces:
            if _is_plain(options):
                held.append(Piece(positions, tf, lengths))
                continue
            weighted = _by_role(tf, tf_user, options)
            if not (options.weight_user and options.weight_assistant):
                positions, weighted = positions[weighted > 0], weighted[weighted > 0]
            held.append(Piece(positions, weighted))
        df = sum(len(piece.positions) for piece in held)
        if self._gone is not None:
            df -= sum(int(np.count_nonzero(tf_at([piece], self._gone))) for piece in held)
        return Held(held, df)

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

    def _norm(self, options: Bm25Options) -> Norms:
        if options not in self._norms:
            length = self._column("length")
            if not _is_plain(options):
                length = _by_role(length, self._column("length_user"), options)
            if options.window:
                before, after = self._neighbours()
                padded = np.append(length, 0)  # what is behind the last, no neighbour, adds nothing
                length = length + padded.take(before) + padded.take(after)
            total = length.sum() if self._alive is None else length[self._alive].sum()
            per_term = options.k1 * options.b * self._count / max(float(total), 1e-300)
            lengths = None
            # Whole numbers: the norm of each length is enough, unless a few documents are very long.
            if _is_plain(options) and (longest := int(length.max())) < len(length) + 100_000:
                lengths = length.astype(np.min_scalar_type(longest), copy=False)
                length = np.arange(longest + 1)
            norms = np.asarray(length, np.float64) * per_term + options.k1 * (1 - options.b)
            self._norms[options] = Norms(norms, lengths)
        return self._norms[options]

    def _order(self) -> NDArray | None:
        # Positions of the documents by ascending doc; None: as they are.
        if not self._by_doc:
            docs, order = self._documents["doc"], None
            if self._alive is not None or np.any(docs[1:] < docs[:-1]):
                order = np.argsort(docs, kind="stable")
                order = order if self._alive is None else order[self._alive[order]]
            self._by_doc.append(order)
        return self._by_doc[0]

    def _neighbours(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        if self._links is None:
            self._links = neighbours(self._documents["doc"], self._column("back"), self._alive, self._order())
        return self._links


class ColdBm25(_Bm25):
    """For a short-lived process: reads the lengths of all documents once, and of postings what a query needs."""

    def _load(self, layer: Layer) -> None:
        # Two bytes are enough for nearly every length, and are fetched faster.
        self._documents = index.read_documents(self._con, layer.id, "least(length, 65535)::USMALLINT AS length")
        if self._documents["length"].max(initial=0) == 65535:
            self._documents = index.read_documents(self._con, layer.id, "length")
        self._found: tuple[list[int], dict[int, Source]] = ([], {})

    def attach(self, con: duckdb.DuckDBPyConnection) -> None:
        """See above."""
        super().attach(con)
        self._found = ([], {})

    def _column(self, name: str) -> NDArray:
        if name not in self._documents:
            assert self._layer is not None
            self._documents |= index.read_documents(self._con, self._layer.id, name)
        return self._documents[name]

    def _find(self, terms: list[int], options: Bm25Options) -> dict[int, Source]:
        assert self._layer is not None
        docs, layer, is_plain = self._documents["doc"], self._layer.id, _is_plain(options)
        if is_plain and self._found[0] == terms:
            return self._found[1]  # the arms of one recall ask for the same terms
        if is_plain and len(docs) >= _LARGE:
            found = stored(self._con, layer, terms, docs, len(docs) // _SOME)
        else:
            found = {}
            for term, doc, tf, tf_user in index.read_postings(self._con, layer, terms, roles=not is_plain):
                by_doc = np.argsort(doc) if np.any(doc[1:] < doc[:-1]) else slice(None)
                pieces = [(positions_in(docs, doc[by_doc]), tf[by_doc], tf_user[by_doc], None)]
                found[term] = self._held(pieces, options)
        if is_plain:
            self._found = terms, found
        return found


class WarmBm25(_Bm25):
    """For a long-lived process: all postings in memory (7 to 16 bytes each); what changes is added by `refresh`."""

    def __init__(self, con: duckdb.DuckDBPyConnection, layer: str) -> None:
        super().__init__(con, layer)
        self._segments: list[Segment] = []
        self._shares: dict[tuple[int, Bm25Options], float] = {}
        self.refresh()

    def _load(self, layer: Layer) -> None:
        self._shares, self._kept = {}, Kept()
        if not len(self._documents["doc"]) or not self._load_changes(layer):
            self._documents, self._alive = index.read_documents(self._con, layer.id, *_COLUMNS), None
            docs, self._segments = self._documents["doc"], []
            for table in ("postings", "recent"):
                self._segments.append(
                    Segment(
                        (each, positions_in(docs, each.doc))
                        for each in index.read_all_postings(self._con, layer.id, table)
                    )
                )
        for segment in self._segments:
            segment.note_lengths(self._documents["length"])

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
            positions = positions_in(added["doc"], found.doc) + np.int32(len(mine["doc"]))
            self._segments.append(Segment([(found, positions)]))
        alive = np.concatenate([kept, np.ones(len(added["doc"]), bool)])
        self._alive = None if alive.all() else alive
        self._documents = {name: np.concatenate([mine[name], added[name]]) for name in mine}
        if len(self._segments) > _MAX_SEGMENTS:
            # The first is by far the largest; those of later changes become one.
            self._segments[1:] = [merged(self._segments[1:])]
        return True

    def _share(self, term: int, source: Source, norms: Norms, options: Bm25Options) -> float:
        if (term, options) not in self._shares:
            self._shares[term, options] = super()._share(term, source, norms, options)
        return self._shares[term, options]

    def _find(self, terms: list[int], options: Bm25Options) -> dict[int, Source]:
        found = {}
        for term in terms:
            pieces = [piece for segment in self._segments if (piece := segment.find(term)) is not None]
            if pieces:
                found[term] = self._held(pieces, options)
        return found


def _is_read_only(con: duckdb.DuckDBPyConnection) -> bool:
    # What a connection sees of a file that it has opened so stays the same.
    return con.execute("SELECT current_setting('access_mode')").fetchall()[0][0] == "read_only"


def _is_plain(options: Bm25Options) -> bool:
    return options.weight_user == options.weight_assistant == 1


def _by_role(count: NDArray, count_user: NDArray, options: Bm25Options) -> NDArray:
    user, assistant = options.weight_user, options.weight_assistant
    return (
        count if _is_plain(options) else float(assistant) * count + (user - assistant) * count_user.astype(np.float64)
    )
