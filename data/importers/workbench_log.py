"""The workbench's own log format: what the spool holds, and what a program can write that has no format of its own.

JSON lines. {"type": "conversation", "session_id": …, and the other fields of records.Conversation} and
{"type": "message", "session_id": …, "role": …, "parts": [{"kind": "text", "text": …}], …}. Times are ISO 8601 or
numbers (records.parse_time). A message without a `native_id` gets one from its content, so that the same event logged
twice is stored once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from workbench.data.importers.base import Probe, Source, read_json_lines
from workbench.data.records import PART_KINDS, ROLES, Conversation, Message, Part, Record, digest, parse_time

FORMAT = "workbench_log"


def detect(probe: Probe) -> int:
    """Certain where the first lines carry our own mark."""
    return (
        100
        if any(row.get("workbench") == 1 and row.get("type") in ("conversation", "message") for row in probe.lines)
        else 0
    )


def read(source: Source) -> Iterator[Record]:
    """Yields what the lines say, in order."""
    known: set[str] = set()

    def convert(row: dict[str, Any], offset: int, length: int) -> Iterator[Record]:
        session_id = row["session_id"]
        if not isinstance(session_id, str):
            raise TypeError("session_id must be a string")
        if row["type"] == "conversation":
            known.add(session_id)
            yield _conversation(row)
        elif row["type"] == "message":
            if session_id not in known:
                known.add(session_id)
                yield Conversation(session_id)
            yield _message(row, offset, length)
        else:
            raise ValueError(f"type must be conversation or message, not {row['type']!r}")

    return read_json_lines(source, convert)


def encode(record: Conversation | Message) -> bytes:
    """One line of this format, with its newline."""
    row: dict[str, Any] = {"workbench": 1, "type": type(record).__name__.lower()}
    for name in record.__dataclass_fields__:
        if name not in ("parts", "offset", "length", "merge"):
            value = getattr(record, name)
            if value not in (None, "", {}):
                row[name] = value
    if isinstance(record, Message):
        row["parts"] = [
            {k: v for k in Part.__dataclass_fields__ if (v := getattr(part, k)) not in (None, "")}
            for part in record.parts
        ]
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def _conversation(row: dict[str, Any]) -> Conversation:
    texts = {k: _text(row, k) for k in ("agent", "project", "title", "model", "parent_session_id", "active_leaf")}
    meta = row.get("meta") or {}
    if not isinstance(meta, dict):
        raise TypeError("meta must be an object")
    return Conversation(row["session_id"], **texts, started_at=parse_time(row.get("started_at")), meta=meta)


def _message(row: dict[str, Any], offset: int, length: int) -> Message:
    if row["role"] not in ROLES:
        raise ValueError(f"role must be one of {', '.join(ROLES)}, not {row['role']!r}")
    parts = [_part(part) for part in row["parts"]]
    numbers = [row.get(k) for k in ("tokens_in", "tokens_out", "tokens_cached")]
    if any(v is not None and (not isinstance(v, int) or isinstance(v, bool)) for v in numbers):
        raise TypeError("token counts must be integers")
    native_id = _text(row, "native_id") or digest(row["role"], orjson.dumps(row["parts"]), str(row.get("created_at")))
    meta = row.get("meta")
    if meta is not None and not isinstance(meta, dict):
        raise TypeError("meta must be an object")
    return Message(
        row["session_id"], row["role"], parts, native_id, _text(row, "parent_id"), _text(row, "agent_id"),
        parse_time(row.get("created_at")), _text(row, "model"), numbers[0], numbers[1], numbers[2],
        offset=offset, length=length, meta=meta,
    )  # fmt: skip


def _part(row: dict[str, Any]) -> Part:
    if row["kind"] not in PART_KINDS:
        raise ValueError(f"kind must be one of {', '.join(PART_KINDS)}, not {row['kind']!r}")
    is_error = row.get("is_error")
    if is_error is not None and not isinstance(is_error, bool):
        raise TypeError("is_error must be true or false")
    return Part(
        row["kind"], _text(row, "text") or "", _text(row, "name"), _text(row, "call_id"), row.get("data"), is_error
    )


def _text(row: dict[str, Any], key: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{key} must be a string")
    return value
