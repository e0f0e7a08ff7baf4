"""The runner: known scores, what is asked again and what is not, failures as data, kills, hostile retrievers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pytest
import recall_made as m

from workbench.data.store import Store
from workbench.errors import InputError, MissingExtra
from workbench.evals import recall_run, recall_scores
from workbench.evals.recall_html import html
from workbench.evals.recall_report import Options, section
from workbench.evals.recall_run import Outcome, Progress, run
from workbench.evals.tasks.base import Document, RecallTask


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store(tmp_path / "s.duckdb") as opened:
        yield opened


def scored(store: Store, task: RecallTask, outcome: Outcome, name: str, **options: Any) -> recall_scores.Scored:
    tokens = recall_scores.tokens_of(task)
    stored = recall_scores.fetch(store.path, outcome.run_ids[name])
    return recall_scores.score(stored, task, task.split("all"), tokens, **options)


def answers(store: Store, run_id: str) -> dict[str, tuple[Any, ...]]:
    rows = store.con.execute(
        "SELECT query_id, status, error, docs, scores, tokens FROM eval_results WHERE run_id = ? ORDER BY attempt",
        [run_id],
    ).fetchall()
    return {row[0]: row[1:] for row in rows}


# --- scores that are known (evals.md P2)


def test_an_oracle_scores_1_and_a_random_order_what_chance_gives(store: Store) -> None:
    task = m.made(300, num_documents=40, scopes=1)
    outcome = run(store.path, task, [m.oracle(task), m.shuffled()], split="all", k=40)
    known = scored(store, task, outcome, "oracle")
    assert known.evaluation.means() == pytest.approx(dict.fromkeys(recall_scores.METRICS, 1.0))
    chance = scored(store, task, outcome, "random")
    assert chance.intervals["recall@10"].estimate == pytest.approx(10 / 40, abs=0.06)
    assert chance.is_verbatim
    assert chance.compression == 1.0
    assert chance.evaluation.num_empty == 0


def test_what_is_stored_is_what_came_back(store: Store) -> None:
    task = m.made()
    outcome = run(store.path, task, [m.overlap()], split="all", k=7)
    stored = answers(store, outcome.run_ids["overlap"])
    assert len(stored) == 24
    by_id = {document.id: document for document in task.documents}
    scopes = task.scopes()
    for query in task.queries:
        status, error, docs, scores, tokens = stored[query.id]
        expected = m.overlap().function(query.text, scopes[query.scope], 7)
        assert (status, error) == ("ok", None)
        assert list(zip(docs, scores, strict=True)) == expected
        assert tokens == [recall_scores.count_tokens(by_id[doc].text) for doc in docs]


# --- what is asked again


def test_nothing_is_asked_twice(store: Store) -> None:
    task, retriever = m.made(), m.overlap()
    first = run(store.path, task, [retriever], split="all", k=5)
    assert (first.num_asked, first.num_stored, retriever.num_searches) == (24, 0, 24)
    again = m.overlap()
    second = run(store.path, task, [again], split="all", k=5)
    assert (second.num_asked, second.num_stored, again.num_searches, again.num_builds) == (0, 24, 0, 0)
    assert second.run_ids == first.run_ids
    assert store.con.execute("SELECT count(*) FROM eval_runs").fetchall() == [(1,)]
    assert store.con.execute("SELECT scope FROM eval_builds ORDER BY 1").fetchall() == [("s0",), ("s1",)]


def test_another_model_of_the_same_name_is_never_answered_from_the_cache(store: Store) -> None:
    """evals.md P1: model B after model A must not be given A's answers."""
    task = m.made()
    a = run(store.path, task, [m.shuffled(version="A")], split="all", k=5)
    b = run(store.path, task, [m.shuffled(version="B")], split="all", k=5)
    assert b.num_asked == 24
    assert a.run_ids["random"] != b.run_ids["random"]
    for query in task.queries:
        documents = task.scopes()[query.scope]
        stored = answers(store, b.run_ids["random"])[query.id]
        expected = m.shuffled(version="B").function(query.text, documents, 5)
        assert stored[2] == [doc for doc, _ in expected]
    assert answers(store, a.run_ids["random"]) != answers(store, b.run_ids["random"])


