"""Verifiers: equivalent forms are right, near misses are wrong, hostile texts neither raise nor score."""

from __future__ import annotations

import importlib.util
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.evals import verifiers
from workbench.evals.verifiers import Verdict, countdown, evaluate, exact, number
from workbench.policies.tasks import Task

needs_math = pytest.mark.skipif(not importlib.util.find_spec("math_verify"), reason="math-verify is not installed")
needs_gym = pytest.mark.skipif(not importlib.util.find_spec("reasoning_gym"), reason="reasoning-gym is not installed")
FEW = settings(max_examples=60, deadline=None, derandomize=True)


def asked(answer: str, **meta: object) -> Task:
    return Task("t", {"prompt": "?"}, answer, meta=meta)


# --- numbers ----------------------------------------------------------------------------------------------------------


def written(value: int) -> list[str]:
    """Ways to write a whole number."""
    sign, size = ("-" if value < 0 else ""), abs(value)
    return [
        f"#### {value}", f"#### {value:,}", f"so it is\n#### {sign}${size:,}.00\n", f"#### {value} dollars.",
        f"The answer is {value:,}.", f"\\boxed{{{value}}}", f"first 7, then {value:,}.", f"#### 3 x 2 = {value}",
        f"#### {2 * value}/2", f"\\boxed{{{sign}\\frac{{{3 * size}}}{{3}}}}", f"**{value}**",
        f"#### {value}".replace("-", "\N{MINUS SIGN}"),
    ]  # fmt: skip


@FEW
@given(st.integers(-(10**9), 10**9))
def test_a_number_is_the_same_in_every_way_to_write_it(value: int) -> None:
    for text in written(value):
        assert number(text, asked(f"worked\n#### {value:,}")) == Verdict(1.0, "ok", str(value)), text


@FEW
@given(st.integers(-(10**6), 10**6), st.sampled_from([-1, 1, 10, Fraction(1, 100)]))
def test_a_near_number_is_wrong(value: int, off: int | Fraction) -> None:
    task = asked(f"#### {value}")
    for text in written(value + off) if isinstance(off, int) else [f"#### {float(value + off)}"]:
        assert number(text, task).score == 0.0, text
    if value:
        assert number(f"#### {-value}", task).score == 0.0
        assert number(f"#### {value}0", task).score == 0.0


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("#### 0.5", "#### 1/2", 1),
        ("#### 1 1/2", "#### 1.5", 1),
        ("#### 1 1/2", "#### 1", 0),
        ("#### -1 1/2", "#### -1.5", 1),
        ("#### 1e3", "#### 1000", 1),
        ("#### .5", "#### 0.5", 1),
        ("#### 50%", "#### 50", 1),
        ("10-4", "#### 4", 1),
        ("10-4", "#### -4", 0),
        ("16 eggs minus 7 gives 9 left", "#### 9", 1),
        ("16 eggs minus 7 gives 9 left", "#### 16", 0),
        ("#### 18\n#### 20", "#### 20", 1),
        ("#### 18\n#### 20", "#### 18", 0),
        ("#### 18\nSo 20 is not it", "#### 18", 1),
        ("#### 1,0000", "#### 10000", 0),
        ("the answer is 12, not 13", "#### 12", 1),
        ("version 1.2.3 of A18", "#### 18", 0),
        ("#### 3/0", "#### 3", 0),
    ],
)
def test_number_cases(text: str, answer: str, score: float) -> None:
    assert number(text, asked(answer)).score == score


