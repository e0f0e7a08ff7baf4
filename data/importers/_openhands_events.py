"""OpenHands events as messages: V0 (action / observation) and V1 of the SDK (`kind`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from workbench.data.importers._chat_parts import (
    call_part,
    chat_messages,
    first,
    media_part,
    parts_of,
    token_counts,
)
from workbench.data.importers.base import Source, as_text
from workbench.data.importers.json_stream import Member
from workbench.data.records import Message, Part, parse_time

#: V0 events about the state of the agent, and those that only announce the next one.
_STATE = frozenset({
    "agent_state_changed", "change_agent_state", "null", "condensation_request", "pause", "resume", "stop", "start",
    "initialize", "recall", "loop_recovery", "user_rejected",
})  # fmt: skip
#: Arguments of V0 actions that say nothing about the call.
_NOISE = frozenset({
    "thought", "hidden", "blocking", "confirmation_state", "security_risk", "is_static", "impl_source",
    "translated_ipython_code",
})  # fmt: skip
_V1_STATE = frozenset({
    "ConversationStateUpdateEvent", "CondensationRequest", "PauseEvent", "LLMCompletionLogEvent", "TokenEvent",
    "StreamingDeltaEvent", "ServerErrorEvent",
})  # fmt: skip


class Events:
    """The events of one conversation, in order: remembers what later events refer to.

    Args:
        source: where skipped events are counted.
        session_id: of the conversation.
    """

    def __init__(self, source: Source, session_id: str) -> None:
        self.source = source
        self.session_id = session_id
        self.calls: dict[str, tuple[str, str]] = {}  # event id -> call id, tool
        self.counted: set[str] = set()  # responses whose tokens were counted
        self.delegates: list[tuple[str, str]] = []  # (event id of the delegation, agent) that run now
        self.num_events = 0

    def messages(self, event: Any, member: Member) -> list[Message]:
        """The message of an event, or none; an event that is no speech is counted. Raises SHAPE_ERRORS."""
        if not isinstance(event, dict):
            raise TypeError(f"an event is an object, not {type(event).__name__}")
        event_id = event.get("id")
        if isinstance(event_id, bool) or not isinstance(event_id, int | str):
            event_id = f"#{self.num_events}"
        self.num_events += 1
        message = Message(
            self.session_id, "assistant", [], str(event_id), created_at=parse_time(event.get("timestamp")),
            offset=member.offset, length=member.length,
        )  # fmt: skip
        if isinstance(event.get("action"), str):
            name = event["action"]
            message.agent_id = self.delegates[-1][1] if self.delegates else None
            self._v0_action(name, event, message)
        elif isinstance(event.get("observation"), str):
            name = event["observation"]
            if name == "delegate" and self.delegates:
                self.delegates.pop()
            message.agent_id = self.delegates[-1][1] if self.delegates else None
            self._v0_observation(name, event, message)
        elif isinstance(event.get("kind"), str):
            name = event["kind"]
            message.parts = list(self._v1(name, event, message))
        else:
            raise TypeError("an event has action, observation or kind")
        if not message.parts:
            self.source.skipped[f"{name[:40]} event"] += 1
            return []
        return [message]

    def _v0_action(self, name: str, event: dict[str, Any], message: Message) -> None:
        args = event.get("args")
        args = args if isinstance(args, dict) else {}
        by_user = event.get("source") == "user"
        message.role = "user" if by_user else "assistant"
        content = args.get("content")
        if name in _STATE:
            return
        if name == "system":
            message.role = "system"
            message.parts = parts_of(content)
        elif name == "message":
            message.parts = parts_of(content if content is not None else event.get("message"))
            message.parts += _images(args.get("image_urls") or args.get("images_urls"))
        elif name == "condensation":
            message.role = "system"
            message.parts = [Part("summary", as_text(args["summary"]))] if args.get("summary") else []
        else:
            message.parts = self._v0_call(name, event, args, message.native_id)
        if not by_user and message.role == "assistant":
            self._v0_usage(event, message)
        if name == "delegate":
            self.delegates.append((message.native_id, f"{as_text(args.get('agent')) or 'agent'}-{message.native_id}"))

    def _v0_call(self, name: str, event: dict[str, Any], args: dict[str, Any], event_id: str) -> list[Part]:
        """Reasoning, thought and tool call of an action that does something."""
        call = event.get("tool_call_metadata")
        call = call if isinstance(call, dict) else {}
        tool = first(call, "function_name")
        call_id = first(call, "tool_call_id")
        tool = tool if isinstance(tool, str) else name
        call_id = call_id if isinstance(call_id, str) else f"event-{event_id}"
        self.calls[event_id] = (call_id, tool)
        data = {key: value for key, value in args.items() if key not in _NOISE and value not in (None, "")}
        reasoning = _v0_message(event).get("reasoning_content")
        parts = [Part("thinking", reasoning)] if isinstance(reasoning, str) and reasoning else []
        thought = as_text(args.get("thought"))
        if thought.strip():
            parts.append(Part("thinking" if name == "think" else "text", thought))
        last = as_text(args.get("final_thought")) if name == "finish" else ""
        if last.strip() and last.strip() not in thought:
            parts.append(Part("text", last))
        for key in ("final_thought",) if name == "finish" else ():
            data.pop(key, None)
        return [*parts, Part("tool_call", name=tool, call_id=call_id, data=data)]

    def _v0_usage(self, event: dict[str, Any], message: Message) -> None:
        """Model and tokens of the response that the action came from; counted once where it had several calls."""
        call = event.get("tool_call_metadata")
        response = call.get("model_response") if isinstance(call, dict) else None
        if not isinstance(response, dict):
            return
        message.model = response["model"] if isinstance(response.get("model"), str) else None
        response_id = as_text(response.get("id"))
        if response_id and response_id not in self.counted:
            self.counted.add(response_id)
            message.tokens_in, message.tokens_out, message.tokens_cached = token_counts(response.get("usage"))

    def _v0_observation(self, name: str, event: dict[str, Any], message: Message) -> None:
        extras = event.get("extras")
        extras = extras if isinstance(extras, dict) else {}
        text = as_text(event.get("content"))
        message.role = "tool"
        if name == "recall":
            message.role = "system"
            message.parts = _recalled(text, extras)
            return
        if name in _STATE:
            return
        call = event.get("tool_call_metadata")
        call = call if isinstance(call, dict) else {}
        cause = as_text(event.get("cause"))
        known_id, known_tool = self.calls.pop(cause, (f"event-{cause}" if cause else None, name))
        call_id = call["tool_call_id"] if isinstance(call.get("tool_call_id"), str) else known_id
        tool = call["function_name"] if isinstance(call.get("function_name"), str) else known_tool
        if name == "error" and call_id is None:
            message.role = "system"
            message.parts = [Part("event", text, name="error", is_error=True)]
            return
        metadata = extras.get("metadata")
        code = first(extras, "exit_code", "returncode")
        code = first(metadata, "exit_code") if code is None and isinstance(metadata, dict) else code
        failed = name == "error" or event.get("success") is False or extras.get("error") is True
        failed = failed or (type(code) is int and code > 0) or text.startswith("ERROR:")
        says = failed or "success" in event or type(code) is int
        message.parts = [Part("tool_result", text, tool, call_id, is_error=failed if says else None)]
        message.parts += _images(extras.get("screenshot") or extras.get("image_urls"))
        message.parent_id = cause or None
        if type(code) is int:
            message.meta = {"exit_code": code}

    def _v1(self, kind: str, event: dict[str, Any], message: Message) -> Iterator[Part]:
        """The parts of an SDK event; sets role and meta of its message."""
        call_id, tool = event.get("tool_call_id"), event.get("tool_name")
        call_id = call_id if isinstance(call_id, str) else None
        tool = tool if isinstance(tool, str) else None
        if kind in _V1_STATE:
            return
        if kind == "MessageEvent":
            yield from self._v1_message(event, message)
        elif kind == "SystemPromptEvent":
            message.role = "system"
            yield from _v1_content(event.get("system_prompt"))
            yield from _as_context(event.get("dynamic_context"))
        elif kind == "ActionEvent":
            yield from self._v1_action(event, message, call_id, tool)
        elif kind in ("ObservationEvent", "UserRejectObservation", "AgentErrorEvent"):
            message.role = "tool"
            message.parent_id = as_text(event.get("action_id")) or None
            known_id, known_tool = self.calls.pop(message.parent_id or "", (None, None))
            yield from _v1_result(kind, event, call_id or known_id, tool or known_tool)
        elif kind == "ACPToolCallEvent":
            message.role = "tool"
            message.meta = {"title": event["title"]} if isinstance(event.get("title"), str) else None
            yield from _acp_tool(event)
        elif kind in ("Condensation", "CondensationSummaryEvent"):
            message.role = "system"
            if event.get("summary"):
                yield Part("summary", as_text(event["summary"]))
        else:
            message.role = "system"
            shown = {key: value for key, value in event.items() if key not in ("id", "timestamp", "source", "kind")}
            is_error = True if "Error" in kind else None
            yield Part("event", as_text(first(event, "detail", "message", "error") or shown), kind, is_error=is_error)

    def _v1_message(self, event: dict[str, Any], message: Message) -> Iterator[Part]:
        said = event["llm_message"]
        source = event.get("source")
        said = {**said, "content": _spread_images(said.get("content"))}
        yield from parts_of(said.get("thinking_blocks"))
        for role, parts in chat_messages(said, "user" if source == "user" else "assistant"):
            message.role = role
            # What a hook or the environment puts under the user's name is context.
            injected = source == "environment" and role == "user"
            yield from (Part("context", p.text) if injected and p.kind == "text" else p for p in parts)
        yield from _as_context(event.get("extended_content"))
        if event.get("activated_skills") or event.get("activated_microagents"):
            message.meta = {"skills": first(event, "activated_skills", "activated_microagents")}

    def _v1_action(
        self, event: dict[str, Any], message: Message, call_id: str | None, tool: str | None
    ) -> Iterator[Part]:
        reasoning = event.get("reasoning_content")
        if isinstance(reasoning, str) and reasoning:
            yield Part("thinking", reasoning)
        yield from parts_of(event.get("thinking_blocks"))
        yield from _v1_content(event.get("thought"))
        action = event.get("action")
        action = dict(action) if isinstance(action, dict) else None
        kind = action.pop("kind", None) if action else None
        if action and kind == "FinishAction" and isinstance(action.get("message"), str):
            yield Part("text", action.pop("message"))
        elif action and kind == "ThinkAction" and isinstance(action.get("thought"), str):
            yield Part("thinking", action.pop("thought"))
        raw = event.get("tool_call")
        call = call_part(raw) if isinstance(raw, dict) else Part("tool_call")
        call.name, call.call_id = tool or call.name, call_id or call.call_id or f"event-{message.native_id}"
        call.data = call.data if action is None else action
        self.calls[message.native_id] = (call.call_id, call.name or "")
        meta = {key: event.get(key) for key in ("security_risk", "llm_response_id", "summary")}
        message.meta = {key: value for key, value in meta.items() if isinstance(value, str) and value} or None
        yield call


def _v0_message(event: dict[str, Any]) -> dict[str, Any]:
    """The message of the model's response that an action came from."""
    node: Any = event.get("tool_call_metadata")
    for key in ("model_response", "choices", 0, "message"):
        node = node.get(key) if isinstance(node, dict) else node[0] if isinstance(node, list) and node else None
    return node if isinstance(node, dict) else {}


