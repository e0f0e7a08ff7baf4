"""The spool: how processes that must not wait for the store's lock hand in what they want stored.

Every append is a file of its own in `<store>.spool/`, written under another name, flushed to disk and then renamed:
once `append` returns, a kill or a power cut loses nothing, and a reader never sees half an event. Whoever next has the
store open for writing absorbs the files in one transaction and deletes them after the commit; a kill in between makes
them be absorbed again, which adds nothing, because ids are content hashes.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.data.records import Conversation, Message, Unreadable, digest
from workbench.data.store import Store, store_errors

if TYPE_CHECKING:
    from workbench.data.ingest import OnChange

_counter = itertools.count()


def folder(store_path: Path) -> Path:
    """Where the events of this store wait."""
    return store_path.with_name(store_path.name + ".spool")


def append(store_path: Path, records: Iterable[Conversation | Message]) -> Path:
    """Hands in records; durable when it returns. Never waits on the store.

    Raises: StoreReadOnly or StoreFull if the folder cannot be written.
    """
    from workbench.data.importers import workbench_log

    target = folder(store_path)
    name = f"{time.time_ns():020d}-{os.getpid()}-{next(_counter)}"
    with store_errors(store_path):
        target.mkdir(parents=True, exist_ok=True)
        temporary, final = target / f"{name}.tmp", target / f"{name}.jsonl"
        try:
            with temporary.open("wb") as f:
                f.writelines(workbench_log.encode(record) for record in records)
                f.flush()
                os.fsync(f.fileno())
            temporary.rename(final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        directory = os.open(target, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    return final


def waiting(store_path: Path) -> list[Path]:
    """The files to absorb, oldest first."""
    try:
        return sorted(p for p in folder(store_path).iterdir() if p.suffix == ".jsonl")
    except FileNotFoundError:
        return []


def absorb(store: Store, on_change: OnChange | None = None) -> int:
    """Moves all waiting events into the store; returns the number of new messages."""
    files = waiting(store.path)
    if not files:
        return 0
    # Every recall looks whether something waits; what is needed for taking it in is imported only then (6 ms of CPU).
    from workbench.data.importers import workbench_log
    from workbench.data.importers.base import Source
    from workbench.data.writer import Writer

    with store.transaction() as con:
        writer = Writer(con)
        for path in files:
            writer.begin_source(digest("spool"), "spool", workbench_log.FORMAT)
            with path.open("rb") as stream:
                for record in workbench_log.read(Source("spool", stream)):
                    if isinstance(record, Conversation):
                        writer.conversation(record)
                    elif isinstance(record, Message):
                        writer.message(record)
                    elif isinstance(record, Unreadable):
                        writer.quarantine(record)
        written = writer.finish()
        if written.touched and on_change:
            on_change(con, sorted(written.touched))
    for path in files:
        path.unlink(missing_ok=True)
    return written.messages_added
