"""Recall tasks: the loaders on synthetic files and, where it lies beside the project, on the shared data."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from workbench.errors import InputError
from workbench.evals.metrics import evaluate
from workbench.evals.tasks import TASKS, agentlog, load_task, locomo, skills
from workbench.evals.tasks.base import (
    Document,
    Query,
    RecallTask,
    judgements,
    oracle_run,
    random_run,
    read_json,
    read_jsonl,
    shared_data,
    split_of,
)

ROOT = Path(__file__).resolve().parents[2]


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


# --- what a task is


def made(num_queries: int = 20, **fields: Any) -> RecallTask:
    documents = tuple(Document(f"d{i}", f"text {i}", scope="s") for i in range(30))
    queries = tuple(Query(f"q{i}", f"query {i}", {f"d{i % 30}": 1.0, "d29": 2.0}, "s") for i in range(num_queries))
    return RecallTask(**({"name": "made", "version": "1", "documents": documents, "queries": queries} | fields))


def test_halves_are_disjoint_stable_and_independent_of_order_and_of_other_queries() -> None:
    task = made(400)
    tune, report = task.split("tune"), task.split("report")
    assert {q.id for q in tune}.isdisjoint(q.id for q in report)
    assert len(tune) + len(report) == len(task.split("all")) == 400
    assert 160 < len(tune) < 240
    fewer = replace(task, queries=task.queries[::-3])
    assert {q.id for q in fewer.split("tune")} <= {q.id for q in tune}
    # Pinned: a changed split would tune on what was reported.
    assert [split_of(q) for q in ("q0", "q1", "q2", "q3", "q4", "conv-26/qa0")] == [
        "tune", "report", "report", "tune", "tune", "tune",
    ]  # fmt: skip
    with pytest.raises(InputError, match="all, tune, report"):
        task.split("test")  # type: ignore[arg-type]


def test_the_fingerprint_sees_every_change_of_data_and_no_order_of_queries() -> None:
    task = made()
    assert replace(task, queries=task.queries[::-1]).fingerprint == task.fingerprint
    first, document = task.queries[0], task.documents[0]
    changed = [
        replace(task, version="2"),
        replace(task, relevant_from=2.0),
        replace(task, queries=task.queries[1:]),
        *(
            replace(task, queries=(replace(first, **change), *task.queries[1:]))
            for change in ({"text": "x"}, {"relevance": {"d0": 2.0, "d29": 2.0}}, {"category": "c"}, {"cluster": "c"})
        ),
        replace(task, documents=(replace(document, user="x"), *task.documents[1:])),
        replace(task, documents=(replace(document, time="2026"), *task.documents[1:])),
        replace(task, documents=task.documents[::-1]),
    ]
    assert len({t.fingerprint for t in [task, *changed]}) == len(changed) + 1


def test_oracle_and_random_runs_have_the_scores_that_theory_gives() -> None:
    """Silent failure P2: a harness that scores unrendered choices gives an untrained model 100 %."""
    task = made(400)
    keys = ["ndcg@10", "mrr", "recall@10", "r_precision"]
    best = evaluate(oracle_run(task.queries), judgements(task.queries), keys).means()
    assert best == {"ndcg@10": 1.0, "mrr": 1.0, "recall@10": 1.0, "r_precision": 1.0}
    chance = evaluate(random_run(task, task.queries), judgements(task.queries), keys).means()
    assert chance["recall@10"] == pytest.approx(10 / 30, abs=0.06)  # standard deviation 0.017
    assert random_run(task, task.queries) == random_run(task, task.queries)
    assert random_run(task, task.queries, seed=1) != random_run(task, task.queries)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"documents": (Document("a", "x"), Document("a", "y"))}, "'a' comes twice"),
        ({"documents": (Document("a", "x", previous="b"), Document("b", "x"))}, "'a' follows 'b'"),
        ({"documents": (Document("a", "x"), Document("b", "x", scope="t", previous="a"))}, "'b' follows 'a'"),
        ({"queries": ()}, "has no query"),
        ({"queries": (Query("q", " ", {"d1": 1.0}, "s"),)}, "'q': its text is empty"),
        ({"queries": (Query("q", "x", {"d1": 1.0}, "s"),) * 2}, "'q': its id comes twice"),
        ({"queries": (Query("q", "x", {"no": 1.0}, "s"),)}, "'no' does not exist"),
        ({"queries": (Query("q", "x", {"d1": 1.0}, "t"),)}, "'d1' is in scope 's', not 't'"),
        ({"queries": (Query("q", "x", {}, "t"),)}, "scope 't' holds no document"),
        ({"queries": (Query("q", "x", {"d1": 0.0}, "s"),)}, "grade of 'd1' is 0.0"),
        ({"queries": (Query("q", "x", {"d1": float("nan")}, "s"),)}, "grade of 'd1' is nan"),
    ],
)
def test_a_task_that_contradicts_itself_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        made(**fields)


# --- the table


def test_listing_tasks_imports_no_task_and_reads_no_data() -> None:
    """Silent failure P6: a harness that runs every task's code to list them."""
    code = (
        "import sys; from workbench.evals.tasks import TASKS; "
        "print(sorted(m for m in sys.modules if m.startswith('workbench.evals.tasks.') or m in ('numpy', 'duckdb')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    no_tasks = {"__init__", "base", "task_file", "own_logs"}
    assert {path.stem for path in (ROOT / "evals/tasks").glob("*.py")} - no_tasks == set(TASKS)


def test_unknown_tasks_and_missing_data_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'locomo'"):
        load_task("locmo")
    with pytest.raises(InputError, match=r"Unknown task 'x'\. There are locomo, agentlog, skills"):
        load_task("x")
    monkeypatch.setenv("WORKBENCH_SHARED_DATA", str(tmp_path))
    with pytest.raises(InputError, match=r"no locomo10\.json in .*WORKBENCH_SHARED_DATA"):
        load_task("locomo")
    (tmp_path / "x.json").write_text("1")
    assert shared_data("x.json") == tmp_path / "x.json"


# --- bad files


GOOD_CORPUS = {"id": "s#0", "repo": "r", "session": "s", "idx": 0, "ts": "2026-01-01", "user": "u", "assistant": "a"}
GOOD_QUERY = {"qid": "q0", "repo": "r", "query": "fix it", "gold": ["s#0"], "gold_sessions": ["s"]}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{\n", r"not valid JSON"),
        ("[1]\n", r"must be an object, not \[1\]"),
        ('"\\ud800 \n', r"not valid JSON"),
        ({**GOOD_CORPUS, "idx": 1, "id": "s#1", "user": None}, r"'user' must be a text, not null"),
        ({**GOOD_CORPUS, "idx": True}, r"'idx' must be a whole number, not true"),
        ({k: v for k, v in GOOD_CORPUS.items() if k != "repo"}, r"'repo' is missing; there are assistant, id"),
        ({**GOOD_CORPUS, "id": "s#1"}, r"exchange 0 of session 's' stands after exchange 0"),
        ({**GOOD_CORPUS, "session": "t"}, r"the id 's#0' comes twice"),
        ({**GOOD_CORPUS, "idx": 1, "id": " "}, r"'id' is empty"),
    ],
)
def test_bad_lines_are_named_by_file_and_line(tmp_path: Path, bad: Any, message: str) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl.gz", [GOOD_CORPUS, "\n", bad])
    queries = write_jsonl(tmp_path / "queries.jsonl", [GOOD_QUERY])
    with pytest.raises(InputError, match=rf"corpus\.jsonl\.gz, line 3: .*({message})"):
        agentlog.load(corpus, queries)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({**GOOD_QUERY, "gold": ["s#9"]}, "'s#9' is not in the corpus"),
        ({**GOOD_QUERY, "gold": "s#0"}, "'gold' must be a list"),
        ({**GOOD_QUERY, "gold": ["s#0", 1]}, "item 1 of the field 'gold' must be a text, not 1"),
        ({**GOOD_QUERY, "query": ""}, "'query' is empty"),
    ],
)
def test_bad_queries_are_named_by_file_and_line(tmp_path: Path, bad: Any, message: str) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [GOOD_CORPUS])
    queries = write_jsonl(tmp_path / "queries.jsonl", [GOOD_QUERY, bad])
    with pytest.raises(InputError, match=rf"queries\.jsonl, line 2: .*{message}"):
        agentlog.load(corpus, queries)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    for name, content in (("cut.gz", whole[:-10]), ("broken.gz", whole[:20] + b"\0" * 20), ("plain.gz", b"{}")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: cannot be read after line \d+"):
            list(read_jsonl(tmp_path / name))
    (tmp_path / "latin.jsonl").write_bytes('{"a": "é"}\n'.encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.jsonl, line 1: not UTF-8 at byte 7"):
        list(read_jsonl(tmp_path / "latin.jsonl"))
    with pytest.raises(InputError, match="cannot be read"):
        list(read_jsonl(tmp_path / "absent.jsonl"))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"deep\.json: cannot be read as JSON"):
        read_json(tmp_path / "deep.json", list)


# --- agentlog and skills on small files


def test_agentlog_joins_exchanges_of_a_session_and_commits_to_exchanges(tmp_path: Path) -> None:
    rows = [
        GOOD_CORPUS,
        GOOD_CORPUS | {"id": "t#0", "session": "t"},
        GOOD_CORPUS | {"id": "s#2", "idx": 2, "user": "why", "assistant": ""},
    ]
    queries = [GOOD_QUERY | {"gold": ["s#2", "t#0"], "gold_sessions": ["t", "s"]}]
    task = agentlog.load(write_jsonl(tmp_path / "c.jsonl", rows), write_jsonl(tmp_path / "q.jsonl", queries))
    assert [(d.id, d.previous, d.text) for d in task.documents] == [
        ("s#0", None, "u\na"), ("t#0", None, "u\na"), ("s#2", "s#0", "why"),
    ]  # fmt: skip
    assert task.queries == (Query("q0", "fix it", {"s#2": 1.0, "t#0": 1.0}, "r", cluster="s"),)


def test_skills_grade_gold_above_near_duplicates(tmp_path: Path) -> None:
    pool = [{"id": n, "name": n, "description": f"about {n}", "body": f"do {n}"} for n in ("a", "b", "c")]
    queries = [{"qid": "q", "query": "x", "gold": ["a"], "near_duplicates": ["b", "a"]}]
    pool_path = write_jsonl(tmp_path / "p.jsonl", pool)
    task = skills.load(pool_path, write_jsonl(tmp_path / "q.jsonl", queries))
    assert task.queries[0].relevance == {"a": 3.0, "b": 1.0}
    assert task.queries[0].category == "single"
    assert task.documents[0].text == "a\nabout a\ndo a"
    near_first = {"q": [("b", 2.0), ("a", 1.0)]}
    values = evaluate(near_first, judgements(task.queries), ["mrr", "ndcg@1"], relevant_from=task.relevant_from)
    assert values.means() == {"mrr": 0.5, "ndcg@1": pytest.approx(1 / 3)}
    names = skills.load(pool_path, write_jsonl(tmp_path / "q.jsonl", queries), with_body=False)
    assert names.documents[0].text == "a\nabout a"
    assert names.fingerprint != task.fingerprint
    queries[0]["near_duplicates"] = ["z"]
    with pytest.raises(InputError, match=r"q\.jsonl, line 1: the skill 'z'"):
        skills.load(pool_path, write_jsonl(tmp_path / "q.jsonl", queries))


# --- LoCoMo on a small file


def small_locomo() -> list[dict[str, Any]]:
    def turn(dia_id: str, text: str, **more: str) -> dict[str, str]:
        return {"speaker": "Ann", "dia_id": dia_id, "text": text, **more}

    sessions = {
        "session_1": [turn("D1:1", "hello"), turn("D1:2", "look", blip_caption="a red bowl")],
        "session_1_date_time": "1:56 pm on 8 May, 2023",
        "session_10": [turn("D10:1", "last")],
        "session_2": [turn(f"D2:{i}", f"turn {i}") for i in range(1, 6)],
        "session_2_date_time": "some day",
    }
    evidence = [
        ["D1:1"], ["D1:2; D2:3"], ["D"], ["D:2:4"], ["D2:1 D2:2 D10:1"], ["D02:05"], ["D9:9"], ["D1:1"], [],
    ]  # fmt: skip
    qa = [{"question": f"question {i}?", "answer": i, "evidence": e, "category": 4} for i, e in enumerate(evidence)]
    qa[7] = {"question": "question 7?", "adversarial_answer": "x", "evidence": ["D1:1"], "category": 5}
    return [{"sample_id": "conv-1", "conversation": {"speaker_a": "Ann", **sessions}, "qa": qa}]


def fix(at: int, correct: list[str], **more: Any) -> dict[str, Any]:
    return {
        "qid": f"locomo_0_qa{at}",
        "question": f"question {at}?",
        "correct": correct,
        "correct_answer": "new",
    } | more


def load_locomo(tmp_path: Path, data: Any, fixes: Any = (), **options: bool) -> RecallTask:
    (tmp_path / "locomo.json").write_text(data if isinstance(data, str) else json.dumps(data, indent=1))
    (tmp_path / "audit.json").write_text(json.dumps(list(fixes)))
    return locomo.load(tmp_path / "locomo.json", tmp_path / "audit.json", **options)


def test_locomo_reads_turns_sessions_in_order_and_malformed_evidence(tmp_path: Path) -> None:
    task = load_locomo(tmp_path, small_locomo())
    assert [d.id for d in task.documents] == [
        *(f"conv-1/{i}" for i in ("D1:1", "D1:2", "D2:1", "D2:2", "D2:3", "D2:4", "D2:5", "D10:1")),
    ]
    assert task.documents[1] == Document(
        "conv-1/D1:2", "Ann: look [a red bowl]", scope="conv-1", previous="conv-1/D1:1", time="2023-05-08T13:56:00"
    )
    assert (task.documents[2].previous, task.documents[2].time) == (None, "some day")
    assert {q.id: sorted(q.relevance) for q in task.queries} == {
        "conv-1/qa0": ["conv-1/D1:1"],
        "conv-1/qa1": ["conv-1/D1:2", "conv-1/D2:3"],
        "conv-1/qa3": ["conv-1/D2:4"],
        "conv-1/qa4": ["conv-1/D10:1", "conv-1/D2:1", "conv-1/D2:2"],
        "conv-1/qa5": ["conv-1/D2:5"],
    }
    assert (task.queries[0].answer, task.queries[0].category) == ("0", "single-hop")
    assert task.notes["evidence_malformed"] == 5
    assert task.notes["evidence_unknown_turn"] == 2
    assert task.notes["questions_without_evidence"] == 3
    with_adversarial = load_locomo(tmp_path, small_locomo(), adversarial=True)
    assert [q.id for q in with_adversarial.queries if q.category == "adversarial"] == ["conv-1/qa7"]


def test_locomo_audit_changes_turns_and_answers(tmp_path: Path) -> None:
    fixes = [fix(0, ["D2:1", "D2:2"]), fix(1, ["D1:2", "D2:3"]), fix(3, [])]
    task = load_locomo(tmp_path, small_locomo(), fixes)
    by_id = {q.id: q for q in task.queries}
    assert sorted(by_id["conv-1/qa0"].relevance) == ["conv-1/D2:1", "conv-1/D2:2"]
    assert by_id["conv-1/qa0"].answer == "new"
    assert sorted(by_id["conv-1/qa3"].relevance) == ["conv-1/D2:4"]  # names no turn: the cited one stays
    assert (task.notes["audit_changed_turns"], task.notes["audit_without_turn"]) == (1, 1)
    plain = load_locomo(tmp_path, small_locomo(), fixes, audited=False)
    assert sorted(plain.queries[0].relevance) == ["conv-1/D1:1"]
    assert plain.fingerprint != task.fingerprint


def broken(change: Callable[[dict[str, Any]], object]) -> Any:
    data = small_locomo()
    change(data[0])
    return data


@pytest.mark.parametrize(
    ("data", "fixes", "message"),
    [
        ('[\n{"a": 1},\n{"b" 2}]', [], r"locomo\.json, line 3: not valid JSON"),
        ("{}", [], r"locomo\.json: must hold a list"),
        ("[1]", [], r"locomo\.json, conversation 0: must be an object, not 1"),
        (broken(lambda s: s.pop("qa")), [], r"conversation 0: the field 'qa' is missing"),
        (broken(lambda s: s["qa"][2].update(category=9)), [], r"conversation 0, question 2: the category .*not 9"),
        (broken(lambda s: s["qa"][1].update(evidence="D1:1")), [], r"question 1: the field 'evidence' must be a list"),
        (broken(lambda s: s["qa"][1].update(question="")), [], r"question 1: the field 'question' is empty"),
        (
            broken(lambda s: s["conversation"]["session_2"][4].update(dia_id="D1:1")), [],
            r"session 2, turn 4: the dia_id 'D1:1' comes twice",
        ),
        (broken(lambda s: s["conversation"]["session_1"][0].pop("text")), [], r"turn 0: .*'text' is missing"),
        (small_locomo() * 2, [], r"conversation 1: the sample_id 'conv-1' comes twice"),
        (small_locomo(), [fix(0, [], question="other?")], r"audit\.json, entry 0: it corrects another question"),
        (small_locomo(), [fix(0, []), fix(99, [])], r"audit\.json, entry 1: there is no such question"),
    ],
)  # fmt: skip
def test_locomo_mistakes_are_named(tmp_path: Path, data: Any, fixes: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_locomo(tmp_path, data, fixes)
