"""What emitters of OpenTelemetry spans write: each library has its own way to note what was said."""

from __future__ import annotations

import json
from typing import Any

import orjson
from importer_checks import Result

from workbench.data.importers import otel
from workbench.data.importers.base import Probe


def attributes(fields: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": {"stringValue": value if isinstance(value, str) else json.dumps(value)}}
            for key, value in fields.items()]  # fmt: skip


def span(number: int, fields: dict[str, Any], **events: dict[str, Any]) -> dict[str, Any]:
    return {"traceId": "ab" * 16, "spanId": f"{number:016x}", "name": "x", "attributes": attributes(fields),
            "startTimeUnixNano": str(1_777_000_000_000_000_000 + number * 10**9),
            **({"parentSpanId": f"{1:016x}"} if number > 1 else {}),
            "events": [{"name": name, "attributes": attributes(said)} for name, said in events.items()]}  # fmt: skip


def told(*spans: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(role, [(kind, text or name)]) of each message; all of them in one conversation."""
    raw = orjson.dumps({"resourceSpans": [{"scopeSpans": [{"spans": list(spans)}]}]})
    assert otel.detect(Probe(raw, complete=True)) >= 80
    result = Result(otel, raw)
    assert not result.unreadable
    assert len({m.session_id for m in result.messages}) == 1
    return [(m.role, [(p.kind, p.text or p.name or "") for p in m.parts]) for m in result.messages]


def test_vercel_ai_sdk():
    asked = [{"role": "system", "content": "be kind"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    call = {"toolCallId": "c", "toolName": "weather", "args": '{"city":"Lyon"}'}
    answered = [
        {"role": "assistant", "content": [{"type": "tool-call", **call, "args": {"city": "Lyon"}}]},
        {"role": "tool", "content": [{"type": "tool-result", "toolCallId": "c", "toolName": "weather",
                                      "output": {"type": "text", "value": "5 degrees"}}]}]  # fmt: skip
    outer = {"ai.operationId": "ai.generateText", "ai.prompt": {"system": "be kind", "prompt": "hi"},
             "ai.response.text": "It is 5 degrees", "ai.telemetry.metadata.sessionId": "s"}  # fmt: skip
    inner = {"ai.operationId": "ai.generateText.doGenerate", "gen_ai.request.model": "m"}
    found = told(
        span(1, outer),
        span(2, {**inner, "ai.prompt.messages": asked, "ai.response.text": "", "ai.response.toolCalls": [call]}),
        span(3, {"ai.operationId": "ai.toolCall", "ai.toolCall.id": "c", "ai.toolCall.name": "weather",
                 "ai.toolCall.args": {"city": "Lyon"}, "ai.toolCall.result": "5 degrees"}),
        span(4, {**inner, "ai.prompt.messages": asked + answered, "ai.response.text": "It is 5 degrees"}),
    )  # fmt: skip
    assert found == [
        ("system", [("text", "be kind")]), ("user", [("text", "hi")]), ("assistant", [("tool_call", "weather")]),
        ("tool", [("tool_result", "5 degrees")]), ("assistant", [("text", "It is 5 degrees")])]  # fmt: skip
    assert told(span(1, outer)) == [found[0], found[1], found[-1]]


def test_blocks_of_converse_in_message_events():
    found = told(span(1, {"gen_ai.operation.name": "chat"}, **{
        "gen_ai.user.message": {"content": [{"text": "2 and 2?"}]},
        "gen_ai.choice": {"finish_reason": "tool_use", "message": [
            {"text": "let me see"}, {"toolUse": {"toolUseId": "t", "name": "calc", "input": {}}}]}}),
        span(2, {"gen_ai.operation.name": "chat"}, **{
            "gen_ai.tool.message": {"content": [{"toolResult": {"toolUseId": "t", "content": [{"text": "4"}]}}]},
            "gen_ai.choice": {"message": [{"text": "four"}]}}))  # fmt: skip
    assert found == [
        ("user", [("text", "2 and 2?")]), ("assistant", [("text", "let me see"), ("tool_call", "calc")]),
        ("tool", [("tool_result", "4")]), ("assistant", [("text", "four")])]  # fmt: skip


def test_tools_that_the_provider_runs_stay_between_the_words():
    parts = [{"type": "server_tool_call", "id": "s", "name": "search", "server_tool_call": {"query": "q"}},
             {"type": "server_tool_call_response", "id": "s", "server_tool_call_response": {"hits": 1}},
             {"type": "text", "content": "found"}]  # fmt: skip
    found = told(span(1, {"gen_ai.operation.name": "chat", "gen_ai.output.messages": [
        {"role": "assistant", "parts": parts}]}))  # fmt: skip
    assert found == [("assistant", [("tool_call", "search"), ("tool_result", '{"hits":1}'), ("text", "found")])]
