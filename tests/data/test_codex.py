"""The importer of Codex logs: golden samples of both forms, real logs, words that stand twice, damage, resuming."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import importer_checks
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from importer_checks import assert_accounted, assert_well_formed, messages

from workbench.data.importers import codex
from workbench.data.importers.base import Probe
from workbench.data.records import Conversation, Record, Unreadable

ROOT = Path(__file__).parents[2]
SAMPLES = sorted((ROOT / "data/samples/codex").glob("*.jsonl"))
SHARED = Path(os.environ.get("WORKBENCH_SHARED_DATA", ROOT.parent / "shared/data")) / "agent_logs/codex"
REAL = sorted(SHARED.rglob("*.jsonl"))
needs_real = pytest.mark.skipif(not REAL, reason=f"no real logs under {SHARED} (set WORKBENCH_SHARED_DATA)")
META = {"type": "session_meta", "payload": {"id": "s", "cwd": "/p"}}


read = partial(importer_checks.read, codex)


def log(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def item(role: str, *texts: str, **fields: Any) -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    content = [{"type": kind, "text": text} for text in texts]
    return {"type": "response_item", "payload": {"type": "message", "role": role, "content": content, **fields}}


def event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": "event_msg", "payload": {"type": kind, **fields}}


def words(content: bytes) -> list[tuple[str, str, str]]:
    return [(m.role, p.kind, p.text) for m in messages(read(content)[0]) for p in m.parts]


# -- golden samples -------------------------------------------------------------------------------------------------


def test_sample_of_today() -> None:
    content = SAMPLES[1].read_bytes()
    records, skipped = read(content)
    found = messages(records)
    first = next(r for r in records if isinstance(r, Conversation))
    assert first.session_id == "019cfd31-7f2a-7c41-b0a6-5d2e9a1c7f03"
    assert first.agent == "codex"
    assert first.project == "/home/sam/work/parcel-tracker"
    assert first.meta["git_branch"] == "deploy-heron"
    said = [(m.role, p.text[:22]) for m in found for p in m.parts if p.kind == "text"]
    assert said == [
        ("user", "Deploy parcel-tracker "), ("assistant", "I'll look at the unit "),
        ("assistant", "`ProtectHome=true` hid"), ("assistant", "Port 8000 is not open "),
        ("user", "Do not wait in a loop."), ("assistant", "Done: `ExecStartPost=/"),
    ]  # fmt: skip
    assert skipped["response_item:message repeated"] == 4
    assert skipped["event_msg:user_message repeated"] == 2
    calls = {p.call_id: p for m in found for p in m.parts if p.kind == "tool_call"}
    assert calls["call_patch"].name == "apply_patch"
    assert calls["call_patch"].data["input"].startswith("*** Begin")
    assert calls["call_unit"].data["cmd"] == "cat deploy/parcel-tracker.service"
    assert calls["call_local"].data["command"] == ["git", "diff", "--stat"]
    failed = {p.call_id: p.is_error for m in found for p in m.parts if p.kind == "tool_result"}
    assert failed == {
        "call_unit": False, "call_journal": False, "call_patch": False, "call_check": False, "call_health": True,
        "call_local": False,
    }  # fmt: skip
    kinds = Counter(p.kind for m in found for p in m.parts)
    assert (kinds["thinking"], kinds["summary"], kinds["event"], kinds["context"]) == (1, 1, 1, 4)
    usage = {m.native_id: (m.tokens_in, m.tokens_out, m.tokens_cached) for m in found if m.tokens_in is not None}
    assert sorted(usage.values()) == [
        (9800, 190, 0), (21840, 310, 16000), (22900, 420, 21500), (24100, 150, 22800),
    ]  # fmt: skip
    for native_id in usage:  # each goes to a message that is there and may come in pieces
        assert [m.merge for m in found if m.native_id == native_id] == [True, True]
    assert sum(isinstance(r, Unreadable) for r in records) == 1
    assert {m.model for m in found if m.role == "assistant"} == {"gpt-5.4"}


def test_sample_of_the_older_form() -> None:
    records, skipped = read(SAMPLES[0].read_bytes())
    found = messages(records)
    conversations = [r for r in records if isinstance(r, Conversation)]
    assert conversations[0].session_id == "5d0b7e9a-2c44-4e0f-a7c3-8f1e6b2d9a04"
    assert conversations[1].project == "/home/sam/work/parcel-tracker"
    assert [p.text[:9] for m in found if m.role == "user" for p in m.parts if p.kind == "text"] == [
        "Customers", "Commit it",
    ]  # fmt: skip
    assert [m.native_id for m in found if m.parts[0].kind == "text" and m.role == "assistant"] == [
        "msg_0001", "msg_0002", "msg_0003", "msg_0004",
    ]  # fmt: skip
    assert [p.is_error for m in found for p in m.parts if p.kind == "tool_result"] == [False, False, True, False, False]
    assert skipped == {"session_meta": 1, "state": 3, "response_item:reasoning encrypted": 1}


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.name[:18])
def test_samples_are_accounted_for(path: Path) -> None:
    content = path.read_bytes()
    records, skipped = read(content)
    assert_accounted(content, records, skipped)
    assert_well_formed(records)
    assert len(content) <= 60_000
    assert codex.detect(Probe(content, True)) >= 70


# -- single rules ---------------------------------------------------------------------------------------------------


def test_words_count_once_in_either_order() -> None:
    shown, sent = event("agent_message", message="done"), item("assistant", "done")
    assert words(log(META, shown, sent)) == words(log(META, sent, shown)) == [("assistant", "text", "done")]
    assert len(words(log(META, shown, sent, shown, sent))) == 2  # said twice
    assert len(words(log(META, sent, sent))) == 2  # one stream does not repeat itself


def test_words_of_one_stream_only() -> None:
    assert words(log(META, item("user", "hi"), item("assistant", "yes"))) == [
        ("user", "text", "hi"), ("assistant", "text", "yes"),
    ]  # fmt: skip
    assert words(log(META, event("user_message", message="hi"))) == [("user", "text", "hi")]


def test_words_in_several_blocks() -> None:
    parts = [("assistant", "text", "a"), ("assistant", "text", "b")]
    shown = [event("agent_message", message="a"), event("agent_message", message="b")]
    assert words(log(META, *shown, item("assistant", "a", "b"))) == parts
    assert words(log(META, item("user", "a", "b"), event("user_message", message="ab"))) == [
        ("user", "text", "a"), ("user", "text", "b"),
    ]  # fmt: skip


def test_injected_entries_are_context() -> None:
    injected = item("user", "<environment_context>x</environment_context>", "# AGENTS.md instructions for /p\nx")
    assert [kind for _, kind, _ in words(log(META, injected, item("developer", "rules")))] == ["context"] * 3


def test_images_are_kept_once() -> None:
    url = "data:image/png;base64,AAAA"
    sent = item("user")
    sent["payload"]["content"] = [{"type": "input_image", "image_url": url}]
    shown = event("user_message", message="", images=[url])
    for content in (log(META, sent), log(META, shown), log(META, sent, shown), log(META, shown, sent)):
        (message,) = messages(read(content)[0])
        assert message.parts[0].data["bytes"] == 3
        assert message.parts[0].name == "image/png"


def test_fork_keeps_its_own_id() -> None:
    child = {"type": "session_meta", "payload": {"id": "child", "source": {"subagent": {"other": "x"}}}}
    parent = {"type": "session_meta", "payload": {"id": "parent", "cwd": "/p"}}
    records, _ = read(log(child, parent, item("user", "hi")))
    assert {m.session_id for m in messages(records)} == {"child"}
    assert [r.parent_session_id for r in records if isinstance(r, Conversation)][:2] == [None, "parent"]
    spawned = {"id": "c", "source": {"subagent": {"thread_spawn": {"parent_thread_id": "p1"}}}}
    records, _ = read(log({"type": "session_meta", "payload": spawned}))
    assert isinstance(records[0], Conversation)
    assert records[0].parent_session_id == "p1"


def test_rolled_back_turns_become_a_branch() -> None:
    turns = [item("user", "one"), item("assistant", "1"), item("user", "two"), item("assistant", "2")]
    content = log(META, *turns, event("thread_rolled_back", num_turns=1), item("user", "three"))
    found = messages(read(content)[0])
    assert found[-1].parent_id == found[1].native_id
    assert found[-2].parts[0].kind == "event"
    assert [m.parent_id for m in found[:-1]] == [None] * 5


def test_without_session_meta() -> None:
    records, _ = read(log(item("user", "hi")))
    assert isinstance(records[0], Conversation)
    assert len(records[0].session_id) == 20


def test_output_forms() -> None:
    def result(output: Any) -> list[tuple[str, str, bool | None]]:
        row = {"type": "response_item", "payload": {"type": "function_call_output", "call_id": "c", "output": output}}
        (message,) = messages(read(log(META, row))[0])
        assert message.role == "tool"
        assert all(p.call_id == "c" for p in message.parts)
        return [(p.kind, p.text, p.is_error) for p in message.parts]

    assert result("ok") == [("tool_result", "ok", None)]
    assert result({"content": "no", "success": False}) == [("tool_result", "no", True)]
    assert result([{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "http://x"}]) == [
        ("tool_result", "a", None), ("image", "", None),
    ]  # fmt: skip
    assert result("Process exited with code 2\nOutput:\n")[0][2] is True
    text = '{"output":"x","metadata":{"exit_code":0}}'
    assert result(text) == [("tool_result", text, False)]


def test_detect() -> None:
    assert codex.detect(Probe(b'{"cut\n' + log(item("user", "x")), True)) > 90
    assert codex.detect(Probe(b'{"payload":{"originator":"x","cli_version":"1","base":"' + b"x" * 70000)) > 50
    for other in (
        b"", b"{}", b"[]", b"hello\n", b'{"type":"user","uuid":"1","sessionId":"s","isSidechain":false}\n',
        b'{"type":"session","version":3,"id":"1","timestamp":"2026-01-01T00:00:00Z","cwd":"/"}\n',
        b'{"type":"message","id":"1","timestamp":"x","message":{"role":"user","content":[]}}\n',
        b'{"messages":[{"role":"user","content":"x"}]}\n', b'{"sessionId":"x","messages":[]}',
    ):  # fmt: skip
        assert codex.detect(Probe(other, True)) == 0


# -- real logs ------------------------------------------------------------------------------------------------------


@needs_real
@pytest.mark.parametrize("path", REAL, ids=lambda p: p.stem[8:21])
def test_real_log(path: Path) -> None:
    content = path.read_bytes()
    records, skipped = read(content)
    assert not [r for r in records if isinstance(r, Unreadable)]
    assert_accounted(content, records, skipped)
    assert_well_formed(records)
    payloads = [json.loads(raw)["payload"] for raw in content.splitlines()]
    kinds = Counter(payload.get("type") for payload in payloads)
    found = messages(records)
    shown = [(p["type"][:-8], p["message"]) for p in payloads if p.get("type") in ("user_message", "agent_message")]
    said = [(m.role, p.text) for m in found for p in m.parts if p.kind == "text"]
    assert Counter((role.replace("assistant", "agent"), text) for role, text in said) == Counter(shown)
    parts = Counter(p.kind for m in found for p in m.parts)
    assert parts["tool_call"] == kinds["function_call"] + kinds["custom_tool_call"]
    assert parts["tool_result"] == kinds["function_call_output"] + kinds["custom_tool_call_output"]
    infos = [p["info"] for p in payloads if p.get("type") == "token_count" and p["info"]]
    totals = {info["total_token_usage"]["total_tokens"]: info["last_token_usage"]["output_tokens"] for info in infos}
    assert sum(m.tokens_out or 0 for m in found) == sum(totals.values())
    assert len({m.native_id for m in found}) == len(found) - sum(not m.parts for m in found)


# -- damage ---------------------------------------------------------------------------------------------------------

TYPES = st.sampled_from(
    ["message", "reasoning", "function_call", "function_call_output", "custom_tool_call", "local_shell_call",
     "user_message", "agent_message", "token_count", "turn_aborted", "thread_rolled_back", "thread_name_updated",
     "input_text", "input_image"]
)  # fmt: skip
NAMES = st.sampled_from(
    ["type", "role", "content", "text", "id", "call_id", "name", "arguments", "input", "output", "summary", "message",
     "info", "last_token_usage", "total_token_usage", "total_tokens", "input_tokens", "images", "num_turns", "source",
     "git", "model", "cwd", "image_url", "subagent", "reason", "success", "action", "thread_name", "forked_from_id"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats(allow_nan=False, allow_infinity=False)
    | TYPES | st.sampled_from(["", "a", "user", "assistant", "data:x"]) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=5), max_leaves=12,
)  # fmt: skip
PAYLOADS = st.builds(
    lambda kind, row: {**row, "type": kind}, TYPES | VALUES, st.dictionaries(NAMES, VALUES, max_size=8)
)
ROWS = st.builds(
    lambda kind, payload, row: {**row, "type": kind, **({"payload": payload} if payload else {})},
    st.sampled_from(["session_meta", "turn_context", "response_item", "event_msg", "compacted"]) | TYPES | VALUES,
    PAYLOADS | st.none(), st.dictionaries(NAMES | st.sampled_from(["timestamp", "record_type"]), VALUES, max_size=5),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(ROWS, max_size=8))
def test_any_objects_are_accounted_for(rows: list[dict[str, Any]]) -> None:
    content = log(*rows)
    records, skipped = read(content)
    assert_accounted(content, records, skipped)
    assert_well_formed(records)
    codex.detect(Probe(content, True))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=40) | st.sampled_from([b"{}", b"[]", b'{"type":"x"', b"", b" "]), max_size=8))
def test_any_bytes_are_accounted_for(pieces: list[bytes]) -> None:
    content = b"\n".join(pieces)
    records, skipped = read(content)
    assert_accounted(content, records, skipped)
    codex.detect(Probe(content, True))


# -- resuming -------------------------------------------------------------------------------------------------------


def session_after(records: list[Record]) -> dict[str, Any] | None:
    """What the ingest keeps of a log: the latest conversation's id, and its meta merged."""
    session: dict[str, Any] | None = None
    for record in records:
        if isinstance(record, Conversation):
            same = session is not None and session["session_id"] == record.session_id
            meta = {**session["meta"], **record.meta} if same and session else record.meta
            session = {"session_id": record.session_id, "meta": meta}
    return orjson.loads(orjson.dumps(session))


def assert_resumes(content: bytes, boundary: int) -> None:
    whole, skipped = read(content)
    before, skipped_before = read(content[:boundary])
    after, skipped_after = read(content, boundary, session_after(before))
    assert messages(before) + messages(after) == messages(whole)
    assert skipped_before + skipped_after == skipped
    assert session_after(before + after) == session_after(whole)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.name[:18])
def test_samples_resume_at_every_line(path: Path) -> None:
    content = path.read_bytes()
    boundary = 0
    for raw in io.BytesIO(content):
        assert_resumes(content, boundary)
        boundary += len(raw)


def test_rollback_survives_resuming() -> None:
    turns = [item("user", "one"), item("assistant", "1"), item("user", "two"), item("assistant", "2")]
    content = log(META, *turns, event("thread_rolled_back", num_turns=1), item("user", "three"))
    ends = [i + 1 for i, byte in enumerate(content) if byte == 10]
    for boundary in ends:
        assert_resumes(content, boundary)


@needs_real
@pytest.mark.parametrize("path", REAL, ids=lambda p: p.stem[8:21])
def test_real_log_resumes(path: Path) -> None:
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == 10]
    for k in range(1, 6):
        assert_resumes(content, ends[len(ends) * k // 6])
