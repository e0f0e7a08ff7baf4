"""Graders of answers, and that nothing disappears when grades are added up."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.evals.graders import Grade, exact_match, judge_agreement, normalise_answer, summarise, token_f1


def squad(text: str) -> str:
    """The normalisation of SQuAD's evaluation, from its description."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


@pytest.mark.parametrize(
    ("answer", "target", "same"),
    [
        ("The Eiffel Tower.", "eiffel tower", True),
        ("  a  Cat ", "cat", True),
        ("don't", "dont", True),
        ("don’t", "don't", True),
        ("U.S.", "US", True),
        ("7 p.m.", "7 pm", True),
        ("1,234,567 people", "1234567 people", True),
        ("+5", "5", True),
        ("cafe\u0301", "café", True),
        ("STRASSE", "straße", True),
        ("$5", "5", True),
        ("well-known", "well known", True),
        ("\N{MINUS SIGN}3", "-3", True),
        ("1.5", "15", False),
        ("-5", "5", False),
        ("1,5", "15", False),
        ("3/4", "34", False),
        ("7:30", "730", False),
        ("2022-05-07", "20220507", False),
        ("covid-19", "covid 19", True),
        ("yesterday", "yes", False),
        ("not yes", "yes", False),
        ("therapist", "the rapist", False),
        ("A", "B", False),
        ("a", "A", True),
        ("日本", "日本。", True),
    ],
)
def test_exact_match(answer: str, target: str, same: bool) -> None:
    grade = exact_match(answer, [target])
    assert (grade.value, grade.status) == (float(same), "ok")
    assert exact_match(answer, ["something else", target]).value == same


@settings(max_examples=200)
@given(st.lists(st.text(string.ascii_letters, min_size=1, max_size=6), min_size=1, max_size=8))
def test_words_are_normalised_as_squad_does(words: list[str]) -> None:
    text = ", ".join(words) + "!"
    if squad(text):
        assert normalise_answer(text) == squad(text)
    assert normalise_answer(normalise_answer(text)) == normalise_answer(text)


@settings(max_examples=2000)
@given(st.text(max_size=40))
def test_normalising_twice_changes_nothing_and_a_text_matches_itself(text: str) -> None:
    once = normalise_answer(text)
    assert normalise_answer(once) == once
    if once:
        assert exact_match(text, [text]).value == token_f1(text, [text]).value == 1


@pytest.mark.parametrize(
    ("answer", "targets", "f1"),
    [
        ("the red car", ["red car"], 1.0),
        ("a big red car", ["red car"], 2 * 2 / 5),
        ("car car car", ["car"], 2 * 1 / 4),  # repetition does not pay
        ("blue", ["red car"], 0.0),
        ("red", ["blue", "red car"], 2 / 3),
    ],
)
def test_token_f1_by_hand(answer: str, targets: list[str], f1: float) -> None:
    assert token_f1(answer, targets).value == pytest.approx(f1)


@given(st.lists(st.sampled_from("abcde"), min_size=1), st.lists(st.sampled_from("abcde"), min_size=1))
def test_token_f1_is_the_harmonic_mean_of_precision_and_recall(a: list[str], b: list[str]) -> None:
    a, b = [f"w{x}" for x in a], [f"w{x}" for x in b]
    shared = sum((Counter(a) & Counter(b)).values())
    precision, recall = shared / len(a), shared / len(b)
    expected = 2 * precision * recall / (precision + recall) if shared else 0.0
    assert token_f1(" ".join(a), [" ".join(b)]).value == pytest.approx(expected)


@pytest.mark.parametrize("answer", ["", "  ", "?!", "\u200b"])
@pytest.mark.parametrize("grader", [exact_match, token_f1])
def test_an_answer_without_a_word_has_a_status_and_no_value(answer: str, grader: Any) -> None:
    grade = grader(answer, ["x"])
    assert (grade.value, grade.status) == (None, "wrong_format")


@pytest.mark.parametrize("grader", [exact_match, token_f1])
def test_targets_that_cannot_be_meant_are_refused(grader: Any) -> None:
    with pytest.raises(InputError, match="No target has a word"):
        grader("x", ["", "…"])
    with pytest.raises(InputError, match="No target"):
        grader("x", [])
    with pytest.raises(InputError, match="must be a list"):
        grader("x", "yes")  # a string is a sequence of letters


def test_errors_are_counted_and_neither_dropped_nor_hidden() -> None:
    """Silent failure P5: 5 of 6 graded gave accuracy 1.0 with status success."""
    grades = [Grade(1.0, "ok", "g/1") for _ in range(5)] + [Grade(None, "grader_error", "g/1", explanation="boom")]
    summary = summarise(grades)
    assert summary.score == pytest.approx(5 / 6)
    assert summary.score_completed == 1.0
    assert summary.by_status == {"ok": 5, "grader_error": 1}
    assert sum(summary.by_status.values()) == summary.num_items == 6
    assert summary.as_json()["by_status"] == summary.by_status
    nothing = summarise([Grade(None, "timeout", "g/1")] * 2)
    assert (nothing.score, nothing.score_completed) == (0.0, None)


def test_grades_that_cannot_be_are_refused() -> None:
    for value, status in ((None, "ok"), (1.0, "timeout"), (1.5, "ok"), (math.nan, "ok"), (0.0, "unknown")):
        with pytest.raises(InputError):
            Grade(value, status, "g/1")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="g/1, g/2"):
        summarise([Grade(1.0, "ok", "g/1"), Grade(1.0, "ok", "g/2")])
    with pytest.raises(InputError, match="none"):
        summarise([])


def test_agreement_of_judges() -> None:
    def column(name: str, *values: float | None) -> list[Grade]:
        return [Grade(v, "grader_error" if v is None else "ok", name) for v in values]

    grades = {
        "a": column("a", 1.0, 0.0, 1.0, None),
        "b": column("b", 1.0, 0.0, 0.0, 1.0),
        "c": column("c", None, None, None, 0.0),
    }
    result = judge_agreement(grades)
    assert (result.num_items, result.num_complete) == (4, 0)
    raw, kappa = result.pairs["a", "b"] or (0.0, 0.0)
    assert raw == pytest.approx(2 / 3)
    assert kappa == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
    assert result.pairs["a", "c"] is None
    assert result.alpha < 1
    same = judge_agreement({"a": grades["a"], "b": grades["a"]})
    assert (same.alpha, same.pairs["a", "b"]) == (1.0, (1.0, 1.0))
    for wrong in ({"a": grades["a"]}, {"a": grades["a"], "b": grades["b"][:2]}):
        with pytest.raises(InputError, match="same items"):
            judge_agreement(wrong)
