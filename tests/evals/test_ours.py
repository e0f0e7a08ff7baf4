"""Our adapter: its rankings are the product's own, ids survive, parts are shared, memories are what it returns."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from workbench.data.store import Store
from workbench.evals.baseline_distillers import TOKENS, Head, Span
from workbench.evals.ours import Corpora, OurIndex, OurRecall
from workbench.evals.recall_grid import Configuration, grid
from workbench.evals.tasks.base import Document
from workbench.memory import vectors
from workbench.memory.checks import violations
from workbench.memory.distill import distill
from workbench.memory.distillers.extractive import Extractive
from workbench.memory.exchanges import insert_exchanges
from workbench.memory.files import FileCollector
from workbench.memory.index import TOKENIZER, VERBATIM, on_memories
from workbench.memory.postings import Document as Indexed
from workbench.memory.postings import add
from workbench.memory.recall import FUSIONS, LAYERS, Query, recall
from workbench.memory.tokens import count_tokens
from workbench.memory.types import Distilled, Exchange

WORDS = [
    "retry", "queue", "worker", "token", "budget", "parser", "socket", "index", "merge", "branch", "cache", "schema",
    "commit", "render", "filter",
]  # fmt: skip
QUERIES = ("retry the parser", "token budget of the worker", "unusual12 and unusual7", "nothing of the kind zzz")


def documents(count: int = 40) -> list[Document]:
    rng = random.Random(3)
    found = []
    for number in range(count):
        user = f"please {' '.join(rng.choices(WORDS, k=8))} in src/file{number}.py unusual{number}"
        assistant = f"I've updated it. {' '.join(rng.choices(WORDS, k=30))} and `value{number}` is set."
        before = f"d{number - 1}" if number % 6 else None
        found.append(Document(f"d{number}", user, assistant if number % 7 else "", previous=before))
    return found


def product_store(path: Path, docs: list[Document]) -> Store:
    """A store filled by the product's own functions, one call after the other."""
    import json

    store = Store(path)
    number = {document.id: at for at, document in enumerate(docs, 1)}
    rows, indexed, place = [], [], {}
    for at, document in enumerate(docs, 1):
        conversation, position = place.get(document.previous, (f"c{at}", -1))
        place[document.id] = conversation, position + 1
        collector = FileCollector()
        collector.add_text(document.user)
        collector.add_text(document.assistant)
        files = json.dumps([{"path": f.path, "action": f.action} for f in collector.files()])
        tokens = count_tokens(document.user) + count_tokens(document.assistant)
        rows.append((at, document.id, conversation, "", position + 1, 0, 0, "x", None, None, document.user,
                     document.assistant, files, "[]", tokens, document.id))  # fmt: skip
        indexed.append(Indexed(at, document.user, document.assistant, number.get(document.previous or "")))
    with store.transaction() as con:
        for conversation in dict.fromkeys(c for c, _ in place.values()):
            con.execute(
                "INSERT INTO conversations BY NAME SELECT ? AS conversation_id, 'x' AS format, ? AS session_id, "
                "'x' AS source_id, 'x' AS path, 1 AS first_seq, 1 AS num_messages", [conversation, conversation]
            )  # fmt: skip
        insert_exchanges(con, rows)
        add(con, VERBATIM, TOKENIZER, indexed)
    distill(store, Extractive(), on_memories=on_memories)
    vectors.update(store)
    return store


@pytest.mark.parametrize("fusion", FUSIONS)
def test_rankings_are_those_of_the_products_recall(tmp_path: Path, fusion: str) -> None:
    docs, corpora = documents(), Corpora()
    with product_store(tmp_path / "product.duckdb", docs) as store:
        for layer in LAYERS:
            for mode in ("keyword", "vector", "hybrid"):
                configuration = Configuration(layer=layer, mode=mode, fusion=fusion)
                folder = tmp_path / configuration.name
                folder.mkdir()
                index = OurRecall(configuration, corpora).build(docs, folder)
                for text in QUERIES:
                    hits = recall(store, Query(text, mode=mode, layer=layer, fusion=fusion, k=20))
                    expected = [(hit.exchange_id, pytest.approx(hit.score, abs=2e-6)) for hit in hits]
                    assert index.search(text, 20) == expected, (configuration.name, text)
                index.close()


def test_every_document_becomes_one_exchange_under_its_own_id(tmp_path: Path) -> None:
    """Short ones, empty ones, very long ones and odd ids: segmentation would drop, join or cut them."""
    docs = [
        Document("a b/c'\"\\", "tiny"), Document("…", "", "only an answer about sockets"), Document("empty", ""),
        Document("long", "queue " * 30_000), Document("half", "half \ud800 of a pair"),
        *documents(12),
    ]  # fmt: skip
    index = OurRecall(Configuration(layer="verbatim", mode="keyword")).build(docs, tmp_path)
    for text, wanted in (("tiny", "a b/c'\"\\"), ("sockets", "…"), ("queue", "long"), ("half pair", "half")):
        assert wanted in [doc for doc, _ in index.search(text, len(docs))], text
    assert index._corpus.con.execute("SELECT count(*) FROM exchanges").fetchall() == [(len(docs),)]
    assert index.returned("long") == docs[3].text
    assert index.num_bytes() > 180_000
    index.close()


