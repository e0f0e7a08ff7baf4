"""Follows folders of growing logs: looks at sizes and times, and opens the store only when something changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from workbench import api
from workbench.data import spool
from workbench.data.sources import find
from workbench.errors import InputError, StoreBusy

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
        now = _look(paths, store)
        changed = [path for path, state in now.items() if seen.get(path) != state]
        rounds = None if rounds is None else rounds - 1
        try:
            reports = _ingest(changed, store, format)
        except StoreBusy:  # another process works: the next round tries again
            continue
        for report in reports:
            if report.messages_added or report.quarantined:
                on_report(report)
        if not changed and spool.waiting(store):
            api.absorb_if_free(store)
        seen = now


def _ingest(changed: list[str], store: Path, format: str | None) -> list[Report]:
    if not changed:
        return []
    try:
        return [api.ingest(changed, store, format=format)]
    except InputError:  # one of them went, or is a damaged zip: the others are read all the same
        reports: list[Report] = []
        for path in changed:
            with suppress(InputError):
                reports.append(api.ingest([path], store, format=format))
        return reports


def _look(paths: list[str], store: Path) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for path in paths:
        with suppress(InputError):  # it is not there now, as a log that is being rotated
            found.update({str(f.file): (f.size_bytes, f.mtime_ns) for f in find([path], store)})
    return found
