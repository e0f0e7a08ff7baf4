"""Writes what importers yield into the store: batched through Arrow, merged, deduplicated, in the caller's transaction.

Records are buffered as columns and inserted with one statement a table and batch. Ids are content hashes, so a row
that is there already is left out by an anti-join. Ids are not made primary keys: DuckDB's indexes would cost more on
insert than the join does, because `seq` lets it look only at the rows of the conversations concerned.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import duckdb
import orjson
import pyarrow as pa

from workbench.data.records import Conversation, Message, Unreadable, conversation_id, digest
from workbench.data.threads import Node, assign_threads

BATCH_BYTES = 8 << 20
BATCH_MESSAGES = 4000

_MESSAGE_SCHEMA = pa.schema(
    [
        ("seq", pa.int64()), ("message_id", pa.string()), ("conversation_id", pa.string()), ("role", pa.string()),
        ("native_id", pa.string()), ("parent_native_id", pa.string()), ("agent_id", pa.string()),
        ("created_at", pa.timestamp("us", tz="UTC")), ("model", pa.string()), ("tokens_in", pa.int64()),
        ("tokens_out", pa.int64()), ("tokens_cached", pa.int64()), ("source_id", pa.string()),
        ("source_offset", pa.int64()), ("source_length", pa.int64()), ("meta", pa.string()),
    ]
)  # fmt: skip
_PART_SCHEMA = pa.schema(
    [
        ("seq", pa.int64()), ("part_id", pa.string()), ("message_id", pa.string()), ("conversation_id", pa.string()),
        ("ordinal", pa.int32()), ("kind", pa.string()), ("text", pa.string()), ("name", pa.string()),
        ("call_id", pa.string()), ("is_error", pa.bool_()), ("data", pa.string()),
    ]
)  # fmt: skip
_CONVERSATION_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in (
            "conversation_id", "format", "session_id", "agent", "project", "title", "model", "parent_session_id",
            "active_leaf")),
        ("started_at", pa.timestamp("us", tz="UTC")), ("ended_at", pa.timestamp("us", tz="UTC")),
        ("source_id", pa.string()), ("path", pa.string()), ("first_seq", pa.int64()), ("num_messages", pa.int64()),
        ("meta", pa.string()),
    ]
)  # fmt: skip


@dataclass
class _Open:
    """A conversation of the current transaction."""

    record: Conversation
    source_id: str
    path: str
    format: str
    is_new: bool = True
    first_seq: int | None = None  # None until looked up


@dataclass
class Written:
    """What one transaction changed."""

    added: set[str] = field(default_factory=set)
    touched: set[str] = field(default_factory=set)
    conversations_seen: int = 0
    messages_added: int = 0
    messages_unchanged: int = 0


class Writer:
    """Takes records, one source after the other, and flushes them into the transaction that the caller has open."""

    def __init__(self, con: duckdb.DuckDBPyConnection) -> None:
        self.con = con
        row = con.execute("SELECT coalesce(max(seq), 0) FROM messages").fetchone()
        self._seq = int(row[0]) if row else 0
        self.reset()

    def reset(self) -> None:
        """Forgets what is buffered: call after a commit or a rollback."""
        self.written = Written()
        self._begun_seq = self._seq
        self._open: dict[str, _Open] = {}
        self._cids: dict[str, str] = {}
        self._clear_batch()

    def _clear_batch(self) -> None:
        self._messages: list[tuple[Any, ...]] = []
        self._parts: list[tuple[Any, ...]] = []
        self._bytes = 0

    def begin_source(self, source_id: str, path: str, format: str) -> None:
        """The records that follow come from this source."""
        self._source_id, self._path, self._format = source_id, path, format
        self._cids = {}

    def conversation(self, record: Conversation) -> None:
        """Opens a conversation, or adds to what is known of it."""
        cid = self._cids.get(record.session_id) or conversation_id(self._format, record.session_id)
        self._cids[record.session_id] = cid
        known = self._open.get(cid)
        if known is None:
            self._open[cid] = _Open(record, self._source_id, self._path, self._format)
            return
        for name in ("agent", "project", "title", "model", "parent_session_id", "active_leaf", "started_at"):
            value = getattr(record, name)
            if value is not None:
                setattr(known.record, name, value)
        known.record.meta.update(record.meta)

    def message(self, record: Message) -> None:
        """Buffers a message; flushes when the batch is large enough."""
        cid = self._cids.get(record.session_id)
        if cid is None:
            self.conversation(Conversation(record.session_id))
            cid = self._cids[record.session_id]
        self._seq += 1
        rows, content = self._part_rows(record)
        if record.merge:
            mid = _hash(cid, record.native_id)
            keys = [_hash(part.key, row[2])[:10] for part, row in zip(record.parts, rows, strict=True)]
        else:
            mid = _hash(cid, record.native_id + "\0" + content)
            keys = [str(i) for i in range(len(rows))]
        for i, row in enumerate(rows):
            self._parts.append((self._seq, f"{mid}.{keys[i]}", mid, cid, i, *row[:1], row[1], *row[3:]))
            self._bytes += len(row[1])
        self._messages.append(
            (
                self._seq, mid, cid, record.role, record.native_id, record.parent_id, record.agent_id,
                record.created_at, record.model, record.tokens_in, record.tokens_out, record.tokens_cached,
                self._source_id, record.offset, record.length,
                _json(record.meta),
            )
        )  # fmt: skip
        if self._bytes > BATCH_BYTES or len(self._messages) >= BATCH_MESSAGES:
            self.flush()

    def _part_rows(self, record: Message) -> tuple[list[tuple[Any, ...]], str]:
        """(kind, text, hashable content, name, call_id, is_error, data) of each part; all content of the message."""
        rows = []
        contents = [record.role]
        for part in record.parts:
            data = None if part.data is None else orjson.dumps(part.data).decode()
            content = f"{part.kind}\0{part.text}\0{part.call_id or ''}\0{data or ''}"
            rows.append((part.kind, part.text, content, part.name, part.call_id, part.is_error, data))
            contents.append(content)
            if data:
                self._bytes += len(data)
        return rows, "" if record.merge else "\0".join(contents)

    def quarantine(self, record: Unreadable) -> None:
        """Keeps what could not be read: source, place, reason, bytes. The same entry is kept once."""
        qid = digest("quarantine", self._source_id, str(record.offset), record.raw)
        self.con.execute(
            "INSERT INTO quarantine SELECT ?, ?, ?, ?, ?, ?, ?, ?, ?, now() "
            "WHERE NOT EXISTS (SELECT 1 FROM quarantine WHERE quarantine_id = ?)",
            [qid, self._source_id, self._path, self._format, record.offset, record.length, record.reason,
             record.raw, record.unfinished, qid],
        )  # fmt: skip

    def flush(self) -> None:
        """Inserts what is buffered into the open transaction."""
        if not self._messages:
            return
        messages = _table(self._messages, _MESSAGE_SCHEMA)
        parts = _table(self._parts, _PART_SCHEMA)
        cids = sorted({row[2] for row in self._messages})
        first_seq = self._look_up(cids, self._messages[0][0])
        added, unchanged = _insert(self.con, messages, parts, cids, first_seq, self._begun_seq)
        self.written.messages_added += added
        self.written.messages_unchanged += unchanged
        self._clear_batch()

    def _look_up(self, cids: list[str], next_seq: int) -> int:
        """Finds which conversations the store has already; returns the lowest seq that any of them can have."""
        unknown = [cid for cid in cids if self._open[cid].first_seq is None]
        if unknown:
            for cid in unknown:
                self._open[cid].first_seq = next_seq
            for cid, first_seq in self.con.execute(
                "SELECT conversation_id, first_seq FROM conversations "
                "WHERE conversation_id IN (SELECT unnest($1::VARCHAR[]))", [unknown]
            ).fetchall():  # fmt: skip
                self._open[cid].is_new, self._open[cid].first_seq = False, first_seq
        return min(self._open[cid].first_seq or 0 for cid in cids)

    def finish(self) -> Written:
        """Flushes, then brings conversations' own rows and their threads up to date. The caller commits."""
        self.flush()
        if not self._open:
            return self.written
        cids = list(self._open)
        self.written.conversations_seen = len(cids)
        first_seq = self._look_up(cids, self._seq + 1)
        counted = self.con.execute(
            "SELECT conversation_id, count(*), epoch_us(min(created_at)), epoch_us(max(created_at)), min(seq), "
            "count(DISTINCT native_id) < count(*) OR count(parent_native_id) > 0 OR count(agent_id) > 0 "
            "FROM messages WHERE seq >= $2 AND conversation_id IN (SELECT unnest($1::VARCHAR[])) GROUP BY ALL",
            [cids, first_seq],
        ).fetchall()
        facts = {row[0]: row[1:] for row in counted}
        trees = [cid for cid in cids if cid in facts and facts[cid][4]]
        if trees:
            self._assign_threads(trees, first_seq)
        new = [cid for cid in cids if self._open[cid].is_new]
        self._insert_conversations(new, facts)
        self.written.added.update(new)
        self.written.touched.update(new)
        for cid in cids:
            if not self._open[cid].is_new and self._update_conversation(cid, facts.get(cid)):
                self.written.touched.add(cid)
        return self.written

    def _insert_conversations(self, cids: list[str], facts: dict[str, tuple[Any, ...]]) -> None:
        rows = []
        for cid in cids:
            o = self._open[cid]
            r = o.record
            count, started, ended, first_seq, _ = facts.get(cid, (0, None, None, o.first_seq, False))
            rows.append(
                (cid, o.format, r.session_id, r.agent, r.project, r.title, r.model, r.parent_session_id, r.active_leaf,
                 started or r.started_at, ended, o.source_id, o.path, first_seq, count, _json(r.meta))
            )  # fmt: skip
        if rows:
            self.con.register("new_conversations", _table(rows, _CONVERSATION_SCHEMA))
            self.con.execute("INSERT INTO conversations SELECT * FROM new_conversations")
            self.con.unregister("new_conversations")

    def _update_conversation(self, cid: str, facts: tuple[Any, ...] | None) -> bool:
        """Adds what is newly known to a stored conversation; False if it stays as it was."""
        r = self._open[cid].record
        fields = ("agent", "project", "title", "model", "parent_session_id", "active_leaf")
        before = self.con.execute(
            f"SELECT num_messages, {', '.join(fields)}, meta FROM conversations WHERE conversation_id = ?", [cid]
        ).fetchone()
        assert before is not None
        count, started, ended = facts[:3] if facts else (0, None, None)
        after = [count, *(getattr(r, name) or old for name, old in zip(fields, before[1:-1], strict=True))]
        meta = _json({**orjson.loads(before[-1] or "{}"), **r.meta})
        if [*after, meta] == [*before[:-1], _json(orjson.loads(before[-1] or "{}"))]:
            return False
        self.con.execute(
            f"UPDATE conversations SET num_messages = ?, {' = ?, '.join(fields)} = ?, meta = ?, "
            "started_at = make_timestamptz(?::BIGINT), ended_at = make_timestamptz(?::BIGINT) WHERE conversation_id = ?",
            [*after, meta, started, ended, cid],
        )
        return True

    def _assign_threads(self, cids: list[str], first_seq: int) -> None:
        where = {"seq": first_seq, "ids": cids}
        leaves: dict[str, str | None] = dict(
            self.con.execute(
                "SELECT conversation_id, active_leaf FROM conversations "
                "WHERE conversation_id IN (SELECT unnest($1::VARCHAR[]))", [cids]
            ).fetchall()
        )  # fmt: skip
        rows = self.con.execute(
            """
            SELECT conversation_id, native_id, parent_native_id, agent_id, role, thread, message_id,
                role IN ('user', 'assistant') AND message_id IN (
                    SELECT message_id FROM parts WHERE seq >= $seq AND kind = 'text')
            FROM messages WHERE seq >= $seq AND conversation_id IN (SELECT unnest($ids::VARCHAR[]))
            ORDER BY conversation_id, ply""",
            where,
        ).fetchall()
        moved: list[tuple[str, str]] = []
        for cid, group in groupby(rows, key=lambda row: row[0]):
            members = list(group)
            nodes = [Node(*row[1:5], row[7]) for row in members]
            threads = assign_threads(nodes, self._open[cid].record.active_leaf or leaves.get(cid))
            before = len(moved)
            moved += [(row[6], new) for row, new in zip(members, threads, strict=True) if row[5] != new]
            if len(moved) > before:
                self.written.touched.add(cid)
        if moved:
            table = pa.table({"message_id": [m[0] for m in moved], "thread": [m[1] for m in moved]})
            self.con.register("moved_threads", table)
            self.con.execute(
                "UPDATE messages SET thread = t.thread FROM moved_threads t "
                "WHERE messages.seq >= ? AND messages.message_id = t.message_id", [first_seq]
            )  # fmt: skip
            self.con.unregister("moved_threads")


