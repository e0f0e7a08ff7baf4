"""The command line: a thin layer over the Python API. Heavy imports happen inside the commands."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Entry point of `workbench` and `python -m workbench`."""
    if "recall" in sys.argv:  # one query is over before BLAS threads (40 ms of CPU) or collecting garbage pay
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        gc.disable()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else whoever started us has Ctrl-C ignored
        signal.signal(signal.SIGINT, _interrupt)
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


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C as Python handles it; but while a module loads the process ends here: some extensions crash on it."""
    at = frame
    while at is not None:
        if at.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, b"workbench: Interrupted. What was committed is kept; run the same command again to go on.\n")
            os._exit(130)
        at = at.f_back
    signal.default_int_handler(number, frame)
