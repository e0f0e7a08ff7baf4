"""Claude Code session logs: ~/.claude/projects/<project>/<session>.jsonl, and agent-*.jsonl of sub-agents.

A log is a tree of lines joined by parentUuid. Each content block of an assistant message is a line of its own; the
pieces carry the same message.id. Progress lines hold the messages of sub-agents. A line's parent is not always the
message that it follows, so two things are mended:
* a parent that is no message (progress, hook, snapshot) stands for the nearest message above it;
* words queued while the agent worked have no line in the tree: they go to where they were delivered ("remove").

Source: no specification is published; fields as seen in logs of versions 2.1.22 to 2.1.37.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from workbench.data.importers._blocks import known_string
from workbench.data.importers._claude_code_lines import messages_of, user_parts, words_of
from workbench.data.importers.base import Probe, Source, as_text, read_json_lines
from workbench.data.records import Conversation, Message, Part, Record, digest, parse_time

FORMAT = "claude_code"

#: agent_id of sub-agents' lines in logs that do not name the agent.
_UNNAMED_AGENT = "sidechain"


def detect(probe: Probe) -> int:
    """How surely the content is a Claude Code log, 0 to 100."""
    best = 0
    for row in probe.lines:
        kind = row.get("type")
        if "sessionId" in row and "uuid" in row and "isSidechain" in row:
            return 97
        if (kind == "summary" and "leafUuid" in row) or (kind == "file-history-snapshot" and "snapshot" in row):
            best = 80
        elif "sessionId" in row and kind in ("queue-operation", "ai-title", "custom-title", "last-prompt", "mode"):
            best = max(best, 60)
    if not probe.lines and probe.document == "{" and probe.has_keys("parentUuid", "sessionId", "isSidechain"):
        return 80  # the first line is longer than the probe
    return best


def read(source: Source) -> Iterator[Record]:
    """Streams the log; what is kept in memory grows only with the ids of its lines."""
    reader = _Reader(source)
    yield from read_json_lines(source, reader.convert)
    yield from reader.left_over()


@dataclass(slots=True)
class _Session:
    """What must be remembered of a session while its lines go by."""

    session_id: str
    nearest: dict[str, str | None] = field(default_factory=dict)  # line uuid -> native id of the nearest message
    parents: dict[str, str | None] = field(default_factory=dict)  # native id -> parent, as first seen
    moved: dict[str, str] = field(default_factory=dict)  # message -> the one put behind it: children go there
    agents: dict[str, str] = field(default_factory=dict)  # agent id -> its latest message
    queue: list[str] = field(default_factory=list)  # typed while the agent worked, not yet delivered
    delivered: deque[str] = field(default_factory=lambda: deque(maxlen=8))
    last: str | None = None  # the latest message of the main thread
    is_announced: bool = False
    is_resumed: bool = False
    has_model: bool = False
    is_titled_by_user: bool = False

    def resolve(self, row: dict[str, Any]) -> str | None:
        """Native id of the message that a line hangs on; "" for a root, None where this read has not seen it.

        A compaction summary without a parent is no new beginning: it goes on from what it sums up.
        """
        uuid = row.get("parentUuid") or row.get("logicalParentUuid")
        if not uuid and row.get("parentUuid", ...) is None and not row.get("isCompactSummary"):
            return ""
        native_id = self.nearest.get(uuid) if isinstance(uuid, str) else None
        while native_id in self.moved:
            native_id = self.moved[native_id]
        return native_id

    def place(self, uuid: Any, messages: list[Message]) -> None:
        """Settles the parents of a line's messages, and what its uuid stands for from now on."""
        for message in messages:
            # A further piece, or a line that is repeated, keeps the parent of the first.
            message.parent_id = self.parents.setdefault(message.native_id, message.parent_id)
        last = messages[-1]
        if isinstance(uuid, str):
            self.nearest.setdefault(uuid, last.native_id)
        if last.agent_id is None:
            self.last = last.native_id


