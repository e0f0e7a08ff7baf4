"""Conversations out of spans: what the importers of traces (OpenTelemetry, LangSmith, Langfuse) share.

Every call of a model is a span that repeats the whole conversation so far, spans arrive in any order, and traces
interleave. So the spans are first put aside in a temporary file, with only their ids and times in memory; then they
are told in the order of their start, and of each only the messages that no earlier span told.

A message is known by its place: its id is a hash of its content and of the id of the message before it. A history
whose beginning was cut off is found again by the messages that follow each other in it.

A file that has grown is told again as a whole, and later spans can change what the earlier ones tell: a chain is told
by its own input and output until the file holds a model call below it; a span belongs to the main thread, or to its
trace, until the span around it (its sub-agent) or the session is named; a tool result is the model call's until the
tool span comes. The message then has another id. The store drops nothing, so the earlier telling stays beside the
present one: words as a branch, tool results and system prompts where their parent is. A file that is read once, or
only when its traces are complete, has no such doubles.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from workbench.data.importers._chat_parts import chat_list, content_digest, loads_or_same, result_parts
from workbench.data.importers._members import not_understood
from workbench.data.importers.base import SHAPE_ERRORS, Source
from workbench.data.records import Conversation, Message, Part, Record, digest

_SPOOL_BYTES_IN_MEMORY = 8 << 20
_UNKNOWN_TIME = 1 << 62
_MAX_DEPTH = 200
#: How many places of a repeated text are tried as the beginning of a cut history.
_MAX_PLACES = 50

Chat = tuple[str, list[Part]]


@dataclass(slots=True)
class Span:
    """A span of any tracer.

    Args:
        kind: "llm" (a call of a model), "tool", "agent", "chain" (a run of several calls), "other" (only its place
            in the tree counts). Of agents and chains the messages are told only where no llm span below tells them.
        session_id: the conversation; None = that of another span of its trace, else the trace.
        inputs, outputs: chat messages of any dialect; of a tool its arguments and result.
        start, end: microseconds since the epoch.
        agent: name or id of the agent that runs in this span.
        about: fields of Conversation known from here (agent, project, title).
    """

    span_id: str
    trace_id: str
    parent_id: str | None = None
    kind: str = "other"
    name: str | None = None
    session_id: str | None = None
    start: int | None = None
    end: int | None = None
    model: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    tokens_cached: int | None = None
    inputs: Any = None
    outputs: Any = None
    call_id: str | None = None
    error: str | None = None
    agent: str | None = None
    about: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    offset: int = 0
    length: int = 0


@dataclass(slots=True)
class _Thread:
    """What was told of one thread (the main one, or a sub-agent's) of a session: ids only."""

    root: str  # the node before the first message
    nodes: set[str] = field(default_factory=set)
    places: dict[str, list[str]] = field(default_factory=dict)  # content -> its nodes
    native: dict[str, str] = field(default_factory=dict)  # node -> native id, where another message tells the same
    last: str | None = None


@dataclass(slots=True)
class _Session:
    known: dict[str, Any] = field(default_factory=dict)  # fields of Conversation that were told
    about: dict[str, Any] = field(default_factory=dict)  # those that untold spans know
    threads: dict[str | None, _Thread] = field(default_factory=dict)
    calls: set[str] = field(default_factory=set)  # ids of the tool calls told
    spans: set[str] = field(default_factory=set)  # native ids of the messages that tell a span itself
    named_calls: Counter[str] = field(default_factory=Counter)  # tool -> calls told that no tool span took up yet
    results: dict[str, str] = field(default_factory=dict)  # call id -> native id of the result's message
    texts: dict[str, list[tuple[str, str | None]]] = field(default_factory=dict)  # result -> (native id, call id)


class SpanBook:
    """Collects the spans of a source, then tells them as conversations. A context manager: it owns a file."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._spool = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES_IN_MEMORY)  # noqa: SIM115
        self._index: list[tuple[int, int, int, int]] = []  # start, order, place and size in the spool
        self._tree: dict[str, tuple[str | None, str, str]] = {}  # span -> parent, kind, agent
        self._speaking: set[str] = set()  # spans that have a model call with messages below them
        self._trace_session: dict[str, str] = {}
        self._sessions: dict[str, _Session] = {}

    def __enter__(self) -> SpanBook:
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    def add(self, span: Span) -> None:
        """Puts a span aside. One without messages counts as skipped; its place in the tree is kept."""
        blob = orjson.dumps(span)
        self._tree[span.span_id] = (span.parent_id, span.kind, span.agent or span.name or span.span_id)
        if span.session_id:
            self._trace_session.setdefault(span.trace_id, span.session_id)
        if span.kind == "other" or not (span.inputs or span.outputs or span.error):
            self._source.skipped[f"{span.kind} span without messages"] += 1
            return
        if span.kind == "llm" and span.parent_id:
            self._speaking.add(span.parent_id)
        start = _UNKNOWN_TIME if span.start is None else span.start
        self._index.append((start, len(self._index), self._spool.tell(), len(blob)))
        self._spool.write(blob)

    def records(self) -> Iterator[Record]:
        """All conversations, their messages in the order of the spans' start."""
        for span_id in list(self._speaking):
            above = self._tree.get(span_id, (None,))[0]
            while above and above not in self._speaking:
                self._speaking.add(above)
                above = self._tree.get(above, (None,))[0]
        self._index.sort()
        for _, _, place, size in self._index:
            self._spool.seek(place)
            span = Span(**orjson.loads(self._spool.read(size)))
            try:
                records = list(self._tell(span))
            except SHAPE_ERRORS as error:
                yield not_understood(span.offset, span.length, [span.inputs, span.outputs], error)
                continue
            yield from records

    def _tell(self, span: Span) -> Iterator[Record]:
        if span.kind in ("agent", "chain") and span.span_id in self._speaking:
            self._source.skipped[f"{span.kind} span (its model calls tell it)"] += 1
            session = self._session(span)[1]
            session.about = {**{key: value for key, value in span.about.items() if value}, **session.about}
            return
        session_id, session = self._session(span)
        agent_id = self._sub_agent(span)
        thread = session.threads.setdefault(agent_id, _Thread(digest("thread", agent_id or "")))
        messages = list(self._tool(span, session, thread) if span.kind == "tool" else self._chat(span, session, thread))
        if messages:
            yield from _conversation(span, session_id, session)
        else:
            self._source.skipped["span without new messages"] += 1
        for message in messages:
            message.session_id = session_id
            message.agent_id = agent_id
            message.offset, message.length = span.offset, span.length
            yield message

    def _session(self, span: Span) -> tuple[str, _Session]:
        session_id = span.session_id or self._trace_session.get(span.trace_id) or span.trace_id
        return session_id, self._sessions.setdefault(session_id, _Session())

    def _sub_agent(self, span: Span) -> str | None:
        """The innermost agent or tool run around the span, unless that is the outermost agent: the main thread."""
        around: list[tuple[str, str]] = []
        above = span.span_id if span.kind == "agent" else span.parent_id
        for _ in range(_MAX_DEPTH):
            if above not in self._tree:
                break
            above, kind, agent = self._tree[above]
            if kind == "tool" or (kind == "agent" and around[-1:] != [(kind, agent)]):
                around.append((kind, agent))
        if around and around[-1][0] == "agent":
            around.pop()
        return around[0][1] if around else None

    def _chat(self, span: Span, session: _Session, thread: _Thread) -> Iterator[Message]:
        inputs, outputs = chat_list(span.inputs), chat_list(span.outputs, "assistant")
        if span.kind != "llm" and any(role == "user" for role, _ in outputs):
            # The state of a graph: the whole conversation, which begins with what was put in.
            answer = 1 + max(i for i, (role, _) in enumerate(outputs) if role == "user")
            inputs, outputs = outputs[:answer], outputs[answer:]
        chats = [(role, parts, content_digest(role, parts)) for role, parts in inputs]
        for role, parts, content in chats:
            if role == "system":
                yield from self._place(thread, session, thread.root, (role, parts), content, span.start)[1]
        told = [chat for chat in chats if chat[0] != "system"]
        node, known = _beginning(thread, [content for _, _, content in told])
        self._source.skipped["repeated message"] += known
        for role, parts, content in told[known:]:
            when = None if role == "assistant" else span.start
            node, new = self._place(thread, session, node, (role, parts), content, when)
            yield from new
        when = span.start if span.end is None else span.end
        usage: tuple[int | None, ...] = (span.tokens_in, span.tokens_out, span.tokens_cached)
        for role, parts in outputs:
            after, new = self._place(thread, session, node, (role, parts), content_digest(role, parts), when)
            node = node if span.kind == "llm" else after  # a model's messages are alternatives, a run's are a sequence
            for message in new:
                if role == "assistant":
                    message.model, message.meta = span.model, span.meta or None
                    message.tokens_in, message.tokens_out, message.tokens_cached = usage
                    usage = (None, None, None)
                yield message
        if span.error and f"error:{span.span_id}" not in session.spans:
            session.spans.add(f"error:{span.span_id}")
            part = Part("event", span.error, name="error", is_error=True)
            yield self._told(thread, Message("", "system", [part], f"error:{span.span_id}", created_at=when))

    def _told(self, thread: _Thread, message: Message, parent: str | None = None) -> Message:
        message.parent_id = parent or thread.last
        thread.last = message.native_id
        return message

    def _place(
        self, thread: _Thread, session: _Session, before: str, chat: Chat, content: str, when: int | None
    ) -> tuple[str, list[Message]]:
        """The node of a message after the node `before`, and the message itself unless it was told already."""
        role, parts = chat
        node = digest(before, content)
        native = None
        if node not in thread.nodes:
            thread.nodes.add(node)
            thread.places.setdefault(content, []).append(node)
            for part in parts:
                if part.kind == "tool_call":
                    session.named_calls[part.name or ""] += 1
                    session.calls.add(part.call_id or "")
            if parts[0].kind == "tool_result":
                native = _result_told(session, parts[0])
                session.results.setdefault(parts[0].call_id or node, native or node)
            if native is None:
                parent = None if before == thread.root else thread.native.get(before, before)
                return node, [self._told(thread, Message("", role, parts, node, created_at=when), parent)]
            thread.native[node] = native
        self._source.skipped["repeated message"] += 1
        return node, []

    def _tool(self, span: Span, session: _Session, thread: _Thread) -> Iterator[Message]:
        call_id = span.call_id or span.span_id
        native = f"span:{span.span_id}"
        if call_id in session.results or native in session.spans:
            self._source.skipped["tool span (a model call tells it)"] += 1
            return
        session.spans.add(native)
        result, *media = result_parts({"content": span.error if span.outputs in (None, "") else span.outputs})
        result.name, result.call_id = span.name, call_id
        result.is_error = True if span.error else None
        session.results[call_id] = native
        session.texts.setdefault(digest(result.text.strip()), []).append((native, span.call_id))
        parts = [result, *media]
        if span.call_id is None and session.named_calls[span.name or ""] > 0:
            session.named_calls[span.name or ""] -= 1
        elif call_id not in session.calls:
            parts.insert(0, Part("tool_call", name=span.name, call_id=call_id, data=loads_or_same(span.inputs)))
        when = span.start if span.end is None else span.end
        meta = {**span.meta, "error": span.error} if span.error else span.meta
        yield self._told(thread, Message("", "tool", parts, native, created_at=when, meta=meta or None))


def _conversation(span: Span, session_id: str, session: _Session) -> Iterator[Conversation]:
    """The Conversation at its first message, and again when a span knows more."""
    known = session.known
    fields = {**span.about, **session.about, "model": span.model}
    new = {key: value for key, value in fields.items() if value and key not in known}
    if "trace_id" not in known:
        known["trace_id"] = span.trace_id
        yield Conversation(session_id, started_at=span.start, meta={"trace_id": span.trace_id}, **new)
    elif new:
        yield Conversation(session_id, **new)
    known.update(new)


def _result_told(session: _Session, part: Part) -> str | None:
    """The native id of the message that told this tool result, found by call id, else by its words."""
    if part.call_id and part.call_id in session.results:
        return session.results[part.call_id]
    same = session.texts.get(digest(part.text.strip()), [])
    for i, (native, call_id) in enumerate(same):
        if part.call_id is None or call_id is None:
            del same[i]
            return native
    return None


def _beginning(thread: _Thread, contents: list[str]) -> tuple[str, int]:
    """(node after which a history goes on, how many of its messages lie before that).

    (thread.root, 0) where it begins as one that is known, or anew. A history whose beginning was cut off is
    recognised by at least two messages that are known to follow each other.
    """
    if len(contents) < 2 or digest(thread.root, contents[0]) in thread.nodes:
        return thread.root, 0
    best, longest = "", 1
    for place in thread.places.get(contents[0], [])[-_MAX_PLACES:]:
        node, length = place, 1
        for content in contents[1:]:
            node = digest(node, content)
            if node not in thread.nodes:
                break
            length += 1
        if length > longest:
            best, longest = place, length
    return (best, 1) if best else (thread.root, 0)