def _longer(task: RecallTask) -> RecallTask:
    return replace(task, documents=(*task.documents, Document("new", "more words", scope="s0")))


@pytest.mark.parametrize("change", ["task", "version", "k", "split", "code"])
def test_whatever_an_answer_depends_on_makes_another_run(
    store: Store, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = m.made(40)
    before = run(store.path, task, [m.overlap()], split="all", k=5)
    options: dict[str, Any] = {"split": "all", "k": 5}
    if change == "task":
        task = _longer(task)
    elif change == "version":
        task = replace(task, version="2")
    elif change == "code":
        monkeypatch.setattr(recall_run, "code_version", lambda: "another")
    else:
        options[change] = {"k": 6, "split": "report"}[change]
    after = run(store.path, task, [m.overlap()], **options)
    assert after.num_stored == 0
    assert after.num_asked > 0
    assert set(after.run_ids.values()).isdisjoint(before.run_ids.values())


def test_the_order_of_the_queries_changes_nothing(store: Store) -> None:
    task = m.made()
    first = run(store.path, task, [m.overlap()], split="all")
    second = run(store.path, replace(task, queries=task.queries[::-1]), [m.overlap()], split="all")
    assert (second.num_asked, second.run_ids) == (0, first.run_ids)


# --- failures are data (evals.md P5)


def test_a_failed_query_is_a_status_with_a_count_and_not_an_empty_answer(store: Store) -> None:
    task = m.made()
    oracle = m.oracle(task)

    def search(text: str, documents: Sequence[Document], k: int) -> list[tuple[str, float]]:
        if text.split()[0] in ("name1", "name3", "name4", "name6", "name7", "name9"):
            raise RuntimeError(f"no luck with {text}")
        return oracle.function(text, documents, k)

    outcome = run(store.path, task, [m.Made("shaky", search)], split="all")
    result = scored(store, task, outcome, "shaky")
    assert result.statuses() == {"error": 6, "ok": 18}
    assert result.evaluation.means()["mrr"] == pytest.approx(18 / 24)
    assert result.completed is not None
    assert result.completed["mrr"] == 1.0
    assert result.first_error() == f"RuntimeError: no luck with {task.queries[1].text}"
    assert sum(result.statuses().values()) == len(result.evaluation.query_ids) == 24
    as_json = result.as_json(times=False)
    assert as_json["metrics"]["mrr"]["mean"] == 0.75
    assert as_json["metrics"]["mrr"]["completed"] == 1.0


def test_failed_queries_are_asked_again_only_when_told_to(store: Store) -> None:
    task = m.made()
    broken = {"is": True}
    oracle = m.oracle(task)

    def search(text: str, documents: Sequence[Document], k: int) -> list[tuple[str, float]]:
        if broken["is"] and text.startswith("name2 "):
            raise RuntimeError("down")
        return oracle.function(text, documents, k)

    retriever = m.Made("shaky", search)
    run(store.path, task, [retriever], split="all")
    broken["is"] = False
    assert run(store.path, task, [retriever], split="all").num_asked == 0
    outcome = run(store.path, task, [retriever], split="all", retry=True)
    assert outcome.num_asked == 1
    assert scored(store, task, outcome, "shaky").statuses() == {"ok": 24}
    attempts = store.con.execute("SELECT attempt, status FROM eval_results WHERE query_id = 'q2' ORDER BY 1").fetchall()
    assert attempts == [(1, "error"), (2, "ok")]


def test_a_query_that_hangs_is_a_timeout(store: Store) -> None:
    task = m.made(6)
    oracle = m.oracle(task)

    def search(text: str, documents: Sequence[Document], k: int) -> list[tuple[str, float]]:
        if text.startswith("name1 "):
            time.sleep(30)
        if text.startswith("name2 "):
            raise TimeoutError("the server said nothing")
        return oracle.function(text, documents, k)

    outcome = run(store.path, task, [m.Made("slow", search)], split="all", timeout_seconds=0.3)
    result = scored(store, task, outcome, "slow")
    assert result.statuses() == {"ok": 4, "timeout": 2}
    assert result.first_error() == "TimeoutError: no answer within 0.3 s"
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("hits", "said"),
    [
        ([("d0", 1.0), ("d0", 0.5)], "comes twice"),
        ([("d0", float("nan"))], "not a number"),
        ([("d0", float("inf"))], "is inf"),
        ([("nowhere", 1.0)], "no document of the scope"),
        ([("d1", 1.0)], "no document of the scope"),
        ([(f"d{2 * i}", 1.0) for i in range(6)], "6 documents where 5"),
        ([("d0", "high")], "ValueError"),
    ],
)
def test_answers_that_cannot_be_meant_are_errors(store: Store, hits: list[Any], said: str) -> None:
    task = m.made(1)
    outcome = run(store.path, task, [m.Made("odd", lambda *_: hits)], split="all", k=5)
    status, error, docs, scores, tokens = answers(store, outcome.run_ids["odd"])["q0"]
    assert status == "error"
    assert said in error
    assert docs == scores == tokens == []


