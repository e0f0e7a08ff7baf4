"""ChatGPT data export: conversations.json (or conversations-NNN.json), a list of trees of messages.

Every branch is read; `active_leaf` is the export's current_node. Nodes without words are no messages: their children
hang on the nearest ancestor that is one, and "" stands for the parent of a root beside the first one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from workbench.data.importers._blocks import count, known_string
from workbench.data.importers._conversations import linked, read_conversations, row_id
from workbench.data.importers._members import not_understood
from workbench.data.importers.base import SHAPE_ERRORS, Probe, Source, as_text
from workbench.data.records import Conversation, Message, Part, Record, Unreadable, parse_time

FORMAT = "chatgpt"
_POINTERS = {
    "image_asset_pointer": "image",
    "audio_asset_pointer": "file",
    "video_container_asset_pointer": "file",
    "real_time_user_audio_video_asset_pointer": "file",
}
_ABOUT = ("gizmo_id", "is_archived", "is_starred", "conversation_origin", "update_time")
_SPOKEN = frozenset({"user", "assistant"})


def detect(probe: Probe) -> int:
    """By the mapping of nodes and the names of a message's fields."""
    return 90 if probe.has_keys("mapping", "author", "content_type", "create_time") else 0


def read(source: Source) -> Iterator[Record]:
    """Yields one conversation after another; a file that is one conversation (not a list) is read as well."""
    yield from read_conversations(source, lambda row, offset, length: _conversation(source, row, offset, length))


def _conversation(source: Source, row: dict[str, Any], offset: int, length: int) -> Iterator[Record]:
    nodes = row["mapping"]
    session_id = row_id(row, "conversation_id", "id")
    messages: dict[str, Message] = {}
    nearest: dict[str | None, str | None] = {None: None}
    broken: list[Unreadable] = []
    for node_id in _in_order(nodes):
        node = nodes[node_id]
        above = nearest.get(_parent(nodes, node))
        nearest[node_id] = above
        try:
            message = _message(source, session_id, node_id, node)
        except SHAPE_ERRORS as error:
            broken.append(not_understood(offset, length, node, error))
            continue
        if message is not None:
            message.parent_id, message.offset, message.length = above, offset, length
            messages[node_id] = message
            nearest[node_id] = node_id
    current = row.get("current_node")
    yield Conversation(
        session_id,
        agent="chatgpt",
        title=known_string(row.get("title")),
        model=known_string(row.get("default_model_slug")),
        active_leaf=nearest.get(current) if isinstance(current, str) else None,
        started_at=parse_time(row.get("create_time")),
        meta={key: row[key] for key in _ABOUT if isinstance(row.get(key), str | int | float)},
    )
    yield from linked(list(messages.values()))
    yield from broken


def _parent(nodes: dict[str, Any], node: Any) -> str | None:
    parent = node.get("parent") if isinstance(node, dict) else None
    return parent if isinstance(parent, str) and parent in nodes else None


def _in_order(nodes: dict[str, Any]) -> Iterator[str]:
    """All node ids, parents before children and a branch before its next sibling; those in a cycle come last."""
    children: dict[str | None, list[str]] = {}
    for node_id, node in nodes.items():
        children.setdefault(_parent(nodes, node), []).append(node_id)
    rest = dict.fromkeys(nodes)
    stack = children.get(None, [])[::-1]
    while stack:
        node_id = stack.pop()
        del rest[node_id]
        yield node_id
        stack.extend(reversed(children.get(node_id, [])))
    yield from rest


def _message(source: Source, session_id: str, node_id: str, node: dict[str, Any]) -> Message | None:
    """The message of a node without its parent; None (and counted) where it says nothing."""
    message = node.get("message")
    if message is None:
        source.skipped["empty node"] += 1
        return None
    metadata = message.get("metadata") or {}
    role = message["author"]["role"]
    is_hidden = metadata.get("is_visually_hidden_from_conversation") is True
    parts = list(_parts(message, role))
    parts += _attachments(metadata, parts)
    if not parts:
        source.skipped["hidden node" if is_hidden else "empty node"] += 1
        return None
    if role not in _SPOKEN and role != "tool":
        role = "system"
    if is_hidden or role == "system":
        parts = [Part("context", p.text, p.name) if p.kind == "text" else p for p in parts]
    meta = {"status": message.get("status"), "channel": message.get("channel"), "weight": message.get("weight")}
    meta = {key: value for key, value in meta.items() if value not in (None, 1, 1.0, "finished_successfully")}
    return Message(
        session_id,
        role,
        parts,
        node_id,
        created_at=parse_time(message.get("create_time")),
        model=known_string(metadata.get("model_slug")) if role == "assistant" else None,
        meta={**meta, **({"hidden": True} if is_hidden else {})} or None,
    )


