"""ingest: sources in, conversations in the store; incremental, interruptible, whole conversations at a time."""

from __future__ import annotations

import errno
import lzma
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, BinaryIO, Protocol

import duckdb
import orjson

from workbench.data import importers
from workbench.data.columns import Kind, registered
from workbench.data.importers.base import Source, unreadable
from workbench.data.records import Checkpoint, Conversation, Message, Unreadable, digest
from workbench.data.sources import Found, find, opened, probe
from workbench.data.store import Store, store_errors
from workbench.data.writer import Writer
from workbench.errors import InputError

#: Commit at the next checkpoint after this many bytes of source or seconds: enough to make commits cheap, short enough
#: for waiting processes and for what a kill can cost.
COMMIT_BYTES = 64 << 20
COMMIT_SECONDS = 1.0
FINGERPRINT_BYTES = 4096
#: What DuckDB may hold of an uncommitted conversation before it moves it to its temporary file.
MEMORY_LIMIT = "256MB"
#: More of them cost 5 to 12 % of CPU and save no time: batches are small, and Python holds up the statements.
THREADS = 1


class OnChange(Protocol):
    """Builds what is derived from conversations, inside the transaction that changes them.

    Args: more_follows: another call comes at once, and a last one (with no ids perhaps) that does not say so.

    Returns: exchanges (added, unchanged).
    """

    def __call__(
        self, con: duckdb.DuckDBPyConnection, conversation_ids: list[str], more_follows: bool = False
    ) -> tuple[int, int]: ...


@dataclass
class Report:
    """What an ingest did. `unchanged` counts what was met again: re-read, or in files that did not change.

    `bytes_read` counts what was read for its messages, not what an importer looks up in front of a resumed read.
    """

    files: int = 0
    files_unchanged: int = 0
    not_logs: list[str] = field(default_factory=list)
    conversations_added: int = 0
    conversations_updated: int = 0
    conversations_unchanged: int = 0
    messages_added: int = 0
    messages_unchanged: int = 0
    exchanges_added: int = 0
    exchanges_unchanged: int = 0
    quarantined: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    bytes_read: int = 0
    seconds: float = 0.0

    def as_json(self) -> dict[str, object]:
        """The object that `ingest --json` ends with."""
        return {
            "conversations": {
                "added": self.conversations_added,
                "updated": self.conversations_updated,
                "unchanged": self.conversations_unchanged,
            },
            "messages": {"added": self.messages_added, "unchanged": self.messages_unchanged},
            "exchanges": {"added": self.exchanges_added, "unchanged": self.exchanges_unchanged},
            "quarantined": self.quarantined,
            "seconds": round(self.seconds, 3),
            "files": {"read": self.files, "unchanged": self.files_unchanged, "not_logs": self.not_logs},
            "formats": dict(self.formats),
            "skipped": dict(self.skipped),
            "bytes_read": self.bytes_read,
        }


def ingest(
    store: Store,
    paths: Iterable[str],
    *,
    format: str | None = None,
    on_change: OnChange | None = None,
    progress: Callable[[str, Report], None] | None = None,
) -> Report:
    """Reads logs into the store.

    Args:
        paths: files, folders, zips, or "-" for standard input.
        format: an importer's name; None = detected from the content of each source.
        on_change: builds what is derived (exchanges, postings) in the same transaction.
        progress: called with the path of each source before it is read, and the report so far.

    Raises: InputError, StoreError. A kill at any moment leaves whole conversations only; run again to go on.
    """
    if format is not None:
        importers.importer(format)
    return _Ingest(store, format, on_change).run(find(list(paths), store.path), progress)


