"""The report: figures that agree with the statistics package, the same bytes twice, texts that stay texts."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recall_made as m

from workbench.errors import InputError
from workbench.evals import recall_report, recall_scores, stats
from workbench.evals.metrics import paired
from workbench.evals.recall_html import embedded, html
from workbench.evals.recall_report import Options, Section, markdown, section
from workbench.evals.recall_run import run
from workbench.evals.recall_viewer import SCRIPT
from workbench.evals.tasks.base import Document, Query, RecallTask

OPTIONS = Options("all", 10, "workbench eval recall --task made")


def report(path: Path, task: RecallTask, retrievers: Sequence[Any], options: Options = OPTIONS) -> tuple[Section, str]:
    outcome = run(path, task, retrievers, split=options.split, k=options.k)
    found = section(path, task, outcome, options)
    return found, html([found], options)


def runs_of(path: Path, task: RecallTask, retrievers: Sequence[Any], budget: int | None = None) -> list[Any]:
    outcome = run(path, task, retrievers, split="all", k=10)
    tokens = recall_scores.tokens_of(task)
    return [
        recall_scores.score(recall_scores.fetch(path, run_id), task, task.queries, tokens, budget)
        for run_id in outcome.run_ids.values()
    ]


def three(task: RecallTask) -> list[Any]:
    return [m.overlap(), m.oracle(task), m.shuffled()]


def compact(task: RecallTask, name: str = "compact", tokens: int = 3) -> Any:
    """Like overlap, and returns the first words only."""
    retriever = m.overlap(name)
    build = retriever.build

    def short(documents: Sequence[Document], folder: Path) -> Any:
        index = build(documents, folder)
        index.texts = {document: " ".join(text.split()[:tokens]) for document, text in index.texts.items()}
        return index

    retriever.build = short
    return retriever


# --- the same bytes


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    task = m.made()
    quiet = replace(OPTIONS, times=False)
    first, page = report(tmp_path / "a.duckdb", task, three(task), quiet)
    second, other_page = report(tmp_path / "b.duckdb", task, three(task), quiet)
    assert page == other_page
    assert first == second
    assert "CPU ms" not in page
    assert "times" not in first.summary["runs"][0]
    assert markdown(_whole(first, quiet)) == markdown(_whole(second, quiet))


def test_a_report_over_what_is_stored_has_the_same_bytes_with_its_times(tmp_path: Path) -> None:
    task = m.made()
    _, page = report(tmp_path / "a.duckdb", task, three(task))
    _, again = report(tmp_path / "a.duckdb", task, three(task))
    assert page == again
    assert "CPU ms" in page


def _whole(found: Section, options: Options) -> dict[str, Any]:
    return {"command": options.command, "times": options.times, "tasks": [found.summary]}


# --- figures


def test_intervals_and_comparisons_are_those_of_the_statistics_package(tmp_path: Path) -> None:
    task = m.made(40)
    overlap, oracle, chance = runs = runs_of(tmp_path / "a.duckdb", task, three(task))
    by_id = {query.id: query for query in task.queries}
    clusters = [by_id[query].cluster for query in oracle.evaluation.query_ids]
    for scored in runs:
        wanted = stats.score_interval(scored.evaluation.values["mrr"], clusters)
        assert scored.intervals["mrr"] == wanted
        assert wanted.method == ("wilson" if scored is oracle else "percentile cluster bootstrap")
    comparison = recall_scores.compare(runs, task.queries, "ndcg@10")
    assert comparison["baseline"] == "oracle"
    assert (comparison["num_comparisons"], comparison["num_clusters"]) == (2, 14)
    for row, scored in zip(comparison["rows"], (overlap, chance), strict=True):
        ours, theirs = paired(scored.evaluation, oracle.evaluation, "ndcg@10")
        interval = stats.paired_bootstrap(ours, theirs, clusters)
        assert row["difference"] == round(float((ours - theirs).mean()), 6)
        assert (row["low"], row["high"]) == (round(interval.low, 6), round(interval.high, 6))
        assert row["low_corrected"] <= row["low"] <= row["high"] <= row["high_corrected"]
        sums = [sum(d for d, c in zip(ours - theirs, clusters, strict=True) if c == k) for k in dict.fromkeys(clusters)]
        assert row["p"] == stats.paired_randomisation(sums, np.zeros(len(sums))).p
        assert row["p_by_query"] == stats.paired_randomisation(ours, theirs).p
        assert row["d_z"] == round(stats.cohens_d_z(ours, theirs), 6)
        assert row["wins"] == 0
        assert row["losses"] == int((ours < theirs).sum())
        assert row["wins"] + row["ties"] + row["losses"] == 40
        needed = stats.queries_needed(row["smallest_detectable"], float((ours - theirs).std(ddof=1)), alpha=0.025)
        assert needed in (40, 41)
    p = [row["p"] for row in comparison["rows"]]
    assert [row["p_holm"] for row in comparison["rows"]] == pytest.approx(stats.holm(p).tolist(), abs=1e-6)
    assert [row["p_bonferroni"] for row in comparison["rows"]] == pytest.approx([min(1, 2 * x) for x in p], abs=1e-6)


def test_without_clusters_the_query_is_the_unit(tmp_path: Path) -> None:
    task = m.made()
    task = replace(task, queries=tuple(replace(query, cluster="") for query in task.queries))
    runs = runs_of(tmp_path / "a.duckdb", task, three(task))
    assert runs[0].intervals["mrr"].method == "percentile bootstrap"
    comparison = recall_scores.compare(runs, task.queries, "mrr")
    assert comparison["num_clusters"] is None
    assert all(row["p"] == row["p_by_query"] for row in comparison["rows"])


def test_a_metric_that_is_1_for_all_queries_has_an_interval_with_a_width(tmp_path: Path) -> None:
    task = m.made(20, scopes=1)
    found, _ = report(tmp_path / "a.duckdb", task, [m.oracle(task)])
    for metric in found.summary["runs"][0]["metrics"].values():
        assert (metric["mean"], metric["high"]) == (1.0, 1.0)
        assert 0.5 < metric["low"] < 0.9


def test_equal_runs_differ_by_nothing_with_p_1(tmp_path: Path) -> None:
    """evals.md P9: all differences 0."""
    task = m.made()
    runs = runs_of(tmp_path / "a.duckdb", task, [m.overlap("a"), m.overlap("b")])
    (row,) = recall_scores.compare(runs, task.queries, "mrr")["rows"]
    assert (row["difference"], row["low"], row["high"], row["p"], row["p_holm"], row["d_z"]) == (0, 0, 0, 1, 1, 0)
    assert (row["wins"], row["ties"], row["losses"], row["smallest_detectable"]) == (0, 24, 0, None)


def test_the_baseline_is_the_best_that_returns_verbatim_text_or_the_named_one(tmp_path: Path) -> None:
    task = m.made()
    runs = runs_of(tmp_path / "a.duckdb", task, [compact(task), m.overlap(), m.shuffled()])
    assert [scored.is_verbatim for scored in runs] == [False, True, True]
    assert runs[0].compression is not None
    assert runs[0].compression > 3
    assert recall_scores.pick_baseline(runs, "mrr").name == "overlap"
    assert recall_scores.pick_baseline(runs[:1], "mrr").name == "compact"
    assert recall_scores.pick_baseline(runs, "mrr", "random").name == "random"
    with pytest.raises(InputError, match="'nobody' is none of the runs: compact, overlap, random"):
        recall_scores.pick_baseline(runs, "mrr", "nobody")


def test_ties_that_only_ids_decide_are_counted(tmp_path: Path) -> None:
    """evals.md P3: one order, and the report says where it mattered."""
    task = m.made()
    same = m.Made("same", lambda text, documents, k: [(d.id, 1.0) for d in documents][:k])
    (scored,) = runs_of(tmp_path / "a.duckdb", task, [same])
    for answer in scored.answers.values():
        assert [doc for doc, _ in answer.hits] == sorted(doc for doc, _ in answer.hits)
    assert scored.evaluation.num_tied > 5
    assert scored.as_json(times=False)["num_tied"] == scored.evaluation.num_tied


@pytest.mark.parametrize(
    ("budget", "within"), [(None, (3, 60)), (60, (3, 60)), (59, (2, 30)), (30, (2, 30)), (10, (1, 10)), (4, (1, 4))]
)
def test_a_budget_cuts_lists_before_the_hit_that_exceeds_it(budget: int | None, within: tuple[int, int]) -> None:
    assert recall_scores._within([10, 20, 30], budget) == within


def test_at_equal_budgets_compact_text_gets_more_hits(tmp_path: Path) -> None:
    task = m.made()
    plain, short = runs_of(tmp_path / "a.duckdb", task, [m.overlap(), compact(task)], budget=30)
    assert plain.tokens <= 30
    assert short.tokens <= 30
    assert short.evaluation.means()["recall@10"] > plain.evaluation.means()["recall@10"]


def test_categories_are_means_over_their_queries(tmp_path: Path) -> None:
    task = m.made()
    found, _ = report(tmp_path / "a.duckdb", task, three(task))
    (first, second) = found.summary["categories"]
    assert (first["category"], first["num_queries"], second["num_queries"]) == ("c0", 12, 12)
    (mean,) = (r["metrics"]["mrr"]["mean"] for r in found.summary["runs"] if r["name"] == "random")
    parts = [category["runs"]["random"]["mrr"] for category in (first, second)]
    assert mean == pytest.approx(sum(parts) / 2, abs=1e-6)


# --- what was missed, and why


def test_every_reason_for_a_miss() -> None:
    terms = {"far": 12, "beyond": 3}
    documents = [*(Document(f"x{i:02d}", f"filler {i}") for i in range(11)), Document("beyond", "kettle kettle"),
                 Document("far", "kettle"), Document("foreign", "unrelated"), Document("blank", "!!"),
                 Document("shares", "the kettle again"), Document("good", "kettle on")]  # fmt: skip
    relevant: dict[str, float] = dict.fromkeys(("beyond", "far", "foreign", "blank", "shares", "good"), 1.0)
    query = Query("q", "kettle", relevant)
    task = RecallTask("t", "1", tuple(documents), (query, Query("p", "kettle", {"far": 1.0})))
    ok = recall_scores.Answer("ok", None, [("good", 2.0)], {"good": 1, **terms}, 13)
    failed = recall_scores.Answer("error", "boom", [], {}, 0)
    cut = replace(ok, num_within=11)

    class Run:
        def __init__(self, name: str, answer: recall_scores.Answer) -> None:
            self.name, self.answers = name, {"q": answer, "p": failed}
            self.evaluation = recall_scores.evaluate({"q": [], "p": []}, {"q": relevant, "p": relevant}, ["ndcg@10"])

    runs: Any = [Run("whole", ok), Run("cut", cut)]
    drill = recall_report._drill(task, task.queries, runs, OPTIONS)
    ids = [doc for doc, _ in drill["docs"]]
    whole, with_budget = (
        {ids[doc]: (why, detail) for doc, why, detail in got["m"]} for got in drill["queries"][0]["g"]
    )
    assert whole == {
        "beyond": (recall_report.OUTRANKED, 3), "far": (recall_report.OUTRANKED, 12),
        "foreign": (recall_report.NO_SHARED_TERM, 0), "blank": (recall_report.NOTHING_TO_INDEX, 0),
        "shares": (recall_report.BELOW_K, 1),
    }  # fmt: skip
    assert with_budget["far"] == (recall_report.BEYOND_BUDGET, 12)
    (asked,) = (got for got in drill["queries"][1]["g"][:1])
    assert asked["e"] == "error: boom"
    assert [why for _, why, _ in asked["m"]] == [recall_report.FAILED]
    assert SCRIPT.count("d =>") + SCRIPT.count('() => "') >= 6


# --- the page


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._open = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag == "script"
        if self._open:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = self._open and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._open:
            self.scripts[-1] += data


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--<script> ]]> \u2028\u2029 \" ' & &lt;"


def test_texts_cannot_become_markup(tmp_path: Path) -> None:
    """Ids, texts, queries, categories, names, errors, licence and notes are other people's words."""
    documents = tuple(Document(f"{EVIL}{i}", f"{EVIL} words {i}", EVIL) for i in range(12))
    queries = tuple(
        Query(f"{EVIL}q{i}", f"{EVIL} {i}", {f"{EVIL}{i}": 1.0}, category=EVIL + str(i % 2)) for i in range(8)
    )
    task = RecallTask(EVIL, EVIL, documents, queries, licence=EVIL, notes={EVIL: 1})

    def broken(text: str, _: Any, k: int) -> list[tuple[str, float]]:
        raise RuntimeError(EVIL)

    class Missing(m.Made):  # type: ignore[name-defined]
        def build(self, documents: Any, folder: Path) -> Any:
            raise recall_missing(EVIL)

    from workbench.errors import MissingExtra

    def recall_missing(text: str) -> MissingExtra:
        return MissingExtra(text, EVIL)

    retrievers = [m.overlap(f"{EVIL} overlap"), m.Made(f"{EVIL} broken", broken), Missing(f"{EVIL} missing", broken)]
    options = replace(OPTIONS, command=f"workbench {EVIL}")
    found, page = report(tmp_path / "a.duckdb", task, retrievers, options)
    seen = _Tags()
    seen.feed(page)
    kinds = [attributes.get("type") for tag, attributes in seen.tags if tag == "script"]
    assert kinds == ["application/json", None]
    assert seen.scripts[1] == SCRIPT
    assert json.loads(seen.scripts[0]) == json.loads(json.dumps(found.drill))
    assert json.loads(seen.scripts[0])["queries"][0]["t"] == f"{' '.join(EVIL.split())} 0"
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on")]
    assert not [tag for tag, _ in seen.tags if tag in ("img", "iframe", "link", "object", "embed")]
    assert "\u2028" not in seen.scripts[0]
    policy = next(a["content"] for tag, a in seen.tags if tag == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "'unsafe-inline'" not in policy.partition("script-src")[2]
    assert "http://" not in page
    assert "https://" not in page
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", SCRIPT)


def test_the_viewer_holds_every_query_and_the_right_hits(tmp_path: Path) -> None:
    task = m.made()
    found, page = report(tmp_path / "a.duckdb", task, three(task))
    seen = _Tags()
    seen.feed(page)
    data = json.loads(seen.scripts[0])
    assert data == json.loads(json.dumps(found.drill))
    assert data["runs"] == ["overlap", "oracle", "random"]
    assert [query["id"] for query in data["queries"]] == [query.id for query in task.queries]
    for query, row in zip(task.queries, data["queries"], strict=True):
        assert {data["docs"][doc][0]: grade for doc, grade in row["r"]} == query.relevance
        hits = [(data["docs"][doc][0], score) for doc, score in row["g"][1]["h"]]
        assert hits == sorted(query.relevance.items(), key=lambda item: (-item[1], item[0]))
        assert row["g"][1]["n"] == 0
        for got in row["g"]:
            missed = {data["docs"][doc][0] for doc, _, _ in got["m"]}
            shown = {data["docs"][doc][0] for doc, _ in got["h"]}
            assert missed == set(query.relevance) - shown


def test_a_report_of_500_queries_and_12_configurations_is_below_3_mb() -> None:
    """All but the viewer's data is small; every hit is another document here, which is the worst case."""
    rng = random.Random(1)
    documents = tuple(Document(f"session-{i // 9:04d}/exchange-{i:05d}", rng.randbytes(200).hex()) for i in range(3000))
    ids = [document.id for document in documents]
    queries = tuple(
        Query(f"commit-{i:05d}", rng.randbytes(60).hex(), dict.fromkeys(rng.sample(ids, 4), 1.0)) for i in range(500)
    )
    task = RecallTask("large", "1", documents, queries)
    evaluation = recall_scores.evaluate({q.id: [] for q in queries}, {q.id: q.relevance for q in queries}, ["ndcg@10"])

    class Run:
        def __init__(self, number: int) -> None:
            self.name, self.evaluation = f"configuration number {number} [with a long name]", evaluation
            hits = {q.id: [(doc, rng.random() * 30) for doc in rng.sample(ids, 10)] for q in queries}
            self.answers = {q: recall_scores.Answer("ok", None, found, {}, 100) for q, found in hits.items()}

    runs: Any = [Run(number) for number in range(12)]
    data = embedded(recall_report._drill(task, queries, runs, OPTIONS))
    assert 1_000_000 < len(data.encode()) < 2_900_000


def test_of_many_configurations_the_best_and_the_baselines_are_drilled(tmp_path: Path) -> None:
    task = m.made()
    retrievers = [*(compact(task, f"compact{i}") for i in range(15)), m.shuffled()]
    found, page = report(tmp_path / "a.duckdb", task, retrievers)
    assert len(found.drill["runs"]) == 12
    assert "random" in found.drill["runs"]
    assert "12 of 16" in page


def test_failures_stand_in_the_tables(tmp_path: Path) -> None:
    task = m.made()
    oracle = m.oracle(task)

    def shaky(text: str, documents: Any, k: int) -> list[tuple[str, float]]:
        if text.startswith("name1"):
            raise RuntimeError("no luck")
        return oracle.function(text, documents, k)

    found, page = report(tmp_path / "a.duckdb", task, [m.Made("shaky", shaky), m.shuffled()])
    failed = found.summary["runs"][0]["statuses"]["error"]
    assert failed == 11
    assert f"{failed} error" in page
    assert "completed 1.000" in page
    told = markdown(_whole(found, OPTIONS))
    assert "(1.000 over completed)" in told
    assert "shaky: 11 queries failed (--retry asks them again), the first: RuntimeError: no luck" in told


def test_documents_that_an_index_lost_are_told(tmp_path: Path) -> None:
    task, retriever = m.made(), m.overlap()
    build = retriever.build

    def lossy(documents: Sequence[Document], folder: Path) -> Any:
        index = build(documents, folder)
        index.num_unindexed = 2
        return index

    retriever.build = lossy
    found, page = report(tmp_path / "a.duckdb", task, [retriever, m.shuffled()])
    assert [row["num_unindexed"] for row in found.summary["runs"]] == [4, 0], "two scopes"
    assert page.count("4 documents could not be indexed") == 1
    assert "overlap: 4 documents could not be indexed." in markdown(_whole(found, OPTIONS))


def test_the_summary_names_data_code_and_versions(tmp_path: Path) -> None:
    task = replace(m.made(), licence="MIT", notes={"left_out": 3})
    found, page = report(tmp_path / "a.duckdb", task, three(task))
    assert found.summary["fingerprint"] == task.fingerprint
    for text in (task.fingerprint, found.summary["code_version"], "duckdb ", "MIT", "left out 3", OPTIONS.command):
        assert text in page
    json.dumps(found.summary, allow_nan=False)
