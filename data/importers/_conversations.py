"""Files of whole conversations: one a JSON line, one an element of an array, or one that is the document."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import orjson

from workbench.data.importers._blocks import known_string
from workbench.data.importers._members import not_understood, read_rows, without_end
from workbench.data.importers.base import SHAPE_ERRORS, Source
from workbench.data.importers.json_stream import Member
from workbench.data.records import Checkpoint, Message, Record, Unreadable, digest

#: Ids shorter than this number rows of one file ("0", "task-7"); they say nothing about other files.
_UNIQUE_ID_LENGTH = 16


def read_conversations(
    source: Source, convert: Callable[[dict[str, Any], int, int], Iterator[Record]]
) -> Iterator[Record]:
    """Hands each conversation to `convert(row, offset, length)` and yields a Checkpoint after it."""
    whole: dict[str, Any] = {}
    end = source.start

    def on_member(member: Member) -> Iterator[Record]:
        nonlocal end
        if member.key is not None:
            whole[member.key] = member.value
            end = member.offset + member.length
            return
        if not isinstance(member.value, dict):
            raise TypeError("a JSON object was expected")
        yield from convert(member.value, member.offset, member.length)
        # Lines have no index: only there does a next read begin in the middle of the file.
        yield Checkpoint(member.offset + member.length if member.index is None else None)

    is_cut = False
    for record in read_rows(source, (), on_member):
        is_cut |= isinstance(record, Unreadable) and record.unfinished
        yield record
    if is_cut and whole:
        yield without_end(source.start, end - source.start, whole)  # perhaps the first of many lines
    elif whole:
        try:
            yield from list(convert(whole, source.start, end - source.start))
        except SHAPE_ERRORS as error:
            yield not_understood(source.start, end - source.start, whole, error)


def row_id(row: dict[str, Any], *keys: str) -> str:
    """The row's own id where it is long enough to be unique, else a digest of the row."""
    ids = (known_string(row.get(key)) for key in keys)
    found = next((name for name in ids if name and len(name) >= _UNIQUE_ID_LENGTH), None)
    return found or "sha-" + digest(orjson.dumps(row, option=orjson.OPT_NON_STR_KEYS))


def linked(messages: list[Message]) -> list[Message]:
    """Gives roots beside the first message the parent "": a branch of their own, not what follows the one before."""
    for message in messages[1:]:
        if message.parent_id is None:
            message.parent_id = ""
    return messages
