"""Chat messages of every dialect as roles and parts: OpenAI, Anthropic, LangChain, GenAI semantic conventions.

Trace formats store whatever the traced program sent to its model, so one file holds several dialects. All of them
are a message with a role and blocks of content; they differ in the names, which this module knows.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterator
from typing import Any

import orjson

from workbench.data.importers.base import as_text
from workbench.data.records import Part, digest

#: What the dialects call the roles, LangChain's class names included.
ROLE_NAMES = {
    "user": "user", "human": "user", "HumanMessage": "user", "HumanMessageChunk": "user",
    "assistant": "assistant", "ai": "assistant", "model": "assistant", "agent": "assistant",
    "AIMessage": "assistant", "AIMessageChunk": "assistant", "AIMessageChunkMessage": "assistant",
    "system": "system", "developer": "system", "SystemMessage": "system",
    "tool": "tool", "function": "tool", "ToolMessage": "tool", "FunctionMessage": "tool",
}  # fmt: skip
TEXT_BLOCKS = frozenset({"text", "input_text", "output_text", "summary_text", "refusal", "TextContent"})
THINKING_BLOCKS = frozenset({"thinking", "reasoning", "reasoning_content", "redacted_thinking", "reasoning_text"})
CALL_BLOCKS = frozenset({
    "tool_call", "tool_use", "function_call", "server_tool_use", "server_tool_call", "custom_tool_call",
})  # fmt: skip
RESULT_BLOCKS = frozenset({
    "tool_result", "tool_call_response", "tool_response", "function_call_output", "custom_tool_call_output",
    "web_search_tool_result", "code_execution_tool_result", "server_tool_call_response",
})  # fmt: skip
#: Blocks of Amazon's Converse, which have their type as their only key.
_CONVERSE = {"toolUse": "tool_use", "toolResult": "tool_result", "reasoningContent": "reasoning"}
#: A dictionary without a role is a message if it has one of these; else it is kept whole, as JSON.
MESSAGE_KEYS = frozenset({"content", "parts", "tool_calls", "toolCalls", "function_call", "reasoning_content"})
MEDIA_BLOCKS = frozenset({"image", "image_url", "input_image", "blob", "uri", "file", "input_file", "media", "audio"})


def first(row: dict[str, Any], *keys: str) -> Any:
    """The value of the first key that is there and is not None."""
    for key in keys:
        value = row.get(key)
        if value is not None:
            return value
    return None


def loads_or_same(value: Any) -> Any:
    """What a string that holds a JSON object or array means; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError:
            return value
    return value