def test_a_failed_build_counts_for_every_query_of_its_scope(store: Store) -> None:
    class Broken(m.Made):  # type: ignore[name-defined]
        def build(self, documents: Sequence[Document], folder: Path) -> Any:
            if documents[0].scope == "s1":
                raise OSError("no space")
            return super().build(documents, folder)

    task = m.made()
    oracle = m.oracle(task)
    outcome = run(store.path, task, [Broken("broken", oracle.function)], split="all")
    result = scored(store, task, outcome, "broken")
    assert result.statuses() == {"error": 12, "ok": 12}
    assert result.first_error() == "build: OSError: no space"
    assert result.evaluation.means()["mrr"] == 0.5


def test_what_lacks_a_library_is_named_and_leaves_no_answers(store: Store) -> None:
    class Lacking(m.Made):  # type: ignore[name-defined]
        def build(self, documents: Sequence[Document], folder: Path) -> Any:
            raise MissingExtra("bm25s is not installed", "test")

    class LackingEarly(m.Made):  # type: ignore[name-defined]
        def fingerprint(self) -> str:
            raise MissingExtra("torch is not installed", "train")

    task = m.made()
    oracle = m.oracle(task)
    outcome = run(
        store.path, task, [Lacking("a", oracle.function), oracle, LackingEarly("b", oracle.function)], split="all"
    )
    assert list(outcome.run_ids) == ["oracle"]
    assert set(outcome.skipped) == {"a", "b"}
    assert "bm25s is not installed" in outcome.skipped["a"]
    assert store.con.execute("SELECT count(DISTINCT run_id) FROM eval_results").fetchall() == [(1,)]


# --- what cannot be run


def test_two_retrievers_of_one_name_are_refused(store: Store) -> None:
    with pytest.raises(InputError, match="Two retrievers are called 'random'"):
        run(store.path, m.made(), [m.shuffled(), m.shuffled(version="2")])


def test_a_split_without_queries_is_refused(store: Store) -> None:
    task = m.made(24)
    report = task.split("report")
    with pytest.raises(InputError, match="no query in this split"):
        run(store.path, replace(task, queries=report), [m.shuffled()], split="tune")


def test_ids_that_no_utf8_can_hold_are_refused(store: Store) -> None:
    task = m.made(1)
    with pytest.raises(InputError, match="surrogate"):
        run(
            store.path, replace(task, documents=(*task.documents, Document("\ud800", "x"))), [m.shuffled()], split="all"
        )


# --- other processes


