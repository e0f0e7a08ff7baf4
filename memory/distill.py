"""distill: pending exchanges in, checked four-field records out, in small transactions; goes on where it stopped."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import duckdb
import orjson

from workbench.data.columns import Kind, registered
from workbench.data.records import digest
from workbench.data.store import Store
from workbench.errors import EndpointError
from workbench.memory.checks import violations
from workbench.memory.rooms import room_id, room_key
from workbench.memory.tokens import count_tokens
from workbench.memory.types import Distilled, Distiller, Exchange, Failed, FileTouch

PAGE = 2000
COMMIT_MEMORIES = 500
COMMIT_SECONDS = 1.0

#: Called inside the transaction with (doc, memory text) of what was added to the distiller's layer.
OnMemories = Callable[[duckdb.DuckDBPyConnection, str, list[tuple[int, str]]], None]


@dataclass
class DistillReport:
    """What a run did; tokens are of the exchanges distilled in this run."""

    distiller: str
    memories_added: int = 0
    failed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    verbatim_tokens: int = 0
    memory_tokens: int = 0
    pending: int = 0
    vectors_added: int = 0
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The object that `distill --json` ends with."""
        ratio = self.verbatim_tokens / self.memory_tokens if self.memory_tokens else None
        return {
            "distiller": self.distiller,
            "memories": {"added": self.memories_added, "failed": self.failed, "pending": self.pending},
            "tokens": {"verbatim": self.verbatim_tokens, "memories": self.memory_tokens},
            "compression": round(ratio, 2) if ratio else None,
            "vectors": {"added": self.vectors_added},
            "reasons": dict(self.reasons),
            "seconds": round(self.seconds, 3),
        }


def distill(
    store: Store,
    distiller: Distiller,
    *,
    on_memories: OnMemories | None = None,
    limit: int | None = None,
    progress: Callable[[DistillReport], None] | None = None,
) -> DistillReport:
    """Distils every exchange that has no up-to-date record by this distiller.

    Args:
        limit: at most this many exchanges in this run; None = all.
        progress: called after each commit.

    An exchange that fails (or whose record breaks the checks) stays pending and is counted with its reason.
    A kill or Ctrl-C loses what was not committed yet (at most COMMIT_SECONDS of work); run again to go on.
    """
    run = _Run(store, distiller, on_memories, progress)
    started = time.monotonic()
    try:
        for exchange, record in distiller.distil(_pending(store, distiller.name, limit, run.docs)):
            run.take(exchange, record)
        run.commit()
    except EndpointError:
        run.commit()  # what came before the model server failed is good
        raise
    finally:
        run.report.seconds = time.monotonic() - started
    run.report.pending = num_pending(store.con, distiller.name)
    return run.report


def num_pending(con: duckdb.DuckDBPyConnection, distiller: str) -> int:
    """How many exchanges have no up-to-date record by this distiller."""
    row = con.execute(
        "SELECT count(*) FROM exchanges e ANTI JOIN "
        "(SELECT exchange_id, content_hash FROM memories WHERE distiller = ?) m USING (exchange_id, content_hash)",
        [distiller],
    ).fetchone()  # fmt: skip
    return int(row[0]) if row else 0


def _pending(store: Store, distiller: str, limit: int | None, docs: dict[str, tuple[int, int]]) -> Iterator[Exchange]:
    """Pending exchanges in the order in which they were stored; notes their doc number and tokens in `docs`."""
    after, left = -1, limit if limit is not None else 1 << 62
    while left > 0:
        rows = store.con.execute(
            """
            SELECT e.seq, e.exchange_id, e.user_text, e.assistant_text, coalesce(c.project, ''), coalesce(c.title, ''),
                e.files, e.tools, e.content_hash, e.num_tokens
            FROM exchanges e JOIN conversations c USING (conversation_id)
            ANTI JOIN (SELECT exchange_id, content_hash FROM memories WHERE distiller = ?) m
                ON m.exchange_id = e.exchange_id AND m.content_hash = e.content_hash
            WHERE e.seq > ? ORDER BY e.seq LIMIT ?""",
            [distiller, after, min(PAGE, left)],
        ).fetchall()
        if not rows:
            return
        after, left = rows[-1][0], left - len(rows)
        for seq, eid, user, assistant, project, title, files, tools, content_hash, tokens in rows:
            docs[eid] = (seq, tokens)
            touches = tuple(FileTouch(f["path"], f["action"]) for f in orjson.loads(files))
            yield Exchange(eid, user, assistant, project, title, touches, tuple(tools), content_hash)


