"""BM25 against rank-bm25, bm25s and brute force, on randomised corpora with additions, replacements and removals."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_bm25 import BM25Okapi

from workbench.errors import InputError, NotFound
from workbench.memory import bm25, maxscore, postings, weights
from workbench.memory.bm25 import Bm25Options, ColdBm25, WarmBm25
from workbench.memory.stored_postings import Stored

SCHEMA = (Path(__file__).parents[2] / "data/schema/0002_recall.sql").read_text()
# The first words are so frequent that their Okapi idf is negative.
WORDS = ["the"] * 30 + ["and"] * 20 + [f"w{i}" for i in range(40)]
Corpus = dict[int, tuple[str, str, int | None]]  # doc: user's words, assistant's words, doc before
ENGINES = [ColdBm25, WarmBm25]


def connect() -> duckdb.DuckDBPyConnection:
    con = duckdb.connect()
    con.execute(SCHEMA)
    return con


def begin() -> tuple[duckdb.DuckDBPyConnection, Corpus]:
    con, corpus = connect(), {0: ("w1 w2", "the end", None)}
    postings.add(con, "verbatim", "words/1", [(0, *corpus[0])])
    return con, corpus


def words(rng: random.Random, most: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(0, most)))


def change(con: duckdb.DuckDBPyConnection, corpus: Corpus, rng: random.Random, doc: int) -> int:
    """One random change of the layer and of `corpus`, its plain copy; returns the next free doc."""
    step = rng.random()
    if step < 0.2 and corpus:
        gone = rng.sample(sorted(corpus), rng.randint(1, min(3, len(corpus))))
        assert postings.remove(con, "verbatim", [*gone, 10_000]) == len(gone)
        for each in gone:
            del corpus[each]
    elif step < 0.3:
        postings.compact(con, "verbatim")
    else:
        batch = []
        for _ in range(rng.randint(1, 8)):
            number, previous = doc, (doc - 1 if rng.random() < 0.7 and doc > 1 else None)
            if rng.random() < 0.2 and corpus:
                number = rng.choice(sorted(set(corpus) - {each[0] for each in batch}) or [doc])
                previous = corpus[number][2] if number in corpus else previous
            text = (words(rng, 12), words(rng, 12), previous)
            batch.append((number, *text))
            corpus[number] = text
            doc += 1 + rng.randint(0, 1)
        postings.add(con, "verbatim", "words/1", batch)
    return doc


def by_rank_bm25(corpus: Corpus, query: str) -> dict[int, float]:
    docs = sorted(corpus)
    texts = [f"{corpus[doc][0]} {corpus[doc][1]}".split() for doc in docs]
    scores = BM25Okapi(texts).get_scores(query.split())
    return {doc: scores[i] for i, doc in enumerate(docs) if set(texts[i]) & set(query.split())}


def by_bm25s(corpus: Corpus, query: str) -> dict[int, float]:
    import bm25s

    docs = sorted(corpus)
    texts = [f"{corpus[doc][0]} {corpus[doc][1]}".split() for doc in docs]
    retriever = bm25s.BM25(method="lucene", k1=1.5, b=0.75, dtype="float64", backend="numpy")
    retriever.index(texts, show_progress=False)
    known = [word for word in query.split() if word in retriever.vocab_dict]
    scores = retriever.get_scores(known) if known else np.zeros(len(docs))
    return {doc: scores[i] for i, doc in enumerate(docs) if set(texts[i]) & set(known)}


def by_definition(corpus: Corpus, query: str, options: Bm25Options) -> dict[int, float]:
    """Role prior and windows, written out over whole texts (lucene's idf, which knows no floor)."""
    docs = sorted(corpus)
    weights = (options.weight_user, options.weight_assistant)
    counts: dict[int, Counter[str]] = {}
    for doc in docs:
        counts[doc] = Counter()
        for text, weight in zip(corpus[doc][:2], weights, strict=True):
            for word in text.split():
                counts[doc][word] += weight  # type: ignore[assignment]
        counts[doc] = +counts[doc]
    df = Counter(word for doc in docs for word in counts[doc])
    windows = dict(counts)
    if options.window:
        after = {corpus[doc][2]: doc for doc in docs if corpus[doc][2] in corpus}
        before = {later: earlier for earlier, later in after.items()}
        nothing: Counter[str] = Counter()
        windows = {
            doc: counts[doc] + counts.get(before.get(doc, -1), nothing) + counts.get(after.get(doc, -1), nothing)
            for doc in docs
        }
    lengths = {doc: sum(windows[doc].values()) for doc in docs}
    mean = sum(lengths.values()) / len(docs)
    scores: dict[int, float] = {}
    for word in query.split():
        if not df[word]:
            continue
        idf = np.log(1 + (len(docs) - df[word] + 0.5) / (df[word] + 0.5))
        for doc in docs:
            if tf := windows[doc][word]:
                norm = options.k1 * (1 - options.b + options.b * lengths[doc] / mean)
                scores[doc] = scores.get(doc, 0.0) + idf * tf / (tf + norm)
    return scores


def check(found: tuple[np.ndarray, np.ndarray], wanted: dict[int, float]) -> None:
    docs, scores = found
    assert sorted(docs.tolist()) == sorted(wanted)
    np.testing.assert_allclose(scores, [wanted[doc] for doc in docs.tolist()], rtol=0, atol=1e-9)
    keys = [(-score, doc) for doc, score in zip(docs.tolist(), scores.tolist(), strict=True)]
    assert keys == sorted(keys)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("variant", "reference"), [("okapi", by_rank_bm25), ("lucene", by_bm25s)], ids=["okapi", "lucene"]
)
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_reference_after_every_change(
    engine: type[ColdBm25] | type[WarmBm25], variant: str, reference: Callable, seed: int
) -> None:
    rng, doc, (con, corpus) = random.Random(seed), 1, begin()
    searcher = engine(con, "verbatim")
    for _ in range(25):
        doc = change(con, corpus, rng, doc)
        if not any(f"{a}{b}" for a, b, _ in corpus.values()):
            continue  # the references divide by a mean length of zero
        query = f"{words(rng, 6)} unheard-of w1 w1"
        found = searcher.search(query, options=Bm25Options(variant=variant))  # type: ignore[arg-type]
        check(found, reference(corpus, query))
        assert len(searcher) == len(corpus)


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    user=st.sampled_from([0.0, 0.5, 1.0, 2.5]),
    assistant=st.sampled_from([0.0, 1.0, 1.5]),
    window=st.booleans(),
)
def test_role_prior_and_window_equal_their_definition(
    engine: type[ColdBm25] | type[WarmBm25], seed: int, user: float, assistant: float, window: bool
) -> None:
    rng, doc, (con, corpus) = random.Random(seed), 1, begin()
    options = Bm25Options(variant="lucene", weight_user=user, weight_assistant=assistant, window=window)
    searcher = engine(con, "verbatim")
    for _ in range(6):
        doc = change(con, corpus, rng, doc)
        query = words(rng, 5)
        if corpus:
            check(searcher.search(query, options=options), by_definition(corpus, query, options))


