"""Our own recall as a retriever: a configuration over the product's store, distillers, indexes and fusion.

The documents of a scope go into a store as exchanges, each document exactly one, whatever its length; everything after
that is the product's own code. Configurations of one `Corpora` share what they have in common: a text is indexed once
for each tokenizer, distilled once, embedded once, and a query is asked of each arm once and fused many times. Costs are
told as if nothing had been shared: those of the parts that a configuration uses.

Verified by: tests/evals/test_ours.py (rankings equal those of workbench.memory.recall.recall).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import duckdb
import numpy as np
from numpy.typing import NDArray

from workbench.data.columns import Kind, insert_rows
from workbench.data.records import digest, valid
from workbench.data.store import Store
from workbench.evals.baseline_distillers import Head, Span
from workbench.evals.recall_grid import Configuration
from workbench.evals.tasks.base import Document
from workbench.memory import dense, embedding, postings, recall
from workbench.memory.arms import NOTHING, Arms
from workbench.memory.distill import distill
from workbench.memory.distillers.extractive import Extractive
from workbench.memory.exchanges import insert_exchanges
from workbench.memory.files import FileCollector
from workbench.memory.fusion import Arm
from workbench.memory.index import VERBATIM, distilled
from workbench.memory.tokens import count_tokens
from workbench.memory.types import Distiller
from workbench.memory.vectors import LEARN_FROM

_DISTILLERS: dict[str, Callable[[], Distiller]] = {"extractive/1": Extractive, "head/1": Head, "span/1": Span}
#: Results depend on these; what is not installed is not used.
_PACKAGES = ("duckdb", "numpy", "snowballstemmer", "PyStemmer", "sentence-transformers", "torch")
_BATCH = 1000


class Corpora:
    """The built corpora of a run, shared by its configurations; each lives as long as an index of it is open."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, tuple[Document, ...]], Corpus] = {}

    def get(self, tokenizer: str, documents: Sequence[Document], folder: Path) -> Corpus:
        """The corpus of these documents; `folder` must live until it is closed."""
        key = (tokenizer, tuple(documents))
        if key not in self._open:
            self._open[key] = Corpus(documents, tokenizer, folder, lambda: self._open.pop(key, None))
        return self._open[key]


class OurRecall:
    """A configuration as a retriever.

    Args: corpora: give the same to all configurations of a run.
    """

    def __init__(self, configuration: Configuration, corpora: Corpora | None = None) -> None:
        self.configuration = configuration
        self.name = configuration.name
        self._corpora = corpora or Corpora()

    def fingerprint(self) -> str:
        """Of the options, the versions of the libraries, and the weights of a downloaded model."""
        options = json.dumps(asdict(self.configuration), sort_keys=True)
        weights = _weights(self.configuration.embedder) if self.configuration.uses("vector") else ""
        return digest("ours", options, json.dumps(installed(*_PACKAGES)), weights)

    def build(self, documents: Sequence[Document], folder: Path) -> OurIndex:
        """Indexes what the configuration looks at and nobody has indexed yet."""
        corpus = self._corpora.get(self.configuration.tokenizer, documents, folder)
        corpus.num_users += 1
        try:
            return OurIndex(self.configuration, corpus)
        except BaseException:
            corpus.release()
            raise


