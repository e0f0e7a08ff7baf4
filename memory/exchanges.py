"""Segments conversations into exchanges: a user turn and all that answered it (card 001, arXiv 2603.13017).

A new exchange opens at a user message with words after an assistant message with words; tool round-trips keep the open
one going. What holds fewer than 50 characters or no word of the user is no exchange (its messages stay in the store).
More than 20 messages with words are cut into chunks of 20. Each thread (active branch, abandoned branch, sub-agent) is
segmented by itself.

Deviation: the chunks of a long exchange are kept even where a later one has no words of the user, so that the end of a
long autonomous run can be found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import duckdb
import orjson

from workbench.data.columns import Kind, registered
from workbench.data.records import digest
from workbench.memory.files import FileCollector
from workbench.memory.pieces import Pieces
from workbench.memory.postings import Document
from workbench.memory.scan import Scanned, scan

MIN_CHARS = 50
MAX_PLIES = 20
_SCAN_CHARS = 1 << 20
#: What was written into the workbench on purpose (notes, `Spool`) is an exchange however short.
OWN_FORMAT = "workbench_log"


@dataclass(slots=True)
class Ply:
    """A message as far as segmentation goes; `text` is "" for tools, thinking and injected context."""

    number: int
    role: str
    text: str
    at: int | None = None  # microseconds since the epoch
    source_id: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class Rebuilt:
    """What changed: doc numbers (exchanges.seq) that went, documents that came, and how many stayed."""

    removed: list[int] = field(default_factory=list)
    added: list[Document] = field(default_factory=list)
    unchanged: int = 0


def segment(plies: Iterable[Ply], keep_short: bool = False) -> Iterator[list[Ply]]:
    """Cuts the messages of one thread into exchanges, in order."""
    open_exchange: list[Ply] = []
    answered = False
    for ply in plies:
        speaks = bool(ply.text.strip())
        if ply.role == "user" and speaks and answered:
            yield from _closed(open_exchange, keep_short)
            open_exchange, answered = [], False
        open_exchange.append(ply)
        answered = answered or (ply.role == "assistant" and speaks)
    yield from _closed(open_exchange, keep_short)


def _closed(plies: list[Ply], keep_short: bool) -> Iterator[list[Ply]]:
    user_chars = sum(len(p.text.strip()) for p in plies if p.role == "user")
    chars = sum(len(p.text) for p in plies)
    if not user_chars or (chars < MIN_CHARS and not keep_short):
        return
    chunk: list[Ply] = []
    spoken = 0
    for ply in plies:
        spoken += bool(ply.text)
        if spoken > MAX_PLIES:
            yield chunk
            chunk, spoken = [], 1
        chunk.append(ply)
    yield chunk


def rebuild(con: duckdb.DuckDBPyConnection, conversation_ids: list[str]) -> Rebuilt:
    """Brings the exchanges of these conversations up to date, in the caller's transaction.

    An exchange that did not change keeps its row and number; a changed one gets a new number, as do those that follow
    it (their numbers ascend, and name the one before), and what was derived from the old ones is deleted with them.
    """
    result = Rebuilt()
    before = {
        row[0]: row[1:]
        for row in con.execute(
            "SELECT exchange_id, seq, content_hash, ply_end, position FROM exchanges "
            "WHERE conversation_id IN (SELECT unnest($1::VARCHAR[]))",
            [conversation_ids],
        ).fetchall()
    }
    row = con.execute("SELECT coalesce(max(seq), 0) FROM exchanges").fetchone()
    seq = int(row[0]) if row else 0
    fresh: list[tuple[Any, ...]] = []
    seen: set[str] = set()
    previous, cascade = None, False
    for values, pieces in _rows(con, conversation_ids):
        exchange_id, position = values[0], values[3]
        if position == 0:
            previous, cascade = None, False
        seen.add(exchange_id)
        old = before.get(exchange_id)
        if old and not cascade and old[1:] == (values[-1], values[5], position):
            result.unchanged += 1
            previous = old[0]
            continue
        if old:
            result.removed.append(old[0])
        seq += 1
        result.added.append(Document(seq, values[9], values[10], previous, pieces))
        fresh.append((seq, *values))
        previous, cascade = seq, True
    result.removed.extend(old[0] for exchange_id, old in before.items() if exchange_id not in seen)
    if result.removed:
        gone = [result.removed]
        con.execute(
            "DELETE FROM memory_rooms WHERE memory_id IN (SELECT memory_id FROM memories WHERE exchange_id IN "
            "(SELECT exchange_id FROM exchanges WHERE seq IN (SELECT unnest($1::BIGINT[]))))", gone
        )  # fmt: skip
        con.execute(
            "DELETE FROM memories WHERE exchange_id IN "
            "(SELECT exchange_id FROM exchanges WHERE seq IN (SELECT unnest($1::BIGINT[])))", gone
        )  # fmt: skip
        con.execute("DELETE FROM exchanges WHERE seq IN (SELECT unnest($1::BIGINT[]))", gone)
    insert_exchanges(con, fresh)
    return result


def _rows(con: duckdb.DuckDBPyConnection, conversation_ids: list[str]) -> Iterator[tuple[tuple[Any, ...], Pieces]]:
    """The exchanges' rows without seq, in the order of conversation, thread, ply; and their texts' pieces."""
    facts = {
        row[0]: row[1:]
        for row in con.execute(
            "SELECT conversation_id, format, coalesce(project, ''), first_seq FROM conversations "
            "WHERE conversation_id IN (SELECT unnest($1::VARCHAR[]))", [conversation_ids]
        ).fetchall()
    }  # fmt: skip
    records = con.execute(
        """
        SELECT m.conversation_id, m.thread, m.ply, m.role, epoch_us(m.created_at), p.kind, p.text, p.name, p.data,
            m.source_id
        FROM messages m LEFT JOIN (
            SELECT message_id, kind, text, name, data, seq, ordinal FROM parts
            WHERE seq >= $seq AND kind IN ('text', 'tool_call')
                AND conversation_id IN (SELECT unnest($ids::VARCHAR[]))) p ON p.message_id = m.message_id
        WHERE m.seq >= $seq AND m.conversation_id IN (SELECT unnest($ids::VARCHAR[]))
        ORDER BY m.conversation_id, m.thread, m.ply, p.seq, p.ordinal""",
        {"seq": min((first_seq for _, _, first_seq in facts.values()), default=0), "ids": list(facts)},
    )
    return _scanned(
        _draft(cid, thread, position, facts[cid][1], chunk)
        for (cid, thread), group in groupby(_fetched(records), key=lambda r: r[:2])
        for position, chunk in enumerate(segment(_plies(group), keep_short=facts[cid][0] == OWN_FORMAT))
    )


def _fetched(result: duckdb.DuckDBPyConnection) -> Iterator[tuple[Any, ...]]:
    while rows := result.fetchmany(2000):
        yield from rows


def _plies(records: Iterable[tuple[Any, ...]]) -> Iterator[Ply]:
    for number, group in groupby(records, key=lambda r: r[2]):
        ply: Ply | None = None
        texts: list[str] = []
        for _, _, _, role, at, kind, text, name, data, source_id in group:
            ply = ply or Ply(number, role, "", at, source_id)
            if kind == "tool_call":
                ply.calls.append((name or "", orjson.loads(data) if data else None))
            elif kind == "text" and role in ("user", "assistant"):
                texts.append(text)
        if ply:
            ply.text = "\n\n".join(texts)
            yield ply


@dataclass(slots=True)
class _Draft:
    """An exchange before its texts are scanned."""

    conversation_id: str
    thread: str
    position: int
    project: str
    plies: list[Ply]
    user: str
    assistant: str


def _draft(cid: str, thread: str, position: int, project: str, plies: list[Ply]) -> _Draft:
    user, assistant = (
        "\n\n".join(p.text for p in plies if p.role == role and p.text) for role in ("user", "assistant")
    )
    return _Draft(cid, thread, position, project, plies, user, assistant)


def _scanned(drafts: Iterator[_Draft]) -> Iterator[tuple[tuple[Any, ...], Pieces]]:
    """The rows of exchanges and their texts' pieces; texts are scanned many at a time."""
    for batch in _batches(drafts):
        found = iter(scan([text for draft in batch for text in (draft.user, draft.assistant)]))
        for draft, of_user, of_assistant in zip(batch, found, found, strict=True):
            yield (
                _exchange_row(draft, of_user, of_assistant),
                Pieces(of_user.vocabulary, of_user.pieces, of_assistant.pieces),
            )


