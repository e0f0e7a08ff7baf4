"""Embedding models: one learnt from the store's own text, a hashed one before that, sentence-transformers on request.

The embedded models need no download and no torch; both have 256 dimensions and read words as stem/1 does.

lsa/1:<digest>: latent semantic analysis (`lsa`) of the store's own texts: words that occur in the same texts point the
    same way; a word that it has not seen gets the direction that hashed/1 gives it.
hashed/1: every word a random direction drawn from its hash, all equally heavy; knows no word better than another.

What they reach by themselves (verbatim text; MRR and nDCG@10 on the agentlog development queries, nDCG@10 on LoCoMo's
turns), measured by benchmarks/bench_embedding.py beside all-MiniLM-L6-v2's .340 / .289 / .296:
lsa/1 .357 / .349 / .432; hashed/1 .216 / .196 / .283.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, Protocol

import duckdb
import numpy as np
from numpy.typing import NDArray

from workbench.errors import MissingExtra, NotFound
from workbench.memory.arrays import distinct, fetch, insert
from workbench.memory.lsa import Features, count_features, learn_features, random_vectors, sum_rows

HASHED = "hashed/1"
LEARNT = "lsa/1"
DIM = 256
SENTENCE_TRANSFORMERS = "sentence-transformers/"
_MAX_FEATURES = 65_536
# As much text as is learnt from: about 1 microsecond of CPU a character.
_MAX_LEARNT_CHARS = 10_000_000
_LOOK_UP_AT_MOST = 2_000  # features; for more, all are read


class Embedder(Protocol):
    """Text to vectors. `name` carries the version: vectors of different names are not comparable."""

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One row of `dim` numbers a text, of length 1, or 0 for a text in which the model sees nothing."""
        ...


class LexicalEmbedder:
    """Sums of the vectors of words, weighted by tf / (tf + 1.2) and idf.

    Args:
        known: what the model has learnt; may be empty.
        scale: length of the vector of a word that it has not.
        num_documents: how many texts there were to learn from; gives the idf of an unseen word.
    """

    def __init__(self, name: str, known: Features, scale: float = 1.0, num_documents: int = 0, dim: int = DIM) -> None:
        self.name, self.dim, self.scale, self.num_documents = name, dim, scale, num_documents
        self._known = known

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One row of `dim` numbers a text, of length 1, or 0 for a text without words."""
        counts = count_features(texts, pairs=self.name != HASHED)
        known = self._look_up(counts.feature)
        at = np.searchsorted(known.feature, counts.feature)
        seen = np.zeros(len(at), bool)
        if len(known.feature):
            at[at == len(known.feature)] = 0
            seen = known.feature[at] == counts.feature
        unseen = ~seen & ~counts.is_pair
        words = distinct(counts.feature[unseen])
        at[unseen] = len(known.feature) + np.searchsorted(words, counts.feature[unseen])
        vectors = np.concatenate([known.vector, np.float32(self.scale) * random_vectors(words, self.dim)])
        unseen_idf = np.log1p(self.num_documents) if self.num_documents else 1.0
        idf = np.concatenate([known.idf, np.full(len(words), unseen_idf, np.float32)])
        use = seen | unseen
        bounds = np.searchsorted(counts.row[use], np.arange(len(texts) + 1))
        rows = sum_rows(vectors, at[use], counts.weight[use] * idf[at[use]], bounds)
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.divide(rows, length, out=rows, where=length > 0)

    def save(self, con: duckdb.DuckDBPyConnection) -> None:
        """Keep the model in the store, in the caller's transaction; once is enough."""
        if con.execute("SELECT 1 FROM embedding_models WHERE model = ?", [self.name]).fetchall():
            return
        blobs = np.empty(len(self._known.feature), object)
        blobs[:] = [row.tobytes() for row in self._known.vector.astype("<f2")]
        batch = {"feature": self._known.feature, "idf": self._known.idf, "vector": blobs}
        con.execute(
            "INSERT INTO embedding_models VALUES (?, ?, ?, ?, now())",
            [self.name, self.dim, self.num_documents, self.scale],
        )
        insert(con, "INSERT INTO embedding_features SELECT ?, feature, idf, vector FROM batch", [self.name], batch)

    def _look_up(self, features: NDArray[np.uint64]) -> Features:
        return self._known