@pytest.mark.parametrize("engine", ENGINES)
def test_best_n_of_allowed_documents_with_ties_in_order(engine: type[ColdBm25] | type[WarmBm25]) -> None:
    con = connect()
    postings.add(con, "verbatim", "words/1", [(doc, "", "same words here", None) for doc in (9, 4, 7, 2)])
    postings.add(con, "verbatim", "words/1", [(3, "", "same", None), (5, "", "other text altogether", None)])
    searcher = engine(con, "verbatim")
    assert searcher.search("same words")[0].tolist() == [2, 4, 7, 9, 3]
    assert searcher.search("same words", 2)[0].tolist() == [2, 4]
    docs, scores = searcher.search("same words", 3, allowed=np.array([3, 5, 9, 4]))
    assert docs.tolist() == [4, 9, 3]
    everything = dict(zip(*(part.tolist() for part in searcher.search("same words")), strict=True))
    assert scores.tolist() == [everything[doc] for doc in (4, 9, 3)]
    for nothing in ("", "unheard-of", "?!"):
        assert len(searcher.search(nothing)[0]) == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_long_queries_ask_for_all_their_terms(engine: type[ColdBm25] | type[WarmBm25]) -> None:
    con = connect()
    postings.add(con, "verbatim", "words/1", [(doc, f"term{doc}", "", None) for doc in range(120)])
    docs, _ = engine(con, "verbatim").search(" ".join(f"term{doc}" for doc in range(0, 120, 2)))
    assert sorted(docs.tolist()) == list(range(0, 120, 2))


