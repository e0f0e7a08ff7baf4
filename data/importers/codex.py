"""Codex CLI session logs: ~/.codex/sessions/YYYY/MM/DD/rollout-<time>-<uuid>.jsonl, in both of their forms.

Since September 2025 a line is {"timestamp", "type", "payload"} and most words stand in it twice: as response_item (what
went over the wire) and as event_msg (what was shown), in either order and close to each other. Whichever comes first
becomes the message and the other is counted as repeated, so that sessions of sub-agents and of older versions, which
hold one kind only, need no rule of their own. Before, lines were bare response items under a bare first line of facts.

Source: no specification is published; fields as seen in logs of versions 0.118 to 0.135. Of the older form no real
file was at hand: it is read as its other readers describe it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from workbench.data.importers._blocks import count, known_string, linked_image
from workbench.data.importers.base import Probe, Source, as_text, read_json_lines
from workbench.data.records import Conversation, Message, Part, Record, digest, parse_time

FORMAT = "codex"

_ENVELOPES = frozenset(("session_meta", "turn_context", "response_item", "event_msg", "compacted"))
_BARE_TYPES = frozenset(("message", "reasoning", "function_call", "function_call_output", "local_shell_call"))
#: How entries begin that the program files under the user's name.
_INJECTED = (
    "<environment_context", "<user_instructions", "<turn_aborted", "<skill", "<subagent_notification",
    "<user_shell_command", "<permissions instructions", "<collaboration_mode", "<INSTRUCTIONS", "<hook_prompt",
    "<apps_instructions", "<plugins_instructions", "<personality_spec", "<model_switch", "<image", "</image",
    "# AGENTS.md instructions", "Warning: The maximum number of unified exec", "Warning: apply_patch was requested",
)  # fmt: skip
_CALLS = frozenset((
    "function_call", "custom_tool_call", "local_shell_call", "web_search_call", "tool_search_call",
    "image_generation_call",
))  # fmt: skip
_OUTPUTS = frozenset(("function_call_output", "custom_tool_call_output", "tool_search_output"))
#: Events that were shown and are no speech.
_SHOWN = frozenset((
    "turn_aborted", "error", "stream_error", "warning", "context_compacted", "thread_rolled_back",
    "entered_review_mode", "exited_review_mode",
))  # fmt: skip
_EXIT_CODE = re.compile(r'(?:Process exited with code|Exit code:) (-?\d+)|"exit_code":\s*(-?\d+)')
_WORKING_FOLDER = re.compile(r"<cwd>([^<\n]+)</cwd>|^Current working directory: ([^\n]+)$", re.MULTILINE)


def detect(probe: Probe) -> int:
    """How surely the content is a Codex log, 0 to 100."""
    best = 0
    for row in probe.lines:
        kind = row.get("type")
        if isinstance(kind, str) and kind in _ENVELOPES and isinstance(row.get("payload"), dict):
            return 96
        if _is_bare_meta(row) or row.get("record_type") == "state":
            best = max(best, 70)
        elif kind in ("function_call", "function_call_output") and "call_id" in row:
            best = max(best, 60)
    if not probe.lines and probe.document == "{" and probe.has_keys("payload", "originator", "cli_version"):
        return 80  # the first line is longer than the probe
    return best


def read(source: Source) -> Iterator[Record]:
    """Streams the log in constant memory."""
    reader = _Reader(source)
    yield from read_json_lines(source, reader.convert)
    yield from reader.left_over()


def _is_bare_meta(row: dict[str, Any]) -> bool:
    is_first = "type" not in row and "timestamp" in row and known_string(row.get("id")) is not None
    return is_first and ("instructions" in row or "git" in row or "cli_version" in row)


class _Reader:
    def __init__(self, source: Source):
        self.skipped = source.skipped
        known = source.session or {}
        state = (known.get("meta") or {}).get("resume") or {}
        self.session_id: str | None = known.get("session_id")
        self.is_announced = False
        self.has_project = bool(state.get("has_project"))
        self.has_parent = bool(state.get("has_parent"))
        self.model: str | None = state.get("model")
        self.spoken: str | None = state.get("spoken")  # native id of the assistant's latest message
        self.before: str | None = state.get("before")  # native id of the latest message
        self.total: int | None = state.get("total")  # of tokens, as last reported
        self.heard = deque((tuple(entry) for entry in state.get("heard") or []), maxlen=16)
        self.turns: deque[str | None] = deque(state.get("turns") or [], maxlen=32)  # what stood before each user turn
        self.next_parent: str | None = state.get("next_parent")

    def left_over(self) -> Iterator[Record]:
        """What a later read of the grown log must know."""
        if self.session_id is None:
            return
        names = ("has_project", "has_parent", "model", "spoken", "before", "total", "next_parent")
        state = {name: getattr(self, name) for name in names}
        resume = {**state, "heard": [list(entry) for entry in self.heard], "turns": list(self.turns)}
        yield Conversation(self.session_id, agent="codex", meta={"resume": resume})

    def convert(self, row: dict[str, Any], offset: int, length: int) -> Iterable[Record]:
        kind, payload = row.get("type"), row.get("payload")
        if not isinstance(payload, dict):
            return self._bare(row, kind, offset, length)
        if kind == "response_item":
            return self._item(row, payload, offset, length)
        if kind == "event_msg":
            return self._event(row, payload, offset, length)
        if kind == "session_meta":
            return self._session_meta(payload, kind)
        if kind == "turn_context":
            return self._turn_context(row, payload)
        if kind == "compacted":
            text = as_text(payload.get("message"))
            if text:
                return self._message(row, "system", [Part("summary", text)], offset, length)
        return self._skip(f"{as_text(kind)[:60]}:{as_text(payload.get('type'))[:60]}".rstrip(":"))

    def _skip(self, name: str) -> list[Record]:
        self.skipped[name] += 1
        return []

    def _bare(self, row: dict[str, Any], kind: Any, offset: int, length: int) -> list[Record]:
        if _is_bare_meta(row):
            return self._session_meta(row, "session_meta")
        if isinstance(kind, str) and (kind in _BARE_TYPES or kind in _CALLS or kind in _OUTPUTS):
            return self._item(row, row, offset, length)
        return self._skip(as_text(row.get("record_type") or kind)[:60] or "record without type")

    # -- facts of the session ---------------------------------------------------------------------------------------

    def _session_meta(self, payload: dict[str, Any], name: str) -> list[Record]:
        """The first names the session; a second one with another id begins the copied history of its parent."""
        session_id = as_text(payload.get("id") or payload.get("session_id"))
        if not session_id:
            raise ValueError("session without id")
        if self.session_id is not None:
            self.skipped[f"{name} repeated"] += 1
            if session_id == self.session_id or self.has_parent:
                return []
            self.has_parent = True
            return [Conversation(self.session_id, agent="codex", parent_session_id=session_id)]
        git, origin = payload.get("git"), payload.get("source")
        facts: dict[str, Any] = {"version": payload.get("cli_version"), "originator": payload.get("originator")}
        if isinstance(git, dict):
            facts |= {"git_branch": git.get("branch"), "git_commit": git.get("commit_hash")}
        spawned = origin.get("subagent") if isinstance(origin, dict) else None
        if isinstance(spawned, dict) and isinstance(spawned.get("thread_spawn"), dict):
            spawned = spawned["thread_spawn"].get("parent_thread_id")
        else:
            spawned = None
        parent = next(
            filter(known_string, (payload.get("forked_from_id"), payload.get("parent_thread_id"), spawned)), None
        )
        project = known_string(payload.get("cwd"))
        self.session_id, self.is_announced = session_id, True
        self.has_parent, self.has_project = parent is not None, project is not None
        self.skipped[name] += 1
        conversation = Conversation(
            session_id,
            agent="codex",
            project=project,
            parent_session_id=parent,
            started_at=parse_time(payload.get("timestamp")),
            meta={fact: value for fact, value in facts.items() if known_string(value)},
        )
        return [conversation]

    def _turn_context(self, row: dict[str, Any], payload: dict[str, Any]) -> list[Record]:
        self.skipped["turn_context"] += 1
        model, cwd = known_string(payload.get("model")), known_string(payload.get("cwd"))
        if model == self.model and (self.has_project or cwd is None):
            return []
        self.model = model or self.model
        project = None if self.has_project else cwd
        self.has_project = self.has_project or cwd is not None
        return [*self._announce(row), Conversation(self._session(row), model=model, project=project)]

    def _session(self, row: dict[str, Any]) -> str:
        if self.session_id is None:
            self.session_id = digest("session", orjson.dumps(row))
        return self.session_id

    def _announce(self, row: dict[str, Any]) -> list[Record]:
        """The Conversation that goes before the first message where the log has not given one."""
        if self.is_announced:
            return []
        self.is_announced = True
        return [Conversation(self._session(row), agent="codex")]

    # -- messages ---------------------------------------------------------------------------------------------------

    def _message(
        self, row: dict[str, Any], role: str, parts: list[Part], offset: int, length: int, item_id: Any = None
    ) -> list[Record]:
        native_id = known_string(item_id) or f"@{offset}"
        is_assistant = role == "assistant"
        if is_assistant:  # token counts follow later, as another piece of the message
            self.spoken = native_id
            for i, part in enumerate(parts):
                part.key = f"{native_id}:{i}"
        elif role == "user" and any(part.kind == "text" or part.kind == "image" for part in parts):
            self.turns.append(self.before)
        message = Message(
            self._session(row),
            role,
            parts,
            native_id,
            parent_id=self.next_parent,
            created_at=parse_time(row.get("timestamp")),
            model=self.model if is_assistant else None,
            offset=offset,
            length=length,
            merge=is_assistant,
        )
        self.before, self.next_parent = native_id, None
        return [message] if self.is_announced else [*self._announce(row), message]

    def _is_repeated(self, stream: str, role: str, texts: list[str]) -> bool:
        """Whether the other stream has brought these words already; if not, they are remembered for it."""
        other = "event" if stream == "item" else "item"
        whole = (other, digest(role, "".join(texts).strip()))
        entries = [whole]
        if len(texts) > 1 and whole not in self.heard:
            entries = [(other, digest(role, text.strip())) for text in texts]
        if all(entry in self.heard for entry in entries):
            for entry in dict.fromkeys(entries):
                self.heard.remove(entry)
            return True
        self.heard.append((stream, whole[1]))
        return False

    def _item(self, row: dict[str, Any], item: dict[str, Any], offset: int, length: int) -> list[Record]:
        kind = item["type"]
        if kind == "message":
            return self._item_message(row, item, offset, length)
        if kind in _CALLS:
            return self._message(row, "assistant", [_call_part(item, kind)], offset, length, item.get("id"))
        if kind in _OUTPUTS:
            return self._message(row, "tool", _output_parts(item), offset, length, item.get("id"))
        if kind == "reasoning":
            blocks = [*(item.get("summary") or []), *(item.get("content") or [])]
            texts = [as_text(block["text"]) for block in blocks]
            if not texts:
                return self._skip("response_item:reasoning encrypted")
            return self._message(
                row, "assistant", [Part("thinking", text) for text in texts], offset, length, item.get("id")
            )
        return self._skip(f"response_item:{as_text(kind)[:60]}")

    def _item_message(self, row: dict[str, Any], item: dict[str, Any], offset: int, length: int) -> list[Record]:
        role, content = item["role"], item["content"]
        if isinstance(content, str):
            content = [{"type": "input_text", "text": content}]
        if role != "user" and role != "assistant":
            parts = [Part("context", part.text) if part.kind == "text" else part for part in map(_part, content)]
            role = "system"
        else:
            parts = [_part(block, role == "user") for block in content]
            texts = [part.text for part in parts if part.kind == "text"]
            has_words = bool(texts) or any(part.kind == "image" for part in parts)
            if has_words and self._is_repeated("item", role, texts):
                return self._skip("response_item:message repeated")
        if not parts:
            return self._skip("response_item:message empty")
        records = self._message(row, role, parts, offset, length, item.get("id"))
        if not self.has_project:
            records.extend(self._project_of(row, parts))
        return records

    def _project_of(self, row: dict[str, Any], parts: list[Part]) -> list[Record]:
        """The working folder from the injected environment: the older form states it nowhere else."""
        texts = (part.text for part in parts if part.text.startswith("<environment_context"))
        found = next(filter(None, map(_WORKING_FOLDER.search, texts)), None)
        if found is None:
            return []
        self.has_project = True
        return [Conversation(self._session(row), project=(found[1] or found[2]).strip())]

    def _event(self, row: dict[str, Any], event: dict[str, Any], offset: int, length: int) -> list[Record]:
        kind = event["type"]
        if kind == "token_count":
            return self._token_count(row, event, offset, length)
        if kind == "user_message" or kind == "agent_message":
            role = "user" if kind == "user_message" else "assistant"
            text, images = as_text(event.get("message")), event.get("images") or []
            if (text or images) and self._is_repeated("event", role, [text] if text else []):
                return self._skip(f"event_msg:{kind} repeated")
            parts = [Part("text", text)] if text else []
            parts.extend(linked_image(url) for url in images)
            if parts:
                return self._message(row, role, parts, offset, length)
        elif isinstance(kind, str) and kind in _SHOWN:
            named = (event.get(name) for name in ("message", "reason", "user_facing_hint", "review_output"))
            text = next((as_text(value) for value in named if value), "")
            detail = {"num_turns": event["num_turns"]} if kind == "thread_rolled_back" else None
            records = self._message(row, "system", [Part("event", text, name=kind, data=detail)], offset, length)
            if detail and isinstance(detail["num_turns"], int) and 0 < detail["num_turns"] <= len(self.turns):
                for _ in range(detail["num_turns"]):  # the next message goes on where the first of these turns began
                    self.next_parent = self.turns.pop()
            return records
        elif kind == "thread_name_updated" and known_string(event.get("thread_name")):
            self.skipped["event_msg:thread_name_updated"] += 1
            return [*self._announce(row), Conversation(self._session(row), title=event["thread_name"])]
        return self._skip(f"event_msg:{as_text(kind)[:60]}")

    def _token_count(self, row: dict[str, Any], event: dict[str, Any], offset: int, length: int) -> list[Record]:
        """Usage of the latest response, as another piece of its last message; input includes what was cached."""
        info = event.get("info")
        if not isinstance(info, dict) or self.spoken is None:
            return self._skip("event_msg:token_count")
        usage, total = info.get("last_token_usage") or {}, (info.get("total_token_usage") or {}).get("total_tokens")
        if count(total) is None or total == self.total:  # sent again for the sake of the rate limits beside it
            return self._skip("event_msg:token_count")
        self.total = total
        piece = Message(
            self._session(row),
            "assistant",
            [],
            self.spoken,
            created_at=parse_time(row.get("timestamp")),
            model=self.model,
            tokens_in=count(usage.get("input_tokens")),
            tokens_out=count(usage.get("output_tokens")),
            tokens_cached=count(usage.get("cached_input_tokens")),
            offset=offset,
            length=length,
            merge=True,
        )
        return [*self._announce(row), piece]


def _part(block: dict[str, Any], is_user: bool = False) -> Part:
    kind = block["type"]
    if kind == "input_text" or kind == "output_text" or kind == "text":
        text = as_text(block["text"])
        is_injected = is_user and text.lstrip().startswith(_INJECTED)
        return Part("context" if is_injected else "text", text)
    if kind == "input_image":
        return linked_image(block.get("image_url"))
    return Part("event", as_text(block), name=as_text(kind))


def _call_part(item: dict[str, Any], kind: str) -> Part:
    name = known_string(item.get("name")) or kind.removesuffix("_call")
    call_id = known_string(item.get("call_id")) or known_string(item.get("id"))
    if kind == "custom_tool_call":
        data: Any = {"input": item["input"]}
    elif kind == "function_call":
        data = _arguments(item["arguments"])
    else:
        data = item.get("action") or item.get("arguments")
        if kind == "image_generation_call":
            data = {"prompt": as_text(item.get("revised_prompt"))}
    return Part("tool_call", name=name, call_id=call_id, data=data)


def _arguments(text: Any) -> Any:
    """A call's arguments: the JSON value where the text is one, else {"arguments": text}."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return {"arguments": text}


def _output_parts(item: dict[str, Any]) -> list[Part]:
    output, call_id, is_error = item.get("output"), known_string(item.get("call_id")), None
    if isinstance(output, dict):
        is_error = output["success"] is False if isinstance(output.get("success"), bool) else None
        output = output.get("content", output)
    if isinstance(output, list):
        parts = [_part(block) for block in output]
        for part in parts:
            part.call_id = call_id
            if part.kind != "image":
                part.kind, part.is_error = "tool_result", is_error
        return parts or [Part("tool_result", call_id=call_id, is_error=is_error)]
    text = as_text(output if output is not None else item.get("tools"))
    if is_error is None:  # head and tail: where the program states it
        found = _EXIT_CODE.search(text[:200]) or (text.startswith("{") and _EXIT_CODE.search(text[-120:]))
        is_error = (found[1] or found[2]) != "0" if found else None
    return [Part("tool_result", text, call_id=call_id, is_error=is_error)]
