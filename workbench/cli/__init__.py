"""The command line: a thin layer over the Python API. Heavy imports happen inside the commands."""

from __future__ import annotations

import contextlib
import gc
import os
import sys


def main() -> None:
    """Entry point of `workbench` and `python -m workbench`."""
    if "recall" in sys.argv:  # one query is over before BLAS threads (40 ms of CPU) or collecting garbage pay
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        gc.disable()
    try:
        from workbench.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # while modules were loaded: nothing had begun
        sys.stderr.write("workbench: Interrupted before it began.\n")
        code = 130
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed before we began
        try:
            stream.flush()
        except BrokenPipeError:
            pass
        except (OSError, ValueError) as error:
            code = code or 1
            with contextlib.suppress(OSError, ValueError):
                print(f"workbench: The output is not complete: {error}", file=sys.__stderr__, flush=True)
    # All is flushed and closed: taking the interpreter apart would only cost time, and complain of a pager that went.
    os._exit(code)