def _images(urls: Any) -> list[Part]:
    urls = [urls] if isinstance(urls, str) and urls else urls if isinstance(urls, list) else []
    return [media_part({"type": "image_url", "url": url}) for url in urls if isinstance(url, str)]


def _recalled(text: str, extras: dict[str, Any]) -> list[Part]:
    """Context that the harness recalled: the repository's instructions and the knowledge that a word triggered."""
    found = [text, *(as_text(extras.get(key)) for key in (
        "repo_instructions", "additional_agent_instructions", "conversation_instructions"))]  # fmt: skip
    knowledge = extras.get("microagent_knowledge")
    for item in knowledge if isinstance(knowledge, list) else []:
        found.append(as_text(item.get("content") if isinstance(item, dict) else item))
    return [Part("context", words) for words in found if words.strip()]


def _spread_images(content: Any) -> Any:
    """The SDK's block {"type": "image", "image_urls": [...]} as one block for each image."""
    if not isinstance(content, list):
        return content
    spread: list[Any] = []
    for block in content:
        urls = block.get("image_urls") if isinstance(block, dict) else None
        spread += [{"type": "image", "url": url} for url in urls] if isinstance(urls, list) else [block]
    return spread


def _v1_content(value: Any) -> list[Part]:
    return parts_of(_spread_images(value))


