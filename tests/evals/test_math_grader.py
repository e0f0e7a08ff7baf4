"""The wrapper of math-verify: what is accepted and rejected, with the traps of evals.md P7, and that it cannot hang."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

pytest.importorskip("math_verify", reason="the math extra is not installed")

from workbench.errors import InputError
from workbench.evals.math_grader import GRADER, MathGrader, equal, extract


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    with MathGrader(timeout_seconds=20) as running:
        yield running


CASES: list[tuple[str, str, float | None]] = [
    # Numbers, decided exactly and without math-verify.
    ("\\boxed{6}", "6", 1),
    ("\\boxed{6}, no wait, \\boxed{7}", "7", 1),  # math-verify: the set {6, 7}
    ("\\boxed{6}, no wait, \\boxed{7}", "6", 0),
    ("so 3 + 4 = 7\n#### 7", "7", 1),
    ("#### 6\nsorry\n#### 7", "6", 0),
    ("\\boxed{3} but then\n#### 4", "4", 1),
    ("#### 4, or rather \\boxed{3}", "3", 1),
    ("#### 1,234", "1234", 1),
    ("#### 1,234", "1", 0),
    ("1,234,567", "1234567", 1),
    ("1e3", "1000", 1),  # math-verify reads 1
    ("1e3", "1", 0),
    ("2.5E-2", "0.025", 1),
    ("5.0", "5", 1),
    ("05", "5", 1),
    (".5", "0.5", 1),
    ("+5", "5", 1),
    ("-5", "5", 0),
    ("\N{MINUS SIGN}5", "-5", 1),
    ("$5", "5", 1),
    ("\\$5", "5", 1),
    ("1/2", "0.5", 1),
    ("\\boxed{\\frac{1}{2}}", "0.5", 1),
    ("\\boxed{\\dfrac12}", "\\frac{1}{2}", 1),
    ("-\\frac{3}{4}", "-0.75", 1),
    ("0.333", "1/3", 0),
    ("0.3333333333", "\\frac13", 0),
    ("2/4", "1/2", 1),
    ("50\\%", "50", 1),
    ("50%", "0.5", 1),
    ("50%", "5", 0),
    ("12345678901234567890", "12345678901234567891", 0),  # equal as floats
    ("0.1", "0.10000000000000001", 0),
    # Texts: math-verify parses none of them, or takes letters for a product.
    ("The answer is Alice.", "Alice", 1),
    ("\\boxed{\\text{alice}}", "Alice", 1),
    ("Bob", "Alice", 0),
    ("\\boxed{A}", "A", 1),
    ("\\boxed{(A)}", "A", 1),
    ("\\boxed{B}", "A", 0),
    ("east", "seat", 0),
    ("not Alice", "Alice", 0),
    ("\\text{no solution}", "no solution", 1),
    ("No", "no", 1),
    # Tuples and intervals keep their order and brackets, sets and bare lists do not.
    ("$(1,2)$", "(1,2)", 1),
    ("$(1,2)$", "$(2,1)$", 0),
    ("(1, 2, 3)", "(1,2)", 0),
    ("(0.5, 1)", "\\left(\\frac12, 1\\right)", 1),
    ("[1,2)", "[1,2]", 0),
    ("[1,2)", "(1,2)", 0),
    ("[1,2)", "[1, 2)", 1),
    ("\\{1,2\\}", "\\{2,1\\}", 1),
    ("\\{1,2\\}", "\\{1,3\\}", 0),
    ("1, -2", "-2, 1", 1),
    ("1, 2", "1, 2, 3", 0),
    ("1, 1", "1, 2", 0),
    ("3, 4", "34", 0),
    # Expressions, through math-verify.
    ("\\boxed{2\\sqrt{2}}", "\\sqrt{8}", 1),
    ("\\boxed{x^2+2x+1}", "(x+1)^2", 1),
    ("\\boxed{x^2+2x+1}", "(x+2)^2", 0),
    ("\\frac{\\pi}{2}", "\\pi/2", 1),
    ("x = 5", "5", 1),
    ("x = 6", "5", 0),
    ("f(x) = 2x+1", "1+2x", 1),
    ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}", 1),
    ("(\\sqrt{4}, \\sqrt{2})", "(2, 2^{1/2})", 1),
    ("(\\sqrt{2}, \\sqrt{4})", "(2, 2^{1/2})", 0),
    ("90^\\circ", "90", 1),
    ("2^{10}", "1024", 1),
    # No answer is a status, not a 0.
    ("", "5", None),
    ("\\boxed{}", "5", None),
    ("I think \\boxed{5", "5", None),
    ("first \\boxed{4} then \\boxed{5", "5", None),
    ("####", "5", None),
    ("it could be 5\nor 6\nor so", "5", None),
    ("\\boxed{" + "1" * 1001 + "}", "5", None),
]


@pytest.mark.parametrize(("answer", "target", "value"), CASES)
def test_case(grader: MathGrader, answer: str, target: str, value: float | None) -> None:
    [grade] = grader.grade([(answer, [target])])
    assert (grade.value, grade.status) == (value, "wrong_format" if value is None else "ok"), grade
    assert grade.grader == GRADER
    assert grade.seconds is not None
    assert grade.seconds >= 0


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 60
    assert len(set(CASES)) == len(CASES)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{\\frac{1}{2}} and more", "\\frac{1}{2}"),
        ("\\boxed{a \\} b}", "a \\} b"),
        ("\\fbox{3}", "3"),
        ("the answer is 3\nThe final answer is: 4.\n", "4"),
        ("  7  ", "7"),
    ],
)
def test_extraction(text: str, answer: str) -> None:
    assert extract(text) == (answer, "")


def test_any_target_counts_and_what_was_extracted_is_kept(grader: MathGrader) -> None:
    [grade] = grader.grade([("thus \\boxed{ 8 }", ["7", "#### 8"])])
    assert (grade.value, grade.extracted) == (1.0, "8")
    for targets in ("8", [], [" "]):
        with pytest.raises(InputError, match="must be a list"):
            grader.grade([("8", targets)])


def test_plain_answers_start_no_process() -> None:
    def never(answer: str, target: str) -> bool:
        raise AssertionError((answer, target))

    assert equal("1e3", "1000", never)
    assert not equal("Bob", "Alice", never)
    assert equal("(1, 1/2)", "(1, 0.5)", never)


def test_it_works_from_any_thread_and_in_order() -> None:
    """Silent failure P7: math-verify raises in every thread but the main one."""
    answers = [("\\sqrt{4}", ["2"]), ("\\sqrt{4}", ["3"]), ("2+x", ["x+2"])]
    found: list[list[float | None]] = []
    with MathGrader(num_workers=2) as grader:
        threads = [
            threading.Thread(target=lambda: found.append([g.value for g in grader.grade(answers)])) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [[1.0, 0.0, 1.0]] * 3


def test_one_expression_that_hangs_stops_nothing_else() -> None:
    with MathGrader(timeout_seconds=3) as grader:
        grades = grader.grade([("\\sqrt{4}", ["2"]), ("9^{9^{9^{9}}}", ["9^{9^{9^{8}}}"]), ("\\sqrt{9}", ["3"])])
    assert [(g.value, g.status) for g in grades] == [(1.0, "ok"), (None, "timeout"), (1.0, "ok")]


def test_a_late_worker_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    import workbench.evals.math_grader as module

    code = "import sys, time; print('{\"ready\": true}', flush=True); sys.stdin.readline(); time.sleep(60)"
    started: list[subprocess.Popen[str]] = []
    real = subprocess.Popen

    def sleeper(arguments: list[str], **options: object) -> subprocess.Popen[str]:
        started.append(real([sys.executable, "-c", code], **options))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(module.subprocess, "Popen", sleeper)
    with MathGrader(timeout_seconds=0.5) as grader:
        grades = grader.grade([("\\sqrt{4}", ["2"]), ("\\sqrt{9}", ["3"])])
    assert [g.status for g in grades] == ["timeout", "timeout"]
    assert "0.5 s" in grades[0].explanation
    assert [process.poll() for process in started] == [-signal.SIGKILL] * 2  # nobody waited for the sleepers