def test_layers_do_not_see_each_other() -> None:
    con = connect()
    postings.add(con, "verbatim", "words/1", [(1, "alpha", "", None)])
    postings.add(con, "distilled/extractive/1", "stem/1", [(1, "", "beta", None), (2, "", "running", None)])
    assert ColdBm25(con, "verbatim").search("alpha beta")[0].tolist() == [1]
    assert ColdBm25(con, "distilled/extractive/1").search("alpha ran runs")[0].tolist() == [2]
    postings.compact(con, "verbatim")
    postings.remove(con, "verbatim", [1])
    assert ColdBm25(con, "distilled/extractive/1").search("beta")[0].tolist() == [1]


def test_a_rolled_back_addition_leaves_nothing() -> None:
    con = connect()
    postings.add(con, "verbatim", "words/1", [(1, "alpha", "beta", None)])
    searcher = WarmBm25(con, "verbatim")
    before = [con.execute(f"SELECT * FROM lexical_{table}").fetchall() for table in ("documents", "recent", "layers")]
    con.execute("BEGIN")
    postings.add(con, "verbatim", "words/1", [(1, "gamma", "", None), (2, "alpha", "", None)])
    postings.compact(con, "verbatim")
    con.execute("ROLLBACK")
    after = [con.execute(f"SELECT * FROM lexical_{table}").fetchall() for table in ("documents", "recent", "layers")]
    assert before == after
    assert searcher.search("alpha")[0].tolist() == [1]


def test_a_warm_index_that_looked_into_a_rolled_back_transaction_forgets_it() -> None:
    con = connect()
    postings.add(con, "verbatim", "words/1", [(1, "alpha", "beta", None), (2, "alpha", "", 1)])
    searcher = WarmBm25(con, "verbatim")
    for again in (False, True):
        con.execute("BEGIN")
        postings.add(con, "verbatim", "words/1", [(1, "gamma", "", None), (3, "alpha", "", None)])
        assert searcher.search("gamma alpha")[0].tolist() == [1, 2, 3]
        con.execute("ROLLBACK")
        if again:
            postings.add(con, "verbatim", "words/1", [(4, "alpha", "", None)])
        for query in ("gamma", "alpha", "beta"):
            found, wanted = searcher.search(query), ColdBm25(con, "verbatim").search(query)
            assert found[0].tolist() == wanted[0].tolist()
            np.testing.assert_array_equal(found[1], wanted[1])


def test_compaction_comes_when_there_is_much_to_sort_and_changes_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    con, rng = connect(), random.Random(3)
    monkeypatch.setattr(postings, "_RECENT_ROWS", 50)
    monkeypatch.setattr(postings, "_COMPACT_ROWS_AT_ONCE", 60)
    postings.add(con, "verbatim", "words/1", [(1, "alpha", "", None)])
    assert postings.maintain(con) == []
    postings.add(con, "verbatim", "words/1", [(doc, words(rng, 9), words(rng, 9), doc - 1) for doc in range(2, 60)])
    before = ColdBm25(con, "verbatim").search("w1 w2 the alpha")
    assert postings.maintain(con, more_follows=True) == [], "more is left unsorted while a large ingest runs"
    assert postings.maintain(con) == ["verbatim"]
    after = ColdBm25(con, "verbatim").search("w1 w2 the alpha")
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_allclose(before[1], after[1], atol=1e-12)
    assert con.execute("SELECT count(*) FROM lexical_recent").fetchall() == [(0,)]
    rows = con.execute("SELECT term, doc FROM lexical_postings").fetchall()
    assert rows == sorted(rows)
    assert len(rows) > 60  # several parts were sorted