@pytest.mark.parametrize("text", ["", "  \n", "none", "#### none", "\\boxed{", "#### "])
def test_a_text_without_a_number_is_wrong_format(text: str) -> None:
    assert number(text, asked("#### 3")) == Verdict(0.0, "wrong_format", "")


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "target", "score"),
    [
        ("#### (B)", "(B)", 1),
        ("#### B", "(B)", 1),
        ("#### b)", "(B)", 1),
        ("#### **(B)**", "(B)", 1),
        ("#### (B) 12/25/1937", "(B)", 1),
        ("#### B. 12/25/1937", "(B)", 1),
        ("So the answer is (B).", "(B)", 1),
        ("#### (A)", "(B)", 0),
        ("#### (A) not (B)", "(B)", 0),
        ("#### Bern", "(B)", 0),
        ("#### A cat", "(A)", 0),
        ("#### AB", "(A)", 0),
        ("#### yes", "Yes", 1),
        ("#### Yes.", "yes", 1),
        ("#### no", "Yes", 0),
        ("#### not yes", "yes", 0),
        ("#### invalid", "valid", 0),
        ("#### valid", "invalid", 0),
        ("#### True", "True", 1),
        ("#### -50", "-50", 1),
        ("#### -50.0", "-50", 1),
        ("#### 50", "-50", 0),
        ("#### eight", "8", 0),
        ("#### ]]", "] ]", 1),
        ("#### ] ] >", "] ]", 0),
        ("#### barn, damp, dot", "barn damp dot", 1),
        ("#### barn dot damp", "barn damp dot", 0),
        ("yes", "yes", 1),
        ("It is raining.\nYes", "yes", 0),
    ],
)
def test_exact_cases(text: str, target: str, score: float) -> None:
    assert exact(text, asked(f"#### {target}")).score == score


def test_an_unmarked_answer_of_several_lines_is_wrong_format() -> None:
    assert exact("I think\nthat (B)", asked("#### (B)")) == Verdict(0.0, "wrong_format", "")
    assert exact("", asked("#### (B)")) == Verdict(0.0, "wrong_format", "")


# --- mathematics ------------------------------------------------------------------------------------------------------


@needs_math
@pytest.mark.parametrize(
    ("text", "target", "score"),
    [
        ("so \\boxed{\\frac{\\sqrt{2}}{2}}", "\\boxed{\\frac{1}{\\sqrt{2}}}", 1),
        ("\\boxed{(3, \\frac{\\pi}{2})}", "\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", 1),
        ("\\boxed{x^2+2x+1}", "\\boxed{(x+1)^2}", 1),
        ("\\boxed{x^2+2x+2}", "\\boxed{(x+1)^2}", 0),
        ("\\boxed{6}, no wait, \\boxed{7}", "\\boxed{7}", 1),
        ("\\boxed{0.333}", "\\boxed{\\frac13}", 0),
    ],
)
def test_mathematics_cases(text: str, target: str, score: float) -> None:
    verdict = verifiers.mathematics(text, asked(f"Long.\nWorked {target}."))
    assert (verdict.score, verdict.status) == (score, "ok")


@needs_math
def test_mathematics_without_a_box_is_wrong_format() -> None:
    assert verifiers.mathematics("I do not\nknow", asked("\\boxed{1}")) == Verdict(0.0, "wrong_format", "")


# --- countdown --------------------------------------------------------------------------------------------------------


@st.composite
def expressions(draw: st.DrawFn) -> tuple[str, list[int]]:
    numbers = draw(st.lists(st.integers(1, 25), min_size=2, max_size=4))
    parts = [str(number) for number in numbers]
    while len(parts) > 1:
        sign = draw(st.sampled_from(["+", "-", "*", "/", " x ".replace("x", "×"), "÷"]))
        parts[-2:] = [f"({parts[-2]}{sign}{parts[-1]})"]
    return parts[0], numbers


def python_value(expression: str) -> Fraction | None:
    plain = expression.replace("×", "*").replace("÷", "/")
    fractions = "".join(f"Fraction({c})" if c.isdigit() else c for c in _tokens(plain))
    try:
        return eval(fractions, {"Fraction": Fraction})
    except ZeroDivisionError:
        return None