class _Reader:
    def __init__(self, source: Source):
        self.skipped = source.skipped
        self.sessions: dict[str, _Session] = {}
        self.session: _Session | None = None  # that of the latest line
        self.title: str | None = None  # stands in the log before the session that it names
        self.latest: _Session | None = None  # that of the latest Conversation: what a later read is told
        self.queue_before: list[str] = []
        if source.session and source.session.get("session_id"):
            meta = source.session.get("meta") or {}
            session = _Session(source.session["session_id"], is_resumed=True, has_model=True)
            self.queue_before = list(meta.get("queued") or [])
            session.queue = list(self.queue_before)
            session.is_titled_by_user = bool(meta.get("titled_by_user"))
            self.session = self.sessions[session.session_id] = session

    def convert(self, row: dict[str, Any], offset: int, length: int) -> Iterable[Record]:
        kind = row.get("type")
        if kind == "assistant" or kind == "user":
            return self._spoken(row, kind, offset, length)
        if kind == "progress":
            return self._progress(row, offset, length)
        if kind == "system":
            return self._system(row, offset, length)
        if kind == "attachment":
            return self._attachment(row, offset, length)
        if kind == "queue-operation":
            return self._queue_operation(row, offset, length)
        if kind == "summary" or kind == "ai-title" or kind == "custom-title":
            return self._title(row, kind)
        return self._skip(row, kind[:60] if isinstance(kind, str) else "record without type")

    def left_over(self) -> Iterator[Record]:
        """What a later read of the grown log must know: its session, and words queued but not yet delivered."""
        session = self.session
        if session and (session.queue != self.queue_before or (self.latest and self.latest is not session)):
            meta: dict[str, Any] = {"titled_by_user": True} if session.is_titled_by_user else {}
            yield Conversation(session.session_id, agent="claude-code", meta={**meta, "queued": session.queue})

    def _skip(self, row: dict[str, Any], name: str) -> list[Record]:
        """Counts a line that is no message; lines that hang on it will hang on its parent."""
        uuid = row.get("uuid")
        if isinstance(uuid, str):
            session = self._enter(row)
            session.nearest.setdefault(uuid, session.resolve(row))
        self.skipped[name] += 1
        return []

    def _enter(self, row: dict[str, Any]) -> _Session:
        """The session of a line; lines that name none belong to the session before them."""
        session_id, session = row.get("sessionId"), self.session
        if session is None or (session_id is not None and session_id != session.session_id):
            session_id = as_text(session_id) or digest("session", orjson.dumps(row))
            session = self.session = self.sessions.setdefault(session_id, _Session(session_id))
        return session

    def _announce(self, session: _Session, row: dict[str, Any]) -> list[Record]:
        """The Conversation that goes before a session's first message, else nothing."""
        if session.is_announced:
            return []
        session.is_announced = True
        self.latest = session
        if session.is_resumed:
            return [Conversation(session.session_id, agent="claude-code")]
        forked, uuid = row.get("forkedFrom"), row.get("parentUuid")
        parent = known_string(forked.get("sessionId")) if isinstance(forked, dict) else None
        if parent is None and isinstance(uuid, str) and uuid not in session.nearest:
            parent = next((s.session_id for s in self.sessions.values() if uuid in s.nearest), None)
        facts = {"version": row.get("version"), "git_branch": row.get("gitBranch")}
        title, self.title = None if session.is_titled_by_user else self.title, None
        conversation = Conversation(
            session.session_id,
            agent="claude-code",
            project=known_string(row.get("cwd")),
            title=title,
            parent_session_id=parent,
            started_at=parse_time(row.get("timestamp")),
            meta={name: value for name, value in facts.items() if known_string(value)},
        )
        return [conversation]

    def _spoken(self, row: dict[str, Any], kind: str, offset: int, length: int) -> list[Record]:
        session = self._enter(row)
        agent_id = known_string(row.get("agentId")) or (_UNNAMED_AGENT if row.get("isSidechain") else None)
        messages = messages_of(session.session_id, row, kind, session.resolve(row), agent_id, offset, length)
        if not messages:
            return self._skip(row, f"{kind} without content")
        records = self._announce(session, row)
        session.place(row.get("uuid"), messages)
        model = messages[0].model
        if not session.has_model and model and agent_id is None:
            session.has_model = True
            records.append(Conversation(session.session_id, model=model))
        records.extend(messages)
        return records

    def _progress(self, row: dict[str, Any], offset: int, length: int) -> list[Record]:
        data = row.get("data")
        name = data.get("type") if isinstance(data, dict) else None
        inner = data.get("message") if isinstance(data, dict) and name == "agent_progress" else None
        if not isinstance(data, dict) or not isinstance(inner, dict) or inner.get("type") not in ("user", "assistant"):
            return self._skip(row, f"progress:{as_text(name)[:60]}")
        session = self._enter(row)
        agent_id = known_string(data.get("agentId")) or _UNNAMED_AGENT
        parent = session.agents.get(agent_id) or session.resolve(row)
        messages = messages_of(session.session_id, inner, inner["type"], parent, agent_id, offset, length)
        if not messages:
            return self._skip(row, "progress:agent_progress without content")
        records = self._announce(session, row)
        session.place(inner.get("uuid"), messages)
        session.agents[agent_id] = messages[-1].native_id
        if isinstance(row.get("uuid"), str):  # the main thread goes on below the progress line
            session.nearest.setdefault(row["uuid"], session.resolve(row))
        return [*records, *messages]

    def _system(self, row: dict[str, Any], offset: int, length: int) -> list[Record]:
        """A message for what the program showed (compaction, API errors, notes); other lines are counted."""
        name = as_text(row.get("subtype"))[:60]
        errors = row.get("hookErrors")
        text = as_text(row.get("content") or row.get("error") or (errors if isinstance(errors, list) else None) or "")
        if not text:
            return self._skip(row, f"system:{name}")
        return self._added(row, "system", [Part("event", text, name=name or None)], offset, length)

    def _attachment(self, row: dict[str, Any], offset: int, length: int) -> list[Record]:
        """A message for queued words and for text put into the conversation; other attachments are counted."""
        attachment = row["attachment"]
        name = as_text(attachment.get("type"))[:60]
        if name == "queued_command":
            prompt = attachment.get("prompt")
            blocks = prompt if isinstance(prompt, list) else [{"type": "text", "text": as_text(prompt)}]
            parts = [part for block in blocks for part in user_parts(block, row)]
            text = "".join(part.text for part in parts)
            if parts and self._is_news(self._enter(row), text):
                return self._added(row, "user", parts, offset, length)
        else:
            text = next((attachment[k] for k in ("content", "snippet") if known_string(attachment.get(k))), None)
            if text:
                return self._added(row, "user", [Part("context", text, name=name)], offset, length)
        return self._skip(row, f"attachment:{name}")

    def _queue_operation(self, row: dict[str, Any], offset: int, length: int) -> list[Record]:
        session, operation = self._enter(row), row.get("operation")
        text = ""
        if operation == "enqueue" and known_string(row.get("content")):
            session.queue.append(row["content"])
        elif operation in ("remove", "dequeue") and session.queue:
            text = session.queue.pop(0)  # "dequeue": a line of its own follows
        elif operation == "popAll":
            session.queue.clear()  # taken back for editing
        if operation != "remove" or not text or not self._is_news(session, text):
            return self._skip(row, f"queue-operation:{as_text(operation)[:60]}")
        before, native_id = session.last, f"@{offset}"
        if before is not None and native_id not in session.parents:
            session.moved[before] = native_id
        return self._added({**row, "uuid": native_id}, "user", words_of(text), offset, length, parent_id=before)

    @staticmethod
    def _is_news(session: _Session, text: str) -> bool:
        """Whether the queued words have not been seen yet: some versions log their delivery twice."""
        if text in session.delivered:
            session.delivered.remove(text)
            return False
        session.delivered.append(text)
        return True

    def _added(
        self, row: dict[str, Any], role: str, parts: list[Part], offset: int, length: int, parent_id: str | None = None
    ) -> list[Record]:
        """The message of a line that has its words outside of `message`."""
        session = self._enter(row)
        agent_id = known_string(row.get("agentId")) or (_UNNAMED_AGENT if row.get("isSidechain") else None)
        message = Message(
            session.session_id,
            role,
            parts,
            known_string(row.get("uuid")) or f"@{offset}",
            parent_id=parent_id or session.resolve(row),
            agent_id=agent_id,
            created_at=parse_time(row.get("timestamp")),
            offset=offset,
            length=length,
        )
        records = self._announce(session, row)
        session.place(row.get("uuid"), [message])
        return [*records, message]

    def _title(self, row: dict[str, Any], kind: str) -> list[Record]:
        """A title given by a person stays when the program gives another; a summary may go before its session."""
        title = known_string(row.get("customTitle") or row.get("aiTitle") or row.get("summary") or row.get("title"))
        leaf = row.get("leafUuid")
        session = next((s for s in self.sessions.values() if leaf in s.nearest), self.session)
        if kind != "summary" and "sessionId" in row:
            session = self._enter(row)
        self.skipped[kind] += 1
        if session is None:
            self.title = title or self.title
        elif title and (kind == "custom-title" or not session.is_titled_by_user):
            session.is_titled_by_user = kind == "custom-title"
            self.latest = session
            meta = {"titled_by_user": True} if session.is_titled_by_user else {}
            return [Conversation(session.session_id, agent="claude-code", title=title, meta=meta)]
        return []
