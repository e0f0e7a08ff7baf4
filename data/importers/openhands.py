"""OpenHands: event streams of V0 and of the V1 SDK (arrays, JSON lines, or a file for each event), the rows of
evaluation outputs (output.jsonl), and the older histories that are lists of [action, observation] pairs.

The session id is the conversation's where the log or the path of an event file ("<id>/events/<n>.json") has it;
a row's is its instance id with a hash of the first event; else it is that hash.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from workbench.data.importers._chat_parts import first
from workbench.data.importers._members import not_understood, read_rows
from workbench.data.importers._openhands_events import Events
from workbench.data.importers.base import SHAPE_ERRORS, Probe, Source, as_text
from workbench.data.importers.json_stream import Member
from workbench.data.records import Checkpoint, Conversation, Part, Record, digest

FORMAT = "openhands"

_ARRAYS = ("history", "trajectory", "events", "items")
_V1 = re.compile(rb'"kind"\s*:\s*"(?:MessageEvent|ActionEvent|ObservationEvent|SystemPromptEvent|AgentErrorEvent|'
                 rb'Condensation|ConversationStateUpdateEvent|UserRejectObservation|ACPToolCallEvent|'
                 rb'CondensationSummaryEvent|HookExecutionEvent|PauseEvent|ConversationErrorEvent)"')  # fmt: skip
_V0 = re.compile(rb'"(?:action|observation)"\s*:\s*"[a-z_]{2,40}"')
_V0_SOURCE = re.compile(rb'"source"\s*:\s*"(?:agent|user|environment)"')
_EVENT_PATH = re.compile(r"([^/\\!]+)[/\\]events[/\\](?:event-)?\d+[^/\\]*\.json$")
_SHORT = 1000


def detect(probe: Probe) -> int:
    if _V1.search(probe.head):
        return 92
    v0 = _V0.search(probe.head) and (probe.has_keys("args") or probe.has_keys("extras") or probe.has_keys("cause"))
    if v0 and _V0_SOURCE.search(probe.head):
        return 90
    # The old pairs: [[{"action": …, "args": …, "source": …}, {"observation": …, "content": …}], …]
    if v0 and probe.has_keys("observation", "content"):
        return 75
    return 85 if probe.has_keys("instance_id", "history", "test_result") else 0


def read(source: Source) -> Iterator[Record]:
    # The session is the reader's own record of what was yielded last: only at the start does it tell what to resume.
    resumed = as_text(source.session["session_id"]) if source.start and source.session else None
    log = _Log(source, resumed)
    yield from read_rows(source, _ARRAYS, log.convert)
    yield from log.end()


class _Log:
    """The conversation of a stream; the rows of an evaluation output have one each."""

    def __init__(self, source: Source, resumed: str | None = None) -> None:
        self.source = source
        self.resumed = resumed
        self.fields: dict[str, Any] = {}
        self.events: Events | None = None
        self.at = (0, 0)

    def convert(self, member: Member) -> Iterator[Record]:
        value = member.value
        if member.key is not None and member.index is None:
            if member.key in _ARRAYS and value is not None:
                raise TypeError(f"{member.key} is no list")
            self.fields[member.key] = value
            self.at = (member.offset, member.length)
        elif member.key is None and isinstance(value, dict) and any(isinstance(value.get(k), list) for k in _ARRAYS):
            yield from self._row(value, member)
        else:
            yield from self._events(value, member)

    def _events(self, value: Any, member: Member) -> Iterator[Record]:
        """The records of an element: an event, or an old [action, observation] pair. Each stands for itself."""
        if value == []:
            self.source.skipped["empty pair"] += 1
        for event in value if isinstance(value, list) else [value]:
            try:
                records = list(self._event(event, member))
            except SHAPE_ERRORS as error:
                yield not_understood(member.offset, member.length, event, error)
                continue
            yield from records

    def _event(self, event: Any, member: Member) -> Iterator[Record]:
        begin: list[Record] = []
        if self.events is None:
            session_id = self._session_id(event)
            self.events = Events(self.source, session_id)
            begin = [Conversation(session_id, agent="openhands")]
        try:
            messages = self.events.messages(event, member)
        except SHAPE_ERRORS:
            if begin:
                self.events = None
            raise
        if isinstance(event, dict) and event.get("kind") == "ConversationStateUpdateEvent":
            begin += _state_update(event, self.events.session_id)
        yield from begin
        yield from messages

    def _session_id(self, event: Any) -> str:
        if self.resumed:
            return self.resumed
        path = _EVENT_PATH.search(self.source.path)
        known = path[1] if path else first(self.fields, "conversation_id", "session_id", "sid", "id")
        if isinstance(known, str) and known:
            return known
        name = self.fields.get("instance_id")
        return (f"{name}-" if isinstance(name, str) and name else "") + digest(as_text(event))

    def _row(self, row: dict[str, Any], member: Member) -> Iterator[Record]:
        """A row of an evaluation output: a conversation by itself. A spoilt event does not take the others with it."""
        history = next(row[key] for key in _ARRAYS if isinstance(row.get(key), list))
        log = _Log(self.source)
        log.fields = {key: value for key, value in row.items() if key not in _ARRAYS}
        for item in history:
            yield from log._events(item, member)
        if not history:
            self.source.skipped["row without events"] += 1
        yield from log.end()
        yield Checkpoint(member.offset + member.length)

    def end(self) -> Iterator[Record]:
        """What is known of the whole conversation; or the only event, where the document is one event."""
        if self.events is None and any(isinstance(self.fields.get(k), str) for k in ("kind", "action", "observation")):
            member = Member(None, None, 0, sum(self.at), self.fields)
            event, self.fields = self.fields, {}
            yield from self._events(event, member)
            return
        if self.events is None:
            if self.fields:
                self.source.skipped["row without events"] += 1
        elif self.fields:
            yield from self._about(self.events)

    def _about(self, events: Events) -> Iterator[Record]:
        fields = self.fields
        patch = _inside(fields.get("test_result"), "git_patch") or fields.get("git_patch")
        if isinstance(patch, str) and patch.strip():
            message = events.messages({"id": "submission", "kind": "Submission", "message": patch}, Member(
                None, None, *self.at, None))[0]  # fmt: skip
            message.parts = [Part("event", patch, name="submission")]
            yield message
        if fields.get("error"):
            message = events.messages({"id": "error", "kind": "Error", "message": fields["error"]}, Member(
                None, None, *self.at, None))[0]  # fmt: skip
            yield message
        model = _inside(_inside(fields.get("metadata"), "llm_config"), "model")
        repository = _inside(fields.get("instance"), "repo")
        kept = {
            "agent_class": _inside(fields.get("metadata"), "agent_class"),
            "dataset": _inside(fields.get("metadata"), "dataset"),
            "cost": _inside(fields.get("metrics"), "accumulated_cost"),
            "tokens": _inside(fields.get("metrics"), "accumulated_token_usage"),
            "report": fields.get("report"),
            "resolved": _inside(fields.get("report"), "resolved"),
        }
        title = fields.get("instance_id")
        yield Conversation(
            events.session_id,
            project=repository if isinstance(repository, str) else None,
            title=title if isinstance(title, str) else None,
            model=model if isinstance(model, str) else None,
            meta={key: value for key, value in kept.items() if value is not None and len(as_text(value)) < _SHORT},
        )


def _inside(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _state_update(event: dict[str, Any], session_id: str) -> list[Record]:
    """Model and working directory, where a state update of the SDK tells them."""
    state = event.get("value")
    workspace = _inside(_inside(state, "workspace"), "working_dir")
    model = _inside(_inside(_inside(state, "agent"), "llm"), "model")
    if not isinstance(workspace, str) and not isinstance(model, str):
        return []
    return [
        Conversation(
            session_id,
            project=workspace if isinstance(workspace, str) else None,
            model=model if isinstance(model, str) else None,
        )
    ]
