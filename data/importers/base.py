"""What importers share: the source they read, the probe that tells formats apart, JSON line by line.

An importer is a module with

    FORMAT: str                                        # "claude_code"
    def detect(probe: Probe) -> int                    # 0 = not mine … 100 = certainly mine
    def read(source: Source) -> Iterator[Record]       # streams; memory does not grow with the file

and one line in the table of `workbench.data.importers`. The rules that every importer keeps:

* Every byte of the source is accounted for: it becomes a message, or is counted in `source.skipped`
  under the name of its kind (records that are no speech), or is yielded as `Unreadable`. Nothing is dropped.
* It never raises on content. Only OSError (the disk) may leave `read`.
* Unknown record types and fields are tolerated (and counted); times are never assumed to be in order.
* It yields a `Conversation` before the first message of it, and a `Checkpoint` where all that it has yielded is
  whole (after each conversation of a file with many; the end of the file is a checkpoint by itself).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from typing import Any, BinaryIO, Protocol, cast

import orjson

from workbench.data.records import Message, Record, Unreadable

HEAD_BYTES = 65536
#: A line longer than this is not read into memory: it goes to quarantine (its first KEPT_RAW_BYTES do).
MAX_LINE_BYTES = 256 << 20
KEPT_RAW_BYTES = 1 << 20
#: What conversion of a record of the wrong shape may raise; each becomes an `Unreadable`.
SHAPE_ERRORS = (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError)
_BOM = b"\xef\xbb\xbf"


@dataclass
class Source:
    """An open, forward-only stream of bytes and what is known about it.

    Args:
        path: as shown to people and stored with every message ("/logs/a.jsonl", "export.zip!/conversations.json", "-").
        stream: positioned at `start`; only read() and readline() are used.
        start: byte offset to begin at (> 0 when a grown log is read from where it was left).
        session: the Conversation fields kept from the earlier part of a log that is resumed (`start` > 0):
            {"session_id": …, "meta": …}. None at `start` 0.
        skipped: how many records of each kind were no speech.
        state: the importer's own notes (JSON-able) for the next read of a grown log: it leaves them here at the end of
            a read, and finds them here at the beginning of the next.
        earlier: opens the source at byte 0, for an importer whose notes do not suffice; None where it cannot.
    """

    path: str
    stream: BinaryIO
    start: int = 0
    session: dict[str, Any] | None = None
    skipped: Counter[str] = field(default_factory=Counter)
    state: dict[str, Any] | None = None
    earlier: Callable[[], AbstractContextManager[BinaryIO]] | None = None
    #: Set by lines(): how far the source has been read, and that it can be resumed at a line.
    offset: int = 0
    by_lines: bool = False

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yields (byte offset, line with its newline). An over-long line comes in pieces without a newline."""
        self.by_lines = True
        self.offset = offset = self.start
        readline = self.stream.readline
        while line := readline(MAX_LINE_BYTES):
            self.offset += len(line)
            yield offset, line
            offset = self.offset

    @contextmanager
    def before(self) -> Iterator[Source]:
        """The bytes [0, start) as a source of their own; an empty one where they cannot be read again."""
        with self.earlier() if self.earlier else nullcontext(BytesIO()) as stream:
            yield Source(self.path, cast(BinaryIO, _Beginning(stream, self.start)))


class _Beginning:
    """The first bytes of a stream, by lines."""

    def __init__(self, stream: BinaryIO, size_bytes: int) -> None:
        self._stream, self._left = stream, size_bytes

    def readline(self, limit: int) -> bytes:
        line = self._stream.readline(min(limit, self._left))
        self._left -= len(line)
        return line


class Importer(Protocol):
    """The shape of an importer module."""

    FORMAT: str

    def detect(self, probe: Probe) -> int: ...
    def read(self, source: Source) -> Iterator[Record]: ...


class Lines:
    """JSON objects, parsed as far as somebody looks: the first mostly tells all."""

    def __init__(self, raw: list[bytes]) -> None:
        self._raw = iter(raw)
        self._parsed: list[dict[str, Any]] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        at = 0
        while at < len(self._parsed) or self._parse_next():
            yield self._parsed[at]
            at += 1

    def __bool__(self) -> bool:
        return bool(self._parsed) or self._parse_next()

    def _parse_next(self) -> bool:
        for raw in self._raw:
            row = _loads_or_none(raw)
            if isinstance(row, dict):
                self._parsed.append(row)
                return True
        return False