class _Ingest:
    def __init__(self, store: Store, format: str | None, on_change: OnChange | None) -> None:
        self.store, self.format, self.on_change = store, format, on_change
        self.report = Report()
        self.writer = Writer(store.con)
        self._uncommitted_bytes = 0
        self._committed_at = time.monotonic()
        self._in_transaction = False
        self._more_follows = True
        self._is_waiting = False  # whether on_change was told so last
        self._unchanged: list[str] = []
        self._remembered: dict[str, tuple[object, ...]] = {}

    def run(self, sources: Iterator[Found], progress: Callable[[str, Report], None] | None) -> Report:
        started = time.monotonic()
        with store_errors(self.store.path):
            before = self._set(memory_limit=MEMORY_LIMIT, threads=THREADS)
            try:
                for batch in _batches(sources):
                    known = self._known(batch)
                    for found in batch:
                        if progress:
                            progress(found.path, self.report)
                        self._source(found, known.get(digest("source", found.path)))
                self._more_follows = False
                self._commit()
                self._count_unchanged()
            finally:
                if self._in_transaction:
                    self.store.rollback()
                self._set(**before)
                self.report.seconds = time.monotonic() - started
        return self.report

    # -- one source -------------------------------------------------------------------------------------------------

    def _known(self, batch: list[Found]) -> dict[str, _Known]:
        rows = self.store.con.execute(
            "SELECT source_id, format, size_bytes, mtime_ns, bytes_read, fingerprint, session, skipped FROM sources "
            "WHERE source_id IN (SELECT unnest($1::VARCHAR[]))",
            [[digest("source", found.path) for found in batch]],
        ).fetchall()
        return {row[0]: _Known(*row[1:]) for row in rows}

    def _source(self, found: Found, known: _Known | None) -> None:
        source_id = digest("source", found.path)
        same = known and found.file and (known.size_bytes, known.mtime_ns) == (found.size_bytes, found.mtime_ns)
        if known and same and self.format in (None, known.format) and not known.is_to_be_judged_again():
            self._unchanged.append(source_id)
            if known.format is None:
                self.report.not_logs.append(found.path)
            return
        try:
            grew = known and self.format in (None, known.format) and _only_grew(found, known)
            start = known.bytes_read if known and grew else 0
            with opened(found, start) as stream:
                self._read(found, source_id, stream, start, known)
        except FileNotFoundError:  # it went after it was found
            return
        except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            self._begin(found, source_id, self.format or "")
            # Unfinished, and of size -1: it is tried again by the next run, which may find it repaired.
            self._quarantine(unreadable(0, b"", f"cannot be read further: {error}", unfinished=True))
            self._remember(found, source_id, None, 0, None, size_bytes=-1)

    def _read(self, found: Found, source_id: str, stream: BinaryIO, start: int, known: _Known | None) -> None:
        format, session = (known.format, orjson.loads(known.session or "null")) if start and known else (None, None)
        if format is None:
            head, replayed = probe(stream)
            if found.seekable:
                stream.seek(start)
            else:
                stream = replayed
            if head.complete and not head.head.strip():
                return
            format = self.format or importers.detect(head)
        if format is None:
            self._not_a_log(found, source_id)
            return
        self.report.files += 1
        self.report.formats[format] += 1
        self._begin(found, source_id, format)
        if known:
            self.store.con.execute("DELETE FROM quarantine WHERE source_id = ? AND unfinished", [source_id])
        state = session.pop("state", None) if session else None
        source = Source(found.path, stream, start, session or None, state=state)
        source.earlier = partial(opened, found) if found.seekable else None
        self._skipped_before = Counter(orjson.loads(known.skipped or "{}")) if start and known else Counter[str]()
        self._counted_to = start
        unfinished_at = self._records(found, source_id, format, source)
        read = (found.size_bytes or source.offset) if not source.by_lines else source.offset
        self.report.bytes_read += read - start
        self._uncommitted_bytes += read - self._counted_to
        self.report.skipped.update(source.skipped)
        end = source.offset if unfinished_at is None else unfinished_at
        self._remember(found, source_id, format, end if source.by_lines else 0, source)
        if self._due():
            self._commit()

    def _records(self, found: Found, source_id: str, format: str, source: Source) -> int | None:
        """Hands all records of the source to the writer; returns where an unfinished last line begins."""
        writer, unfinished_at = self.writer, None
        for record in importers.importer(format).read(source):
            if isinstance(record, Message):
                writer.message(record)
            elif isinstance(record, Conversation):
                before = source.session
                same = before is not None and before["session_id"] == record.session_id
                source.session = {
                    "session_id": record.session_id,
                    "meta": {**before["meta"], **record.meta} if same and before else record.meta,
                }
                writer.conversation(record)
            elif isinstance(record, Checkpoint):
                if self._due(source.offset - self._counted_to):
                    # The size -1 says that the file was not read to its end: the next run goes on here.
                    resume_at = record.offset if source.by_lines and record.offset is not None else 0
                    self._remember(found, source_id, format, resume_at, source, size_bytes=-1)
                    self._commit()
                    self._begin(found, source_id, format)
                    self._counted_to = max(source.offset, source.start)
            else:
                self._quarantine(record)
                if record.unfinished:
                    unfinished_at = record.offset
        return unfinished_at

    def _quarantine(self, record: Unreadable) -> None:
        self.report.quarantined += 1
        self.writer.quarantine(record)

    def _not_a_log(self, found: Found, source_id: str) -> None:
        self.report.not_logs.append(found.path)
        if found.file is None:
            raise InputError(
                "Standard input is in no format that the workbench knows. Name it with --format, one of: "
                + ", ".join(importers.IMPORTERS)
            )
        self._begin(found, source_id, "")
        self._remember(found, source_id, None, 0, None)

    def _remember(
        self, found: Found, source_id: str, format: str | None, bytes_read: int, source: Source | None,
        size_bytes: int | None = None,
    ) -> None:  # fmt: skip
        """Notes how far the source has been read, in the same transaction as what was read."""
        if found.file is None:
            return
        self._remembered[source_id] = (
            source_id, found.path, format, found.size_bytes if size_bytes is None else size_bytes, found.mtime_ns,
            bytes_read, _fingerprint(found, bytes_read) if format else importers.fingerprint(),
            orjson.dumps({**(source.session or {}), "state": source.state}).decode() if source and bytes_read else None,
            orjson.dumps(dict(self._skipped_before + source.skipped)).decode() if source else None,
        )  # fmt: skip

    def _store_sources(self) -> None:
        if not self._remembered:
            return
        con = self.store.con
        con.execute("DELETE FROM sources WHERE source_id IN (SELECT unnest($1::VARCHAR[]))", [list(self._remembered)])
        with registered(con, "read_sources", _SOURCES, list(self._remembered.values())):
            con.execute("INSERT INTO sources BY NAME SELECT *, now() AS updated_at FROM read_sources")
        self._remembered = {}

    # -- transactions -----------------------------------------------------------------------------------------------

    def _begin(self, found: Found, source_id: str, format: str) -> None:
        if not self._in_transaction:
            self.store.con.execute("BEGIN")
            self._in_transaction = True
        self.writer.begin_source(source_id, found.path, format)

    def _set(self, **settings: Any) -> dict[str, Any]:
        """Changes settings of DuckDB's; returns what they were before."""
        con, before = self.store.con, {}
        for name, value in settings.items():
            before[name] = con.execute("SELECT current_setting(?)", [name]).fetchall()[0][0]
            con.execute(f"SET {name} = '{value}'")
        return before

    def _due(self, more_bytes: int = 0) -> bool:
        late = time.monotonic() - self._committed_at > COMMIT_SECONDS
        return late or self._uncommitted_bytes + more_bytes > COMMIT_BYTES

    def _commit(self) -> None:
        is_due = self._is_waiting and not self._more_follows
        if is_due and not self._in_transaction:
            self.store.con.execute("BEGIN")
            self._in_transaction = True
        if self._in_transaction:
            written = self.writer.finish()
            self._store_sources()
            report = self.report
            if self.on_change and (written.touched or is_due):
                added, unchanged = self.on_change(self.store.con, sorted(written.touched), self._more_follows)
                self._is_waiting = self._more_follows
                report.exchanges_added += added
                report.exchanges_unchanged += unchanged
            self.store.con.execute("COMMIT")
            self._in_transaction = False
            report.conversations_added += len(written.added)
            report.conversations_updated += len(written.touched - written.added)
            report.conversations_unchanged += written.conversations_seen - len(written.touched)
            report.messages_added += written.messages_added
            report.messages_unchanged += written.messages_unchanged
        self._uncommitted_bytes = 0
        if self.store.hand_over():
            self._set(memory_limit=MEMORY_LIMIT, threads=THREADS)
            self.writer = Writer(self.store.con)
        self.writer.reset()
        self._committed_at = time.monotonic()

    def _count_unchanged(self) -> None:
        """Adds what the files hold that did not have to be opened."""
        self.report.files_unchanged = len(self._unchanged)
        row = self.store.con.execute(
            "WITH c AS (SELECT conversation_id, num_messages FROM conversations "
            "WHERE source_id IN (SELECT unnest($1::VARCHAR[]))) "
            "SELECT count(*), coalesce(sum(num_messages), 0), "
            "(SELECT count(*) FROM exchanges WHERE conversation_id IN (SELECT conversation_id FROM c)) FROM c",
            [self._unchanged],
        ).fetchone()
        if row:
            self.report.conversations_unchanged += row[0]
            self.report.messages_unchanged += row[1]
            self.report.exchanges_unchanged += row[2]


