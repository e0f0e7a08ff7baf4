"""Importers of traces: OpenTelemetry, LangSmith, Langfuse, and what they share."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
from pathlib import Path

import importer_checks
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from importer_checks import spoil

from workbench.data.importers import langfuse, langsmith, otel
from workbench.data.importers._chat_parts import chat_list, content_digest, token_counts
from workbench.data.importers.base import HEAD_BYTES, Probe, Source
from workbench.data.records import Message

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "data" / "samples"
SHARED = Path(os.environ.get("WORKBENCH_SHARED_DATA", ROOT.parent / "shared" / "data"))
MODULES = {"otel": otel, "langsmith": langsmith, "langfuse": langfuse}
SAMPLE_FILES = {"otel": "spans.jsonl", "langsmith": "runs.jsonl", "langfuse": "trace-search.json"}


class Result(importer_checks.Result):
    """No message comes twice, and each stands after the one that it answers."""

    def __init__(self, module, raw: bytes) -> None:
        super().__init__(module, raw)
        known: set[tuple[str, str]] = set()
        for message in self.messages:
            assert (message.session_id, message.native_id) not in known, "a message twice"
            known.add((message.session_id, message.native_id))
            assert message.parent_id is None or (message.session_id, message.parent_id) in known

    def said(self, session_id: str | None = None) -> list[tuple[str, str]]:
        return [(m.role, "".join(p.text for p in m.parts if p.kind != "thinking"))
                for m in self.messages if session_id in (None, m.session_id)]  # fmt: skip


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def sample(name: str) -> bytes:
    return (SAMPLES / name / SAMPLE_FILES[name]).read_bytes()


def sample_rows(name: str) -> list:
    raw = sample(name)
    if SAMPLE_FILES[name].endswith(".json"):
        return [json.loads(raw)]
    rows = []
    for line in raw.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


@pytest.mark.parametrize("name", MODULES)
@settings(max_examples=120, deadline=None)
@given(raw=st.binary(max_size=400))
def test_arbitrary_bytes_never_raise(name, raw):
    result = Result(MODULES[name], raw)
    assert not raw.strip(b"\xef\xbb\xbf \t\r\n[]{}") or result.num_accounted() > 0


@pytest.mark.parametrize("name", MODULES)
@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 1 << 32), rate=st.sampled_from([0.005, 0.03, 0.3]))
def test_wrong_types_at_any_depth_never_raise(name, seed, rate):
    rng = random.Random(seed)
    rows = [spoil(row, rng, rate) for row in sample_rows(name)]
    lines = b"\n".join(orjson.dumps(row) for row in rows)
    assert Result(MODULES[name], lines).num_accounted() >= sum(1 for row in rows if row not in ([], {}))
    assert Result(MODULES[name], orjson.dumps(rows)).num_accounted() >= len(rows)
    Result(MODULES[name], orjson.dumps(rows[0], option=orjson.OPT_INDENT_2))


@pytest.mark.parametrize("name", MODULES)
@settings(max_examples=40, deadline=None)
@given(cut=st.floats(0, 1), junk=st.binary(max_size=30))
def test_damage_in_the_middle_never_raises(name, cut, junk):
    raw = sample(name)
    at = int(cut * len(raw))
    Result(MODULES[name], raw[:at] + junk + raw[at:])
    Result(MODULES[name], raw[:at])


@pytest.mark.parametrize("name", MODULES)
def test_detect_knows_its_sample_only(name):
    for other in MODULES:
        score = MODULES[name].detect(Probe(sample(other), complete=True))
        assert (score >= 80) if other == name else score == 0
        spoilt = b'{"resourceSpa\n' + sample(other)
        assert (MODULES[name].detect(Probe(spoilt, complete=True)) >= 80) == (other == name)
    assert MODULES[name].detect(Probe(b"", complete=True)) == 0


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real logs in {SHARED} (set WORKBENCH_SHARED_DATA)")
def test_detect_on_real_logs_of_other_formats():
    files = [p for folder in ("agent_logs", "trajectories") for p in (SHARED / folder).rglob("*") if p.is_file()]
    assert len(files) > 20
    for path in files:
        with path.open("rb") as stream:
            probe = Probe(stream.read(HEAD_BYTES), complete=path.stat().st_size <= HEAD_BYTES)
        assert [module.detect(probe) for module in MODULES.values()] == [0, 0, 0], path


def test_otel_sample():
    result = Result(otel, sample("otel"))
    assert len(result.unreadable) == 1
    assert {m.session_id for m in result.messages} == {
        "deploy-parcels-1", "00f067aa0ba902b74bf92f3577b34da6", "postmortem-oom"}  # fmt: skip
    main = [m for m in result.messages if m.session_id == "deploy-parcels-1" and m.agent_id is None]
    assert [m.role for m in main] == ["system", "user", "assistant", "tool", "assistant", "tool", "assistant", "user",
                                      "assistant"]  # fmt: skip
    assert all(m.parent_id == before.native_id for before, m in itertools.pairwise(main))
    assert (main[2].tokens_in, main[2].tokens_out, main[2].model) == (310, 48, "gpt-4.1-2025-04-14")
    assert main[2].parts[0].kind == "thinking"
    assert main[2].parts[2].call_id == main[3].parts[0].call_id == "call_j1"
    assert main[2].created_at == 1777000004000123
    sub = [m for m in result.messages if m.agent_id == "smoke-test-1"]
    assert [m.role for m in sub] == ["user", "assistant", "tool"]
    assert sub[2].parts[0].is_error is True
    assert "Connection refused" in sub[2].parts[0].text
    assert [role for role, _ in result.said("postmortem-oom")] == ["user", "assistant", "user", "assistant"]
    assert result.conversations[0].project == "/home/sam/work/parcel-tracker"


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_otel_spans_may_come_in_any_order(seed):
    rows = sample_rows("otel")
    expected = Result(otel, sample("otel"))
    spans = [(g["resource"], s["scope"], span) for row in rows for g in row["resourceSpans"] for s in g["scopeSpans"]
             for span in s["spans"]]  # fmt: skip
    random.Random(seed).shuffle(spans)
    groups = [{"resource": r, "scopeSpans": [{"scope": sc, "spans": [span]}]} for r, sc, span in spans]
    lines = b"\n".join(orjson.dumps({"resourceSpans": [group]}) for group in groups)
    document = orjson.dumps({"resourceSpans": groups}, option=orjson.OPT_INDENT_2)
    for raw in (lines, document):
        result = Result(otel, raw)
        assert [m.native_id for m in result.messages] == [m.native_id for m in expected.messages]
        assert result.said() == expected.said()


def test_langsmith_sample():
    result = Result(langsmith, sample("langsmith"))
    assert len(result.unreadable) == 1
    assert [m.role for m in result.messages] == ["system", "user", "assistant", "tool", "assistant", "user", "system",
                                                 "assistant"]  # fmt: skip
    assert {m.session_id for m in result.messages} == {"webhook-401"}
    assert result.messages[2].parts[-1].data == {"pattern": "hmac", "path": "src/parcel_tracker/webhooks.py"}
    assert result.messages[3].parts[0].call_id == "call_w1"
    assert (result.messages[2].tokens_in, result.messages[2].tokens_out) == (121, 33)
    error = result.messages[6].parts[0]
    assert (error.kind, error.is_error) == ("event", True)
    assert result.messages[7].parent_id == result.messages[5].native_id
    assert (result.conversations[0].agent, result.conversations[0].project) == ("parcel-helper", "parcel-tracker")


def test_langsmith_array_and_wrapped_runs_equal_lines():
    rows = sample_rows("langsmith")
    expected = Result(langsmith, b"\n".join(orjson.dumps(row) for row in rows)).said()
    pretty = orjson.dumps({"runs": rows}, option=orjson.OPT_INDENT_2)
    for raw in (orjson.dumps(rows), orjson.dumps({"runs": rows}), pretty, orjson.dumps(rows[::-1])):
        assert Result(langsmith, raw).said() == expected


def test_langsmith_runs_of_the_command_line_and_runs_inside_runs():
    rows = sample_rows("langsmith")
    expected = Result(langsmith, orjson.dumps(rows)).said()
    by_run_id = [{("run_id" if key == "id" else key): value for key, value in row.items()} for row in rows]
    assert Result(langsmith, orjson.dumps(by_run_id)).said() == expected
    asked = {"id": "c", "run_type": "llm", "inputs": {"messages": turns("why?")}, "outputs": {"output": "because"}}
    root = {"id": "r", "run_type": "chain", "inputs": {"input": "why?"}, "outputs": {}, "child_runs": [
        {"id": "m", "run_type": "chain", "inputs": {}, "outputs": {}, "child_runs": [asked]}]}  # fmt: skip
    export = orjson.dumps({"export_metadata": {"total_traces": 1}, "traces": [root]}, option=orjson.OPT_INDENT_2)
    assert langsmith.detect(Probe(export, complete=True)) >= 80
    for raw in (export, orjson.dumps(root)):
        assert Result(langsmith, raw).said() == [("user", "why?"), ("assistant", "because")]


def test_langsmith_state_of_a_graph_is_not_told_twice():
    def run(number: int, asked: str, state: list) -> dict:
        return {"id": str(number), "run_type": "chain", "start_time": f"2026-01-0{number}T00:00:00",
                "extra": {"metadata": {"thread_id": "t"}},
                "inputs": {"messages": turns(asked)}, "outputs": {"messages": state}}  # fmt: skip

    result = Result(langsmith, orjson.dumps([run(1, "a", turns("a", "b")), run(2, "c", turns("a", "b", "c", "d"))]))
    assert [text for _, text in result.said()] == ["a", "b", "c", "d"]
    assert all(m.parent_id == before.native_id for before, m in itertools.pairwise(result.messages))


@pytest.mark.parametrize(("inputs", "outputs"), [
    ({"system": "be kind", "messages": turns("hi")}, {"message": {"role": "assistant", "content": [
        {"type": "text", "text": "yo"}, {"type": "tool_use", "id": "c", "name": "f", "input": {}}]}}),
    ({"instructions": "be kind", "input": turns("hi")}, {"output": [
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "yo"}]},
        {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"}]}),
], ids=["anthropic", "responses"])  # fmt: skip
def test_langsmith_answers_of_the_sdks_are_one_message(inputs, outputs):
    result = Result(langsmith, orjson.dumps({"id": "1", "run_type": "llm", "inputs": inputs, "outputs": outputs}))
    assert result.said() == [("system", "be kind"), ("user", "hi"), ("assistant", "yo")]
    assert [(p.kind, p.name) for p in result.messages[2].parts] == [("text", None), ("tool_call", "f")]


def test_langfuse_sample():
    result = Result(langfuse, sample("langfuse"))
    assert [u.reason for u in result.unreadable] == ["unexpected shape: TypeError: an observation without traceId"]
    assert [m.role for m in result.messages] == ["system", "user", "assistant", "tool", "assistant", "user", "system",
                                                 "assistant"]  # fmt: skip
    assert {m.session_id for m in result.messages} == {"parcel-search"}
    assert result.messages[2].parts[0].call_id == result.messages[3].parts[0].call_id
    assert result.messages[-1].tokens_in == 371
    assert result.conversations[0].title == "slow search"


def test_langfuse_forms_of_export_are_equal():
    document = sample_rows("langfuse")[0]
    document["observations"] = [o for o in document["observations"] if "traceId" in o]
    expected = Result(langfuse, orjson.dumps(document)).said()
    assert len(expected) == 8
    session = {"id": "parcel-search", "traces": [document], "comments": []}
    wrapped = {
        "trace": {k: v for k, v in document.items() if k != "observations"},
        "observations": document["observations"],
    }
    for form in (session, wrapped, [document]):
        assert Result(langfuse, orjson.dumps(form)).said() == expected
        assert Result(langfuse, orjson.dumps(form, option=orjson.OPT_INDENT_2)).said() == expected
    lines = b"\n".join(orjson.dumps({**o, "sessionId": "parcel-search"}) for o in document["observations"])
    assert Result(langfuse, lines).said() == expected


def test_langfuse_export_to_blob_storage():
    row = {"trace_id": "t", "level": "DEFAULT", "session_id": "s", "trace_name": "support"}
    root = {**row, "id": "r", "type": "SPAN", "parent_observation_id": "", "start_time": "2026-05-29 13:46:19.000000",
            "input": '{"question": "where is it?"}', "output": "in Lyon"}  # fmt: skip
    call = {**row, "id": "g", "type": "GENERATION", "parent_observation_id": "r", "level": "ERROR",
            "start_time": "2026-05-29 13:46:20.000000", "provided_model_name": "gpt-5", "status_message": "cut off",
            "input": '[{"role":"user","content":"where is it?"}]', "output": '{"role":"assistant","content":"in Lyon"}',
            "usage_details": {"input": 5, "output": 3}}  # fmt: skip
    raw = orjson.dumps(root) + b"\n" + orjson.dumps(call)
    assert langfuse.detect(Probe(raw, complete=True)) >= 80
    result = Result(langfuse, raw)
    assert result.said() == [("user", "where is it?"), ("assistant", "in Lyon"), ("system", "cut off")]
    assert (result.messages[1].model, result.messages[1].tokens_in, result.messages[1].session_id) == ("gpt-5", 5, "s")
    assert result.conversations[0].title == "support"
    # A trace without generations has only its outermost span to tell what was said.
    assert Result(langfuse, orjson.dumps(root)).said() == [("user", "where is it?"), ("assistant", "in Lyon")]


def test_trace_without_generations_tells_its_own_input_and_output():
    trace = {"id": "t", "timestamp": "2026-01-01T00:00:00Z", "name": "n", "input": {"question": "why?"},
             "output": "because", "sessionId": None, "scores": [], "observations": []}  # fmt: skip
    assert Result(langfuse, orjson.dumps(trace)).said() == [("user", "why?"), ("assistant", "because")]


def chat_span(number: int, inputs: list, output: str, **more) -> dict:
    pairs = {"gen_ai.operation.name": "chat", "gen_ai.input.messages": json.dumps(inputs),
             "gen_ai.output.messages": json.dumps([{"role": "assistant", "content": output}]), **more}  # fmt: skip
    return {"traceId": "ab" * 16, "spanId": f"{number:016x}", "name": "chat",
            "startTimeUnixNano": 1_777_000_000_000_000_000 + number * 10**9,
            "attributes": [{"key": k, "value": {"stringValue": v}} for k, v in pairs.items()]}  # fmt: skip


def payload(*spans: dict) -> bytes:
    return orjson.dumps({"resourceSpans": [{"resource": {}, "scopeSpans": [{"spans": list(spans)}]}]})


def test_same_words_at_another_place_are_another_message():
    result = Result(otel, payload(
        chat_span(1, turns("go on"), "one"), chat_span(2, turns("go on", "one", "go on"), "one"),
        chat_span(3, turns("go on", "one", "go on", "one", "go on"), "two")))  # fmt: skip
    assert [text for _, text in result.said()] == ["go on", "one", "go on", "one", "go on", "two"]


def test_history_that_was_cut_is_found_again():
    whole = turns("a", "b", "c", "d", "e")
    result = Result(otel, payload(
        chat_span(1, whole[:1], "b"), chat_span(2, whole[:3], "d"), chat_span(3, whole[2:], "f")))  # fmt: skip
    assert [text for _, text in result.said()] == ["a", "b", "c", "d", "e", "f"]
    assert result.messages[4].parent_id == result.messages[3].native_id


def test_retry_is_a_branch():
    result = Result(otel, payload(chat_span(1, turns("q"), "bad"), chat_span(2, turns("q"), "good")))
    question, bad, good = result.messages
    assert bad.parent_id == good.parent_id == question.native_id


def test_changed_system_prompt_does_not_repeat_the_history():
    def system(text):
        return {"role": "system", "content": text}

    result = Result(otel, payload(
        chat_span(1, [system("it is 9:00"), *turns("a")], "b"),
        chat_span(2, [system("it is 9:05"), *turns("a", "b", "c")], "d")))  # fmt: skip
    assert [text for _, text in result.said()] == ["it is 9:00", "a", "b", "it is 9:05", "c", "d"]


@pytest.mark.parametrize("message", [
    {"role": "assistant", "content": "x", "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
    {"role": "assistant", "parts": [{"type": "text", "content": "x"},
                                    {"type": "tool_call", "id": "c", "name": "f", "arguments": {"a": 1}}]},
    {"role": "assistant", "content": [{"type": "text", "text": "x"},
                                      {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}]},
    {"lc": 1, "type": "constructor", "id": ["langchain", "AIMessage"], "kwargs": {
        "content": [{"type": "text", "text": "x"}, {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}],
        "tool_calls": [{"name": "f", "args": {"a": 1}, "id": "c"}]}},
    {"type": "ai", "data": {"content": "x", "additional_kwargs": {"tool_calls": [
        {"id": "c", "function": {"name": "f", "arguments": '{"a":1}'}}]}}},
    {"role": "model", "content": [{"type": "text", "text": " x"},
                                  {"type": "tool-call", "toolCallId": "c", "toolName": "f", "args": {"a": 1}}]},
], ids=["openai", "gen_ai", "anthropic", "langchain", "langchain dict", "ai sdk"])  # fmt: skip
def test_dialects_say_the_same(message):
    ((role, parts),) = chat_list([message])
    assert (role, [p.kind for p in parts]) == ("assistant", ["text", "tool_call"])
    assert (parts[1].name, parts[1].call_id, parts[1].data) == ("f", "c", {"a": 1})
    standard = chat_list([{"role": "assistant", "content": "x", "tool_calls": [
        {"id": "other", "function": {"name": "f", "arguments": '{"a":1}'}}]}])  # fmt: skip
    assert content_digest(role, parts) == content_digest(*standard[0])


def test_responses_items_are_one_message_and_their_results():
    items = [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
             {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"},
             {"type": "function_call_output", "call_id": "c", "output": "42"}]  # fmt: skip
    found = chat_list(items)
    assert [(role, [p.kind for p in parts]) for role, parts in found] == [
        ("assistant", ["thinking", "tool_call"]), ("tool", ["tool_result"])]  # fmt: skip


def test_tool_results_in_a_user_message_are_their_own():
    found = chat_list([{"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "r"}], "is_error": True},
        {"type": "text", "text": "and now?"}]}])  # fmt: skip
    assert [(role, parts[0].text) for role, parts in found] == [("tool", "r"), ("user", "and now?")]
    assert found[0][1][0].is_error is True


def test_images_are_references():
    ((_, parts),) = chat_list([{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAEC"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": "AAEC"}},
        {"type": "blob", "mime_type": "image/png", "modality": "image", "content": "AAEC"},
        {"type": "image_url", "image_url": {"url": "file:///a.png"}}]}])  # fmt: skip
    assert [p.kind for p in parts] == ["image"] * 4
    assert [p.data.get("bytes") for p in parts] == [3, 3, 3, None]
    assert parts[0].data["sha256"] == parts[1].data["sha256"] == parts[2].data["sha256"]
    assert parts[3].data == {"url": "file:///a.png"}


def test_token_counts_of_the_providers():
    assert token_counts(
        {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
    ) == (5, 2, 1)
    assert token_counts({"input_tokens": 5, "output_tokens": 2, "cache_read_input_tokens": 1}) == (5, 2, 1)
    assert token_counts({"input": 5, "output": 2, "total": 7}) == (5, 2, None)
    assert token_counts({"input": True, "output": -2}) == (None, None, None)
    assert token_counts([1]) == (None, None, None)


@pytest.mark.parametrize("name", MODULES)
def test_a_grown_file_is_read_from_its_beginning(name):
    source = Source("x", io.BytesIO(b"\n".join(orjson.dumps(row) for row in sample_rows(name))))
    assert any(isinstance(r, Message) for r in MODULES[name].read(source))
    assert source.by_lines is False