class _StoredEmbedder(LexicalEmbedder):
    """A learnt model in the store: short texts ask for their words, longer ones have all of them read."""

    def __init__(self, con: duckdb.DuckDBPyConnection, name: str) -> None:
        row = con.execute("SELECT dim, scale, num_documents FROM embedding_models WHERE model = ?", [name]).fetchall()
        if not row:
            raise NotFound(f"the store has no embedding model {name!r}: run `workbench distill` to learn one")
        super().__init__(name, hashed(row[0][0])._known, row[0][1], row[0][2], row[0][0])
        self._con = con

    def _look_up(self, features: NDArray[np.uint64]) -> Features:
        if not len(self._known.feature):
            wanted = distinct(features)
            if len(wanted) <= _LOOK_UP_AT_MOST:
                # By row: a join would unpack the vectors of all features (15 ms of CPU for a first query, not 9).
                rows = "SELECT rowid FROM embedding_features WHERE feature IN (SELECT unnest(?::UBIGINT[]))"
                return self._read(f"AND rowid IN ({rows})", [wanted])
            self._known = self._read("", [])
        return self._known

    def _read(self, chosen: str, parameters: list[Any]) -> Features:
        columns = fetch(
            self._con,
            f"SELECT feature, idf, vector FROM embedding_features WHERE model = ? {chosen} ORDER BY feature",
            [self.name, *parameters],
        )
        vectors = np.frombuffer(b"".join(columns["vector"]), "<f2").reshape(-1, self.dim).astype(np.float32)
        return Features(columns["feature"], columns["idf"], vectors)


class SentenceTransformersEmbedder:
    """Any model of the sentence-transformers library.

    Args: model: a name on the hub or a folder.
    Raises: MissingExtra if the library is not installed.
    """

    def __init__(self, model: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingExtra(
                f"embedding model {model!r} needs sentence-transformers, which is not installed", "train"
            ) from error
        self._model = SentenceTransformer(model)
        self.name = SENTENCE_TRANSFORMERS + model
        # Asked of an output, because the method that tells it changed its name between versions.
        self.dim = len(self._model.encode("dim", convert_to_numpy=True, show_progress_bar=False))

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One row of `dim` numbers a text, of length 1."""
        rows = self._model.encode(
            list(texts), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )
        return np.asarray(rows, np.float32).reshape(len(texts), self.dim)


def hashed(dim: int = DIM) -> LexicalEmbedder:
    """The model for a store that has no text to learn from yet."""
    nothing = Features(np.empty(0, np.uint64), np.empty(0, np.float32), np.empty((0, dim), np.float32))
    return LexicalEmbedder(HASHED, nothing, dim=dim)


def learn(texts: Sequence[str], dim: int = DIM) -> LexicalEmbedder:
    """A model of these texts; of more than 10 million characters, of an even sample.

    Takes about 3 s of CPU for 4 million characters. Keep it with `save`; `get_embedder` then finds it. A store that has
    grown to twice the texts should learn anew and embed everything again.
    """
    step = 1 + sum(map(len, texts)) // _MAX_LEARNT_CHARS
    sample = texts[::step]
    known = learn_features(sample, dim, _MAX_FEATURES)
    # What is stored is what is used: both have the precision of float16.
    known = known._replace(vector=known.vector.astype(np.float16).astype(np.float32))
    length = np.linalg.norm(known.vector, axis=1)
    scale = float(np.median(length[length > 0])) if np.any(length > 0) else 1.0
    digest = blake2b(known.feature.tobytes() + known.vector.tobytes(), digest_size=4).hexdigest()
    return LexicalEmbedder(f"{LEARNT}:{digest}", known, scale, len(texts), dim)


def get_embedder(con: duckdb.DuckDBPyConnection, name: str) -> Embedder:
    """The model of that name: hashed/1, lsa/1:… from the store, or sentence-transformers/<model>.

    Raises: NotFound for a name that is none of these; MissingExtra.
    """
    if name == HASHED:
        return hashed()
    if name.startswith(SENTENCE_TRANSFORMERS):
        return SentenceTransformersEmbedder(name.removeprefix(SENTENCE_TRANSFORMERS))
    return _StoredEmbedder(con, name)
