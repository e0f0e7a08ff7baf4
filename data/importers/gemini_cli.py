"""Gemini CLI: ~/.gemini/tmp/<project>/chats/session-*.json (a document, rewritten as it grows); since 2026 .jsonl.

The lines of the JSONL are a log of changes: a message, written again in full whenever it gains a tool result;
`{"$set": {…}}` for metadata, or for the messages that the model is shown from now on; `{"$rewindTo": id}`, which
takes back that message and all after it. Taken-back messages stay as a side branch: the next message's parent is
the one before the rewound one ("" if there is none).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import orjson

from workbench.data.importers._blocks import count, known_string, stored_image
from workbench.data.importers._members import not_understood
from workbench.data.importers.base import SHAPE_ERRORS, Probe, Source, as_text, read_json_lines
from workbench.data.importers.json_rows import with_peek
from workbench.data.importers.json_stream import Member, read_members
from workbench.data.records import Conversation, Message, Part, Record, digest, parse_time

FORMAT = "gemini_cli"
_EVENTS = frozenset({"info", "warning", "error"})
#: Between these two the program pastes the files that a prompt names with @.
_FILES_BEGIN, _FILES_END = "--- Content from referenced files ---", "--- End of content ---"
_SESSION_CONTEXT = "<session_context>"
_CHANGES = ("$set", "$rewindTo")
#: Of so many latest messages a later read of the grown log is told where they hang.
_KEPT_MESSAGES = 64


def detect(probe: Probe) -> int:
    """By the session's `projectHash`, messages of type "gemini", or the change records of the JSONL form."""
    for row in probe.lines:
        if any(change in row for change in _CHANGES) or (row.get("type") == "gemini" and "id" in row):
            return 95
        if isinstance(row.get("sessionId"), str) and isinstance(row.get("projectHash"), str):
            return 95
    if probe.document != "{" or not probe.has_keys("sessionId", "messages"):
        return 0
    return 95 if probe.has_keys("projectHash") or re.search(rb'"type"\s*:\s*"gemini"', probe.head) else 0


def read(source: Source) -> Iterator[Record]:
    """Reads either form; resumes the JSONL form."""
    session = _Session(source)
    head = b"" if source.start else with_peek(source).peek(1).lstrip(b"\xef\xbb\xbf \t\r\n")
    if source.start or _is_lines(head):
        yield from read_json_lines(source, session.line)
        source.state = session.state()
    else:
        yield from _read_document(source, session)


def _is_lines(head: bytes) -> bool:
    """Whether the first line is a record of the JSONL form: an object that does not hold the conversation itself."""
    line, newline, _ = head.partition(b"\n")
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        # A document is either spread over lines that are no JSON, or is one line of which only a part is in `head`.
        return bool(newline) and any(row.startswith(b'{"') for row in head.splitlines()[1:50])
    return not (isinstance(row, dict) and row.get("messages") and "id" not in row)


def _read_document(source: Source, session: _Session) -> Iterator[Record]:
    about: dict[str, Any] = {}
    for member in read_members(source, ("messages",)):
        if not isinstance(member, Member):
            yield member
        elif member.index is None:
            about[str(member.key)] = member.value
        else:
            try:
                if member.index == 0 or session.session_id is None:
                    yield from session.metadata(about, orjson.dumps(member.value))
                yield from session.message(member.value, member.offset, member.length)
            except SHAPE_ERRORS as error:
                yield not_understood(member.offset, member.length, member.value, error)
    if about:
        yield from session.metadata(about, orjson.dumps(about))


