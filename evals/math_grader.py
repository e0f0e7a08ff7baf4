"""Grades mathematical answers: the last \\boxed{} or ####, exact and number match first, math-verify for the rest.

math-verify (extra `math`) by itself raises in any thread but the main one, takes "\\boxed{6}, no wait, \\boxed{7}" for
a set, reads 1e3 as 1, finds no answer in "Alice", and can work on a tower of powers for seconds (evals.md P7). So what
texts and numbers decide is decided here, exactly; tuples keep their order and brackets, sets and bare lists do not; and
the rest goes to worker processes that are ended when they take too long. It works from any thread.

Deviations from math-verify: decimals are compared exactly with fractions (0.333 is not 1/3); one per cent sign against
none is forgiven (50% is 50 and 0.5).
Verified by: tests/evals/test_math_grader.py.
"""

from __future__ import annotations

import json
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

from workbench.errors import InputError, MissingExtra
from workbench.evals.graders import Grade

GRADER = "math/1"
STARTUP_SECONDS = 120.0  # importing SymPy on a busy machine
MAX_MEMORY_BYTES = 2 << 30  # of a worker: 10**10**10 would take all
MAX_CHARS = 1000  # of an extracted answer

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_PHRASE = re.compile(r"\banswer\s*(?:is|:|=)\s*:?\s*([^\n]+?)\s*\.?\s*(?:\n|$)", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d{1,3})?")
_FRACTION = re.compile(r"([-+]?)(?:\\[dt]?frac\{\s*(-?\d+)\s*\}\{\s*(\d+)\s*\}|(\d+)/(\d+))")
_TEXT = re.compile(r"[^\W\d_]{2,}(?:[ '-][^\W\d_]+)*|[A-Z]")
_OPENING = {"(": ")", "[": "]", "\\{": "\\}"}


def extract(text: str) -> tuple[str, str]:
    """The final answer in a text, and "", or "" and why there is none.

    The last \\boxed{} or #### counts, whichever stands later; then "answer is …"; then a text of one line.
    """
    boxes, hashes = list(_BOX.finditer(text)), list(_HASHES.finditer(text))
    if boxes and not (hashes and hashes[-1].start() > boxes[-1].start()):
        inside = _braces(text, boxes[-1].end())
        if inside is None:
            return "", "the last \\boxed{ is not closed"
        return (inside.strip(), "") if inside.strip() else ("", "the last \\boxed{} is empty")
    if hashes:
        found = hashes[-1].group(1).strip()
        return (found, "") if found else ("", "nothing follows the last ####")
    if phrases := _PHRASE.findall(text):
        return phrases[-1].strip(), ""
    stripped = text.strip()
    if not stripped or "\n" in stripped:
        return "", "no \\boxed{}, no ####, and more than one line" if stripped else "the answer is empty"
    return stripped, ""


def _braces(text: str, start: int) -> str | None:
    """What stands before the brace that closes the one before `start`; None if none does."""
    depth, at = 1, start
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[start:at]
        at += 1
    return None


_CLEANING: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"^(?:\$\$?|\\\(|\\\[)|(?:\$\$?|\\\)|\\\])$"), ""),
    (re.compile(r"\\(?:left|right)(?![a-z])|\\[!,;: ]|\\q?quad|~"), ""),
    (re.compile(r"\\[dt]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)(?!\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|°"), ""),
    (re.compile("\N{MINUS SIGN}"), "-"),
    (re.compile(r"\s+"), " "),
)


def _clean(text: str) -> str:
    text = text.strip()
    for pattern, replacement in _CLEANING:
        text = pattern.sub(replacement, text).strip()
    text = re.sub(r"^\\?\$\s?(?=[-\d.])", "", text)  # five dollars are 5
    return text[:-1].rstrip() if text.endswith(".") else text


def _number(text: str) -> Fraction | None:
    """The exact value of a plain number or fraction of whole numbers; None for everything else."""
    text = text.replace(" ", "")
    if found := _FRACTION.fullmatch(text):
        numerator, denominator = (found[2], found[3]) if found[2] else (found[4], found[5])
        return Fraction(int(f"{found[1]}1") * int(numerator), int(denominator)) if int(denominator) else None
    if any(c.isdigit() for c in text) and _NUMBER.fullmatch(text):
        return Fraction(text.replace(",", ""))
    return None


def equal(answer: str, target: str, verify: Callable[[str, str], bool]) -> bool:
    """Whether two extracted answers are the same; what text and number do not decide is asked of `verify`."""
    a, t = _clean(answer), _clean(target)
    if "=" in a and "=" not in t:  # x = 5 answers 5
        a = re.sub(r"^[A-Za-z](?:\([a-z]\))?\s*=\s*", "", a)
    if _TEXT.fullmatch(t.strip("()")):
        a, t = a.strip("()"), t.strip("()")
    if a.casefold() == t.casefold() if _TEXT.fullmatch(t) and len(t) > 1 else a.replace(" ", "") == t.replace(" ", ""):
        return True
    if _TEXT.fullmatch(t) and (len(t) > 1 or _TEXT.fullmatch(a)):
        return False
    x, y = _number(a), _number(t)
    if x is not None and y is not None:
        return x == y
    if (a.endswith("%") or t.endswith("%")) and (per_cent := _per_cent(a, t)) is not None:
        return per_cent
    parts_a, parts_t = _parts(a), _parts(t)
    if parts_a is None and parts_t is None:
        return verify(a, t)
    if parts_a is None or parts_t is None or parts_a[0] != parts_t[0] or len(parts_a[1]) != len(parts_t[1]):
        return False
    if parts_a[0] in ("(", "["):
        return all(equal(p, q, verify) for p, q in zip(parts_a[1], parts_t[1], strict=True))
    left = list(parts_t[1])
    for part in parts_a[1]:
        match = next((at for at, wanted in enumerate(left) if equal(part, wanted, verify)), None)
        if match is None:
            return False
        del left[match]
    return True


