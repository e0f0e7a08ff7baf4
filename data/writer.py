"""Writes what importers yield into the store: batched in columns, merged, deduplicated, in the caller's transaction.

Records are buffered and inserted with one statement a table and batch. Ids are content hashes, so what is there
already is recognised and left out. Ids are no primary keys: DuckDB's indexes would cost more on insert than looking
does, because only conversations that are stored already need a look, and `seq` finds their rows.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import groupby
from typing import Any

import duckdb
import orjson

from workbench.data.columns import Kind, insert_rows, registered
from workbench.data.records import Conversation, Message, Part, Unreadable, conversation_id, digest, valid
from workbench.data.threads import Node, assign_threads

BATCH_BYTES = 8 << 20
BATCH_MESSAGES = 4000

_MESSAGES: dict[str, Kind] = {
    "seq": "int", "conversation_id": "valid", "role": "text", "native_id": "text", "parent_native_id": "text",
    "agent_id": "text", "created_at": "time", "model": "text", "tokens_in": "int", "tokens_out": "int",
    "tokens_cached": "int", "source_id": "valid", "source_offset": "int", "source_length": "int", "meta": "valid",
    "thread": "text", "message_id": "valid", "ply": "int",
}  # fmt: skip
_TOKENS = tuple(map(list(_MESSAGES).index, ("tokens_in", "tokens_out", "tokens_cached")))
_META = list(_MESSAGES).index("meta")
_PARTS: dict[str, Kind] = {
    "seq": "int", "message_id": "valid", "conversation_id": "valid", "ordinal": "int", "kind": "text", "text": "valid",
    "name": "text", "call_id": "text", "is_error": "bool", "data": "valid", "part_id": "valid",
}  # fmt: skip
_CONVERSATIONS: dict[str, Kind] = {
    "conversation_id": "valid", "format": "text", "session_id": "text", "agent": "text", "project": "text",
    "title": "text", "model": "text", "parent_session_id": "text", "active_leaf": "text", "started_at": "time",
    "ended_at": "time", "source_id": "valid", "path": "text", "first_seq": "int", "num_messages": "int",
    "meta": "valid",
}  # fmt: skip


@dataclass
class _Open:
    """A conversation of the current transaction."""

    record: Conversation
    source_id: str
    path: str
    format: str
    is_new: bool = True
    first_seq: int | None = None  # None until looked up
    next_ply: int = 0
    stored: bool = False  # whether rows of it can be in the store already


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
        # Of parts as well: the pieces of a message that came later have higher numbers than any message.
        rows = con.execute("SELECT max(seq) FROM messages UNION ALL SELECT max(seq) FROM parts").fetchall()
        self._seq = max(seq or 0 for (seq,) in rows)
        self.reset()

    def reset(self) -> None:
        """Forgets what is buffered: call after a commit or a rollback."""
        self.written = Written()
        self._begun_seq = self._seq
        self._open: dict[str, _Open] = {}
        self._cids: dict[str, str] = {}
        self._paths: dict[str, str] = {}  # of the sources read since
        self._quarantined: dict[str, tuple[Any, ...]] = {}
        self._quarantined_bytes = 0
        self._clear_batch()

    def _clear_batch(self) -> None:
        self._messages: dict[str, list[Any]] = {}  # message_id -> row
        self._parts: dict[str, tuple[Any, ...]] = {}  # part_id -> row
        self._bytes = 0

    def begin_source(self, source_id: str, path: str, format: str) -> None:
        """The records that follow come from this source."""
        self._source_id, self._path, self._format = source_id, path, format
        self._paths[source_id] = path
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
        self._seq = seq = self._seq + 1
        scope, native_id = cid.encode(), record.native_id.encode("utf-8", "replace")
        stored = [_stored(part) for part in record.parts]
        if record.merge:
            mid = _hash(scope, native_id)
        else:
            role = record.role.encode("utf-8", "replace")
            mid = _hash(scope, native_id, role, *[content for _, _, content in stored])
        for i, (part, (text, data, content)) in enumerate(zip(record.parts, stored, strict=True)):
            self._bytes += len(content)
            key = _hash(part.key.encode("utf-8", "replace"), content)[:10] if record.merge else i
            pid = f"{mid}.{key}"
            if pid not in self._parts:
                self._parts[pid] = (
                    seq, mid, cid, i, part.kind, text, part.name, part.call_id, part.is_error, data, pid
                )  # fmt: skip
        known = self._messages.get(mid)
        if known is None:
            self._messages[mid] = [
                seq, cid, record.role, record.native_id, record.parent_id, record.agent_id, record.created_at,
                record.model, record.tokens_in, record.tokens_out, record.tokens_cached, self._source_id,
                record.offset, record.length, _json(record.meta),
                "" if record.agent_id is None else f"agent:{record.agent_id}", mid,
            ]  # fmt: skip
        else:  # a later piece of the same message: its usage is the final one
            for at, tokens in zip(_TOKENS, (record.tokens_in, record.tokens_out, record.tokens_cached), strict=True):
                if tokens is not None:
                    known[at] = max(known[at] or 0, tokens)
            if record.meta:
                known[_META] = _json({**orjson.loads(known[_META] or "{}"), **record.meta})
        if self._bytes > BATCH_BYTES or len(self._messages) >= BATCH_MESSAGES:
            self.flush()

    def quarantine(self, record: Unreadable) -> None:
        """Keeps what could not be read: source, place, reason, bytes. The same entry is kept once."""
        qid = digest("quarantine", self._source_id, str(record.offset), record.raw)
        self._quarantined[qid] = (qid, self._source_id, self._path, self._format, record.offset, record.length,
                                  record.reason, record.raw, record.unfinished)  # fmt: skip
        self._quarantined_bytes += len(record.raw)
        if self._quarantined_bytes > BATCH_BYTES or len(self._quarantined) >= BATCH_MESSAGES:
            self._flush_quarantine()

    def _flush_quarantine(self) -> None:
        columns = [list(column) for column in zip(*self._quarantined.values(), strict=True)]
        self._quarantined, self._quarantined_bytes = {}, 0
        if columns:
            self.con.execute(
                "INSERT INTO quarantine SELECT *, now() FROM (SELECT unnest($1::VARCHAR[]) AS id, "
                "unnest($2::VARCHAR[]), unnest($3::VARCHAR[]), unnest($4::VARCHAR[]), "
                "unnest($5::BIGINT[]), unnest($6::BIGINT[]), unnest($7::VARCHAR[]), "
                "unnest($8::BLOB[]), unnest($9::BOOLEAN[])) "
                "WHERE id NOT IN (SELECT quarantine_id FROM quarantine)", columns
            )  # fmt: skip

    def flush(self) -> None:
        """Inserts what is buffered into the open transaction, but for what the store has already."""
        if not self._messages:
            return
        cids = sorted({row[1] for row in self._messages.values()})
        first_seq = self._look_up(cids, next(iter(self._messages.values()))[0])
        stored = {cid for cid in cids if self._open[cid].stored}
        if stored:
            self._leave_out_known(stored, first_seq)
        for row in self._messages.values():
            opened = self._open[row[1]]
            row.append(opened.next_ply)
            opened.next_ply += 1
            opened.stored = True
        rows, parts = list(self._messages.values()), list(self._parts.values())
        self.written.messages_added += len(rows)
        self._clear_batch()
        insert_rows(self.con, "messages", _MESSAGES, rows)
        insert_rows(self.con, "parts", _PARTS, parts)

    def _leave_out_known(self, cids: set[str], first_seq: int) -> None:
        """Takes what the store has already out of the batch; brings token counts of known messages up to date."""
        mids = [mid for mid, row in self._messages.items() if row[1] in cids]
        known = self.con.execute(
            "SELECT message_id, seq, meta, tokens_in, tokens_out, tokens_cached FROM messages "
            "WHERE seq >= ? AND message_id IN (SELECT unnest(?::VARCHAR[]))", [first_seq, mids]
        ).fetchall()  # fmt: skip
        if not known:
            return
        grown: set[str] = set()
        for mid, seq, meta, *tokens in known:
            row = self._messages.pop(mid)
            self.written.messages_unchanged += seq <= self._begun_seq
            newer = [
                None if row[at] is None else max(row[at], old or 0) for at, old in zip(_TOKENS, tokens, strict=True)
            ]
            more = row[_META]
            both = _json({**orjson.loads(meta or "{}"), **orjson.loads(more)}) if more and more != meta else meta
            if both != meta or any(new is not None and new != old for new, old in zip(newer, tokens, strict=True)):
                self.con.execute(
                    "UPDATE messages SET tokens_in = coalesce(?, tokens_in), tokens_out = coalesce(?, tokens_out), "
                    "tokens_cached = coalesce(?, tokens_cached), meta = ? WHERE seq = ? AND message_id = ?",
                    [*newer, both, seq, mid],
                )
            grown.add(mid)
        known_parts = self.con.execute(
            "SELECT part_id FROM parts WHERE seq >= ? AND message_id IN (SELECT unnest(?::VARCHAR[]))",
            [first_seq, list(grown)],
        )
        while rows := known_parts.fetchmany(10_000):
            for (pid,) in rows:
                self._parts.pop(pid, None)
        # New pieces of a stored message change its conversation, although its messages are as many as before.
        self.written.touched.update(row[2] for row in self._parts.values() if row[1] in grown)

    def _look_up(self, cids: list[str], next_seq: int) -> int:
        """Finds which conversations the store has already; returns the lowest seq that any of them can have."""
        unknown = [cid for cid in cids if self._open[cid].first_seq is None]
        if unknown:
            for cid in unknown:
                self._open[cid].first_seq = next_seq
            for cid, first_seq, count in self.con.execute(
                "SELECT conversation_id, first_seq, num_messages FROM conversations "
                "WHERE conversation_id IN (SELECT unnest($1::VARCHAR[]))", [unknown]
            ).fetchall():  # fmt: skip
                opened = self._open[cid]
                opened.is_new, opened.first_seq, opened.next_ply, opened.stored = False, first_seq, count, True
        return min(self._open[cid].first_seq or 0 for cid in cids)

    def finish(self) -> Written:
        """Flushes, then brings conversations' own rows and their threads up to date. The caller commits."""
        self.flush()
        self._flush_quarantine()
        if not self._open:
            return self.written
        cids = list(self._open)
        self.written.conversations_seen = len(cids)
        first_seq = self._look_up(cids, self._seq + 1)
        counted = self.con.execute(
            "SELECT conversation_id, count(*), epoch_us(min(created_at)), epoch_us(max(created_at)), min(seq), "
            "count(DISTINCT native_id) < count(*) OR count(parent_native_id) > 0 OR count(agent_id) > 0, "
            "arg_min(source_id, seq) FILTER (WHERE agent_id IS NULL) "  # the main log, not a sub-agent's
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
            count, started, ended, first_seq, _, main = facts.get(cid, (0, None, None, o.first_seq, False, None))
            source_id = main if main in self._paths else o.source_id
            rows.append(
                (cid, o.format, r.session_id, r.agent, r.project, r.title, r.model, r.parent_session_id, r.active_leaf,
                 started or r.started_at, ended, source_id, self._paths[source_id], first_seq, count, _json(r.meta))
            )  # fmt: skip
        insert_rows(self.con, "conversations", _CONVERSATIONS, rows)

    def _update_conversation(self, cid: str, facts: tuple[Any, ...] | None) -> bool:
        """Adds what is newly known to a stored conversation; False if it stays as it was."""
        r = self._open[cid].record
        fields = ("agent", "project", "title", "model", "parent_session_id", "active_leaf")
        columns = ("source_id", "path", "num_messages", *fields)
        [before] = self.con.execute(
            f"SELECT {', '.join(columns)}, meta FROM conversations WHERE conversation_id = ?", [cid]
        ).fetchall()
        count, started, ended, _, _, main = facts or (0, None, None, None, None, None)
        source = (main, self._paths[main]) if main in self._paths else before[:2]
        after = [*source, count, *(getattr(r, name) or old for name, old in zip(fields, before[3:-1], strict=True))]
        meta = _json({**orjson.loads(before[-1] or "{}"), **r.meta})
        if [*after, meta] == [*before[:-1], _json(orjson.loads(before[-1] or "{}"))]:
            return False
        self.con.execute(
            f"UPDATE conversations SET {' = ?, '.join(columns)} = ?, meta = ?, "
            "started_at = coalesce(make_timestamptz(?::BIGINT), started_at), ended_at = make_timestamptz(?::BIGINT) "
            "WHERE conversation_id = ?",
            [*after, meta, started or r.started_at, ended, cid],
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
            nodes = [Node(row[1], row[2], row[3], row[4], row[7]) for row in members]
            threads = assign_threads(nodes, self._open[cid].record.active_leaf or leaves.get(cid))
            before = len(moved)
            moved += [(row[6], new) for row, new in zip(members, threads, strict=True) if row[5] != new]
            if len(moved) > before:
                self.written.touched.add(cid)
        if moved:
            with registered(self.con, "moved_threads", {"message_id": "valid", "thread": "text"}, moved):
                self.con.execute(
                    "UPDATE messages SET thread = t.thread FROM moved_threads t "
                    "WHERE messages.seq >= ? AND messages.message_id = t.message_id", [first_seq]
                )  # fmt: skip


def _json(value: dict[str, Any] | None) -> str | None:
    if not value:
        return None
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        plain = {k: v if v is None or isinstance(v, str | int | float) else _json_text(v) for k, v in value.items()}
        return _dumps(plain)


def _dumps(value: Any) -> str:
    """Compact JSON; what orjson refuses (nested deeper than 254) becomes a string that holds JSON."""
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        return orjson.dumps(_json_text(value)).decode()


def _json_text(value: Any) -> str:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + 10_000)  # orjson reads up to 1,024 levels
    try:
        return json.dumps(value, default=str)
    finally:
        sys.setrecursionlimit(limit)


def _stored(part: Part) -> tuple[str, str | None, bytes]:
    """The text and the data of a part as they are stored, and what its content hash is made of."""
    text, data = part.text, None if part.data is None else _dumps(part.data)
    content = f"{part.kind}\0{len(text)}\0{text}\0{part.call_id}\0{data}"  # text may hold any character
    try:
        return text, data, content.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which no UTF-8 can hold
        return valid(text), data, valid(content).encode()


def _hash(*fields: bytes) -> str:
    return sha256(b"\0".join(fields)).hexdigest()[:20]