def _parts(message: dict[str, Any], role: str) -> Iterator[Part]:
    content, name = message.get("content") or {}, known_string(message["author"].get("name"))
    kind, recipient = content.get("content_type"), message.get("recipient")
    parts = list(_content(content, kind))
    if role == "tool":
        failed = True if kind == "system_error" else None
        for part in parts:
            is_words = part.kind == "text"
            yield Part("tool_result", part.text, name, data=part.data, is_error=failed) if is_words else part
    elif role == "assistant" and isinstance(recipient, str) and recipient not in ("", "all"):
        for part in parts:
            yield _call(part.text, recipient) if part.kind == "text" else part
    else:
        yield from parts


def _call(text: str, tool: str) -> Part:
    """A message addressed to a tool; arguments that are JSON are kept as such, code as {"input": code}."""
    try:
        arguments = orjson.loads(text)
    except orjson.JSONDecodeError:
        arguments = None
    return Part("tool_call", name=tool, data=arguments if isinstance(arguments, dict) else {"input": text})


def _content(content: dict[str, Any], kind: Any) -> Iterator[Part]:
    """The parts of a content object; words of any kind come as text."""
    if kind == "thoughts":
        for thought in content.get("thoughts") or []:
            text = "\n".join(filter(None, (as_text(thought.get("summary")), as_text(thought.get("content")))))
            if text:
                yield Part("thinking", text)
    elif kind == "reasoning_recap":
        yield Part("event", as_text(content.get("content")), name=kind)
    elif kind == "user_editable_context":
        for key in ("user_profile", "user_instructions"):
            if content.get(key):
                yield Part("context", as_text(content[key]), name=key)
    elif isinstance(content.get("parts"), list):
        for piece in content["parts"]:
            yield from _piece(piece)
    else:
        words = [content.get(key) for key in ("title", "text", "result", "summary")]
        text = "\n".join(as_text(word) for word in words if word)
        address = {"url": content["url"]} if known_string(content.get("url")) else None
        if text or address:
            yield Part("text", text, data=address)
        elif content.keys() - {"content_type", "language", "response_format_name", "text", "result", "summary"}:
            yield Part("event", as_text(content), name=known_string(kind))


def _piece(piece: Any) -> Iterator[Part]:
    """One of `parts`: words, a transcription, or a pointer to an image, sound or file."""
    if isinstance(piece, str):
        if piece:
            yield Part("text", piece)
        return
    kind = piece.get("content_type")
    if kind == "audio_transcription":
        yield Part("text", as_text(piece.get("text")))
    elif kind in _POINTERS:
        data = {key: piece.get(key) for key in ("width", "height") if count(piece.get(key))}
        pointer = piece.get("asset_pointer") or piece.get("audio_asset_pointer") or piece
        data |= {"media_type": None, "pointer": as_text(pointer), "bytes": count(piece.get("size_bytes"))}
        yield Part(_POINTERS[kind], data=data)
    elif isinstance(piece.get("text"), str):
        yield Part("text", piece["text"])
    else:
        yield Part("event", as_text(piece), name=known_string(kind))


def _attachments(metadata: dict[str, Any], parts: list[Part]) -> list[Part]:
    """The uploads that are not among the parts already."""
    pointers = " ".join(as_text(part.data.get("pointer")) for part in parts if isinstance(part.data, dict))
    found = []
    for upload in metadata.get("attachments") or []:
        upload_id = known_string(upload.get("id"))
        if upload_id and upload_id in pointers:
            continue
        media = known_string(upload.get("mime_type")) or known_string(upload.get("mimeType"))
        data = {"media_type": media, "pointer": upload_id, "bytes": count(upload.get("size"))}
        is_image = media is not None and media.startswith("image/")
        found.append(Part("image" if is_image else "file", name=known_string(upload.get("name")) or media, data=data))
    return found
