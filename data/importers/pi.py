"""Pi: ~/.pi/agent/sessions/…/*.jsonl, a tree of entries by id and parentId.

Every entry of the tree becomes a message (settings and labels as events), so that no parent is missing, wherever
reading is resumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from workbench.data.importers._blocks import count, known_string, stored_image
from workbench.data.importers.base import Probe, Source, as_text, read_json_lines
from workbench.data.records import Conversation, Message, Part, Record, digest, parse_time

FORMAT = "pi"
_ENVELOPE = frozenset({"type", "id", "parentId", "timestamp"})
_SUMMARIES = frozenset({"compaction", "branch_summary"})
_ROLES = {"user": "user", "assistant": "assistant", "toolResult": "tool", "bashExecution": "tool"}


def detect(probe: Probe) -> int:
    """By the session line, or by entries that hold a message and a parentId."""
    for row in probe.lines:
        if row.get("type") == "session" and "cwd" in row and "id" in row:
            return 95
        message = row.get("message")
        if row.get("type") == "message" and isinstance(message, dict) and "role" in message and "parentId" in row:
            return 90
    return 0


def read(source: Source) -> Iterator[Record]:
    """Reads a session; resumes at any line."""
    session = _Session(source)
    yield from read_json_lines(source, session.line)


class _Session:
    def __init__(self, source: Source) -> None:
        self.source = source
        known = (source.session or {}).get("session_id")
        self.session_id: str | None = known if isinstance(known, str) else None

    def line(self, row: dict[str, Any], offset: int, length: int) -> Iterator[Record]:
        kind = row.get("type")
        if kind == "session":
            self.source.skipped["session"] += 1
            self.session_id = known_string(row.get("id")) or "sha-" + digest(orjson.dumps(row))
            yield _about(self.session_id, row)
            return
        if self.session_id is None:
            self.session_id = "sha-" + digest(orjson.dumps(row))
            yield Conversation(self.session_id, agent="pi")
        if kind == "leaf":
            self.source.skipped["leaf"] += 1
            yield Conversation(self.session_id, active_leaf=known_string(row.get("targetId")))
            return
        message = row["message"] if kind == "message" else row
        role, parts = _said(message) if kind == "message" else _entry(kind, row)
        # null is a root, "": rewinding to the beginning makes a second one, which does not follow what is before it.
        parent = known_string(row.get("parentId")) or ("" if "parentId" in row else None)
        if kind == "model_change":
            yield Conversation(self.session_id, model=known_string(row.get("modelId")))
        elif kind == "session_info":
            yield Conversation(self.session_id, title=known_string(row.get("name")))
        usage = message.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        stop, cached = known_string(message.get("stopReason")), count(usage.get("cacheRead"))
        fresh = count(usage.get("input"))
        yield Message(
            self.session_id,
            role,
            parts or [Part("event", name="empty message")],
            known_string(row.get("id")) or f"@{offset}",
            parent,
            created_at=parse_time(row.get("timestamp")) or parse_time(message.get("timestamp")),
            model=known_string(message.get("model")),
            # `input` leaves out what came from and went into the cache; the store counts the whole prompt.
            tokens_in=None if fresh is None else count(fresh + (cached or 0) + (count(usage.get("cacheWrite")) or 0)),
            tokens_out=count(usage.get("output")),
            tokens_cached=cached,
            offset=offset,
            length=length,
            meta={"stop_reason": stop} if stop else None,
        )


def _about(session_id: str, row: dict[str, Any]) -> Conversation:
    return Conversation(
        session_id,
        agent="pi",
        project=known_string(row.get("cwd")),
        parent_session_id=known_string(row.get("parentSession")),
        started_at=parse_time(row.get("timestamp")),
        meta={"version": row["version"]} if count(row.get("version")) else {},
    )


def _entry(kind: Any, row: dict[str, Any]) -> tuple[str, list[Part]]:
    """An entry of the tree that is no message."""
    if kind in _SUMMARIES:
        return "system", [Part("summary", as_text(row.get("summary")))]
    if kind == "custom_message":
        parts = _blocks(row.get("content"))
        return "user", [Part("context", p.text) if p.kind == "text" else p for p in parts]
    detail = {key: value for key, value in row.items() if key not in _ENVELOPE}
    return "system", [Part("event", as_text(detail), name=as_text(kind))]


def _said(message: dict[str, Any]) -> tuple[str, list[Part]]:
    name = message["role"]
    if not isinstance(name, str):
        raise TypeError(f"role {as_text(name)[:80]}")
    if name == "bashExecution":
        # A command that the user ran in the session: its words and its output, no tool call of the model's.
        text = f"$ {as_text(message.get('command'))}\n{as_text(message.get('output'))}"
        code = message.get("exitCode")
        return "user", [Part("context", text, name="bash", is_error=bool(code) if isinstance(code, int) else None)]
    if name in ("branchSummary", "compactionSummary"):
        return "system", [Part("summary", as_text(message.get("summary")))]
    parts = _blocks(message.get("content"))
    if name == "toolResult":
        tool, call_id = known_string(message.get("toolName")), known_string(message.get("toolCallId"))
        failed = message.get("isError")
        text = "\n".join(p.text for p in parts if p.kind == "text")
        failed = failed if isinstance(failed, bool) else None
        return "tool", [
            Part("tool_result", text, tool, call_id, is_error=failed),
            *(p for p in parts if p.kind != "text"),
        ]
    if name not in _ROLES:
        return "user", [Part("context", p.text, name=name) if p.kind == "text" else p for p in parts]
    error = known_string(message.get("errorMessage"))
    return _ROLES[name], [*parts, *([Part("event", error, name="error")] if error else [])]


def _blocks(content: Any) -> list[Part]:
    found = []
    for block in content if isinstance(content, list) else [content]:
        if isinstance(block, str):
            found.append(Part("text", block))
        elif block is None:
            continue
        elif block.get("type") == "text":
            found.append(Part("text", as_text(block.get("text"))))
        elif block.get("type") == "thinking":
            found.append(Part("thinking", as_text(block.get("thinking"))))
        elif block.get("type") == "toolCall":
            name, call_id = known_string(block.get("name")), known_string(block.get("id"))
            found.append(Part("tool_call", name=name, call_id=call_id, data=block.get("arguments")))
        elif block.get("type") == "image":
            found.append(stored_image(block.get("mimeType"), block.get("data")))
        else:
            found.append(Part("event", as_text(block), name=known_string(block.get("type"))))
    return [part for part in found if part.text or part.kind not in ("text", "thinking")]
