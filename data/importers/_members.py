"""Members of a log that may be JSON lines, one JSON array or one JSON object: for formats that occur as all three."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from typing import Any

import orjson

from workbench.data.importers.base import KEPT_RAW_BYTES, SHAPE_ERRORS, Source, read_json_lines
from workbench.data.importers.json_rows import with_peek
from workbench.data.importers.json_stream import Member, read_members
from workbench.data.records import Record, Unreadable

Convert = Callable[[Member], Iterator[Record]]
_BLANK = b"\xef\xbb\xbf \t\r\n"


def _is_json(line: bytes, kind: type = object) -> bool:
    try:
        return isinstance(orjson.loads(line), kind)
    except orjson.JSONDecodeError:
        return False


def _is_object(line: bytes) -> bool:
    return _is_json(line, dict)


def _is_lines(head: bytes) -> bool:
    """Whether these are JSON lines: the first is an object, or is spoilt and one of the next is an object."""
    head = head.lstrip(_BLANK)
    first, *more = head.split(b"\n", 20)
    if first[:1] == b"[" and not _is_json(first):
        return False
    if first[:1] not in (b"{", b"[") or _is_object(first) or (not more and len(first) >= 1 << 20):
        return True
    return any(line[:1] == b"{" and _is_object(line) for line in more)


def convert_members(source: Source, members: Iterator[Member | Unreadable], convert: Convert) -> Iterator[Record]:
    """Hands each member to `convert`; one that it cannot handle (SHAPE_ERRORS) becomes `Unreadable`."""
    for member in members:
        if isinstance(member, Unreadable):
            yield member
            continue
        try:
            records = list(convert(member))
        except SHAPE_ERRORS as error:
            yield not_understood(member.offset, member.length, member.value, error)
            continue
        yield from records


def not_understood(offset: int, length: int, value: Any, error: Exception) -> Unreadable:
    """The quarantine entry of a value whose shape is not what was expected."""
    reason = f"unexpected shape: {type(error).__name__}: {str(error)[:200]}"
    return Unreadable(offset, length, reason, _raw(value))


def without_end(offset: int, length: int, value: Any) -> Unreadable:
    """The quarantine entry of a document that is still being written: without its end it is another conversation."""
    return Unreadable(offset, length, "the document has no end: still being written?", _raw(value), unfinished=True)


def _raw(value: Any) -> bytes:
    try:
        raw = orjson.dumps(value)
    except TypeError:
        try:
            raw = json.dumps(value, default=repr).encode("ascii", "replace")
        except (ValueError, RecursionError):
            raw = b""
    return raw[:KEPT_RAW_BYTES]


def read_rows(source: Source, arrays: Collection[str], convert: Convert) -> Iterator[Record]:
    """Drives an importer of rows: each line of JSONL and each element of a top-level array is a Member without key.

    Args:
        source: JSON lines or a document. An object on a single line is taken for a line and is read as a whole.
        arrays: keys of a top-level object whose elements come one by one (see read_members).
        convert: from a member to records.
    """
    head = with_peek(source).peek(1)
    if _is_lines(head):
        yield from read_json_lines(source, lambda row, offset, length: convert(Member(None, None, offset, length, row)))
    else:
        yield from convert_members(source, read_members(source, arrays), convert)