def _per_cent(a: str, t: str) -> bool | None:
    x, y = (_number(side.rstrip("%").rstrip("\\").strip()) for side in (a, t))
    if x is None or y is None:
        return None
    return x == y or (a.endswith("%") != t.endswith("%") and (x == y * 100 or x * 100 == y))


def _parts(text: str) -> tuple[str, list[str]] | None:
    """The opening bracket ("" for a bare list, "\\{" for a set) and the members of a list; None if it is none.

    An interval keeps its brackets: "[1,2)" gives "[)" and is compared in order.
    """
    opening = next((o for o in _OPENING if text.startswith(o)), "")
    inside = text
    if opening:
        ending = next((e for e in _OPENING.values() if text.endswith(e)), "")
        if not ending or (opening == "\\{") != (ending == "\\}"):
            return None
        inside = text[len(opening) : -len(ending)]
        if ending != _OPENING[opening]:
            opening = f"{opening}{ending}"
    members, depth, last = [], 0, 0
    for at, c in enumerate(inside):
        depth += (c in "([{") - (c in ")]}")
        if depth < 0:
            return None  # (1,2) or (3,4): the first bracket is not closed by the last
        if c == "," and depth == 0:
            members.append(inside[last:at].strip())
            last = at + 1
    members.append(inside[last:].strip())
    return (opening, members) if len(members) > 1 and all(members) else None


class MathGrader:
    """Grades answers in worker processes; use as a context manager.

    Args: num_workers: processes, started when they are needed; timeout_seconds: for one answer.
    Raises: MissingExtra without math-verify.
    """

    def __init__(self, *, num_workers: int = 1, timeout_seconds: float = 10.0) -> None:
        if num_workers < 1 or timeout_seconds <= 0:
            raise InputError(f"num_workers ({num_workers}) must be 1 or more, timeout_seconds ({timeout_seconds}) > 0.")
        self._timeout_seconds = timeout_seconds
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker() for _ in range(num_workers)]
        for worker in self._workers:
            self._free.put(worker)

    def __enter__(self) -> MathGrader:
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self._workers:
            worker.stop()

    def grade(self, answers: Iterable[tuple[str, Sequence[str]]]) -> list[Grade]:
        """Grades of (answer, targets), in order: 1 if the answer equals a target, else 0.

        An answer that holds no final answer is wrong_format, one that takes too long is timeout; neither is a 0.
        """
        with ThreadPoolExecutor(len(self._workers)) as pool:
            return list(pool.map(lambda pair: self._grade(*pair), answers))

    def _grade(self, answer: str, targets: Sequence[str]) -> Grade:
        if isinstance(targets, str) or not any(target.strip() for target in targets):
            raise InputError(f"The targets must be a list of texts, not {targets!r}.")
        started = time.perf_counter()
        extracted, problem = extract(answer)
        if len(extracted) > MAX_CHARS:
            extracted, problem = "", f"the final answer has {len(extracted)} characters"
        if problem:
            return Grade(None, "wrong_format", GRADER, explanation=problem, seconds=time.perf_counter() - started)
        wanted = [extract(target)[0] or target for target in targets]
        try:
            value = any(equal(extracted, target, self._verify) for target in wanted)
        except TimeoutError:
            seconds = time.perf_counter() - started
            explanation = f"not compared within {self._timeout_seconds:g} s"
            return Grade(None, "timeout", GRADER, extracted, explanation, seconds)
        except _Failed as e:
            return Grade(None, "grader_error", GRADER, extracted, str(e), time.perf_counter() - started)
        return Grade(float(value), "ok", GRADER, extracted, seconds=time.perf_counter() - started)

    def _verify(self, answer: str, target: str) -> bool:
        worker = self._free.get()
        try:
            return worker.verify(answer, target, self._timeout_seconds)
        finally:
            self._free.put(worker)


class _Failed(Exception):
    """The worker could not compare."""


class _Worker:
    """A process that compares by math-verify; ended and started again when it takes too long."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def verify(self, answer: str, target: str, timeout_seconds: float) -> bool:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "workbench.evals.math_worker", str(MAX_MEMORY_BYTES)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
            )  # fmt: skip
            ready = self._exchange(None, STARTUP_SECONDS)
            if "missing" in ready:
                self.stop()
                raise MissingExtra(
                    f"Grading mathematics needs math-verify, which is missing ({ready['missing']})", "math"
                )
        found = self._exchange({"answer": answer, "target": target}, timeout_seconds)
        if "error" in found:
            raise _Failed(found["error"])
        return found["equal"]

    def _exchange(self, request: dict[str, str] | None, timeout_seconds: float) -> dict[str, Any]:
        """Sends a request and waits for a line; a worker that is too late is killed, which ends the waiting."""
        process = self._process
        assert process
        assert process.stdin
        assert process.stdout
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(timeout_seconds, expire)
        timer.start()
        line = ""
        try:
            if request is not None:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            pass  # the worker died; an empty line says so below
        finally:
            timer.cancel()
        if line and not expired.is_set():
            return json.loads(line)
        self.stop()
        if expired.is_set():
            raise TimeoutError
        raise _Failed("the worker process ended; the expression may need more memory than it may take")

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()