def count_or_none(value: Any) -> int | None:
    """A token count: an int in the range of the store, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63 else None


def token_counts(usage: Any) -> tuple[int | None, int | None, int | None]:
    """(input, output, cached input) tokens of a usage object of any provider."""
    if not isinstance(usage, dict):
        return None, None, None
    details = first(usage, "prompt_tokens_details", "input_tokens_details", "input_token_details")
    details = details if isinstance(details, dict) else {}
    cached = first(usage, "cache_read_input_tokens", "cache_read_tokens", "cached_tokens", "input_cached_tokens")
    return (
        count_or_none(first(usage, "prompt_tokens", "input_tokens", "promptTokens", "inputTokens", "input")),
        count_or_none(first(usage, "completion_tokens", "output_tokens", "completionTokens", "outputTokens", "output")),
        count_or_none(cached if cached is not None else first(details, "cached_tokens", "cache_read")),
    )


def media_part(block: dict[str, Any]) -> Part:
    """An image or file as a reference: its address, or its size and hash where the bytes are inside the log."""
    source = block.get("source")
    inner = source if isinstance(source, dict) else block
    media = first(inner, "media_type", "mime_type", "mimeType", "mediaType")
    where = first(inner, "url", "image_url", "uri", "path", "file_id", "data", "content", "image", "file", "audio")
    for _ in range(3):
        if not isinstance(where, dict):
            break
        media = media or where.get("media_type")
        where = first(where, "url", "uri", "file_id", "data", "file_data", "image")
    media = media if isinstance(media, str) else None
    kind = "file" if "file" in str(block.get("type")) or block.get("modality") not in (None, "image") else "image"
    if not isinstance(where, str):
        return Part(kind, name=media, data={"url": None})
    encoded = where if any(isinstance(inner.get(key), str) for key in ("data", "content")) else None
    if where.startswith("data:"):
        header, _, encoded = where.partition(",")
        media = media or header[5:].partition(";")[0] or None
    if encoded is None:
        return Part(kind, name=media, data={"url": where})
    try:
        raw = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raw = encoded.encode("utf-8", "surrogatepass")
    reference = {"media_type": media, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    return Part(kind, name=media, data=reference)


def _string_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def call_part(call: dict[str, Any]) -> Part:
    """A tool call: {function{name, arguments}}, {name, args|arguments|input} or {toolName, args}, with its id."""
    function = call.get("function")
    inner = function if isinstance(function, dict) else call
    name = first(inner, "name", "toolName", "tool_name", "function_name")
    data = loads_or_same(first(inner, "arguments", "args", "input", "parameters", "server_tool_call"))
    call_id = first(call, "call_id", "tool_call_id", "id", "toolCallId", "toolUseId")
    return Part("tool_call", name=_string_or_none(name), call_id=_string_or_none(call_id), data=data)


def result_parts(block: dict[str, Any]) -> list[Part]:
    """A tool result, and after it the images that it holds."""
    value = first(block, "content", "response", "result", "output", "text", "server_tool_call_response")
    if isinstance(value, dict) and value.keys() == {"type", "value"}:  # as Vercel's AI SDK wraps it
        value = value["value"]
    inside = parts_of(value) if isinstance(value, list) else []
    text = "\n".join(p.text for p in inside if p.kind != "image") if isinstance(value, list) else as_text(value)
    call_id = first(block, "tool_use_id", "tool_call_id", "call_id", "id", "toolCallId", "callId", "toolUseId")
    name = first(block, "name", "toolName")
    failed = block.get("is_error")
    if failed is None and block.get("status") == "error":
        failed = True
    result = Part(
        "tool_result", text, _string_or_none(name), _string_or_none(call_id),
        is_error=failed if isinstance(failed, bool) else None,
    )  # fmt: skip
    return [result, *(p for p in inside if p.kind == "image")]


def block_parts(block: Any) -> list[Part]:
    """The parts of one block of content. A block of unknown type is kept as an event with its JSON."""
    if isinstance(block, str):
        return [Part("text", block)] if block else []
    if not isinstance(block, dict):
        return [Part("event", as_text(block))]
    if len(block) == 1 and (key := next(iter(block))) in _CONVERSE and isinstance(block[key], dict):
        block = {"type": _CONVERSE[key], **block[key]}
    kind = block.get("type")
    kind = kind.replace("-", "_") if isinstance(kind, str) else "text" if isinstance(block.get("text"), str) else ""
    if kind in TEXT_BLOCKS:
        text = as_text(first(block, "text", "content", "refusal"))
        return [Part("text", text)] if text else []
    if kind in THINKING_BLOCKS:
        value = first(
            block, "thinking", "reasoning", "reasoning_content", "reasoningText", "text", "content", "summary"
        )
        text = "\n".join(p.text for p in parts_of(value))
        return [Part("thinking", text)] if text else []
    if kind in CALL_BLOCKS:
        return [call_part(block)]
    if kind in RESULT_BLOCKS:
        return result_parts(block)
    if kind in MEDIA_BLOCKS:
        return [media_part(block)]
    return [Part("event", as_text(block), name=kind or None)]


def parts_of(content: Any) -> list[Part]:
    """The parts of a message's content: a string, a list of blocks, or one block."""
    if isinstance(content, list):
        return [part for block in content for part in block_parts(block)]
    return [] if content is None else block_parts(content)


