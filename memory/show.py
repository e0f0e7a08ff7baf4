"""show: from an id back to the verbatim source, with its neighbours."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import duckdb
import orjson

from workbench.errors import InputError, NotFound

MIN_PREFIX = 6
_HEX = frozenset("0123456789abcdef")


def iso(micros: int | None) -> str | None:
    """ISO 8601 in UTC of microseconds since the epoch."""
    if micros is None:
        return None
    return datetime.fromtimestamp(micros / 1e6, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def resolve(con: duckdb.DuckDBPyConnection, given: str) -> tuple[str, str]:
    """(kind, whole id) of a memory, exchange, conversation or message from its id or the beginning of it.

    A conversation is also found by its log's own session id.
    Raises: NotFound; InputError if the beginning is too short or fits several.
    """
    found: list[tuple[str, str]] = []
    if set(given) <= _HEX and len(given) >= MIN_PREFIX:
        for kind in ("memory", "exchange", "conversation", "message"):
            table = "memories" if kind == "memory" else f"{kind}s"
            rows = con.execute(
                f"SELECT {kind}_id FROM {table} WHERE starts_with({kind}_id, ?) LIMIT 5", [given]
            ).fetchall()
            found += [(kind, row[0]) for row in rows]
    if not found:
        rows = con.execute("SELECT conversation_id FROM conversations WHERE session_id = ? LIMIT 5", [given]).fetchall()
        found = [("conversation", row[0]) for row in rows]
    if len(found) > 1:
        some = ", ".join(f"{kind} {id}" for kind, id in found[:5])
        raise InputError(f"{given!r} fits several: {some}. Give more of the id.")
    if not found:
        hint = f"; at least {MIN_PREFIX} hex digits of an id are needed" if len(given) < MIN_PREFIX else ""
        raise NotFound(f"Nothing in the store has the id {given!r}{hint}. `workbench recall QUERY` shows ids.")
    return found[0]


def show(con: duckdb.DuckDBPyConnection, given: str, neighbours: int = 1) -> dict[str, Any]:
    """Everything about one memory, exchange, conversation or message, verbatim.

    Args:
        given: an id, the first digits of one, or a log's session id.
        neighbours: how many exchanges before and after are named beside an exchange.

    Returns: a JSON-able object with `kind`; messages carry their parts with the text as it stood in the log, and
        where the record lies in the source (path, byte offset, length).
    Raises: NotFound, InputError.
    """
    kind, id = resolve(con, given)
    if kind == "memory":
        row = con.execute("SELECT exchange_id FROM memories WHERE memory_id = ?", [id]).fetchone()
        return {**_exchange(con, row[0] if row else "", neighbours), "kind": "memory", "memory_id": id}
    if kind == "exchange":
        return _exchange(con, id, neighbours)
    if kind == "conversation":
        return _conversation(con, id)
    row = con.execute("SELECT conversation_id, ply FROM messages WHERE message_id = ?", [id]).fetchone()
    assert row is not None
    return {"kind": "message", **_head(con, row[0]), "messages": messages(con, row[0], None, row[1], row[1])}


def _head(con: duckdb.DuckDBPyConnection, conversation_id: str) -> dict[str, Any]:
    row = con.execute(
        "SELECT format, path, session_id, agent, project, title, parent_session_id FROM conversations "
        "WHERE conversation_id = ?", [conversation_id]
    ).fetchone()  # fmt: skip
    if row is None:
        raise NotFound(f"Conversation {conversation_id} is not in the store.")
    return {
        "conversation_id": conversation_id,
        "source": {"format": row[0], "path": row[1], "session_id": row[2]},
        "agent": row[3], "project": row[4], "title": row[5], "parent_session_id": row[6],
    }  # fmt: skip


def _exchange(con: duckdb.DuckDBPyConnection, exchange_id: str, neighbours: int) -> dict[str, Any]:
    row = con.execute(
        "SELECT conversation_id, thread, position, ply_start, ply_end, epoch_us(started_at), epoch_us(ended_at), "
        "files, tools, num_tokens FROM exchanges WHERE exchange_id = ?", [exchange_id]
    ).fetchone()  # fmt: skip
    if row is None:
        raise NotFound(f"Exchange {exchange_id} is not in the store any more; its conversation changed.")
    cid, thread, position = row[:3]
    near = con.execute(
        "SELECT exchange_id, position, ply_start, ply_end, left(user_text, 200) FROM exchanges "
        "WHERE conversation_id = ? AND thread = ? AND position BETWEEN ? AND ? AND position <> ? ORDER BY position",
        [cid, thread, position - neighbours, position + neighbours, position],
    ).fetchall()
    said, head = messages(con, cid, thread, row[3], row[4]), _head(con, cid)
    if said:  # a session can be spread over files
        head["source"]["path"] = said[0]["source"]["path"]
    return {
        "kind": "exchange", "exchange_id": exchange_id, **head, "thread": thread,
        "ply_start": row[3], "ply_end": row[4], "started_at": iso(row[5]), "ended_at": iso(row[6]),
        "files": orjson.loads(row[7]), "tools": row[8], "num_tokens": row[9],
        "memories": _memories(con, exchange_id),
        "messages": said,
        "neighbours": [
            {"exchange_id": n[0], "offset": n[1] - position, "ply_start": n[2], "ply_end": n[3], "user": n[4]}
            for n in near
        ],
    }  # fmt: skip


def _memories(con: duckdb.DuckDBPyConnection, exchange_id: str) -> list[dict[str, Any]]:
    rows = con.execute(
        "SELECT memory_id, distiller, core, context, num_tokens, "
        "(SELECT list(r.label ORDER BY p.relevance DESC, r.label) FROM memory_rooms p JOIN rooms r USING (room_id) "
        "WHERE p.memory_id = m.memory_id) FROM memories m WHERE exchange_id = ? ORDER BY distiller", [exchange_id]
    ).fetchall()  # fmt: skip
    names = ("memory_id", "distiller", "core", "context", "num_tokens", "rooms")
    return [dict(zip(names, (*row[:5], row[5] or []), strict=True)) for row in rows]


def _conversation(con: duckdb.DuckDBPyConnection, cid: str) -> dict[str, Any]:
    rows = con.execute(
        "SELECT exchange_id, thread, ply_start, ply_end, epoch_us(started_at), left(user_text, 200) FROM exchanges "
        "WHERE conversation_id = ? ORDER BY thread, position", [cid]
    ).fetchall()  # fmt: skip
    row = con.execute(
        "SELECT num_messages, epoch_us(started_at), epoch_us(ended_at), meta FROM conversations "
        "WHERE conversation_id = ?",
        [cid],
    ).fetchone()
    assert row is not None
    return {
        "kind": "conversation", **_head(con, cid), "num_messages": row[0], "started_at": iso(row[1]),
        "ended_at": iso(row[2]), "meta": orjson.loads(row[3] or "{}"),
        "exchanges": [
            {"exchange_id": r[0], "thread": r[1], "ply_start": r[2], "ply_end": r[3], "started_at": iso(r[4]),
             "user": r[5]}
            for r in rows
        ],
    }  # fmt: skip


def messages(
    con: duckdb.DuckDBPyConnection, conversation_id: str, thread: str | None, ply_start: int, ply_end: int
) -> list[dict[str, Any]]:
    """The messages of a range of plies (inclusive), of one thread or (None) of all, with their parts in order."""
    rows = con.execute(
        """
        SELECT m.message_id, m.ply, m.role, epoch_us(m.created_at), m.model, m.thread, m.source_offset, m.source_length,
            coalesce(s.path, c.path), p.kind, p.text, p.name, p.call_id, p.is_error, p.data
        FROM messages m JOIN conversations c USING (conversation_id) LEFT JOIN sources s ON s.source_id = m.source_id
        LEFT JOIN parts p ON p.message_id = m.message_id AND p.conversation_id = m.conversation_id
        WHERE m.conversation_id = $cid AND m.ply BETWEEN $a AND $b AND ($thread IS NULL OR m.thread = $thread)
        ORDER BY m.ply, p.seq, p.ordinal""",
        {"cid": conversation_id, "a": ply_start, "b": ply_end, "thread": thread},
    ).fetchall()
    found: list[dict[str, Any]] = []
    for row in rows:
        if not found or found[-1]["message_id"] != row[0]:
            found.append(
                {"message_id": row[0], "ply": row[1], "role": row[2], "created_at": iso(row[3]), "model": row[4],
                 "thread": row[5], "source": {"path": row[8], "offset": row[6], "length": row[7]}, "parts": []}
            )  # fmt: skip
        if row[9] is not None:
            part = {"kind": row[9], "text": row[10], "name": row[11], "call_id": row[12], "is_error": row[13],
                    "data": orjson.loads(row[14]) if row[14] else None}  # fmt: skip
            found[-1]["parts"].append({k: v for k, v in part.items() if v is not None})
    return found
