"""Claude.ai data export: conversations.json, a list of conversations whose messages name their parents.

Tool results stand inside the assistant's message there; here they are messages of their own, named <uuid>/1, /2 ….
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from workbench.data.importers._blocks import count, known_string, stored_image
from workbench.data.importers._conversations import linked, read_conversations, row_id
from workbench.data.importers._members import not_understood
from workbench.data.importers.base import SHAPE_ERRORS, Probe, Source, as_text
from workbench.data.records import Conversation, Message, Part, Record, Unreadable, parse_time

FORMAT = "claude_ai"
_ROLES = {"human": "user", "user": "user", "assistant": "assistant"}
_ABOUT = ("summary", "updated_at", "is_starred")


def detect(probe: Probe) -> int:
    """By the names that only this export has."""
    return 92 if probe.has_keys("chat_messages", "uuid") else 0


def read(source: Source) -> Iterator[Record]:
    """Yields one conversation after another; a file that is one conversation (not a list) is read as well."""
    yield from read_conversations(source, lambda row, offset, length: _conversation(source, row, offset, length))


def _conversation(source: Source, row: dict[str, Any], offset: int, length: int) -> Iterator[Record]:
    session_id = row_id(row, "uuid")
    #: The message that answers to a uuid come after: its last piece, or its nearest ancestor where it says nothing.
    ends: dict[str, str | None] = {}
    messages: list[Message] = []
    broken: list[Unreadable] = []
    for index, row_message in enumerate(row["chat_messages"]):
        try:
            native_id = known_string(row_message.get("uuid")) or f"#{index}"
            stated = known_string(row_message.get("parent_message_uuid"))
            above = ends.get(stated) if stated else messages[-1].native_id if messages else None
            pieces = list(_messages(session_id, native_id, row_message, above))
        except SHAPE_ERRORS as error:
            broken.append(not_understood(offset, length, row_message, error))
            continue
        for piece in pieces:
            piece.offset, piece.length = offset, length
        if not pieces:
            source.skipped["empty message"] += 1
        messages += pieces
        ends[native_id] = pieces[-1].native_id if pieces else above
    project = row.get("project")
    yield Conversation(
        session_id,
        agent="claude.ai",
        project=known_string(project.get("name")) if isinstance(project, dict) else None,
        title=known_string(row.get("name")),
        model=known_string(row.get("model")),
        active_leaf=ends.get(str(row.get("current_leaf_message_uuid"))),
        started_at=parse_time(row.get("created_at")),
        meta={key: row[key] for key in _ABOUT if known_string(row.get(key)) or isinstance(row.get(key), bool)},
    )
    yield from linked(messages)
    yield from broken


def _messages(session_id: str, native_id: str, row: dict[str, Any], above: str | None) -> Iterator[Message]:
    """One message as runs of parts of the same role."""
    role = _ROLES[row["sender"]]
    created = parse_time(row.get("created_at"))
    runs: list[tuple[str, list[Part]]] = []
    for part in _parts(row):
        speaker = "tool" if part.kind == "tool_result" else role
        if not runs or runs[-1][0] != speaker:
            runs.append((speaker, []))
        runs[-1][1].append(part)
    for number, (speaker, parts) in enumerate(runs):
        piece_id = f"{native_id}/{number}" if number else native_id
        yield Message(session_id, speaker, parts, piece_id, above, created_at=created)
        above = piece_id


def _parts(row: dict[str, Any]) -> Iterator[Part]:
    found = [part for block in row.get("content") or [] for part in _block(block)]
    if not found and row.get("text"):
        found.append(Part("text", as_text(row["text"])))
    yield from found
    for upload in row.get("attachments") or []:
        media = known_string(upload.get("file_type"))
        data = {"media_type": media, "bytes": count(upload.get("file_size"))}
        name = known_string(upload.get("file_name")) or "pasted text"
        yield Part("file", as_text(upload.get("extracted_content")), name=name, data=data)
    for upload in row.get("files") or []:
        name = known_string(upload.get("file_name"))
        is_image = upload.get("file_kind") == "image"
        data = {"media_type": None, "pointer": known_string(upload.get("file_uuid"))}
        yield Part("image" if is_image else "file", name=name, data=data)


def _block(block: dict[str, Any]) -> Iterator[Part]:
    kind = block.get("type")
    if kind in ("text", "voice_note"):
        if block.get("text"):
            yield Part("text", as_text(block["text"]))
    elif kind == "thinking":
        if block.get("thinking"):
            yield Part("thinking", as_text(block["thinking"]))
    elif kind == "tool_use":
        name, call_id = known_string(block.get("name")), known_string(block.get("id"))
        yield Part("tool_call", name=name, call_id=call_id, data=block.get("input"))
    elif kind == "tool_result":
        yield from _result(block)
    elif kind == "image":
        image = block.get("source") or {}
        yield stored_image(image.get("media_type"), image.get("data"))
    elif kind != "token_budget":
        yield Part("event", as_text(block), name=known_string(kind))


def _result(block: dict[str, Any]) -> Iterator[Part]:
    content = block.get("content")
    blocks = content if isinstance(content, list) else []
    texts = [as_text(b.get("text") if b.get("type") == "text" else b) for b in blocks if b.get("type") != "image"]
    failed = block.get("is_error")
    yield Part(
        "tool_result",
        "\n".join(texts) if blocks else as_text(content),
        known_string(block.get("name")),
        known_string(block.get("tool_use_id")),
        is_error=failed if isinstance(failed, bool) else None,
    )
    for image in blocks:
        if image.get("type") == "image":
            yield stored_image((image.get("source") or {}).get("media_type"), (image.get("source") or {}).get("data"))
