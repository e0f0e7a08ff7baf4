"""Verifiers: what a completion is worth, given the task. Pure functions: the same text and task, the same verdict.

A final answer stands after the last ####, inside the last \\boxed{}, or after "answer is"; what each verifier does
without one is said in its docstring. A completion without an answer is wrong_format and scores 0; where the verifier
itself gave up, there is no score (evals.md R5).

Verified by: tests/evals/test_verifiers.py.
"""

from __future__ import annotations

import ast
import atexit
import operator
import re
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from fractions import Fraction
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from workbench.errors import MissingExtra
from workbench.evals.graders import Status
from workbench.evals.math_grader import GRADER as MATH_GRADER
from workbench.evals.math_grader import MathGrader, extract
from workbench.policies.tasks import Task

NUMBER, EXACT, MATH, COUNTDOWN = "number/1", "exact/1", MATH_GRADER, "countdown/1"
REASONING_GYM, END_STATE = "reasoning-gym/1", "end-state/1"


class Verdict(NamedTuple):
    """What a completion is worth.

    Args:
        score: 0 to 1; None if it could not be judged.
        status: ok, wrong_format (score 0), timeout or grader_error (no score).
        extracted: the answer that was judged; equal answers of several samples have equal texts where possible.
    """

    score: float | None
    status: Status
    extracted: str = ""


Verify = Callable[[str, Task], Verdict]
_NO_ANSWER = Verdict(0.0, "wrong_format")

# --- numbers ----------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>(?<![\w)\]])-)?"
    r"(?P<value>(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,2}(?!\w))?)"
    r"(?:\s?/\s?(?P<over>\d+)(?![\d/.]))?"
)
_MIXED = re.compile(r"\s*(-?)(\d+)\s+(\d+)/(\d+)(?!\d)")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")


def number(text: str, task: Task) -> Verdict:
    """1 if the final number equals the task's answer exactly; without a marked answer, the last number of the text.

    Thousands commas, currency signs, decimals, exponents and fractions are understood; of an equation, the side after
    the last = counts.
    """
    found, wanted = _final_number(text), _final_number(task.answer)
    if found is None:
        return _NO_ANSWER
    return Verdict(float(found == wanted), "ok", str(found))


def _final_number(text: str) -> Fraction | None:
    marked = _marked(text)
    if marked is None:
        numbers = _numbers(text)
        return numbers[-1] if numbers else None
    side = marked.rsplit("=", 1)[-1]
    if mixed := _MIXED.match(side):
        sign, whole, top, bottom = mixed.groups()
        return Fraction(f"{sign}1") * (int(whole) + Fraction(int(top), int(bottom))) if int(bottom) else None
    numbers = _numbers(side)
    return numbers[0] if numbers else None


def _marked(text: str) -> str | None:
    """The final answer of a text that marks one."""
    found, problem = extract(text)
    return None if problem or found == text.strip() else found


def _numbers(text: str) -> list[Fraction]:
    plain = _LATEX_FRACTION.sub(r"\1/\2", text.replace("\N{MINUS SIGN}", "-"))
    plain = re.sub(r"\\?\$\s?", "", plain)
    found = []
    for match in _NUMBER.finditer(plain):
        value = Fraction(match["value"].replace(",", "")) / int(match["over"] or 1) if match["over"] != "0" else None
        if value is not None:
            found.append(-value if match["sign"] else value)
    return found


# --- words, choices, targets ------------------------------------------------------------------------------------------

_CHOICE = re.compile(r"\(([A-Z])\)")
_CHOSEN = re.compile(r"\((\w)\)|(\w)(?=[).:]|$)")


def exact(text: str, task: Task) -> Verdict:
    """1 if the final answer equals the target; an answer of several lines that marks none is wrong_format.

    Case, surrounding quotes and emphasis, commas and the last full stop are forgiven. "(B)" is also "B", "b)" and
    "(B) and its text"; a number is compared by value; brackets without their spaces.
    """
    found, problem = extract(text)
    if problem:
        return _NO_ANSWER
    found, target = _bare(found), _bare(extract(task.answer)[0])
    if choice := _CHOICE.fullmatch(target):
        chosen = _CHOSEN.match(found)
        letter = (chosen[1] or chosen[2]).upper() if chosen else ""
        return Verdict(float(letter == choice[1]), "ok", letter or found)
    if _NUMBER.fullmatch(target):
        numbers = _numbers(found) if _NUMBER.fullmatch(found) else []
        return Verdict(float(numbers == _numbers(target)), "ok", str(numbers[0]) if numbers else found)
    if not any(c.isalnum() for c in target):
        found, target = "".join(found.split()), "".join(target.split())
    else:
        found, target = _words(found), _words(target)
    return Verdict(float(found == target), "ok", found)


