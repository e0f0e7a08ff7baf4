"""Answers from a file: what is graded is what the file says now, nothing disappears, judges agree or do not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from workbench.data.store import Store
from workbench.errors import InputError, StoreBusy
from workbench.evals.answers import (
    AnswerItem,
    agreement,
    compare_by_judge,
    grade_by_judge,
    grade_by_rule,
    in_order,
    preferences,
    read_items,
    summary,
)
from workbench.evals.asking import Budget, Usage
from workbench.evals.graders import Grade
from workbench.evals.judge import Judge
from workbench.evals.pair_judge import PairJudge
from workbench.memory.distillers.llm import DuckDBCache


def verdict(word: str) -> dict[str, str]:
    return {"content": json.dumps({"reason": "because", "verdict": word})}


def client(server: Any, model: str = "m") -> Any:
    from workbench.llm_client import OpenAIChat

    return OpenAIChat(server.url, model, max_retries=0)


def row(k: int, **fields: Any) -> dict[str, Any]:
    return {"id": f"i{k}", "question": f"question {k}?", "answer": f"answer-{k:02d}", "targets": ["blue"]} | fields


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_items_are_read_as_they_stand(tmp_path: Path) -> None:
    rows = [row(0), row(1, answer="", status="truncated", cluster="c", targets=["a", "b"]), {"id": "x", "answer": "y"}]
    assert read_items(write(tmp_path / "a.jsonl", rows)) == [
        AnswerItem("i0", "question 0?", "answer-00", ("blue",)),
        AnswerItem("i1", "question 1?", "", ("a", "b"), "truncated", "c"),
        AnswerItem("x", "", "y", ()),
    ]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(0), r"line 2: the id 'i0' comes twice"),
        (row(1, answer=None), r"line 2: the field 'answer' must be a text"),
        (row(1, targets="blue"), r"line 2: the field 'targets' must be a list"),
        (row(1, status="grader_error"), r"line 2: the status must be ok or one of truncated"),
        (row(1, target=["x"]), r"line 2: there is no field 'target'; there are id, question"),
        ({"id": "i1"}, r"line 2: the field 'answer' is missing"),
    ],
)
def test_bad_items_are_named_by_file_and_line(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_items(write(tmp_path / "a.jsonl", [row(0), bad]))
    with pytest.raises(InputError, match="holds no item"):
        read_items(write(tmp_path / "b.jsonl", []))


@pytest.mark.parametrize("field", [{"question": "Q: {{question}}"}, {"targets": ["red", "{{ choices[1] }}"]}])
def test_what_was_not_rendered_is_refused_unless_it_is_meant(tmp_path: Path, field: dict[str, Any]) -> None:
    """Silent failure P2: choices that were never rendered were scored."""
    with pytest.raises(InputError, match=r"line 1: .* still has the template mark"):
        read_items(write(tmp_path / "a.jsonl", [row(0, **field)]))
    assert len(read_items(write(tmp_path / "a.jsonl", [row(0, literal=True, **field)]))) == 1
    assert len(read_items(write(tmp_path / "a.jsonl", [row(0, answer="{{question}}")]))) == 1  # a system may say that


def test_rules_grade_in_order_and_a_missing_answer_keeps_its_status(tmp_path: Path) -> None:
    rows = [
        row(0, answer="Blue!"),
        row(1, answer="the blue car"),
        row(2, answer="", status="timeout"),
        row(3, answer=""),
    ]
    items = read_items(write(tmp_path / "a.jsonl", rows))
    exact = grade_by_rule(items, "exact")
    assert [(g.value, g.status) for g in exact] == [(1, "ok"), (0, "ok"), (None, "timeout"), (None, "wrong_format")]
    assert [g.value for g in grade_by_rule(items, "f1")] == [1, pytest.approx(2 / 3), None, None]
    found = summary(items, exact)
    assert (found["score"], found["score_completed"], found["num_items"]) == (0.25, 0.5, 4)
    assert found["by_status"] == {"ok": 2, "wrong_format": 1, "timeout": 1}
    with pytest.raises(InputError, match="no grader 'bleu'"):
        grade_by_rule(items, "bleu")
    with pytest.raises(InputError, match="'x' has no target"):
        grade_by_rule([AnswerItem("x", "q", "a", (" ",))], "exact")
    with pytest.raises(InputError, match="'x' has no target"):
        grade_by_rule([AnswerItem("x", "q", "a", ())], "math")
    with pytest.raises(InputError, match="item 'x': No target has a word"):
        grade_by_rule([*items, AnswerItem("x", "q", "a", ("🎉",))], "f1")


def test_math_answers_are_graded(tmp_path: Path) -> None:
    pytest.importorskip("math_verify", reason="the math extra is not installed")
    rows = [
        row(0, answer="\\boxed{1/2}", targets=["0.5"]),
        row(1, answer="", status="timeout"),
        row(2, answer="\\boxed{"),
    ]
    items = read_items(write(tmp_path / "a.jsonl", rows))
    grades = grade_by_rule(items, "math")
    assert [(g.value, g.status) for g in grades] == [(1.0, "ok"), (None, "timeout"), (None, "wrong_format")]
    assert summary(items, grades)["score"] == pytest.approx(1 / 3)


def test_intervals_are_by_cluster_and_have_a_width_at_0_and_1() -> None:
    """Silent failures P11 and P12: no interval at accuracy 1, and samples of one question taken for independent."""

    def graded(values: list[float]) -> list[Grade]:
        return [Grade(value, "ok", "g/1") for value in values]

    alone = [AnswerItem(f"i{k}", "q", "a", ("t",)) for k in range(40)]
    right = summary(alone, graded([1.0] * 40))["score_interval"]
    assert right["low"] < 0.95 < right["high"] <= 1
    together = [AnswerItem(f"i{k}", "q", "a", ("t",), cluster=f"c{k // 10}") for k in range(40)]
    values = [float(k // 10 % 2) for k in range(40)]
    narrow, wide = (summary(items, graded(values))["score_interval"] for items in (alone, together))
    assert (narrow["num_units"], wide["num_units"]) == (40, 4)
    assert wide["high"] - wide["low"] > 1.8 * (narrow["high"] - narrow["low"])
    assert summary(alone[:1], graded([1.0]))["score_interval"] is None
    uneven = [AnswerItem(f"i{k}", "q", "a", ("t",), cluster="a" if k else "b") for k in range(11)]
    found = summary(uneven, graded([0.0] + [1.0] * 10))
    assert found["score_interval"]["low"] <= found["score"] <= found["score_interval"]["high"]
    mixed = summary(together, graded([k % 4 / 3 for k in range(40)]))["score_interval"]
    assert mixed["method"] == "percentile cluster bootstrap"


def test_an_edited_file_is_graded_anew_though_results_are_there(tmp_path: Path, server: Any) -> None:
    """Silent failure P8: results reused by file name, after the samples had been edited."""
    path = write(tmp_path / "a.jsonl", [row(0), row(1)])

    def run() -> tuple[list[float | None], Usage]:
        with Store(tmp_path / "s.duckdb") as store:
            judge = Judge(client(server), cache=DuckDBCache(lambda: store.con))
            items = read_items(path)
            return [grade.value for grade in in_order(items, grade_by_judge(items, judge))], judge.usage

    server.plan([{"match": "answer-", "faults": [verdict("correct")] * 2}])
    assert run()[0] == [1.0, 1.0]
    server.plan([{"match": "", "faults": [verdict("incorrect")] * 9}])
    values, usage = run()
    assert (values, usage.num_cached, usage.num_requests) == ([1.0, 1.0], 2, 0)
    for change in ({"answer": "answer-00, or not"}, {"question": "another?"}, {"targets": ["red"]}):
        write(path, [row(0, **change), row(1)])
        values, usage = run()
        assert (values, usage.num_cached, usage.num_requests) == ([0.0, 1.0], 1, 1), change


def test_the_cost_budget_stops_and_the_same_command_goes_on(tmp_path: Path, server: Any) -> None:
    items = read_items(write(tmp_path / "a.jsonl", [row(k) for k in range(12)]))
    server.plan([{"match": "", "faults": [verdict("correct")] * 30}])
    budget = Budget(max_cost=0.0045, price_in=1.0, price_out=2.0)  # 100 tokens in and 20 out cost .00014
    done, runs = 0, 0
    while done < 12 and runs < 12:
        with Store(tmp_path / "s.duckdb") as store:
            judge = Judge(client(server), cache=DuckDBCache(lambda: store.con), budget=budget, concurrency=1)
            grades = in_order(items, grade_by_judge(items, judge))
        assert judge.usage.cost is not None
        assert judge.usage.cost <= 0.0045
        assert judge.usage.num_cached == done
        done, runs = sum(grade.status == "ok" for grade in grades), runs + 1
        assert {grade.status for grade in grades} <= {"ok", "skipped"}
    assert done == 12
    assert runs > 1  # the first run was stopped
    assert len(server.bodies()) == 12  # nothing was asked twice
    left = budget.minus(Usage(tokens_in=10, tokens_out=5, cost=0.001))
    assert left.max_cost == pytest.approx(0.0035)
    for wrong in ({"max_cost": 1.0}, {"price_in": 1.0}, {"max_tokens": -1}):
        with pytest.raises(InputError):
            Budget(**wrong)  # type: ignore[arg-type]


def test_half_a_character_in_an_item_or_a_verdict_ends_no_run(tmp_path: Path, server: Any) -> None:
    words = [{"content": "no verdict \ud800"}, verdict("correct \ud800"), verdict("correct")]
    words += [{"content": '{"reason": "fine \\ud800", "verdict": "correct"}'}]
    server.plan([{"match": "", "faults": words}])
    items = [AnswerItem(f"i{k}", f"question {k} \ud800?", "\udfff", ("t\ud800",)) for k in range(3)]
    with Store(tmp_path / "s.duckdb") as store:
        judge = Judge(client(server), cache=DuckDBCache(lambda: store.con), concurrency=1)
        grades = in_order(items, grade_by_judge(items, judge))
    assert [grade.status for grade in grades] == ["grader_error", "ok", "ok"]
    assert "fine" in grades[2].explanation


def test_agreement_of_judges_and_gaps() -> None:
    def column(*values: float | None) -> list[Grade]:
        return [Grade(v, "grader_error" if v is None else "ok", "g/1") for v in values]

    same = agreement({"a": column(1, 0, 1), "b": column(1, 0, 1)})
    assert same
    assert same["krippendorff_alpha"] == 1.0
    assert same["pairs"] == [{"judges": ["a", "b"], "raw": 1.0, "kappa": 1.0}]
    gaps = agreement({"a": column(1, 0, None), "b": column(0, 1, 1)})
    assert gaps
    assert gaps["krippendorff_alpha"] < 0
    assert gaps["num_complete"] == 2
    one_value = agreement({"a": column(1, 1), "b": column(1, 1)})
    assert one_value
    assert (one_value["krippendorff_alpha"], one_value["pairs"][0]["kappa"]) == (None, None)  # undefined, not 1
    json.dumps(one_value, allow_nan=False)
    assert agreement({"a": column(1, 0)}) is None
    assert agreement({"a": column(1, None), "b": column(None, 1)}) is None


def test_pairs_of_two_files_and_their_preference(tmp_path: Path, server: Any) -> None:
    ours = read_items(write(tmp_path / "a.jsonl", [row(k, answer=f"ours-{k:02d}") for k in range(10)]))
    theirs = read_items(write(tmp_path / "b.jsonl", [row(k, answer=f"theirs-{k:02d}") for k in reversed(range(10))]))
    rules = [{"match": f"ours-{k:02d}", "faults": [verdict("first"), verdict("second")]} for k in range(9)]
    server.plan([*rules, {"match": "ours-09", "faults": [verdict("second")] * 2}])
    judge = PairJudge(client(server), concurrency=1)
    grades = in_order(ours, compare_by_judge(ours, theirs, judge))
    found = preferences(ours, grades, judge.num_by_position)
    assert (found["wins"], found["ties"], found["losses"], found["ties_by_position"]) == (9, 1, 0, 1)
    assert found["preference"] == pytest.approx(0.95)
    assert found["interval"]["low"] > 0.5
    assert found["p"] < 0.05
    with pytest.raises(InputError, match="1 stand in one only, for example 'i9'"):
        next(compare_by_judge(ours, [item for item in theirs if item.id != "i9"], judge))
    other = [AnswerItem(i.id, "changed", i.answer, i.targets) for i in theirs]
    with pytest.raises(InputError, match="'i0' has another question"):
        next(compare_by_judge(ours, other, judge))


def test_a_null_preference_is_not_called_significant() -> None:
    items = [AnswerItem(f"i{k}", "q", "a", ()) for k in range(40)]
    values = [1.0, 0.0, 0.5, 0.5] * 10
    found = preferences(items, [Grade(v, "ok", "g/1") for v in values], 0)
    assert (found["preference"], found["p"]) == (0.5, 1.0)
    assert preferences(items[:1], [Grade(None, "skipped", "g/1")], 0)["p"] is None


def test_the_preference_that_is_tested_is_the_one_that_is_told() -> None:
    """One long conversation that is lost and two short ones that are won are no preference for the first file."""
    items = [AnswerItem(f"i{k}", "q", "a", (), cluster="ab"[k % 2] if k < 2 else "c") for k in range(4)]
    found = preferences(items, [Grade(v, "ok", "g/1") for v in (1.0, 1.0, 0.0, 0.0)], 0)
    assert (found["preference"], found["p"]) == (0.5, 1.0)


def test_another_process_can_look_while_verdicts_come(tmp_path: Path, server: Any) -> None:
    """Silent failure P16: a reader must get the store, or a clear message, while a run writes."""
    store_path = tmp_path / "s.duckdb"
    look = (
        "import sys; from workbench.data.store import Store\n"
        "with Store(sys.argv[1], read_only=True, wait_seconds=30) as store:\n"
        "    print(store.con.execute('SELECT count(*) FROM llm_cache').fetchall()[0][0])"
    )
    server.plan([{"match": "", "faults": [verdict("correct")] * 400}])
    items = [AnswerItem(f"i{k}", f"question {k}?", f"answer {k}", ("t",)) for k in range(400)]
    with Store(store_path) as store:
        judge = Judge(client(server), cache=DuckDBCache(lambda: store.con), concurrency=2)
        graded = grade_by_judge(items, judge)
        for _ in range(5):
            next(graded)
        reader = subprocess.Popen([sys.executable, "-c", look, str(store_path)], stdout=subprocess.PIPE, text=True)
        for _ in graded:
            store.hand_over()
            if reader.poll() is not None:
                break
        seen = reader.communicate(timeout=60)[0]
        graded.close()
        assert reader.returncode == 0
        assert 5 <= int(seen) < 400
        # Without a hand-over the second process is told who has it.
        told = subprocess.run(
            [sys.executable, "-c", look.replace("=30", "=0.2"), str(store_path)], capture_output=True, text=True
        )
        assert StoreBusy.__name__ in told.stderr
        assert "process" in told.stderr
