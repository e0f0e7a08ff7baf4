"""The seventeen silent failures of research/evals.md section 3: each is named by a test; listing tasks is harmless."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

#: A process in which any use of the network or of pickle ends the program.
GUARD = """
import sys
FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind", "pickle.find_class")
def guard(event, arguments):
    if event in FORBIDDEN:
        sys.stderr.write(f"forbidden: {event}\\n")
        sys.stderr.flush()
        import os
        os._exit(99)
sys.addaudithook(guard)
"""


def guarded(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", GUARD + code], capture_output=True, text=True, check=False)


def test_listing_tasks_touches_no_network_no_pickle_and_no_task_code() -> None:
    """Silent failures P6 and P17: a listing that downloads and unpickles, or that reads 14,686 tasks first."""
    run = guarded(
        "from workbench.evals.tasks import TASKS, load_task\n"
        "from workbench.errors import InputError\n"
        "try:\n    load_task('no-such-task')\nexcept InputError:\n    pass\n"
        "print(len(TASKS), sorted(m for m in sys.modules if m.startswith('workbench.evals.tasks.')))"
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert re.fullmatch(r"[1-9]\d* \[\]\n", run.stdout)


def test_the_guard_sees_what_it_should() -> None:
    for code, event in (
        ("import socket; socket.socket().connect(('127.0.0.1', 9))", "socket.connect"),
        ("import pickle, fractions; pickle.loads(pickle.dumps(fractions.Fraction(1, 2)))", "pickle.find_class"),
    ):
        run = guarded(code)
        assert (run.returncode, run.stderr) == (99, f"forbidden: {event}\n")


def test_each_silent_failure_is_named_by_a_test_that_asserts() -> None:
    """P1 to P17 by the docstrings of the tests in this folder."""
    named: dict[int, list[str]] = {number: [] for number in range(1, 18)}
    for path in sorted(HERE.glob("test_*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_") or path == Path(__file__):
                continue
            checks = any(isinstance(inner, ast.Assert) for inner in ast.walk(node)) or "raises" in ast.dump(node)
            for number in re.findall(r"\bP(\d+)\b", ast.get_docstring(node) or ""):
                if checks and int(number) in named:
                    named[int(number)].append(f"{path.name}::{node.name}")
    # P6's and P17's is above: it cannot vouch for itself.
    missing = [number for number, tests in named.items() if not tests and number != 17]
    assert missing == []