class OurIndex:
    """The documents of one scope, searched as a configuration says.

    Attributes: build_seconds: CPU of all parts that it uses, those that others had built included; query_ms: CPU of
    the last search, as if it had asked every arm itself; None before the first. num_unindexed: documents with words
    that only memories could find and that have none, because their record failed the checks.
    """

    def __init__(self, configuration: Configuration, corpus: Corpus) -> None:
        self._configuration, self._corpus = configuration, corpus
        self._parts = list(dict.fromkeys(p for arm in configuration.arms for p in self._parts_of(arm)))
        for part in self._parts:
            corpus.need(part)
        self.build_seconds = sum(corpus.seconds[part] for part in self._parts)
        self.query_ms: float | None = None
        self._uses_vector = configuration.uses("vector")
        self._memories = corpus.memories(configuration.distiller) if configuration.layer != "verbatim" else {}
        lost = (doc for doc, text in corpus.texts.items() if text.strip() and doc not in self._memories)
        self.num_unindexed = sum(1 for _ in lost) if configuration.layer == "distilled" else 0
        self.search("warm up", 1)  # postings and vectors are read into memory by the first search
        self.query_ms = None

    def _parts_of(self, arm: str) -> list[tuple[str, ...]]:
        mechanism, _, short = arm.partition(":")
        of_memories = short == "distilled"
        layer = distilled(self._configuration.distiller) if of_memories else VERBATIM
        first: list[tuple[str, ...]] = [("exchanges",)]
        if of_memories:
            first.append(("memories", self._configuration.distiller))
        if mechanism == "vector":
            return [*first, ("model", self._configuration.embedder), ("vector", layer, self._configuration.embedder)]
        return first if of_memories else [*first, ("keyword", layer)]  # distilling indexes the words of memories

    def search(self, text: str, k: int) -> list[tuple[str, float]]:
        """The k best documents."""
        found: dict[str, Arm] = {}
        spent = self._corpus.embed_query(self._configuration.embedder, text) if self._uses_vector else 0.0
        for arm in self._configuration.arms:
            result, milliseconds = self._corpus.arm(arm, self._configuration, text)
            spent += milliseconds
            if len(result[0]):
                found[arm] = result
        start = time.process_time()
        hits: list[tuple[str, float]] = []
        if found:
            query = recall.Query(text, k=k, fusion=self._configuration.fusion, layer=self._configuration.layer)
            docs, scores = recall.fuse(self._corpus.arms, query, found, recall.DEFAULT_WEIGHTS[query.layer])
            ids = self._corpus.ids
            hits = [(ids[doc], score) for doc, score in zip(docs[:k].tolist(), scores[:k].tolist(), strict=True)]
        self.query_ms = spent + (time.process_time() - start) * 1000
        return hits

    def returned(self, document_id: str) -> str:
        """The memory where the layer has memories and the document has one, else the document's text."""
        memory = self._memories.get(document_id)
        return self._corpus.texts[document_id] if memory is None else memory

    def num_bytes(self) -> int:
        """Bytes of the rows that it reads and of the texts that it returns, before DuckDB's compression."""
        rows = sum(self._corpus.num_bytes(part) for part in self._parts)
        return rows + sum(len(self.returned(doc).encode("utf-8", "replace")) for doc in self._corpus.texts)

    def close(self) -> None:
        """Closes the store if no other configuration uses it."""
        self._corpus.release()