def _tokens(text: str) -> list[str]:
    found: list[str] = []
    for c in text:
        if c.isdigit() and found and found[-1].isdigit():
            found[-1] += c
        else:
            found.append(c)
    return found


@FEW
@given(expressions())
def test_countdown_agrees_with_python_on_fractions(made: tuple[str, list[int]]) -> None:
    expression, numbers = made
    value = python_value(expression)
    if value is None:
        with pytest.raises(ZeroDivisionError):
            evaluate(expression)
        return
    assert evaluate(expression) == (value, numbers)
    task = asked("", numbers=numbers, target=value)
    for text in (f"#### {expression}", f"hm\n#### {expression} = {value.numerator}", f"\\boxed{{{expression}}}"):
        assert countdown(text, task).score == 1.0, text
    for wrong in (asked("", numbers=numbers, target=value + 1), asked("", numbers=numbers[1:], target=value)):
        assert countdown(f"#### {expression}", wrong).score == 0.0


def test_countdown_may_leave_numbers_out_but_not_use_one_twice() -> None:
    task = asked("", numbers=[3, 8, 5], target=24)
    assert countdown("#### 3*8", task) == Verdict(1.0, "ok", "3*8")
    assert countdown("#### 3 \\times 8 = 24", task).score == 1.0
    assert countdown("#### 3*3*3-3", task).score == 0.0
    assert countdown("#### 24", task).score == 0.0
    assert countdown("#### 3*8*5/(5-5)", task).score == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "", "#### ", "I\ngive up", "#### __import__('os').system('true')", "#### 9**9**9", "#### 3*8 if 1 else 0",
        "#### " + "(" * 5000 + "1" + ")" * 5000, "#### 1.5*16", "#### 0x18", "#### 2 4", "#### ()", "#### 024",
        "#### +24", "#### 1" + "0" * 10_000, "#### 48//2",
    ],
)  # fmt: skip
def test_what_is_no_expression_is_wrong_format(text: str) -> None:
    assert countdown(text, asked("", numbers=[24, 2, 48], target=24)) == Verdict(0.0, "wrong_format", "")


# --- others -----------------------------------------------------------------------------------------------------------


@needs_gym
def test_reasoning_gym_scores_what_is_in_the_tags() -> None:
    entry = {"question": "1 + 2", "answer": "3", "metadata": {}}
    task = asked("", generator="chain_sum", entry=entry)
    assert verifiers.reasoning_gym("so <answer>4</answer> or <answer> 3 </answer>", task) == Verdict(1.0, "ok", "3")
    assert verifiers.reasoning_gym("<answer>4</answer>", task).score == 0.0
    for text in ("3", "<answer></answer>", "<answer>3"):
        assert verifiers.reasoning_gym(text, task) == Verdict(0.0, "wrong_format", "")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(max_size=60) | st.text("#{}\\boxed0123456789./,-+*()= \nAB", max_size=60))
def test_no_text_makes_a_verifier_raise(text: str) -> None:
    tasks = asked("#### 17"), asked("#### (C)"), asked("", numbers=[1, 2], target=997)
    for verify, task in zip((number, exact, countdown), tasks, strict=True):
        verdict = verify(text, task)
        assert verdict.score in (0.0, 1.0)
        assert verdict.status in ("ok", "wrong_format")


def test_a_transcript_is_judged_by_its_end_state() -> None:
    from workbench.evals.environments.shop import Shop, make_task

    rng = random.Random(0)
    for task in map(make_task, rng.sample(range(1000), 20)):
        shop = Shop()
        state, lines = shop.reset(task), []
        for call in task.answer.splitlines():
            lines += [call, shop.step(state, call)[0].strip()]
        transcript = "\n".join(lines)
        assert verifiers.end_state(transcript, task) == Verdict(1.0, "ok", "")
        assert verifiers.end_state(transcript.removesuffix("done\n"), task).score == 0.0
    assert verifiers.end_state("-> nothing", task).status == "wrong_format"
