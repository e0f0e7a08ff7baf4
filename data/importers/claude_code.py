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
from itertools import islice
from typing import Any

import orjson

from workbench.data.importers._blocks import known_string
from workbench.data.importers._claude_code_lines import messages_of, user_parts, words_of
from workbench.data.importers.base import Probe, Source, as_text, read_json_lines
from workbench.data.records import Conversation, Message, Part, Record, digest, parse_time

FORMAT = "claude_code"

#: agent_id of sub-agents' lines in logs that do not name the agent.
_UNNAMED_AGENT = "sidechain"
#: Of so many last lines a later read of the grown log is told where they stand: parallel tool results hang on any.
_KEPT_LINES = 32
_KEPT_FIELDS = ("session_id", "agents", "queue", "last", "has_model", "is_titled_by_user")


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
    source.state = reader.state()


@dataclass(slots=True)
class _Session:
    """What must be remembered of a session while its lines go by."""

    session_id: str
    nearest: dict[str, str | None] = field(default_factory=dict)  # line uuid -> native id of the nearest message
    parents: dict[str, str | None] = field(default_factory=dict)  # native id -> parent, as first seen
    moved: dict[str, str] = field(default_factory=dict)  # message -> the one put behind it: children go there
    agents: dict[str, str] = field(default_factory=dict)  # agent id -> its latest message
    queue: list[str] = field(default_factory=list)  # typed while the agent worked, not yet delivered
    delivered: deque[str] = field(default_factory=lambda: deque(maxlen=8))  # digests of the words
    last: str | None = None  # the latest message of the main thread
    is_announced: bool = False
    is_resumed: bool = False  # announced by an earlier read
    has_model: bool = False
    is_titled_by_user: bool = False

    def resolve(self, row: dict[str, Any]) -> str | None:
        """Native id of the message that a line hangs on; "" for a root, None where the log does not hold it.

        A compaction summary without a parent is no new beginning: it goes on from what it sums up.
        """
        uuid = row.get("parentUuid") or row.get("logicalParentUuid")
        if not uuid and row.get("parentUuid", ...) is None and not row.get("isCompactSummary"):
            return ""
        return self.followed(self.nearest.get(uuid) if isinstance(uuid, str) else None)

    def followed(self, native_id: str | None) -> str | None:
        """The message itself, or the last of those that were put behind it."""
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

    def state(self) -> dict[str, Any]:
        """What a later read needs where the log goes on from one of its last lines."""
        nearest = {uuid: self.followed(self.nearest[uuid]) for uuid in islice(reversed(self.nearest), _KEPT_LINES)}
        return {
            **{name: getattr(self, name) for name in _KEPT_FIELDS},
            "is_resumed": self.is_announced or self.is_resumed,
            "delivered": list(self.delivered),
            "nearest": dict(reversed(nearest.items())),
            "parents": {
                native_id: self.parents[native_id] for native_id in nearest.values() if native_id in self.parents
            },
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> _Session:
        return cls(**{**state, "delivered": deque(state["delivered"], maxlen=8)})

    def add_earlier(self, earlier: _Session) -> None:
        """Adds what an earlier read knew of lines; the first to say something of a line is right."""
        self.nearest = {**earlier.nearest, **self.nearest, **earlier.nearest}
        self.parents = {**earlier.parents, **self.parents, **earlier.parents}
        self.moved = {**earlier.moved, **self.moved}


class _Reader:
    def __init__(self, source: Source):
        self.skipped = source.skipped
        self.sessions: dict[str, _Session] = {}
        self.session: _Session | None = None  # that of the latest line
        self.title: str | None = None  # stands in the log before the session that it names
        self.source = source
        self.is_whole = source.start == 0  # whether all lines before the present one are known
        if source.state:
            self.title = source.state["title"]
            if source.state["session"]:
                self.session = _Session.from_state(source.state["session"])
                self.sessions[self.session.session_id] = self.session
            else:
                self.is_whole = True  # nothing but titles stood before
        elif source.start:
            before = self._look_back()
            self.title, self.session = before.title, before.session

    def state(self) -> dict[str, Any]:
        """What a later read of the grown log must know."""
        return {"title": self.title, "session": self.session.state() if self.session else None}

    def _look_back(self) -> _Reader:
        """Reads what stands before the resumed part once more, only to know which lines and sessions there are."""
        self.is_whole = True
        with self.source.before() as source:
            before = _Reader(source)
            deque(read_json_lines(source, before.convert), maxlen=0)
        for session_id, earlier in before.sessions.items():
            earlier.is_resumed, earlier.is_announced = earlier.is_announced, False
            known = self.sessions.setdefault(session_id, earlier)
            if known is not earlier:
                known.add_earlier(earlier)
        return before

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
            if not self.is_whole and session_id not in self.sessions:
                self._look_back()
            session = self.session = self.sessions.setdefault(session_id, _Session(session_id))
        if not self.is_whole:
            uuid = row.get("parentUuid") or row.get("logicalParentUuid")
            if isinstance(uuid, str) and uuid not in session.nearest:
                self._look_back()
        return session

    def _announce(self, session: _Session, row: dict[str, Any]) -> list[Record]:
        """The Conversation that goes before a session's first message, else nothing."""
        if session.is_announced:
            return []
        session.is_announced = True
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
        words = digest(text)
        if words in session.delivered:
            session.delivered.remove(words)
            return False
        session.delivered.append(words)
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
        if not self.is_whole and isinstance(leaf, str) and not any(leaf in s.nearest for s in self.sessions.values()):
            self._look_back()
        session = next((s for s in self.sessions.values() if leaf in s.nearest), self.session)
        if kind != "summary" and "sessionId" in row:
            session = self._enter(row)
        self.skipped[kind] += 1
        if session is None:
            self.title = title or self.title
        elif title and (kind == "custom-title" or not session.is_titled_by_user):
            session.is_titled_by_user = kind == "custom-title"
            return [Conversation(session.session_id, agent="claude-code", title=title)]
        return []