def _bare(text: str) -> str:
    return text.strip().strip("*`\"'“”$ ").removesuffix(".").strip("*`\"'“”$ ")


def _words(text: str) -> str:
    return " ".join(text.replace(",", " ").split()).casefold()


# --- mathematics ------------------------------------------------------------------------------------------------------


def mathematics(text: str, task: Task) -> Verdict:
    """1 if the answer in the last \\boxed{} (or after the last ####) equals the task's by math-verify.

    Raises: MissingExtra without math-verify.
    """
    grade = _math_grader().grade([(text, [task.answer])])[0]
    if grade.status == "wrong_format":
        return _NO_ANSWER
    return Verdict(grade.value, grade.status, grade.extracted)


@cache
def _math_grader() -> MathGrader:
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(MathGrader())


# --- countdown --------------------------------------------------------------------------------------------------------

_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "\N{MINUS SIGN}": "-", "{": "(", "}": ")"})
_MAX_EXPRESSION_CHARS = 200


def countdown(text: str, task: Task) -> Verdict:
    """1 if the expression uses each of meta["numbers"] at most once and is meta["target"] exactly.

    An expression has whole numbers, + - * / and parentheses; it is computed on fractions, never run.
    """
    found, problem = extract(text)
    expression = max(found.split("="), key=len).strip()
    try:
        value, used = evaluate(expression)
    except ZeroDivisionError:
        return Verdict(0.0, "ok", expression)
    except ValueError:
        return _NO_ANSWER
    is_allowed = Counter(used) <= Counter(task.meta["numbers"])
    return Verdict(float(not problem and is_allowed and value == task.meta["target"]), "ok", expression)


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """(value, the numbers in it) of an arithmetical expression.

    Raises: ValueError for what is none; ZeroDivisionError.
    """
    plain = expression.replace("\\times", "*").replace("\\cdot", "*").replace("\\div", "/").translate(_SIGNS)
    if len(plain) > _MAX_EXPRESSION_CHARS:
        raise ValueError(f"An expression has at most {_MAX_EXPRESSION_CHARS} characters, not {len(plain)}.")
    if not re.fullmatch(r"[\d\s()+*/-]+", plain):
        raise ValueError(f"{expression!r} is no arithmetical expression.")
    used: list[int] = []
    try:
        return _value(ast.parse(plain.strip(), mode="eval").body, used), used
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"{expression!r} is no arithmetical expression.") from error


def _value(node: ast.expr, used: list[int]) -> Fraction:
    match node:
        case ast.Constant(value=int(value)):
            used.append(value)
            return Fraction(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, used)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_value(left, used), _value(right, used))
    raise ValueError(f"{ast.unparse(node)} is no sum, difference, product or quotient.")


# --- others' and environments -----------------------------------------------------------------------------------------

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def reasoning_gym(text: str, task: Task) -> Verdict:
    """The score that reasoning-gym's own generator gives the last <answer>…</answer>.

    Raises: MissingExtra without reasoning-gym.
    """
    tagged = _ANSWER_TAG.findall(text)
    if not tagged or not (found := tagged[-1].strip()):
        return _NO_ANSWER
    score = _gym_scorer(task.meta["generator"])(found, task.meta["entry"])
    return Verdict(min(1.0, max(0.0, float(score))), "ok", found)


@cache
def _gym_scorer(generator: str) -> Any:
    try:
        library = import_module("reasoning_gym")
    except ImportError as error:
        raise MissingExtra("This bench needs reasoning-gym", "evals") from error
    return library.get_score_answer_fn(generator)


def end_state(text: str, task: Task) -> Verdict:
    """1 if the tool calls in a transcript of the shop, one a line, leave its database as it should be.

    Lines of the shop's answers are passed over; a transcript without any call is wrong_format.
    """
    from workbench.evals.environments.shop import ANSWER_MARK, Shop

    calls = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith(ANSWER_MARK)]
    if not calls:
        return _NO_ANSWER
    shop = Shop()
    state = shop.reset(task)
    for call in calls:
        if shop.step(state, call)[1]:
            break
    return Verdict(shop.reward(state), "ok")