def test_compaction_of_many_row_groups_in_one_transaction() -> None:
    con, rng = connect(), random.Random(4)
    vocabulary = [f"w{i}" for i in range(5_000)]
    con.execute("BEGIN")
    batch = [(doc, "", " ".join(rng.choices(vocabulary, k=50)), None) for doc in range(6_000)]
    postings.add(con, "verbatim", "words/1", batch)
    before = ColdBm25(con, "verbatim").search("w1 w2 w3", 20)
    assert postings.maintain(con) == ["verbatim"]
    inside = ColdBm25(con, "verbatim").search("w1 w2 w3", 20)
    con.execute("COMMIT")
    for after in (inside, ColdBm25(con, "verbatim").search("w1 w2 w3", 20)):
        assert len(before[0]) == 20
        np.testing.assert_array_equal(before[0], after[0])
        np.testing.assert_allclose(before[1], after[1], atol=1e-12)


def test_a_warm_index_reads_everything_anew_after_many_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bm25, "_CHANGED_MIN", 3)
    rng, doc, (con, corpus) = random.Random(5), 1, begin()
    searcher = WarmBm25(con, "verbatim")
    for _ in range(40):
        doc = change(con, corpus, rng, doc)
        check(searcher.search("w1 w2 w3 the"), by_rank_bm25(corpus, "w1 w2 w3 the"))


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    variant=st.sampled_from(["okapi", "lucene"]),
    roles=st.sampled_from([(1.0, 1.0), (1.0, 1.0), (0.5, 1.5), (0.0, 1.0), (2.0, 0.0)]),
    window=st.booleans(),
    ask=st.sampled_from([1e-12, 1e-7, 1.0]),  # seconds to look a document up: never read, sometimes, always read
)
def test_the_n_best_are_the_first_n_of_all(
    engine: type[ColdBm25] | type[WarmBm25],
    seed: int,
    variant: str,
    roles: tuple[float, float],
    window: bool,
    ask: float,
) -> None:
    rng, doc, (con, corpus) = random.Random(seed), 1, begin()
    options = Bm25Options(variant=variant, weight_user=roles[0], weight_assistant=roles[1], window=window)  # type: ignore[arg-type]
    with ExitStack() as patched:
        for name in ("_SAMPLED", "_WATCHED_MIN", "_WORTH_A_LOOK"):
            patched.enter_context(mock.patch.object(maxscore, name, 1))
        patched.enter_context(mock.patch.object(maxscore, "_RANGE", rng.choice([5, 1_000])))
        patched.enter_context(mock.patch.object(bm25, "_LARGE", 0))
        patched.enter_context(mock.patch.object(bm25, "_SOME", rng.choice([1, 3, 10_000])))
        patched.enter_context(mock.patch.object(weights, "_FREQUENT", rng.choice([1, 10_000])))
        patched.enter_context(mock.patch.object(weights, "_MAX_KEPT", 40))
        for source in (weights.Held, Stored):
            patched.enter_context(mock.patch.object(source, "read_at_seconds", return_value=(0.0, ask)))
        searcher = engine(con, "verbatim")
        for _ in range(6):
            for _ in range(3):
                doc = change(con, corpus, rng, doc)
            query = " ".join(rng.choice(WORDS[45:]) if rng.random() < 0.7 else rng.choice(WORDS) for _ in range(6))
            allowed = np.array(rng.sample(range(doc + 5), (doc + 5) // 2)) if rng.random() < 0.5 else None
            # Another searcher, so that what this one has read is no help.
            docs, scores = ColdBm25(con, "verbatim").search(query, options=options)
            if allowed is not None:
                kept = np.isin(docs, allowed)
                docs, scores = docs[kept], scores[kept]
            for n in (1, 2, 7, 1_000):
                found = searcher.search(query, n, allowed=allowed, options=options)
                np.testing.assert_array_equal(found[0], docs[:n])
                np.testing.assert_array_equal(found[1], scores[:n])
            assert len(searcher.search(query, 0, options=options)[0]) == 0


def test_a_cold_index_finds_what_a_compaction_has_moved_since_its_last_query() -> None:
    con, _ = begin()
    postings.add(con, "verbatim", "words/1", [(doc, "alpha", f"beta w{doc}", None) for doc in range(1, 40)])
    postings.compact(con, "verbatim")
    postings.add(con, "verbatim", "words/1", [(doc, "alpha", "gamma", None) for doc in range(40, 50)])
    with mock.patch.object(bm25, "_LARGE", 0), mock.patch.object(bm25, "_SOME", 1_000):
        searcher = ColdBm25(con, "verbatim")
        allowed = np.array([3, 45])
        first = searcher.search("alpha beta", 5, allowed=allowed)
        postings.compact(con, "verbatim")
        second = searcher.search("alpha beta", 5)
        assert first[0].tolist() == [3, 45]
        wanted = WarmBm25(con, "verbatim").search("alpha beta", 5)
    np.testing.assert_array_equal(second[0], wanted[0])
    np.testing.assert_array_equal(second[1], wanted[1])


def test_gains_that_are_looked_up_by_length_are_the_same() -> None:
    con, rng = connect(), random.Random(3)
    texts = [" ".join(rng.choice(["a", "b", "b", f"w{doc}"]) for _ in range(rng.randint(2, 7))) for doc in range(500)]
    postings.add(con, "verbatim", "words/1", [(doc, "", text, None) for doc, text in enumerate(texts)])
    cold, warm = (engine(con, "verbatim").search("b w7 a") for engine in ENGINES)
    with mock.patch.object(weights, "_MAX_TABLE", 0):
        without = WarmBm25(con, "verbatim").search("b w7 a")
    for found in (warm, without):
        np.testing.assert_array_equal(found[0], cold[0])
        np.testing.assert_array_equal(found[1], cold[1])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_that_is_open_read_only_is_looked_at_anew_with_each_connection(
    tmp_path: Path, engine: type[ColdBm25] | type[WarmBm25]
) -> None:
    file = str(tmp_path / "some.duckdb")
    with duckdb.connect(file) as con:
        con.execute(SCHEMA)
        postings.add(con, "verbatim", "words/1", [(0, "", "alpha", None)])
    with duckdb.connect(file, read_only=True) as con:
        searcher = engine(con, "verbatim")
        assert searcher.search("alpha")[0].tolist() == searcher.search("alpha")[0].tolist() == [0]
    with duckdb.connect(file) as con:
        postings.add(con, "verbatim", "words/1", [(1, "", "alpha", None)])
        searcher.attach(con)
        assert searcher.search("alpha")[0].tolist() == [0, 1]
        postings.add(con, "verbatim", "words/1", [(2, "", "alpha", None)])
        assert searcher.search("alpha")[0].tolist() == [0, 1, 2]
        postings.remove(con, "verbatim", [0])
    with duckdb.connect(file, read_only=True) as con:
        searcher.attach(con)
        assert searcher.search("alpha")[0].tolist() == [1, 2]
        assert len(searcher) == 2


def test_mistakes_are_named() -> None:
    con = connect()
    with pytest.raises(NotFound, match="verbatim"):
        ColdBm25(con, "verbatim").search("x")
    with pytest.raises(InputError, match=r"stem/9.*code/1"):
        postings.add(con, "verbatim", "stem/9", [(1, "a", "", None)])
    postings.add(con, "verbatim", "words/1", [(1, "a", "", None)])
    with pytest.raises(InputError, match=r"words/1.*code/1"):
        postings.add(con, "verbatim", "code/1", [(2, "a", "", None)])
    with pytest.raises(InputError, match="twice"):
        postings.add(con, "verbatim", "words/1", [(2, "a", "", None), (2, "b", "", None)])
    postings.drop_layer(con, "verbatim")
    assert postings.add(con, "verbatim", "code/1", [(2, "a_b", "", None)]) == 1
    assert ColdBm25(con, "verbatim").search("b")[0].tolist() == [2]
