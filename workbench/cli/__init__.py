"""The command line: a thin layer over the Python API. Heavy imports happen inside the commands."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point of `workbench` and `python -m workbench`."""
    if "recall" in sys.argv:  # one query is over before BLAS threads pay: starting them costs 40 ms of CPU
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from workbench.cli.app import run

    code = run(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # A pager or `head` that went away is no error of ours, and the interpreter must not complain about it on exit.
    os._exit(code) if sys.stdout.closed else sys.exit(code)