def _json(value: dict[str, Any] | None) -> str | None:
    return orjson.dumps(value).decode() if value else None


def _hash(scope: str, text: str) -> str:
    h = hashlib.sha256(scope.encode("utf-8", "replace"))
    h.update(b"\0")
    h.update(text.encode("utf-8", "replace"))
    return h.hexdigest()[:20]


def _table(rows: list[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    return pa.Table.from_arrays(
        [pa.array(column, type=f.type) for column, f in zip(columns, schema, strict=True)], schema=schema
    )


def _insert(
    con: duckdb.DuckDBPyConnection, messages: pa.Table, parts: pa.Table, cids: list[str], first_seq: int, begun_seq: int
) -> tuple[int, int]:
    """Inserts the rows that are not there yet; returns the numbers of new messages and of those of earlier runs."""
    con.register("batch_messages", messages)
    con.register("batch_parts", parts)
    where = {"cids": cids, "seq": first_seq}
    try:
        unchanged = con.execute(
            "SELECT count(DISTINCT message_id) FROM batch_messages SEMI JOIN (SELECT message_id FROM messages WHERE "
            "seq BETWEEN $seq AND $begun AND conversation_id IN (SELECT unnest($cids::VARCHAR[]))) USING (message_id)",
            {**where, "begun": begun_seq},
        ).fetchone()
        added = con.execute(
            """
            INSERT INTO messages
            WITH known AS (
                SELECT conversation_id, message_id, ply FROM messages
                WHERE seq >= $seq AND conversation_id IN (SELECT unnest($cids::VARCHAR[]))),
            fresh AS (
                SELECT min(seq) AS seq, message_id, first(conversation_id) AS conversation_id, first(role) AS role,
                    first(native_id) AS native_id, first(parent_native_id ORDER BY seq) AS parent_native_id,
                    first(agent_id) AS agent_id, min(created_at) AS created_at, max(model) AS model,
                    max(tokens_in) AS tokens_in, max(tokens_out) AS tokens_out, max(tokens_cached) AS tokens_cached,
                    first(source_id) AS source_id, min(source_offset) AS source_offset,
                    first(source_length ORDER BY seq) AS source_length, first(meta ORDER BY seq) AS meta
                FROM batch_messages GROUP BY message_id)
            SELECT seq, message_id, f.conversation_id,
                coalesce((SELECT max(ply) + 1 FROM known k WHERE k.conversation_id = f.conversation_id), 0)
                    + row_number() OVER (PARTITION BY f.conversation_id ORDER BY seq) - 1,
                CASE WHEN agent_id IS NULL THEN '' ELSE 'agent:' || agent_id END,
                role, native_id, parent_native_id, agent_id, created_at, model, tokens_in, tokens_out, tokens_cached,
                source_id, source_offset, source_length, meta
            FROM fresh f ANTI JOIN known USING (message_id) ORDER BY seq""",
            where,
        ).fetchone()
        con.execute(
            """
            UPDATE messages SET tokens_out = b.tokens_out
            FROM (SELECT message_id, max(tokens_out) AS tokens_out FROM batch_messages GROUP BY message_id) b
            WHERE messages.message_id = b.message_id AND messages.seq >= $seq
                AND messages.tokens_out < b.tokens_out""",
            {"seq": first_seq},
        )
        con.execute(
            """
            INSERT INTO parts
            SELECT * FROM batch_parts b ANTI JOIN (
                SELECT part_id FROM parts
                WHERE seq >= $seq AND conversation_id IN (SELECT unnest($cids::VARCHAR[]))) USING (part_id)
            QUALIFY row_number() OVER (PARTITION BY part_id ORDER BY seq) = 1 ORDER BY seq, ordinal""",
            where,
        )
    finally:
        con.unregister("batch_messages")
        con.unregister("batch_parts")
    return (int(added[0]) if added else 0, int(unchanged[0]) if unchanged else 0)