@dataclass(frozen=True)
class Probe:
    """The first bytes of a source, parsed as far as they can be, for `detect`.

    `head` holds at least the first HEAD_BYTES of the source, or all of it (`complete`).
    """

    head: bytes
    complete: bool = False

    @cached_property
    def lines(self) -> Lines:
        """The JSON objects among the first complete lines (JSONL); bad lines are passed over."""
        rows = self.head.removeprefix(_BOM).split(b"\n")
        if not self.complete and len(rows) > 1:
            rows.pop()
        return Lines(rows[:50])

    @cached_property
    def document(self) -> str:
        """'{' or '[' for the first byte of a JSON document, '' for anything else."""
        first = self.head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        return first.decode() if first in (b"{", b"[") else ""

    @cached_property
    def whole(self) -> Any:
        """The parsed document where all of it is in `head`, else None."""
        return _loads_or_none(self.head.removeprefix(_BOM)) if self.complete else None

    def has_keys(self, *keys: str) -> bool:
        """Whether all of the names stand as JSON keys somewhere in the head (nested ones included)."""
        return all(key.encode() in self._quoted for key in keys)

    @cached_property
    def _quoted(self) -> frozenset[bytes]:
        """All that stands between two quotation marks."""
        return frozenset(self.head.split(b'"')[1:-1])


def _loads_or_none(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return _repaired(raw) if b"\\u" in raw or b"NaN" in raw or b"Infinity" in raw else None


def unreadable(offset: int, raw: bytes, reason: str, unfinished: bool = False) -> Unreadable:
    """An Unreadable for `raw`, of which at most KEPT_RAW_BYTES are kept."""
    return Unreadable(offset, len(raw), reason, raw[:KEPT_RAW_BYTES], unfinished)


def read_json_lines(
    source: Source, convert: Callable[[dict[str, Any], int, int], Iterable[Record]]
) -> Iterator[Record]:
    """Drives a JSONL importer: each line is parsed and handed to `convert(row, offset, length)`.

    A line that is no JSON object, or that `convert` cannot handle (SHAPE_ERRORS), becomes `Unreadable`; what
    `convert` yielded for that line before it failed is dropped, so that a line is imported whole or not at all.
    Blank lines are counted as skipped. The last line counts as unfinished if it has no newline and does not parse.
    """
    for offset, line in source.lines():
        is_repaired = False
        try:
            row = orjson.loads(line if offset else line.removeprefix(_BOM))
        except orjson.JSONDecodeError as error:
            if not line.strip():
                source.skipped["blank line"] += 1
                continue
            row = _repaired(line)
            is_repaired = row is not None
            if not is_repaired:
                yield _not_json(offset, line, error.msg)
                continue
        if not isinstance(row, dict):
            yield unreadable(offset, line, f"a JSON object was expected, not {_json_type(row)}")
            continue
        try:
            records = convert(row, offset, len(line))
            if not isinstance(records, list):
                records = list(records)
        except SHAPE_ERRORS as error:
            yield unreadable(offset, line, f"unexpected shape: {type(error).__name__}: {str(error)[:200]}")
            continue
        if is_repaired:
            for record in records:
                if isinstance(record, Message):
                    record.meta = {**(record.meta or {}), "json_repaired": True}
        yield from records


def _repaired(line: bytes) -> Any:
    """The value of a line that other programs take for JSON (half a surrogate pair, NaN); None if it is none."""
    from workbench.data.importers.json_stream import parse_json  # it imports this module

    try:
        return parse_json(line)
    except (ValueError, RecursionError):
        return None


def _not_json(offset: int, line: bytes, why: str) -> Unreadable:
    if line.endswith(b"\n"):
        return unreadable(offset, line, "nested too deeply" if "depth" in why else f"not JSON: {why}")
    if len(line) == MAX_LINE_BYTES:
        return unreadable(offset, line, f"line longer than {MAX_LINE_BYTES >> 20} MiB")
    return unreadable(offset, line, f"not JSON: {why} (last line has no end: still being written?)", unfinished=True)


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def as_text(value: Any) -> str:
    """The verbatim text of a value: a string as it is, None as "", anything else as compact JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else orjson.dumps(value).decode()