class Corpus:
    """One store with the documents of a scope; parts of it are made on demand and timed.

    Parts: ("exchanges",), ("keyword", "verbatim"), ("memories", distiller) with their words indexed, ("model",
    embedder), ("vector", layer, embedder).
    """

    def __init__(
        self, documents: Sequence[Document], tokenizer: str, folder: Path, on_close: Callable[[], object]
    ) -> None:
        self.tokenizer, self.num_users, self._on_close = tokenizer, 0, on_close
        self.ids = {doc: document.id for doc, document in enumerate(documents, 1)}
        self.texts = {document.id: document.text for document in documents}
        self.seconds: dict[tuple[str, ...], float] = {}
        number = {document.id: doc for doc, document in enumerate(documents, 1)}
        self._previous = {number[d.id]: number[d.previous] for d in documents if d.previous in number}
        self._documents = documents
        self._embedders: dict[str, embedding.Embedder] = {}
        self._for_queries: dict[str, embedding.Embedder] = {}
        self._dense: dict[tuple[str, str], dense.DenseIndex] = {}
        self._asked = _Asked("")
        self.store = Store(folder / f"{tokenizer.replace('/', '-')}.duckdb")
        self.con.execute("SET threads = 1")
        self.arms = Arms(self.store, warm=True)

    @property
    def con(self) -> duckdb.DuckDBPyConnection:
        """The store's connection."""
        return self.store.con

    def release(self) -> None:
        """One user less; the last one closes the store."""
        self.num_users -= 1
        if self.num_users <= 0:
            self.store.close()
            self._on_close()

    # -- building

    def need(self, part: tuple[str, ...]) -> None:
        """Makes a part unless it is there; parts that it builds on must be."""
        if part in self.seconds:
            return
        start = time.process_time()
        if part[0] == "exchanges":
            self._fill()
        elif part[0] == "keyword":
            self._index(VERBATIM, ((doc, d.user, d.assistant) for doc, d in enumerate(self._documents, 1)))
        elif part[0] == "memories":
            distill(self.store, _DISTILLERS[part[1]](), on_memories=self._on_memories)
        elif part[0] == "model":
            self._embedders[part[1]] = self._embedder(part[1])
        else:
            self._embed(part[1], part[2])
        self.seconds[part] = time.process_time() - start

    def _fill(self) -> None:
        place: dict[int, tuple[str, int]] = {}  # doc -> its conversation and position there
        rows = []
        for doc, document in enumerate(self._documents, 1):
            before = self._previous.get(doc)
            cid, position = (place[before][0], place[before][1] + 1) if before else (f"thread-{doc}", 0)
            place[doc] = cid, position
            user, assistant = valid(document.user), valid(document.assistant)
            collector = FileCollector()
            collector.add_text(user)
            collector.add_text(assistant)
            for path in document.files:
                collector.add_tool("Edit", {"file_path": path})
            files = json.dumps([{"path": f.path, "action": f.action} for f in collector.files()])
            tokens = count_tokens(user) + count_tokens(assistant)
            started = _microseconds(document.time)
            rows.append((doc, document.id, cid, "", position, position, position, "task", started, None, user,
                         assistant, files, "[]", tokens, digest(user, assistant)))  # fmt: skip
        threads = dict.fromkeys(cid for cid, _ in place.values())
        with self.store.transaction() as con:
            insert_rows(con, "conversations", _CONVERSATIONS, [(c, "task", c, "task", "task", 1, 1) for c in threads])
            insert_exchanges(con, rows)

    def _index(self, layer: str, texts: Iterable[tuple[int, str, str]]) -> None:
        documents = [postings.Document(doc, user, said, self._previous.get(doc)) for doc, user, said in texts]
        for start in range(0, len(documents), _BATCH):
            with self.store.transaction() as con:
                postings.add(con, layer, self.tokenizer, documents[start : start + _BATCH])

    def _on_memories(
        self, con: duckdb.DuckDBPyConnection, distiller: str, memories: list[tuple[int, str]]
    ) -> None:  # as index.on_memories, with this corpus' tokenizer
        batch = [postings.Document(doc, "", text, self._previous.get(doc)) for doc, text in memories]
        postings.add(con, distilled(distiller), self.tokenizer, batch)

    def _embedder(self, choice: str) -> embedding.Embedder:
        if choice.startswith(embedding.SENTENCE_TRANSFORMERS):
            return embedding.get_embedder(self.con, choice)
        kind, _, dim = choice.partition(":")
        if kind == "hashed" or len(self._documents) < LEARN_FROM:  # as memory.vectors decides
            return embedding.hashed(int(dim or embedding.DIM))
        learnt = embedding.learn([text for _, text in self._layer(VERBATIM)], int(dim or embedding.DIM))
        with self.store.transaction() as con:
            learnt.save(con)
        # The one in the store looks up the words of a query; the one in memory would copy its whole table for them.
        self._for_queries[choice] = embedding.get_embedder(self.con, learnt.name)
        return learnt

    def _embed(self, layer: str, choice: str) -> None:
        embedder, rows = self._embedders[choice], self._layer(layer)
        for start in range(0, len(rows), _BATCH):
            some = rows[start : start + _BATCH]
            vectors = embedder.embed([text for _, text in some])
            with self.store.transaction() as con:
                dense.add(con, layer, choice, [doc for doc, _ in some], vectors)
        if rows:
            self._dense[layer, choice] = dense.DenseIndex(self.con, layer, choice)

    def _layer(self, layer: str) -> list[tuple[int, str]]:
        """(doc, text) as the product embeds it."""
        if layer == VERBATIM:
            sql = "SELECT seq, user_text || '\n\n' || assistant_text FROM exchanges ORDER BY 1"
            return self.con.execute(sql).fetchall()
        found = self.memories(layer.removeprefix("distilled/"))
        return [(doc, found[id]) for doc, id in self.ids.items() if id in found]

    def memories(self, distiller: str) -> dict[str, str]:
        """Document id -> text of its memory."""
        sql = "SELECT exchange_id, text FROM memories WHERE distiller = ?"
        return dict(self.con.execute(sql, [distiller]).fetchall())

    def num_bytes(self, part: tuple[str, ...]) -> int:
        """Bytes of the rows of a part of the index; texts are counted by who returns them."""
        if part[0] in ("keyword", "memories"):
            layer = VERBATIM if part[0] == "keyword" else distilled(part[1])
            sql = (
                "SELECT (SELECT 26 * count(*) FROM lexical_documents SEMI JOIN mine USING (layer)) + "
                "(SELECT 22 * count(*) FROM lexical_postings SEMI JOIN mine USING (layer)) + "
                "(SELECT 22 * count(*) FROM lexical_recent SEMI JOIN mine USING (layer))"
            )
            with_layer = f"WITH mine AS (SELECT layer FROM lexical_layers WHERE name = ?) {sql}"
            return int(self.con.execute(with_layer, [layer]).fetchall()[0][0])
        if part[0] == "vector":
            sql = (
                "SELECT coalesce(sum(14 + octet_length(vector)), 0) FROM embeddings JOIN embedding_spaces "
                "USING (space) WHERE layer = ? AND model = ?"
            )
            return int(self.con.execute(sql, [part[1], part[2]]).fetchall()[0][0])
        if part[0] == "model" and isinstance(model := self._embedders[part[1]], embedding.LexicalEmbedder):
            return len(model._known.feature) * (12 + 2 * model.dim)
        return 0

    # -- searching

    def embed_query(self, embedder: str, text: str) -> float:
        """Embeds the query for the vector arms; returns the CPU milliseconds that it took the first time."""
        asked = self._about(text)
        if embedder not in asked.vectors:
            start = time.process_time()
            vector = self._for_queries.get(embedder, self._embedders[embedder]).embed([text])[0]
            asked.vectors[embedder] = vector, (time.process_time() - start) * 1000
        return asked.vectors[embedder][1]

    def arm(self, name: str, configuration: Configuration, text: str) -> tuple[Arm, float]:
        """What an arm finds, and the CPU milliseconds that it took the first time."""
        mechanism, _, short = name.partition(":")
        layer = VERBATIM if short == "verbatim" else distilled(configuration.distiller)
        asked, embedder = self._about(text), configuration.embedder if mechanism == "vector" else ""
        key = (mechanism, layer, embedder)
        if key not in asked.arms:
            start = time.process_time()
            if not embedder:
                found = self.arms.keyword(layer, text, recall.CANDIDATES, None, window=mechanism == "window")
            elif (index := self._dense.get((layer, embedder))) is None:
                found = NOTHING
            else:
                found = index.search(asked.vectors[embedder][0], recall.CANDIDATES)
            asked.arms[key] = found, (time.process_time() - start) * 1000
        return asked.arms[key]

    def _about(self, text: str) -> _Asked:
        if self._asked.text != text:
            self._asked = _Asked(text)
        return self._asked


