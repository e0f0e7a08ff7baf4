"""ShareGPT rows: {"conversations": [{"from": "human", "value": …}]}, with LLaMA-Factory's tools, system and images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import orjson

from workbench.data.importers._blocks import known_string, linked_image
from workbench.data.importers._conversations import read_conversations, row_id
from workbench.data.importers.base import Probe, Source, as_text
from workbench.data.records import Conversation, Message, Part, Record, parse_time

FORMAT = "sharegpt"
_LISTS = ("conversations", "conversation", "items")
_ROLES = {
    "human": "user", "user": "user", "prompter": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "function_call": "assistant", "tool_call": "assistant",
    "system": "system",
    "tool": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool", "function": "tool",
}  # fmt: skip
_CALLS = frozenset({"function_call", "tool_call"})
_TURN = re.compile(rb'"(?:conversations|conversation|items)"\s*:\s*\[\s*\{(?:[^{}]*?,)?\s*"from"\s*:')
#: A placeholder in the text, and the member of the row that lists what it stands for.
_MEDIA = {"<image>": "images", "<video>": "videos", "<audio>": "audios"}


def detect(probe: Probe) -> int:
    """By a list of turns with `from`."""
    return 88 if _TURN.search(probe.head) and probe.has_keys("from", "value") else 0


def read(source: Source) -> Iterator[Record]:
    """Yields one conversation for each row; resumes JSON lines after any of them."""
    yield from read_conversations(source, lambda row, offset, length: _conversation(source, row, offset, length))


def _conversation(source: Source, row: dict[str, Any], offset: int, length: int) -> Iterator[Record]:
    turns = next((row[key] for key in _LISTS if isinstance(row.get(key), list)), None)
    if turns is None:
        raise ValueError("a row without a list of conversations")
    session_id, name = row_id(row, "id"), row.get("id")
    tools = row.get("tools")
    meta: dict[str, Any] = {"tools": _loads(tools)} if tools else {}
    if name is not None and name != session_id:
        meta["id"] = name
    yield Conversation(
        session_id,
        agent="sharegpt",
        title=known_string(row.get("title")),
        model=known_string(row.get("model")),
        started_at=parse_time(row.get("created_at")),
        meta=meta,
    )
    media = {token: list(row[key]) for token, key in _MEDIA.items() if isinstance(row.get(key), list)}
    messages: list[Message] = []
    if known_string(row.get("system")):
        messages.append(Message(session_id, "system", [Part("context", row["system"])], "#system"))
    for index, turn in enumerate(turns):
        speaker = turn.get("from", turn.get("role"))
        if speaker not in _ROLES:
            raise ValueError(f"unknown speaker {as_text(speaker)[:80]}")
        role = _ROLES[speaker]
        text = as_text(turn["value"] if "value" in turn else turn["content"])
        parts = [_part(speaker, role, text)] if text else []
        parts += [_linked(token, media[token].pop(0)) for token in _tokens(text, media) if media[token]]
        if parts:
            weight = turn.get("weight", turn.get("loss"))
            about = None if weight is None else {"weight": weight}
            messages.append(Message(session_id, role, parts, f"#{index}", meta=about))
        else:
            source.skipped["empty message"] += 1
    for message in messages:
        message.offset, message.length = offset, length
    yield from messages


def _tokens(text: str, media: dict[str, list[Any]]) -> list[str]:
    return re.findall("<image>|<video>|<audio>", text) if media and "<" in text else []


def _linked(token: str, where: Any) -> Part:
    part = linked_image(where)
    if token != "<image>":
        part.kind = "file"
    return part


def _part(speaker: str, role: str, text: str) -> Part:
    if speaker in _CALLS:
        call = _loads(text)
        if isinstance(call, dict) and isinstance(call.get("name"), str):
            arguments = _loads(call.get("arguments", call.get("parameters")))
            return Part("tool_call", name=call["name"], data={"input": arguments} if _is_raw(arguments) else arguments)
        return Part("tool_call", data={"input": call})
    if role == "tool":
        return Part("tool_result", text)
    return Part("context" if role == "system" else "text", text)


def _is_raw(arguments: Any) -> bool:
    return isinstance(arguments, str)


def _loads(value: Any) -> Any:
    """What a string that holds JSON means; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        return value