def _unwrap(message: Any, default_role: str) -> tuple[str, dict[str, Any]]:
    """(role, fields) of a message; LangChain's three ways of wrapping one are taken off."""
    if isinstance(message, list | tuple) and len(message) == 2 and message[0] in ROLE_NAMES:
        message = {"role": message[0], "content": message[1]}
    if not isinstance(message, dict):
        return default_role, {"content": message}
    kind = message.get("type")
    role = message.get("role")
    inner = message
    if isinstance(message.get("kwargs"), dict) and isinstance(message.get("id"), list):
        inner = message["kwargs"]
        kind = message["id"][-1] if message["id"] else None
        role = inner.get("role")
    elif isinstance(message.get("data"), dict) and isinstance(kind, str) and kind in ROLE_NAMES:
        inner = message["data"]
    for name in (role, kind):
        if isinstance(name, str) and name in ROLE_NAMES:
            return ROLE_NAMES[name], inner
    if isinstance(kind, str) and kind.replace("-", "_") in CALL_BLOCKS | THINKING_BLOCKS:
        return "assistant", {"content": [message]}
    if isinstance(kind, str) and kind.replace("-", "_") in RESULT_BLOCKS | TEXT_BLOCKS | MEDIA_BLOCKS:
        return default_role, {"content": [message]}
    if inner is message and not message.keys() & MESSAGE_KEYS:
        return default_role, {"content": message}
    return default_role, inner


def _fields_parts(inner: dict[str, Any]) -> Iterator[Part]:
    """The parts of a message's fields: reasoning, content, parts, tool calls (those not among the blocks already)."""
    extra = inner.get("additional_kwargs")
    extra = extra if isinstance(extra, dict) else {}
    thinking = first(inner, "reasoning_content", "reasoning") or extra.get("reasoning_content")
    if isinstance(thinking, str) and thinking:
        yield Part("thinking", thinking)
    known = set()
    for part in [*parts_of(inner.get("content")), *parts_of(inner.get("parts"))]:
        if part.kind == "tool_call":
            known.add(part.call_id)
        yield part
    calls = first(inner, "tool_calls", "toolCalls") or extra.get("tool_calls")
    if isinstance(inner.get("function_call"), dict):
        calls = [inner["function_call"]]
    for call in calls if isinstance(calls, list) else [] if calls is None else [calls]:
        if not isinstance(call, dict):
            yield Part("event", as_text(call), name="tool_call")
            continue
        part = call_part(call)
        if part.call_id is None or part.call_id not in known:
            yield part


def chat_messages(message: Any, default_role: str = "user") -> list[tuple[str, list[Part]]]:
    """One message of any dialect as (role, parts). Tool results become messages of their own, but for those of
    calls of the same message: the model's provider ran them between the assistant's words."""
    role, inner = _unwrap(message, default_role)
    parts = list(_fields_parts(inner))
    if role == "tool" and not any(p.kind == "tool_result" for p in parts):
        parts = result_parts({**inner, "content": first(inner, "content", "parts")})
    called = {part.call_id for part in parts if part.kind == "tool_call"}
    found: list[tuple[str, list[Part]]] = []
    rest: list[Part] = []
    for part in parts:
        if part.kind == "tool_result" and (part.call_id is None or part.call_id not in called):
            found.append(("tool", [part]))
        elif found and role == "tool":
            found[-1][1].append(part)
        else:
            rest.append(part)
    if rest:
        found.append((role, rest))
    return found


def chat_list(value: Any, default_role: str = "user") -> list[tuple[str, list[Part]]]:
    """A list of messages (or one of them) as (role, parts); neighbouring blocks that are no messages are joined."""
    rows = value if isinstance(value, list) else [] if value is None or value == "" else [value]
    found: list[tuple[str, list[Part]]] = []
    was_block = False
    for row in rows:
        # An item of the Responses API (a message among them has a role), or a block of content.
        is_item = isinstance(row, dict) and (row.get("type") == "message" or "role" not in row)
        is_block = is_item and "kwargs" not in row and "type" in row
        for role, parts in chat_messages(row, default_role):
            if is_block and was_block and role == "assistant" and found and found[-1][0] == role:
                found[-1][1].extend(parts)
            else:
                found.append((role, parts))
        was_block = is_block
    return found


def content_digest(role: str, parts: list[Part]) -> str:
    """Hash of what a message says, without what repetitions lose or change: ids, thinking, outer white space."""
    said = [part for part in parts if part.kind != "thinking"] or parts
    fields = [role]
    for part in said:
        data = b"" if part.data is None else orjson.dumps(part.data, option=orjson.OPT_SORT_KEYS)
        fields += [part.kind, part.text.strip(), part.name or "" if part.kind == "tool_call" else "", data.decode()]
    return digest(*fields)