@dataclass(slots=True)
class _Asked:
    """What one query has found so far, each with its milliseconds."""

    text: str
    vectors: dict[str, tuple[NDArray[np.float32], float]] = field(default_factory=dict)
    arms: dict[tuple[str, str, str], tuple[Arm, float]] = field(default_factory=dict)


_CONVERSATIONS: dict[str, Kind] = {
    "conversation_id": "valid", "format": "valid", "session_id": "valid", "source_id": "valid", "path": "valid",
    "first_seq": "int", "num_messages": "int",
}  # fmt: skip


def _microseconds(time: str) -> int | None:
    """Since the epoch, of an ISO time (without a zone: UTC); None for what is none."""
    try:
        at = datetime.fromisoformat(time)
    except ValueError:
        return None
    return int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1_000_000)


def installed(*packages: str) -> dict[str, str]:
    """Versions of those of these packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def _weights(embedder: str) -> str:
    """Digest of a sentence-transformers model's content: the same name may hold another tomorrow (evals.md P1)."""
    if not embedder.startswith(embedding.SENTENCE_TRANSFORMERS):
        return ""
    model = embedding.SentenceTransformersEmbedder(embedder.removeprefix(embedding.SENTENCE_TRANSFORMERS))._model
    import torch

    found = hashlib.sha256(f"{model} {sorted(model.tokenizer.get_vocab().items())}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