class _Session:
    """What must be known of the records before to place the next one: ids only, so that memory stays small."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.is_whole = source.start == 0  # whether all messages before the present record are known
        known = (source.session or {}).get("session_id")
        self.session_id: str | None = known if isinstance(known, str) else None
        self.tail: str | None = None
        #: Parent of the first message of each id, and the message that the next one follows.
        self.parents: dict[str, str | None] = {}
        self.lasts: dict[str, str] = {}
        self.newest = 0  # the latest time of a message
        if source.state:
            self.tail, self.newest = source.state["tail"], source.state["newest"]
            self.parents, self.lasts = source.state["parents"], source.state["lasts"]
        elif source.start:
            before = self.look_back()
            self.tail, self.newest = before.tail, before.newest

    def state(self) -> dict[str, Any]:
        """What a later read of the grown log must know: the tail, and the messages most likely written again."""
        recent = dict(islice(reversed(self.parents.items()), _KEPT_MESSAGES))
        lasts = {native_id: self.lasts[native_id] for native_id in recent}
        return {"tail": self.tail, "newest": self.newest, "parents": dict(reversed(recent.items())), "lasts": lasts}

    def look_back(self) -> _Session:
        """Reads what stands before the resumed part once more, only to know where its messages hang."""
        self.is_whole = True
        with self.source.before() as source:
            before = _Session(source)
            deque(read_json_lines(source, before.line), maxlen=0)
        # The order is that of the log; what hung a message up first is right, and what wrote it last.
        self.parents = {**before.parents, **self.parents, **before.parents}
        self.lasts = {**before.lasts, **self.lasts}
        return before

    def line(self, row: dict[str, Any], offset: int, length: int) -> Iterator[Record]:
        if "$rewindTo" in row:
            self.rewind(row["$rewindTo"])
        elif "$set" in row:
            yield from self.change(row["$set"], offset, length)
        elif "type" in row and ("id" in row or "content" in row):
            if self.session_id is None:
                yield from self.metadata({}, orjson.dumps(row))
            yield from self.message(row, offset, length)
        else:
            self.source.skipped["metadata"] += 1
            yield from self.metadata(row, orjson.dumps(row))

    def rewind(self, target: Any) -> None:
        self.source.skipped["$rewindTo"] += 1
        if not self.is_whole and target not in self.parents:
            self.look_back()
        self.tail = self.parents.get(target) or ""

    def change(self, values: Any, offset: int, length: int) -> Iterator[Record]:
        """`$set`: its `messages` are what the model is shown from now on; those that are new continue the session."""
        self.source.skipped["$set"] += 1
        yield from self.metadata(values, orjson.dumps(values))
        shown = values.get("messages") or []
        for row in shown:
            yield from self.message(row, offset, length)

    def metadata(self, about: dict[str, Any], raw: bytes) -> Iterator[Record]:
        session_id = known_string(about.get("sessionId"))
        if self.session_id is None:
            self.session_id = session_id or "sha-" + digest(raw)
        directories = about.get("directories")
        folder = directories[0] if isinstance(directories, list) and directories else None
        kept = {key: about[key] for key in ("projectHash", "kind", "lastUpdated") if known_string(about.get(key))}
        yield Conversation(
            self.session_id,
            agent="gemini-cli",
            project=known_string(folder),
            title=known_string(about.get("summary")),
            started_at=parse_time(about.get("startTime")),
            meta=kept,
        )

    def message(self, row: dict[str, Any], offset: int, length: int) -> Iterator[Record]:
        """A message, and one with the results of its tool calls after it."""
        kind, native_id = row["type"], known_string(row.get("id")) or f"@{offset}"
        parts = list(_parts(row, kind))
        if not parts:
            self.source.skipped["empty message"] += 1
            return
        when = parse_time(row.get("timestamp"))
        # A message that is written again keeps its time: a later one than all before belongs to a new message.
        if not self.is_whole and native_id not in self.parents and (when is None or when <= self.newest):
            self.look_back()
        self.newest = max(self.newest, when or 0)
        tokens = row.get("tokens")
        tokens = tokens if isinstance(tokens, dict) else {}
        spoken = Message(
            str(self.session_id),
            "user" if kind == "user" else "assistant" if kind == "gemini" else "system",
            parts,
            native_id,
            self.parents.get(native_id, self.tail),
            created_at=when,
            model=known_string(row.get("model")),
            tokens_in=count(tokens.get("input")),
            tokens_out=count(tokens.get("output")),
            tokens_cached=count(tokens.get("cached")),
            offset=offset,
            length=length,
            meta={"thought_tokens": tokens["thoughts"]} if count(tokens.get("thoughts")) else None,
        )
        found = [spoken]
        results = [part for call in _calls(row) for part in _results(call)]
        if results:
            times = [parse_time(call.get("timestamp")) for call in _calls(row)]
            result_id = native_id + "/results"
            ended_at = max((time for time in times if time is not None), default=None)
            found.append(
                Message(
                    spoken.session_id, "tool", results, result_id, native_id,
                    created_at=ended_at, offset=offset, length=length,
                )
            )  # fmt: skip
        # A message that is written again keeps its place; the one that is being answered stays the tail.
        if native_id not in self.parents or self.tail == self.lasts[native_id]:
            self.tail = found[-1].native_id
        self.parents.setdefault(native_id, spoken.parent_id)
        self.lasts[native_id] = found[-1].native_id
        yield from found


def _calls(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [call for call in row.get("toolCalls") or [] if isinstance(call, dict)]


def _parts(row: dict[str, Any], kind: str) -> Iterator[Part]:
    for thought in row.get("thoughts") or []:
        yield Part("thinking", "\n".join(filter(None, (thought.get("subject"), thought.get("description")))))
    content = list(_content(row.get("content")))
    if kind not in ("user", "gemini"):
        name = kind if kind in _EVENTS else f"gemini:{kind}"
        content = [Part("event", p.text, name=name) if p.kind == "text" else p for p in content]
    elif kind == "user":
        shown = [p.text for p in _content(row.get("displayContent")) if p.kind == "text"]
        content = list(_user_parts(content, shown))
    yield from content
    for call in row.get("toolCalls") or []:
        if not isinstance(call, dict):
            raise TypeError(f"a tool call that is no object: {as_text(call)[:80]}")
        yield Part("tool_call", name=known_string(call.get("name")), call_id=known_string(call.get("id")),
                   data=call.get("args"))  # fmt: skip


def _user_parts(parts: list[Part], shown: list[str]) -> Iterator[Part]:
    """A prompt's parts, in which pasted files and the session's environment are context, not the user's words."""
    if shown and shown != [p.text for p in parts if p.kind == "text"]:
        yield from (Part("text", text) for text in shown)
        yield from (Part("context", p.text) if p.kind == "text" else p for p in parts if p.text not in shown)
        return
    is_pasted = False
    for part in parts:
        is_pasted = is_pasted or part.text.strip().startswith(_FILES_BEGIN)
        if part.kind == "text" and (is_pasted or part.text.startswith(_SESSION_CONTEXT)):
            part = Part("context", part.text)
        is_pasted = is_pasted and _FILES_END not in part.text
        yield part


