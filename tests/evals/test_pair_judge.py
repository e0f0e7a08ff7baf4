"""The judge of pairs: both orders, and only agreement of both is a preference."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("httpx", reason="the llm extra is not installed")
pytest.importorskip("detect_secrets", reason="the llm extra is not installed")

from workbench.errors import InputError
from workbench.evals.asking import Budget
from workbench.evals.pair_judge import PairItem, PairJudge
from workbench.llm_client import OpenAIChat


def judge(server: Any, **options: Any) -> PairJudge:
    return PairJudge(OpenAIChat(server.url, "m", max_retries=0, timeout_seconds=20), concurrency=1, **options)


def verdict(word: str) -> dict[str, str]:
    return {"content": json.dumps({"reason": f"because {word}", "verdict": word})}


def pairs(num: int) -> list[PairItem]:
    return [PairItem(f"i{k}", f"question-{k:02d}?", (), f"left {k}", f"right {k}") for k in range(num)]


@pytest.mark.parametrize(
    ("straight", "swapped", "value", "is_by_position"),
    [
        ("first", "second", 1.0, False),  # A both times
        ("second", "first", 0.0, False),  # B both times
        ("first", "first", 0.5, True),  # a taste for the first place
        ("second", "second", 0.5, True),
        ("tie", "tie", 0.5, False),
        ("first", "tie", 0.5, False),
        ("tie", "first", 0.5, False),
    ],
)
def test_only_the_same_answer_in_both_orders_is_preferred(
    server: Any, straight: str, swapped: str, value: float, is_by_position: bool
) -> None:
    """Silent failure P15: a judge that likes the first place decides nothing."""
    server.plan([{"match": "question-00", "faults": [verdict(straight), verdict(swapped)]}])
    run = judge(server)
    [(_, grade)] = run.compare(pairs(1))
    assert (grade.value, grade.status) == (value, "ok")
    assert run.num_by_position == is_by_position
    assert ("by position" in grade.extracted) == is_by_position
    bodies = [body["messages"][1]["content"] for body in server.bodies()]
    assert [body.index("left 0") < body.index("right 0") for body in bodies] == [True, False]
    assert grade.explanation == f"because {straight} | swapped: because {swapped}"


def test_a_judge_that_always_says_first_finds_no_winner(server: Any) -> None:
    server.plan([{"match": "", "faults": [verdict("first")] * 40}])
    run = judge(server)
    assert [grade.value for _, grade in run.compare(pairs(20))] == [0.5] * 20
    assert run.num_by_position == 20


def test_one_half_without_a_verdict_leaves_the_pair_without_one(server: Any) -> None:
    server.plan([
        {"match": "question-00", "faults": [verdict("first"), "500"]},
        {"match": "question-01", "faults": [{"content": "first!"}, {"content": "first"}, verdict("first")]},
        {"match": "question-02", "faults": [verdict("First"), verdict("first"), verdict("second")]},
    ])  # fmt: skip
    grades = {item.id: grade for item, grade in judge(server).compare(pairs(3))}
    assert [(grades[f"i{k}"].value, grades[f"i{k}"].status) for k in range(3)] == [
        (None, "grader_error"), (None, "grader_error"), (1.0, "ok"),
    ]  # fmt: skip


def test_a_missing_answer_is_not_sent_and_the_budget_skips_whole_pairs(server: Any) -> None:
    server.plan([{"match": "", "faults": [verdict("tie")] * 40}])
    failed = PairItem("x", "q?", (), "", "b", failure="cut off", failure_status="truncated")
    [(_, grade)] = judge(server).compare([failed])
    assert (grade.status, grade.explanation) == ("truncated", "cut off")
    assert server.bodies() == []
    run = judge(server, budget=Budget(max_tokens=4_000))
    grades = [grade for _, grade in run.compare(pairs(30))]
    statuses = {grade.status for grade in grades}
    assert len(grades) == 30
    assert statuses == {"ok", "skipped"}
    assert run.usage.tokens_in + run.usage.tokens_out <= 4_000


def test_ids_that_come_twice_are_refused(server: Any) -> None:
    server.plan([{"match": "", "faults": [verdict("tie")] * 9}])
    with pytest.raises(InputError, match="'i0' comes twice"):
        list(judge(server).compare([*pairs(1), *pairs(1)]))
