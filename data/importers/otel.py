"""OpenTelemetry spans of generative AI: OTLP JSON documents, and JSON lines of them as the collector writes.

Read are the GenAI semantic conventions (gen_ai.input.messages and, of older emitters, span events such as
gen_ai.user.message), OpenInference (llm.input_messages.N.message.*), traceloop (gen_ai.prompt.N.*) and Vercel's AI SDK
(ai.prompt.messages).
A conversation is gen_ai.conversation.id, else session.id, else the trace.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from typing import Any

from workbench.data.importers._chat_parts import count_or_none, first, loads_or_same
from workbench.data.importers._chat_spans import Span, SpanBook
from workbench.data.importers._members import not_understood, read_rows
from workbench.data.importers.base import SHAPE_ERRORS, Probe, Source, as_text
from workbench.data.importers.json_stream import Member
from workbench.data.records import Record, digest, parse_time

FORMAT = "otel"

_GROUPS = ("resourceSpans", "resource_spans")
#: One of these stands in the spans of every convention that is read.
_MARKS = (b"gen_ai.", b"openinference", b"traceloop", b"ai.prompt")
_KIND_KEYS = ("gen_ai.operation.name", "openinference.span.kind", "traceloop.span.kind", "ai.operationId")
_KINDS = {
    "chat": "llm", "text_completion": "llm", "generate_content": "llm", "completion": "llm", "llm": "llm",
    "execute_tool": "tool", "tool": "tool", "invoke_agent": "agent", "agent": "agent",
    "invoke_workflow": "chain", "workflow": "chain", "chain": "chain",
    "ai.toolcall": "tool", "ai.generatetext": "chain", "ai.streamtext": "chain", "ai.generateobject": "chain",
    "ai.streamobject": "chain",
}  # fmt: skip
_EVENT_ROLES = {
    "gen_ai.system.message": "system", "gen_ai.user.message": "user",
    "gen_ai.assistant.message": "assistant", "gen_ai.tool.message": "tool",
}  # fmt: skip
#: Prefixes of flattened lists of messages: (input, output), of OpenInference and traceloop.
_FLAT = (("llm.input_messages.", "llm.output_messages."), ("gen_ai.prompt.", "gen_ai.completion."))
#: Names that OpenInference puts around each element of a list.
_WRAPPERS = ("message", "tool_call", "message_content")


def detect(probe: Probe) -> int:
    if probe.has_keys("resourceSpans") or probe.has_keys("resource_spans"):
        return 95 if any(mark in probe.head for mark in _MARKS) else 60
    return 0


def read(source: Source) -> Iterator[Record]:
    with SpanBook(source) as book:

        def convert(member: Member) -> Iterator[Record]:
            yield from _add_member(source, book, member)

        yield from read_rows(source, _GROUPS, convert)
        # Spans of one conversation lie anywhere in the file: one that has grown is read again from its beginning.
        source.by_lines = False
        yield from book.records()


def _add_member(source: Source, book: SpanBook, member: Member) -> Iterator[Record]:
    if member.key is None:
        groups = _rows(first(_object(member.value), *_GROUPS))
        if not groups:
            source.skipped["payload without spans"] += 1
    elif member.key in _GROUPS:
        groups = _rows(member.value) if member.index is None else [member.value]
    else:
        source.skipped[f"document field {member.key[:40]}"] += 1
        groups = []
    found = [item for group in groups for item in _spans_of(group)]
    if groups and not found:
        source.skipped["payload without spans"] += 1
    for raw, about in found:
        try:
            book.add(_span(_object(raw), about, member))
        except SHAPE_ERRORS as error:
            yield not_understood(member.offset, member.length, raw, error)


def _object(value: Any) -> dict[str, Any]:
    """The value, which must be an object. Raises: TypeError."""
    if not isinstance(value, dict):
        raise TypeError(f"an object was expected, not {type(value).__name__}")
    return value


def _rows(value: Any) -> list[Any]:
    """The value, which must be a list or missing. Raises: TypeError."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise TypeError(f"a list was expected, not {type(value).__name__}")
    return value