def test_the_store_is_free_for_others_while_an_index_is_built_or_asked(tmp_path: Path) -> None:
    path, task = tmp_path / "s.duckdb", m.made(4)
    code = f"from workbench.data.store import Store; Store({str(path)!r}, wait_seconds=0).close()"
    oracle = m.oracle(task)

    def search(text: str, documents: Sequence[Document], k: int) -> list[tuple[str, float]]:
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
        return oracle.function(text, documents, k)

    outcome = run(path, task, [m.Made("slow", search)], split="all")
    with Store(path) as store:
        assert scored(store, task, outcome, "slow").statuses() == {"ok": 4}


# --- interruptions


def test_an_interrupt_keeps_what_was_answered(store: Store) -> None:
    task, count = m.made(), {"n": 0}
    oracle = m.oracle(task)

    def search(text: str, documents: Sequence[Document], k: int) -> list[tuple[str, float]]:
        count["n"] += 1
        if count["n"] == 10:
            raise KeyboardInterrupt
        return oracle.function(text, documents, k)

    retriever = m.Made("stopped", search)
    with pytest.raises(KeyboardInterrupt):
        run(store.path, task, [retriever], split="all")
    seen: list[Progress] = []
    outcome = run(store.path, task, [retriever], split="all", progress=seen.append)
    assert (outcome.num_asked, outcome.num_stored) == (15, 9)
    assert seen[0].total == 24
    assert scored(store, task, outcome, "stopped").evaluation.means()["mrr"] == 1.0


def test_an_interrupt_inside_a_statement_is_no_failed_answer(store: Store) -> None:
    def search(text: str, documents: Sequence[Document], k: int) -> list[tuple[str, float]]:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        duckdb.sql("SELECT sum(hash(range)) FROM range(4_000_000_000)").fetchall()  # some 30 s
        return []

    with pytest.raises(KeyboardInterrupt):
        run(store.path, m.made(), [m.Made("queries", search)], split="all")
    assert store.con.execute("SELECT count(*) FROM eval_results").fetchall() == [(0,)]


def _rows(path: Path) -> list[Any]:
    with Store(path, read_only=True) as opened:
        results = opened.con.execute(
            "SELECT retriever, query_id, attempt, status, docs, scores, tokens FROM eval_results "
            "JOIN eval_runs USING (run_id) ORDER BY ALL"
        ).fetchall()
        return (
            results + opened.con.execute("SELECT run_id, scope, index_bytes FROM eval_builds ORDER BY ALL").fetchall()
        )


def _report(path: Path) -> str:
    task = m.made(60)
    options = Options("all", 10, "command", times=False)
    outcome = run(path, task, [m.overlap(), m.oracle(task), m.shuffled()], split="all", k=10)
    assert outcome.num_asked == 0
    return html([section(path, task, outcome, options)], options)


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_rows_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(5)
    command = [sys.executable, m.__file__]
    whole, killed = tmp_path / "whole.duckdb", tmp_path / "killed.duckdb"
    subprocess.run([*command, str(whole), "60", "0"], check=True, capture_output=True, timeout=120)
    kills = 0
    for attempt in range(40):
        sleep = "0.01" if attempt < 4 else "0"
        process = subprocess.Popen([*command, str(killed), "60", sleep], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        if attempt < 4:
            time.sleep(rng.uniform(0.02, 0.6))
            process.kill()
        out, _ = process.communicate(timeout=120)
        if process.returncode == 0:
            assert out.startswith("done")
            break
        kills += 1
    assert kills >= 2
    assert _rows(killed) == _rows(whole)
    assert len(_rows(whole)) == 3 * 60 + 3 * 2
    monkeypatch.setattr(recall_run, "code_version", lambda: "test")
    assert _report(killed) == _report(whole)


def test_two_processes_that_run_the_same_leave_one_answer_each(tmp_path: Path) -> None:
    command = [sys.executable, m.__file__, str(tmp_path / "s.duckdb"), "30", "0.01"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.communicate(timeout=120)[0].startswith("started\ndone")
        assert process.returncode == 0
    with Store(tmp_path / "s.duckdb", read_only=True) as opened:
        counts = opened.con.execute("SELECT count(*), count(DISTINCT (run_id, query_id)) FROM eval_results").fetchall()
    assert counts == [(90, 90)]