_SOURCES: dict[str, Kind] = {
    "source_id": "valid", "path": "text", "format": "text", "size_bytes": "int", "mtime_ns": "int",
    "bytes_read": "int", "fingerprint": "valid", "session": "valid", "skipped": "valid",
}  # fmt: skip


def _batches(sources: Iterator[Found]) -> Iterator[list[Found]]:
    while batch := list(islice(sources, 256)):
        yield batch


@dataclass(frozen=True, slots=True)
class _Known:
    format: str | None
    size_bytes: int
    mtime_ns: int
    bytes_read: int
    fingerprint: str
    session: str | None
    skipped: str | None

    def is_to_be_judged_again(self) -> bool:
        """Whether it was no log to the importers of another version."""
        return self.format is None and self.fingerprint != importers.fingerprint()


def _only_grew(found: Found, known: _Known) -> bool:
    """Whether the file begins with all that was read of it (judged by the bytes before that point, and its first)."""
    if not known.bytes_read or not found.seekable or known.bytes_read > found.size_bytes:
        return False
    if found.size_bytes == known.size_bytes:  # of the same size, but written to: no growth
        return False
    return _fingerprint(found, known.bytes_read) == known.fingerprint


def _fingerprint(found: Found, offset: int) -> str:
    if not offset or found.file is None:
        return ""
    with found.file.open("rb") as f:
        first = f.read(min(offset, FINGERPRINT_BYTES))
        f.seek(max(0, offset - FINGERPRINT_BYTES))
        return digest(first, f.read(min(offset, FINGERPRINT_BYTES)))