def _content(content: Any) -> Iterator[Part]:
    """The parts of a PartListUnion: a string, a part, or a list of them."""
    for piece in content if isinstance(content, list) else [content]:
        if piece is None or piece == "":
            continue
        if isinstance(piece, str):
            yield Part("text", piece)
        elif not isinstance(piece, dict):
            raise TypeError(f"content that is neither text nor a part: {as_text(piece)[:80]}")
        elif isinstance(piece.get("text"), str):
            if piece["text"]:
                yield Part("thinking" if piece.get("thought") is True else "text", piece["text"])
        elif isinstance(inline := piece.get("inlineData"), dict):
            yield stored_image(inline.get("mimeType"), inline.get("data"))
        elif isinstance(linked := piece.get("fileData"), dict):
            media = known_string(linked.get("mimeType"))
            kind = "image" if media and media.startswith("image/") else "file"
            yield Part(kind, name=media, data={"media_type": media, "url": linked.get("fileUri")})
        elif isinstance(call := piece.get("functionCall"), dict):
            yield Part("tool_call", name=known_string(call.get("name")), call_id=known_string(call.get("id")),
                       data=call.get("args"))  # fmt: skip
        elif isinstance(response := piece.get("functionResponse"), dict):
            yield _response(response, None, None, None)
        else:
            yield Part("event", as_text(piece), name=next(iter(piece), None))


def _results(call: dict[str, Any]) -> Iterator[Part]:
    """What a tool call gave back: its function responses and images, or else what was displayed."""
    failed = {"success": False, "error": True, "cancelled": True}.get(str(call.get("status")))
    name, call_id = known_string(call.get("name")), known_string(call.get("id"))
    result = call.get("result")
    for piece in result if isinstance(result, list) else [] if result is None else [result]:
        response = piece.get("functionResponse") if isinstance(piece, dict) else None
        if isinstance(response, dict):
            yield _response(response, name, call_id, failed)
        else:
            for part in _content(piece):
                text = part.kind == "text"
                yield Part("tool_result", part.text, name, call_id, is_error=failed) if text else part
    if not result and call.get("resultDisplay"):
        yield Part("tool_result", as_text(call["resultDisplay"]), name, call_id, is_error=failed)


def _response(response: dict[str, Any], name: str | None, call_id: str | None, failed: bool | None) -> Part:
    said = response.get("response")
    text = said
    if isinstance(said, dict) and said.keys() & {"output", "error"} and len(said) == 1:
        (text,) = said.values()
    name = name or known_string(response.get("name"))
    return Part("tool_result", as_text(text), name, call_id or known_string(response.get("id")), is_error=failed)
