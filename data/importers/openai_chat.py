"""Chat messages in OpenAI's form: fine-tuning rows, Batch requests and responses, Responses items, tau-bench results.

A row is a conversation: a JSON line, an element of an array, or a whole document.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from workbench.data.importers._blocks import known_string
from workbench.data.importers._chat_parts import chat_list, chat_messages, token_counts
from workbench.data.importers._conversations import read_conversations, row_id
from workbench.data.importers.base import Probe, Source, as_text
from workbench.data.records import Conversation, Message, Part, Record, parse_time

FORMAT = "openai_chat"
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_LIST = re.compile(rb'"(?:messages|traj)"\s*:\s*\[\s*\{(?:\s*"(?:content|name)"\s*:[^{}]*?,)?\s*"role"\s*:')
#: Names that traces and trajectories of other formats have beside their messages.
_OTHERS = frozenset({
    "trajectory_format", "trajectory", "history", "run_type", "sessionId", "instance_id", "uuid", "mapping",
    "traceId", "trace_id", "spans", "observations", "conversations", "instance_cost",
})  # fmt: skip
_KEPT = ("task_id", "trial", "reward", "info", "tools", "functions", "metadata", "custom_id", "parallel_tool_calls")


def detect(probe: Probe) -> int:
    """By rows with a list of messages that have roles; by custom_id for Batch files."""
    rows = probe.lines or [row for row in [probe.whole] if isinstance(row, dict)]
    for row in rows:
        if _OTHERS & row.keys():
            continue
        if "custom_id" in row and ("body" in row or "response" in row):
            return 85
        messages = row.get("traj", row.get("messages"))
        if isinstance(messages, list) and messages and all(_is_message(m) for m in messages[:3]):
            return 80 if "traj" in row else 60
    if rows or not _LIST.search(probe.head) or any(b'"%s"' % name.encode() in probe.head for name in _OTHERS):
        return 0
    return 55


def _is_message(value: Any) -> bool:
    role = value.get("role") if isinstance(value, dict) else None
    return isinstance(role, str) and role in _ROLES and "timestamp" not in value


def read(source: Source) -> Iterator[Record]:
    """Yields one conversation for each row; resumes JSON lines after any of them."""
    yield from read_conversations(source, lambda row, offset, length: _conversation(source, row, offset, length))


def _conversation(source: Source, row: dict[str, Any], offset: int, length: int) -> Iterator[Record]:
    response = row.get("response") if isinstance(row.get("response"), dict) else None
    body = row.get("body") or (response or {}).get("body") or row
    said, error = _said(body), row.get("error")
    if said is None and not error:
        raise ValueError("a row without messages")
    session_id = row_id(row, "id", "conversation_id", "session_id")
    meta = {key: row[key] for key in _KEPT if row.get(key) not in (None, [], {})}
    if body is not row:
        meta |= {key: body[key] for key in ("tools", "metadata") if body.get(key)}
    name = known_string(row.get("id"))
    model = known_string(body.get("model")) or known_string(row.get("model"))
    yield Conversation(
        session_id,
        agent=known_string(row.get("agent")) or ("tau-bench" if "traj" in row else "openai-chat"),
        title=known_string(row.get("title")),
        model=model,
        started_at=next(
            filter(None, (parse_time(body.get(key)) for key in ("created", "created_at", "timestamp"))), None
        ),
        meta={**meta, **({"id": name} if name and name != session_id else {})},
    )
    messages = list(_messages(session_id, said or [], model))
    if error:
        messages.append(
            Message(session_id, "system", [Part("event", as_text(error), name="error")], f"#{len(messages)}")
        )
    if not messages:
        source.skipped["empty conversation"] += 1
        return
    if body.get("choices") or body.get("output"):
        last = messages[-1]
        last.tokens_in, last.tokens_out, last.tokens_cached = token_counts(body.get("usage"))
    for message in messages:
        message.offset, message.length = offset, length
    yield from messages


def _said(body: dict[str, Any]) -> list[Any] | None:
    """The messages of a row, request or response, in any of the shapes; None where it has none of them."""
    for key in ("messages", "traj"):
        if key in body:
            return _list(body[key])
    if isinstance(body.get("choices"), list):
        return [choice["message"] for choice in body["choices"]]
    if "input" not in body and "output" not in body:
        return None
    asked = body.get("input")
    before = [{"role": "system", "content": body["instructions"]}] if known_string(body.get("instructions")) else []
    asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else _list(asked or [])
    return before + asked + _list(body.get("output") or [])


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("messages that are no list")
    return value


def _messages(session_id: str, said: list[Any], model: str | None) -> Iterator[Message]:
    tools: dict[str | None, str | None] = {}
    number = 0
    for row in said:
        content = row.get("content")
        role = row.get("role")
        meta = {"weight": row["weight"]} if row.get("weight") is not None else None
        if isinstance(content, str) and content and role in ("user", "assistant") and _is_plain(row):
            spoken = [(role, [Part("text", content)])]
        elif "role" in row:
            if role not in _ROLES:
                raise ValueError(f"unknown role {as_text(role)[:80]}")
            spoken = chat_messages(row)
        else:
            spoken = chat_list([row], "assistant")
        for speaker, parts in spoken:
            for part in parts:
                _finish(part, speaker, tools)
            speaker_model = model if speaker == "assistant" else None
            yield Message(session_id, speaker, parts, f"#{number}", model=speaker_model, meta=meta)
            number += 1


def _is_plain(row: dict[str, Any]) -> bool:
    """Whether a message is nothing but a role and its words: the common case, kept fast."""
    return len(row) == 2 or not (row.keys() - {"role", "content", "name", "weight"})


def _finish(part: Part, speaker: str, tools: dict[str | None, str | None]) -> None:
    """System text is context; arguments are an object; a result has the name of the call that it answers."""
    if part.kind == "text" and speaker == "system":
        part.kind = "context"
    elif part.kind == "tool_call":
        tools[part.call_id] = part.name
        if isinstance(part.data, str):
            part.data = {"input": part.data}
    elif part.kind == "tool_result" and part.name is None and part.call_id is not None:
        part.name = tools.get(part.call_id)