def _batches(drafts: Iterator[_Draft]) -> Iterator[list[_Draft]]:
    batch: list[_Draft] = []
    chars = 0
    for draft in drafts:
        batch.append(draft)
        chars += len(draft.user) + len(draft.assistant)
        if chars > _SCAN_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _exchange_row(draft: _Draft, of_user: Scanned, of_assistant: Scanned) -> tuple[Any, ...]:
    cid, thread, plies, user, assistant = draft.conversation_id, draft.thread, draft.plies, draft.user, draft.assistant
    collector = FileCollector()
    tools: dict[str, None] = {}
    for ply in plies:
        for name, arguments in ply.calls:
            tools[name] = None
            collector.add_tool(name, arguments)
    collector.add_mentioned(of_user.paths)
    collector.add_mentioned(of_assistant.paths)
    files = orjson.dumps([{"path": f.path, "action": f.action} for f in collector.files()]).decode()
    times = [p.at for p in plies if p.at]
    start, end = plies[0].number, plies[-1].number
    return (
        digest("exchange", cid, thread, str(start)), cid, thread, draft.position, start, end, plies[0].source_id,
        min(times, default=None), max(times, default=None), user, assistant, files, orjson.dumps(list(tools)).decode(),
        of_user.num_tokens + of_assistant.num_tokens, digest(user, assistant, files, draft.project, *tools),
    )  # fmt: skip


_COLUMNS: dict[str, Kind] = {
    "seq": "int", "exchange_id": "valid", "conversation_id": "valid", "thread": "text", "position": "int",
    "ply_start": "int", "ply_end": "int", "source_id": "valid", "started_at": "time", "ended_at": "time",
    "user_text": "valid", "assistant_text": "valid", "files": "valid", "tools": "text", "num_tokens": "int",
    "content_hash": "valid",
}  # fmt: skip


def insert_exchanges(con: duckdb.DuckDBPyConnection, rows: list[tuple[Any, ...]]) -> None:
    if rows:
        with registered(con, "fresh_exchanges", _COLUMNS, rows):
            con.execute(
                "INSERT INTO exchanges BY NAME "
                "SELECT * REPLACE (from_json(tools, '[\"VARCHAR\"]') AS tools) FROM fresh_exchanges"
            )
