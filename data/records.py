"""What an importer yields: the neutral form that every log format is turned into.

A conversation is a tree of messages; a message is an ordered list of parts. Nothing is flattened:
tool calls, tool results, thinking, images and injected context are parts with a kind of their own,
so that `kind == "text"` always means words that this role really said.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

#: What a part can be. `context` is text that the harness injected under the user's or system's name
#: (reminders, environment, command output); `summary` is a compaction summary; `event` is a fact of
#: the session that is no speech (an abort, an error shown to the user).
PART_KINDS = (
    "text", "thinking", "tool_call", "tool_result", "image", "file", "summary", "context", "event",
)  # fmt: skip
ROLES = ("user", "assistant", "system", "tool")


def digest(*fields: str | bytes) -> str:
    """Content hash of the fields in order: 20 hex digits (80 bits) of SHA-256, injective framing."""
    h = hashlib.sha256()
    for f in fields:
        b = f.encode("utf-8", "surrogatepass") if isinstance(f, str) else f
        h.update(b"%d:" % len(b))
        h.update(b)
    return h.hexdigest()[:20]


def valid(text: str) -> str:
    """The text with "?" for each half of a surrogate pair, which no UTF-8 can hold."""
    return text.encode("utf-8", "replace").decode()


def conversation_id(format: str, session_id: str) -> str:
    """The id of a conversation: stable while its log grows, equal wherever the file lies."""
    return digest("conversation", format, session_id)


@dataclass(slots=True)
class Part:
    """One piece of a message.

    Args:
        kind: one of PART_KINDS.
        text: the verbatim words (text, thinking, tool_result, summary, context); "" where there are none.
        name: tool name (tool_call, and tool_result where the log says it), or media type (image, file).
        call_id: joins a tool_call to its tool_result.
        data: JSON-able detail: a tool call's arguments, an image's reference
            ({"media_type", "bytes", "sha256"} or {"url"}), never the image itself.
        is_error: for a tool_result, whether the tool failed; None where the log does not say.
        key: identity of the part inside its message where the log has one (a line's uuid and the
            block's index); only needed for messages with `merge=True`.
    """

    kind: str
    text: str = ""
    name: str | None = None
    call_id: str | None = None
    data: Any = None
    is_error: bool | None = None
    key: str = ""


@dataclass(slots=True)
class Message:
    """One message of a conversation, in the order of the log.

    Args:
        session_id: the log's own session id: which Conversation this belongs to.
        role: one of ROLES. Tool results have role "tool" even where the log files them under "user".
        parts: in order.
        native_id: the log's own id of the message, or "@<byte offset>" / "#<index>" where it has none;
            unique within the session and stable when the log grows.
        parent_id: native_id of the parent where the log is a tree; "" for a root (a first question that was asked
            anew); None = the message before it.
        agent_id: id of the sub-agent that this message belongs to; None for the main thread.
        created_at: microseconds since the epoch, UTC; None where the log does not say. See parse_time.
        offset, length: where the record lies in the source, in bytes.
        merge: True if several records of the log carry pieces of this one message (Claude Code writes a
            line for each block): pieces with the same native_id become one message. False: the same
            native_id with other content is a later revision, and both are kept.
        meta: small JSON-able facts worth keeping (stop reason, effort, git branch …).
    """

    session_id: str
    role: str
    parts: list[Part]
    native_id: str
    parent_id: str | None = None
    agent_id: str | None = None
    created_at: int | None = None
    model: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    tokens_cached: int | None = None
    offset: int = 0
    length: int = 0
    merge: bool = False
    meta: dict[str, Any] | None = None


@dataclass(slots=True)
class Conversation:
    """What is known of a session. May be yielded again when more is known: later values win, None never.

    Args:
        session_id: the log's own session id; where it has none, a digest of the first record.
        agent: which program spoke ("claude-code", "codex", "gemini-cli", "chatgpt" …).
        project: working directory, repository or workspace.
        parent_session_id: the session this one was forked, continued or spawned from.
        active_leaf: native_id of the last message of the branch that is shown; None = the log's last message.
        meta: small JSON-able facts (git branch, version, reward, exit status, tool definitions …).
    """

    session_id: str
    agent: str | None = None
    project: str | None = None
    title: str | None = None
    model: str | None = None
    parent_session_id: str | None = None
    active_leaf: str | None = None
    started_at: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Unreadable:
    """A piece of the source that could not be understood: goes to quarantine, the rest is imported."""

    offset: int
    length: int
    reason: str
    raw: bytes
    #: True for the last, unfinished line of a log that may still be growing: read again next time.
    unfinished: bool = False


@dataclass(slots=True)
class Checkpoint:
    """All conversations yielded so far are whole: the writer may commit, and resume at this offset.

    Args:
        offset: first byte that has not been read; None if this format cannot be resumed inside a file.
    """

    offset: int | None = None


Record = Conversation | Message | Unreadable | Checkpoint


def parse_time(value: Any) -> int | None:
    """Microseconds since the epoch from ISO 8601, or a number of s, ms, µs or ns since the epoch.

    None for anything else, and for moments outside the years 1971 to 2199: a wrong clock is no time.
    """
    if isinstance(value, str):
        # Digits alone are a number before they are a date: 998706187200800000 would be one of the year 9987.
        if value.isdecimal() and (at := parse_time(_number(value))) is not None:
            return at
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            return parse_time(_number(value))
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        since = moment - _EPOCH
        micros = (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
    elif isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        scale = next((scale for limit, *scale in _TIME_SCALES if abs(value) < limit), None)
        if scale is None:
            return None
        times, over = scale
        # A float cannot hold nanoseconds; whole numbers are cut to microseconds, as fromisoformat cuts strings.
        micros = value * times // over if isinstance(value, int) else round(value * times / over)
    else:
        return None
    return micros if 31_536_000_000_000 < micros < 7_258_118_400_000_000 else None


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# A number of seconds stays below 1e11 until the year 5138, one of milliseconds below 1e14, and so on.
_TIME_SCALES = ((10**11, 10**6, 1), (10**14, 1000, 1), (10**17, 1, 1), (10**20, 1, 1000))