def _spans_of(group: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(span, what its resource says of the conversation) of an element of resourceSpans."""
    group = _object(group)
    resource = attributes(_object(group.get("resource") or {}).get("attributes"))
    about = {"agent": _text(resource.get("service.name")), "project": _text(resource.get("process.working_directory"))}
    scopes = first(group, "scopeSpans", "scope_spans", "instrumentationLibrarySpans")
    for scope in _rows(scopes):
        for raw in _rows(_object(scope).get("spans")):
            yield raw, about


def attributes(pairs: Any) -> dict[str, Any]:
    """OTLP's list of {key, value} as a dict."""
    return {as_text(_object(pair).get("key")): _value(pair.get("value")) for pair in _rows(pairs)}


def _value(wrapped: Any) -> Any:
    if not isinstance(wrapped, dict):
        return wrapped
    for kind, value in wrapped.items():
        if kind == "intValue" and isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value):
            return int(value)
        if kind == "arrayValue":
            return [_value(item) for item in _rows(_object(value).get("values"))]
        if kind == "kvlistValue":
            return attributes(_object(value).get("values"))
        return value
    return None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _time(nanoseconds: Any) -> int | None:
    """Microseconds, cut off as integers: as a float the number of nanoseconds would lose its last digits."""
    if isinstance(nanoseconds, str) and re.fullmatch(r"\d{17,19}", nanoseconds):
        nanoseconds = int(nanoseconds)
    if isinstance(nanoseconds, int) and 10**17 <= nanoseconds < 10**19:
        return parse_time(nanoseconds // 1000)
    return parse_time(nanoseconds)


def hex_id(value: Any) -> str:
    """A trace or span id: hex as it is, base64 (protobuf's own JSON) as hex."""
    if not isinstance(value, str):
        return ""
    if len(value) in (12, 24):
        try:
            return base64.b64decode(value, validate=True).hex()
        except (binascii.Error, ValueError):
            return value
    return value.lower()


def _span(raw: dict[str, Any], about: dict[str, Any], member: Member) -> Span:
    """A span of OTLP as a Span. Raises SHAPE_ERRORS where a part of it has the wrong type."""
    found = attributes(raw.get("attributes"))
    operation = first(found, *_KIND_KEYS)
    inputs, outputs = _messages(found, _rows(raw.get("events")))
    kind = _KINDS.get(str(operation).lower(), "llm" if inputs or outputs else "other")
    if kind == "tool":
        inputs, outputs = _tool_io(found)
    elif kind in ("agent", "chain") and not (inputs or outputs):
        inputs = _chain_io(first(found, "input.value", "traceloop.entity.input"))
        outputs = _chain_io(first(found, "output.value", "traceloop.entity.output"))
    tool_names = ("gen_ai.tool.name", "tool.name", "traceloop.entity.name", "ai.toolCall.name")
    name = first(found, *tool_names) if kind == "tool" else None
    agent = first(found, "gen_ai.agent.id", "gen_ai.agent.name", "agent.name", "traceloop.entity.name")
    parent = hex_id(first(raw, "parentSpanId", "parent_span_id")) or None
    span_id = hex_id(first(raw, "spanId", "span_id")) or digest(str(member.offset), as_text(raw))
    session = first(found, "gen_ai.conversation.id", "session.id", "traceloop.association.properties.session_id",
                    "ai.telemetry.metadata.sessionId")  # fmt: skip
    return Span(
        span_id=span_id,
        trace_id=hex_id(first(raw, "traceId", "trace_id")) or span_id,
        parent_id=parent,
        kind=kind,
        name=_text(name) or _text(raw.get("name")),
        session_id=as_text(session) or None,
        start=_time(first(raw, "startTimeUnixNano", "start_time_unix_nano")),
        end=_time(first(raw, "endTimeUnixNano", "end_time_unix_nano")),
        model=_text(first(found, "gen_ai.response.model", "gen_ai.request.model", "llm.model_name")),
        **_usage(found),
        inputs=inputs,
        outputs=outputs,
        call_id=_text(first(found, "gen_ai.tool.call.id", "tool_call.id", "tool.call_id", "ai.toolCall.id")),
        error=_error(raw, found) if kind != "other" else None,
        agent=_text(agent) if kind == "agent" else None,
        about={**about, "title": None if parent else _text(raw.get("name"))},
        meta=_meta(found),
        offset=member.offset,
        length=member.length,
    )


def _usage(found: dict[str, Any]) -> dict[str, int | None]:
    names = {
        "tokens_in": ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens", "llm.token_count.prompt"),
        "tokens_out": ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens", "llm.token_count.completion"),
        "tokens_cached": ("gen_ai.usage.cache_read.input_tokens", "gen_ai.usage.cache_read_input_tokens",
                          "llm.token_count.prompt_details.cache_read"),
    }  # fmt: skip
    return {field: count_or_none(first(found, *keys)) for field, keys in names.items()}


def _meta(found: dict[str, Any]) -> dict[str, Any]:
    wanted = {
        "provider": ("gen_ai.provider.name", "gen_ai.system", "llm.provider"),
        "response_id": ("gen_ai.response.id",),
        "finish_reasons": ("gen_ai.response.finish_reasons",),
        "temperature": ("gen_ai.request.temperature",),
    }
    values = {name: first(found, *keys) for name, keys in wanted.items()}
    return {name: value for name, value in values.items() if value is not None and len(as_text(value)) < 1000}


def _error(raw: dict[str, Any], found: dict[str, Any]) -> str | None:
    """What went wrong, where the status of the span is an error (code 2): its message, else the exception's."""
    status = raw.get("status")
    if not isinstance(status, dict) or status.get("code") not in (2, "STATUS_CODE_ERROR", "ERROR"):
        return None
    texts = [as_text(status.get("message"))]
    for event in _rows(raw.get("events")):
        if _object(event).get("name") == "exception":
            texts.append(as_text(attributes(event.get("attributes")).get("exception.message")))
    return next((text for text in texts if text), as_text(found.get("error.type")) or "error")


def _tool_io(found: dict[str, Any]) -> tuple[Any, Any]:
    arguments = first(
        found, "gen_ai.tool.call.arguments", "ai.toolCall.args", "tool.parameters", "traceloop.entity.input",
        "input.value",
    )  # fmt: skip
    result = first(found, "gen_ai.tool.call.result", "output.value", "traceloop.entity.output", "ai.toolCall.result")
    return loads_or_same(arguments), result


def _chain_io(value: Any) -> Any:
    """The messages of an agent's or workflow's input or output: a text, or JSON with or without messages in it."""
    value = loads_or_same(value)
    inner = value.get("messages") if isinstance(value, dict) else None
    return inner if isinstance(inner, list) else value


def _messages(found: dict[str, Any], events: list[Any]) -> tuple[list[Any], list[Any]]:
    """(input messages, output messages) of a model call, in whichever convention it has them."""
    inputs, outputs = _from_attributes(found)
    for event in events:
        name = _object(event).get("name")
        inside = attributes(event.get("attributes"))
        if name in _EVENT_ROLES:
            inputs.append({"role": _EVENT_ROLES[name], **_body(inside)})
        elif name == "gen_ai.choice":
            body = _body(inside)
            outputs.append(body["message"] if isinstance(body.get("message"), dict) else body)
        else:
            more_in, more_out = _from_attributes(inside)
            inputs += more_in
            outputs += more_out
    return inputs, outputs


def _body(inside: dict[str, Any]) -> dict[str, Any]:
    """The fields of an older message event: content, tool_calls, id … each of which may be JSON in a string."""
    inner = inside.get("gen_ai.event.content")
    fields = loads_or_same(inner) if inner is not None else inside
    fields = fields if isinstance(fields, dict) else {"content": fields}
    kept = {key: value for key, value in fields.items() if not key.startswith("gen_ai.")}
    for key in ("tool_calls", "message"):
        if key in kept:
            kept[key] = loads_or_same(kept[key])
    if isinstance(blocks := loads_or_same(kept.get("content")), list):
        kept["content"] = blocks
    if isinstance(kept.get("message"), list):  # Strands: the blocks without a message around them
        kept["message"] = {"role": "assistant", "content": kept["message"]}
    return kept


def _from_attributes(found: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    inputs: list[Any] = []
    instructions = loads_or_same(found.get("gen_ai.system_instructions"))
    if instructions:
        inputs.append({"role": "system", "content": instructions})
    inputs += _listed(first(found, "gen_ai.input.messages", "gen_ai.prompt"))
    outputs = _listed(first(found, "gen_ai.output.messages", "gen_ai.completion"))
    for prompt, completion in _FLAT:
        inputs += _unflatten(found, prompt)
        outputs += _unflatten(found, completion)
    more_in, more_out = _ai_sdk(found)
    return inputs + more_in, outputs + more_out


def _ai_sdk(found: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """The messages that Vercel's AI SDK notes: of a call in ai.prompt.messages, of the run around it in ai.prompt."""
    inputs = _listed(found.get("ai.prompt.messages"))
    prompt = loads_or_same(found.get("ai.prompt"))
    if isinstance(prompt, dict) and not inputs:
        inputs = [{"role": "system", "content": prompt["system"]}] if prompt.get("system") else []
        inputs += _listed(first(prompt, "messages", "prompt"))
    said = {
        "content": first(found, "ai.response.text", "ai.response.object", "ai.result.text", "ai.result.object"),
        "reasoning_content": found.get("ai.response.reasoning"),
        "tool_calls": loads_or_same(first(found, "ai.response.toolCalls", "ai.result.toolCalls")),
    }
    return inputs, [{"role": "assistant", **said}] if any(said.values()) else []


def _listed(value: Any) -> list[Any]:
    value = loads_or_same(value)
    return value if isinstance(value, list) else [] if value is None else [value]


def _unflatten(found: dict[str, Any], prefix: str) -> list[Any]:
    """The list that "prefix0.a.b", "prefix1.c" … spell out."""
    tree: dict[str, Any] = {}
    for key in [key for key in found if key.startswith(prefix)]:
        *path, last = key[len(prefix) :].split(".")
        node = tree
        for step in path:
            inner = node.setdefault(step, {})
            if not isinstance(inner, dict):
                inner = node[step] = {"": inner}
            node = inner
        node[last] = loads_or_same(found[key]) if last in ("content", "arguments", "tool_calls") else found[key]
    if not tree:
        return []
    folded = _fold(tree)
    return folded if isinstance(folded, list) else [folded] if folded else []


def _fold(node: Any) -> Any:
    """Dicts with numbers for keys become lists; the wrappers of OpenInference are taken off."""
    if not isinstance(node, dict):
        return node
    if node and all(key.isdecimal() and len(key) < 10 for key in node):
        return [_fold(node[key]) for key in sorted(node, key=int)]
    if len(node) == 1 and next(iter(node)) in _WRAPPERS:
        return _fold(next(iter(node.values())))
    return {("content" if key == "contents" else key): _fold(value) for key, value in node.items()}