class _Run:
    def __init__(
        self,
        store: Store,
        distiller: Distiller,
        on_memories: OnMemories | None,
        progress: Callable[[DistillReport], None] | None,
    ) -> None:
        self.store, self.name = store, distiller.name
        self.on_memories, self.progress = on_memories, progress
        self.report = DistillReport(distiller.name)
        self.docs: dict[str, tuple[int, int]] = {}
        self._batch: list[tuple[Exchange, Distilled]] = []
        self._handed_over = False
        self._committed_at = time.monotonic()

    def take(self, exchange: Exchange, record: Distilled | Failed) -> None:
        """Checks one result and keeps it for the next commit."""
        if isinstance(record, Distilled) and (broken := violations(exchange, record)):
            record = Failed(f"check: {broken[0]}")
        if isinstance(record, Failed):
            self.docs.pop(exchange.exchange_id)
            self.report.failed += 1
            self.report.reasons[record.reason[:160]] += 1
        else:
            self._batch.append((exchange, record))
        due = time.monotonic() - self._committed_at > COMMIT_SECONDS
        if self._batch and (due or len(self._batch) >= COMMIT_MEMORIES):
            self.commit()

    def commit(self) -> None:
        """Writes the batch: records, rooms, and what is derived from them, in one transaction."""
        batch, self._batch = self._batch, []
        if batch:
            with self.store.transaction() as con:
                if self._handed_over:
                    batch = self._still_there(con, batch)
                added = _insert(con, self.name, batch)
                docs = [self.docs.pop(exchange.exchange_id) for exchange, _ in batch]
                if self.on_memories:
                    self.on_memories(con, self.name, [(d[0], r.text) for d, (_, r) in zip(docs, batch, strict=True)])
            self.report.memories_added += len(batch)
            self.report.verbatim_tokens += sum(d[1] for d in docs)
            self.report.memory_tokens += added
        self._handed_over |= self.store.hand_over()
        self._committed_at = time.monotonic()
        if self.progress:
            self.progress(self.report)

    def _still_there(
        self, con: duckdb.DuckDBPyConnection, batch: list[tuple[Exchange, Distilled]]
    ) -> list[tuple[Exchange, Distilled]]:
        """The records whose exchange is as it was when it was read: another process may have had the store since."""
        rows = con.execute(
            "SELECT exchange_id, content_hash, seq, num_tokens FROM exchanges "
            "WHERE exchange_id IN (SELECT unnest($1::VARCHAR[]))", [[exchange.exchange_id for exchange, _ in batch]]
        ).fetchall()  # fmt: skip
        now = {(eid, content_hash): (seq, tokens) for eid, content_hash, seq, tokens in rows}
        kept = []
        for exchange, record in batch:
            found = now.get((exchange.exchange_id, exchange.content_hash))
            if found is None:
                self.docs.pop(exchange.exchange_id)
            else:
                self.docs[exchange.exchange_id] = found
                kept.append((exchange, record))
        return kept


def _insert(con: duckdb.DuckDBPyConnection, name: str, batch: list[tuple[Exchange, Distilled]]) -> int:
    """Inserts the records and their rooms; returns the records' tokens."""
    memories, rooms, placed, total = [], {}, [], 0
    for exchange, record in batch:
        memory_id = digest("memory", exchange.exchange_id, name, exchange.content_hash)
        tokens = count_tokens(record.text)
        total += tokens
        details = orjson.dumps(record.details).decode() if record.details else None
        memories.append((memory_id, exchange.exchange_id, name, exchange.content_hash, record.core, record.context,
                         record.text, tokens, details))  # fmt: skip
        placed_here: dict[str, float] = {}
        for room in record.rooms:
            key = room_key(room, exchange.project)
            rid = room_id(room.room_type, key, exchange.project)
            rooms.setdefault(rid, (rid, room.room_type, key, room.label, exchange.project))  # first label stays
            placed_here[rid] = max(room.relevance, placed_here.get(rid, 0.0))
        placed += [(memory_id, rid, relevance) for rid, relevance in placed_here.items()]
    with (
        registered(con, "new_memories", _MEMORY_COLUMNS, memories),
        registered(con, "new_rooms", _ROOM_COLUMNS, list(rooms.values())),
        registered(con, "new_placed", _PLACED_COLUMNS, placed),
    ):
        # A record of the same exchange from an earlier run that lost the race with a change of the log is replaced.
        stale = (
            "SELECT m.memory_id FROM memories m JOIN new_memories n USING (exchange_id) WHERE m.distiller = n.distiller"
        )
        con.execute(f"DELETE FROM memory_rooms WHERE memory_id IN ({stale})")
        con.execute(f"DELETE FROM memories WHERE memory_id IN ({stale})")
        con.execute("INSERT INTO memories BY NAME SELECT *, now() AS created_at FROM new_memories")
        con.execute("INSERT INTO rooms BY NAME SELECT * FROM new_rooms ANTI JOIN rooms USING (room_id)")
        con.execute("INSERT INTO memory_rooms BY NAME SELECT * FROM new_placed")
    return total


_MEMORY_COLUMNS: dict[str, Kind] = {
    "memory_id": "valid", "exchange_id": "valid", "distiller": "text", "content_hash": "valid", "core": "text",
    "context": "text", "text": "text", "num_tokens": "int", "details": "text",
}  # fmt: skip
_ROOM_COLUMNS: dict[str, Kind] = {
    "room_id": "valid", "room_type": "valid", "room_key": "text", "label": "text", "project": "text",
}  # fmt: skip
_PLACED_COLUMNS: dict[str, Kind] = {"memory_id": "valid", "room_id": "valid", "relevance": "real"}
