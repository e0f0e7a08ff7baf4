"""Follows folders of growing logs: looks at sizes and times, and opens the store only when something changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from workbench import api
from workbench.data import spool
from workbench.data.sources import find
from workbench.errors import InputError

if TYPE_CHECKING:
    from workbench.data.ingest import Report


def watch(
    store: Path,
    paths: list[str],
    *,
    format: str | None = None,
    every_seconds: float = 2.0,
    on_report: Callable[[Report], None],
    rounds: int | None = None,
) -> None:
    """Ingests what changes below the paths until interrupted (or for a number of rounds).

    The store is closed between rounds, so that other processes can use it.
    """
    if "-" in paths:
        raise InputError("--watch follows files and folders; standard input ends by itself.")
    seen: dict[str, tuple[int, int]] = {}  # the first round looks at everything: something may have come meanwhile
    while rounds is None or rounds > 0:
        time.sleep(every_seconds)
        now = _look(paths)
        changed = [path for path, state in now.items() if seen.get(path) != state]
        if changed:
            report = api.ingest(changed, store, format=format)
            if report.messages_added or report.quarantined:
                on_report(report)
        elif spool.waiting(store):
            api.absorb_if_free(store)
        seen = now
        rounds = None if rounds is None else rounds - 1


def _look(paths: list[str]) -> dict[str, tuple[int, int]]:
    return {f.path.split("!/")[0]: (f.size_bytes, f.mtime_ns) for f in find(paths)}