def test_neighbours_are_those_of_the_thread(tmp_path: Path) -> None:
    """A window finds a document by the words of the one before it in its thread, and not across threads."""
    docs = [
        Document("a1", "zebra crossing"), Document("a2", "second of the thread", previous="a1"),
        Document("b1", "another thread"), *(Document(f"n{i}", f"noise {i}") for i in range(9)),
    ]  # fmt: skip
    index = OurRecall(Configuration(layer="verbatim", mode="window")).build(docs, tmp_path)
    assert {doc for doc, _ in index.search("zebra", 10)} == {"a1", "a2"}
    index.close()


def test_a_hit_of_the_memory_layers_returns_the_memory_and_verbatim_the_text(tmp_path: Path) -> None:
    docs = [*documents(), Document("empty", "")]
    for layer in LAYERS:
        (tmp_path / layer).mkdir()
        index = OurRecall(Configuration(layer=layer, mode="keyword")).build(docs, tmp_path / layer)
        for document in docs[:5]:
            returned = index.returned(document.id)
            if layer == "verbatim":
                assert returned == document.text
            else:
                memory = index._corpus.con.execute(
                    "SELECT text FROM memories WHERE exchange_id = ?", [document.id]
                ).fetchall()
                assert [(returned,)] == memory
                assert count_tokens(returned) < count_tokens(document.text)
        assert index.returned("empty") == ""
        assert index.num_unindexed == 0
        index.close()


def test_documents_whose_record_fails_the_checks_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are lost to the memory layer: the report must say so."""
    monkeypatch.setattr(
        "workbench.memory.distill.violations", lambda exchange, _: ["no"] if exchange.exchange_id == "d3" else []
    )
    for layer, lost in (("distilled", 1), ("both", 0), ("verbatim", 0)):
        (tmp_path / layer).mkdir()
        index = OurRecall(Configuration(layer=layer, mode="bm25")).build(documents(), tmp_path / layer)
        assert index.num_unindexed == lost
        assert ("d3" in [doc for doc, _ in index.search("unusual3", 40)]) == (not lost)
        index.close()


def test_configurations_share_one_store_and_cost_as_if_they_did_not(tmp_path: Path) -> None:
    docs, corpora = documents(), Corpora()
    indexes: list[OurIndex] = []
    for number, configuration in enumerate(grid("default")):
        (tmp_path / str(number)).mkdir()
        indexes.append(OurRecall(configuration, corpora).build(docs, tmp_path / str(number)))
    assert len({id(index._corpus) for index in indexes}) == 1
    assert len(list(tmp_path.rglob("*.duckdb"))) == 1
    by_name = {c.name: index for c, index in zip(grid("default"), indexes, strict=True)}
    for layer in LAYERS:
        parts = {mode: set(by_name[f"{layer} {mode}"]._parts) for mode in ("keyword", "vector", "hybrid")}
        assert parts["hybrid"] == parts["keyword"] | parts["vector"]
        seconds = by_name[f"{layer} hybrid"].build_seconds
        assert seconds == pytest.approx(sum(indexes[0]._corpus.seconds[part] for part in parts["hybrid"]))
    for index in indexes:
        assert index.query_ms is None
        index.search("retry", 3)
        assert index.query_ms is not None
    corpus = indexes[0]._corpus
    for index in indexes[:-1]:
        index.close()
    assert corpus.con.execute("SELECT 1").fetchall() == [(1,)]
    indexes[-1].close()
    assert not corpora._open


def test_the_order_of_configurations_changes_no_answer(tmp_path: Path) -> None:
    docs, configurations = documents(), grid("default", "fusions", "tokenizers")
    found = []
    for name, order in (("a", configurations), ("b", configurations[::-1])):
        corpora, answers = Corpora(), {}
        indexes = []
        for number, configuration in enumerate(order):
            folder = tmp_path / f"{name}{number}"
            folder.mkdir()
            indexes.append((configuration.name, OurRecall(configuration, corpora).build(docs, folder)))
        for text in QUERIES:
            for configuration_name, index in indexes:
                answers[configuration_name, text] = index.search(text, 10)
        for _, index in indexes:
            index.close()
        found.append(answers)
    assert found[0] == found[1]


def test_fingerprints_differ_by_every_option() -> None:
    changes = {"layer": "verbatim", "mode": "keyword", "tokenizer": "code/1", "embedder": "hashed", "fusion": "rrf",
               "distiller": "head/1"}  # fmt: skip
    plain = Configuration()
    found = {OurRecall(replace(plain, **{field: value})).fingerprint() for field, value in changes.items()}
    assert len(found | {OurRecall(plain).fingerprint()}) == 7
    assert OurRecall(plain).fingerprint() == OurRecall(Configuration()).fingerprint()


@pytest.mark.parametrize("distiller", [Head(), Span()])
def test_baseline_records_are_parts_of_the_text_within_their_tokens(distiller: Head | Span) -> None:
    exchanges = [Exchange(d.id, d.user, d.assistant) for d in documents()]
    records = list(distiller.distil(exchanges))
    assert records == list(distiller.distil(exchanges))
    for exchange, record in records:
        assert isinstance(record, Distilled)
        assert record.text in exchange.text
        assert count_tokens(record.text) <= TOKENS + 1  # additive up to one token at a seam
        assert violations(exchange, record) == []
    at_start = sum(e.text.startswith(r.text) for e, r in records if isinstance(r, Distilled))
    assert at_start == 40 if isinstance(distiller, Head) else at_start < 10