def _as_context(value: Any) -> Iterator[Part]:
    for part in _v1_content(value):
        yield Part("context", part.text) if part.kind == "text" else part


def _acp_tool(event: dict[str, Any]) -> Iterator[Part]:
    """Call and result of a tool that an agent behind the Agent Client Protocol ran; its last event has both."""
    if event.get("status") not in ("completed", "failed"):
        return
    name, call_id = as_text(first(event, "tool_kind", "title")) or None, as_text(event.get("tool_call_id")) or None
    yield Part("tool_call", name=name, call_id=call_id, data=event.get("raw_input"))
    blocks = event.get("content")
    blocks = [block for block in blocks if isinstance(block, dict)] if isinstance(blocks, list) else []
    said = [part.text for block in blocks for part in _v1_content(block.get("content")) if part.text]
    text = as_text(event.get("raw_output")) or "\n".join(said) or (as_text(blocks) if blocks else "")
    yield Part("tool_result", text, name, call_id, is_error=event["status"] == "failed")


def _v1_result(kind: str, event: dict[str, Any], call_id: str | None, tool: str | None) -> Iterator[Part]:
    """The tool result of an observation, a rejection or an error."""
    if kind != "ObservationEvent":
        text = as_text(first(event, "rejection_reason", "error", "observation"))
        yield Part("tool_result", text, tool, call_id, is_error=True)
        return
    observation = event.get("observation")
    if not isinstance(observation, dict):
        yield Part("tool_result", as_text(observation), tool, call_id)
        return
    value = first(observation, "content", "output", "text", "error", "message")
    if value is None:
        value = {key: v for key, v in observation.items() if key != "kind" and v is not None}
    inside = _v1_content(value) if isinstance(value, list) else [Part("text", as_text(value))]
    code = first(observation, "exit_code")
    failed = observation.get("is_error")
    if not isinstance(failed, bool):
        failed = True if (type(code) is int and code > 0) or observation.get("error") else None
    text = "\n".join(part.text for part in inside if part.kind != "image")
    yield Part("tool_result", text, tool, call_id, is_error=failed)
    yield from (part for part in inside if part.kind == "image")
