"""The process in which math-verify runs: a JSON object per line in, one per line out; see workbench.evals.math_grader.

math-verify's own time limits are off: they use a signal that only a main thread gets. Who started this process ends it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any


def main() -> None:
    """Says that it is ready, or what is missing; then compares line by line until its input ends."""
    try:
        from math_verify import parse, verify
    except ImportError as e:
        print(json.dumps({"missing": str(e)}), flush=True)
        return
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), int(sys.argv[1])))

    no_limit: Any = {"parsing_timeout": None}

    def compare(answer: str, target: str) -> bool:
        gold, guess = (parse(f"${text}$", **no_limit) for text in (target, answer))
        return bool(gold and guess and verify(gold, guess, timeout_seconds=None))

    compare(r"\frac{1}{2}", "x+1")  # the first of each kind takes a second
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            found = {"equal": compare(request["answer"], request["target"])}
        except Exception as e:  # anything may come out of SymPy; it is a status of the grade
            found = {"error": f"{type(e).__name__}: {e}"[:300]}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
