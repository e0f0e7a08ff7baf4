"""Importers of trajectories: SWE-agent and mini-swe-agent, OpenHands, ATIF."""

from __future__ import annotations

import io
import json
import os
import random
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from importer_checks import Result, spoil

from workbench.data.importers import atif, openhands, swe_agent
from workbench.data.importers.base import HEAD_BYTES, Probe, Source
from workbench.data.records import Checkpoint, Conversation

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "data" / "samples"
SHARED = Path(os.environ.get("WORKBENCH_SHARED_DATA", ROOT.parent / "shared" / "data"))
REAL = SHARED / "trajectories"
MODULES = {"swe_agent": swe_agent, "openhands": openhands, "atif": atif}
SAMPLE_FILES = {
    "swe_agent": ["parcel-tracker__eta-31.traj"],
    "openhands": ["v0-output.jsonl", "v1-events.json"],
    "atif": ["trajectory.json"],
}
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real logs in {REAL} (set WORKBENCH_SHARED_DATA)")


def sample(name: str, file: str) -> bytes:
    return (SAMPLES / name / file).read_bytes()


@pytest.mark.parametrize("name", MODULES)
@settings(max_examples=120, deadline=None)
@given(raw=st.binary(max_size=400))
def test_arbitrary_bytes_never_raise(name, raw):
    result = Result(MODULES[name], raw)
    assert not raw.strip(b"\xef\xbb\xbf \t\r\n[]{}") or result.num_accounted() > 0


@pytest.mark.parametrize("name", MODULES)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), rate=st.sampled_from([0.01, 0.05, 0.3]))
def test_wrong_types_at_any_depth_never_raise(name, seed, rate):
    rng = random.Random(seed)
    for file in SAMPLE_FILES[name]:
        raw = sample(name, file)
        rows = (
            [json.loads(raw)] if file.endswith(("json", "traj")) else [json.loads(raw.splitlines()[i]) for i in (0, 2)]
        )
        rows = [spoil(row, rng, rate) for row in rows]
        lines = b"\n".join(orjson.dumps(row) for row in rows)
        assert Result(MODULES[name], lines).num_accounted() >= sum(1 for row in rows if row not in ({}, []))
        document = orjson.dumps(rows[0], option=orjson.OPT_INDENT_2)
        result = Result(MODULES[name], document)
        if isinstance(rows[0], list):
            assert result.num_accounted() >= len(rows[0])


@pytest.mark.parametrize("name", MODULES)
@settings(max_examples=40, deadline=None)
@given(cut=st.floats(0, 1), junk=st.binary(max_size=30))
def test_damage_in_the_middle_keeps_what_stands_before(name, cut, junk):
    for file in SAMPLE_FILES[name]:
        raw = sample(name, file)
        at = int(cut * len(raw))
        Result(MODULES[name], raw[:at] + junk + raw[at:])
        Result(MODULES[name], raw[:at])


@pytest.mark.parametrize("name", MODULES)
def test_detect_knows_its_samples_only(name):
    for other, files in SAMPLE_FILES.items():
        for file in files:
            raw = sample(other, file)
            score = MODULES[name].detect(Probe(raw, complete=True))
            assert (score >= 70) if other == name else score == 0, (name, file, score)
    assert MODULES[name].detect(Probe(b"", complete=True)) == 0
    assert MODULES[name].detect(Probe(b"\x00\xff" * 50, complete=True)) == 0


def test_detect_survives_a_spoilt_first_line():
    raw = b'{"instance_id": "x", "his\n' + sample("openhands", "v0-output.jsonl")
    assert openhands.detect(Probe(raw, complete=True)) >= 70
    result = Result(openhands, raw)
    assert len(result.unreadable) == 2
    assert len({m.session_id for m in result.messages}) == 2


@needs_real
def test_detect_on_real_logs():
    files = [p for folder in ("agent_logs", "trajectories") for p in (SHARED / folder).rglob("*") if p.is_file()]
    assert len(files) > 20
    for path in files:
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
        probe = Probe(head, complete=len(head) == path.stat().st_size)
        scores = {name: module.detect(probe) for name, module in MODULES.items()}
        expected = path.parent.name.removeprefix("mini_") if path.parent.parent == REAL else None
        for name, score in scores.items():
            assert (score >= 70) == (name == expected), (path, scores)
            assert score == 0 or name == expected, (path, scores)


@needs_real
@pytest.mark.parametrize("path", sorted(REAL.glob("*swe_agent/*")), ids=lambda p: p.name[:40])
def test_real_swe_agent_counts(path):
    document = json.loads(path.read_bytes())
    result = Result(swe_agent, path.read_bytes())
    assert not result.unreadable
    history = document if isinstance(document, list) else document["history"]
    expected = [m for m in history if m["content"] or m.get("tool_calls") or m["role"] != "system"]
    from_history = [m for m in result.messages if m.native_id.startswith("#")]
    assert len(from_history) == len(expected)
    steps = [] if isinstance(document, list) else document.get("trajectory", [])
    # A step is told by the history where that has its action (as often); the rest are told after it.
    actions = [m["action"].strip() for m in history if isinstance(m.get("action"), str)]
    left = 0
    for step in steps:
        if step["action"].strip() in actions:
            actions.remove(step["action"].strip())
        else:
            left += 1
    added = [m for m in result.messages if m.native_id.startswith("step#") and m.role == "assistant"]
    assert len(added) == left
    calls = [p.call_id for m in result.messages for p in m.parts if p.kind == "tool_call"]
    results = [p.call_id for m in result.messages for p in m.parts if p.kind == "tool_result"]
    assert set(results) <= set(calls)
    demonstrations = sum(1 for m in history if m.get("is_demo") or m.get("message_type") == "demonstration")
    assert sum(1 for m in result.messages if m.parts[0].kind == "context") == demonstrations


@needs_real
def test_real_openhands_counts():
    path = next((REAL / "openhands").iterdir())
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    result = Result(openhands, path.read_bytes())
    assert not result.unreadable
    assert sum(isinstance(r, Checkpoint) for r in result.records) == len(rows)
    events = [e for row in rows for e in row["history"]]
    recalls = sum(1 for e in events if e.get("action") == "recall")
    extra = sum(bool(row["test_result"]["git_patch"].strip()) + bool(row["error"]) for row in rows)
    assert len(result.messages) == len(events) - recalls + extra
    usages = {e["tool_call_metadata"]["model_response"]["id"]: e["tool_call_metadata"]["model_response"]["usage"]
              for e in events if e.get("tool_call_metadata")}  # fmt: skip
    assert sum(m.tokens_in or 0 for m in result.messages) == sum(u["prompt_tokens"] for u in usages.values())
    calls = {p.call_id for m in result.messages for p in m.parts if p.kind == "tool_call"}
    assert all(p.call_id in calls for m in result.messages for p in m.parts if p.kind == "tool_result")


def test_swe_agent_sample():
    result = Result(swe_agent, sample("swe_agent", "parcel-tracker__eta-31.traj"))
    assert len(result.unreadable) == 1
    assert result.unreadable[0].raw == b'"<<history entry lost: checkpoint 4>>"'
    assert result.skipped == {"trajectory step (history tells it)": 7}
    assert len(result.messages) == 17 + 2 + 1
    assert [m.role for m in result.messages[:5]] == ["system", "user", "user", "assistant", "tool"]
    assert result.messages[1].parts[0].kind == "context"
    assert (result.messages[3].meta or {})["execution_seconds"] == 3.812
    call, answer = result.messages[3].parts[1], result.messages[4].parts[0]
    assert (call.kind, call.name, call.call_id) == ("tool_call", "bash", answer.call_id)
    assert "```" not in result.messages[3].parts[0].text
    last = result.conversations[-1]
    assert (last.title, last.model, last.meta["exit_status"]) == ("parcel-tracker__eta-31", "gpt-4.1", "submitted")
    assert result.messages[-1].parts[0].name == "submission"


def test_swe_agent_without_history_is_built_from_the_steps():
    document = json.loads(sample("swe_agent", "parcel-tracker__eta-31.traj"))
    prompts = [m for m in document.pop("history")[:3] if m["message_type"] != "demonstration"]
    document["trajectory"][0]["query"] = prompts
    result = Result(swe_agent, json.dumps(document).encode())
    steps = document["trajectory"]
    observed = sum(1 for step in steps if step["observation"])
    assert len(result.messages) == 2 + len(steps) + observed + 1
    assert result.texts("text")[1] == prompts[1]["content"]
    reordered = {"history": json.loads(sample("swe_agent", "parcel-tracker__eta-31.traj"))["history"], **document}
    result = Result(swe_agent, json.dumps(reordered).encode())
    assert len(result.messages) == 20


def test_mini_swe_agent_v2():
    said = {"role": "assistant", "content": "I list it.", "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}],
        "extra": {"timestamp": 1770000000.5, "cost": 0.01, "response": {
            "model": "m-1", "usage": {"prompt_tokens": 10, "completion_tokens": 2}}}}  # fmt: skip
    rows = [{"role": "system", "content": "s"}, {"role": "user", "content": "fix it"}, said,
            {"role": "tool", "tool_call_id": "c1", "content": "no such file", "extra": {"returncode": 2}},
            {"role": "exit", "content": "", "extra": {"exit_status": "Submitted", "submission": "p"}}]  # fmt: skip
    raw = {"info": {"exit_status": "Submitted", "submission": "diff", "config": {"model": {"model_name": "m"}}},
           "messages": rows, "trajectory_format": "mini-swe-agent-1.1", "instance_id": "parcel__1"}  # fmt: skip
    encoded = json.dumps(raw).encode()
    assert swe_agent.detect(Probe(encoded, complete=True)) == 95
    result = Result(swe_agent, encoded)
    assert [m.role for m in result.messages] == ["system", "user", "assistant", "tool", "system", "system"]
    answer, tool = result.messages[2], result.messages[3]
    assert (answer.model, answer.tokens_in, answer.tokens_out) == ("m-1", 10, 2)
    assert answer.created_at == 1770000000500000
    assert (tool.parts[0].call_id, tool.parts[0].is_error) == ("c1", True)
    assert result.conversations[-1].title == "parcel__1"


def test_session_id_does_not_change_while_the_run_grows():
    document = json.loads(sample("swe_agent", "parcel-tracker__eta-31.traj"))
    whole = Result(swe_agent, json.dumps(document).encode())
    shorter = {**document, "trajectory": document["trajectory"][:3], "history": document["history"][:7]}
    part = Result(swe_agent, json.dumps(shorter).encode())
    assert part.conversations[0].session_id == whole.conversations[0].session_id
    document["trajectory"][0]["execution_time"] = 9.9
    other = Result(swe_agent, json.dumps(document).encode())
    assert other.conversations[0].session_id != whole.conversations[0].session_id


def test_openhands_v0_sample():
    result = Result(openhands, sample("openhands", "v0-output.jsonl"))
    assert len(result.unreadable) == 1
    assert result.skipped == {"recall event": 1, "agent_state_changed event": 1, "null event": 3}
    assert len(result.messages) == 23 - 2 + 1 + (6 - 3) + 1 + 1
    assert any("make check" in text for text in result.texts("context"))
    assert len(result.texts("summary")) == 1
    assert any("X-Forwarded-For" in text for text in result.texts("thinking"))
    failed = [p for m in result.messages for p in m.parts if p.is_error]
    assert [p.kind for p in failed] == ["tool_result", "tool_result", "tool_result", "event"]
    by_id = {m.native_id: m for m in result.messages if "ratelimit" in m.session_id}
    assert by_id["5"].parent_id == "4"
    assert by_id["5"].parts[0].call_id == by_id["4"].parts[-1].call_id == "toolu_01"


def test_openhands_tools_of_an_agent_behind_acp():
    event = {"kind": "ACPToolCallEvent", "source": "agent", "tool_call_id": "t", "title": "Read a.py",
             "tool_kind": "read", "raw_input": {"path": "a.py"}, "raw_output": None, "content": None}  # fmt: skip
    inside = [{"type": "content", "content": {"type": "text", "text": "x = 1"}}]
    events = [{**event, "id": "1", "status": "in_progress"},
              {**event, "id": "2", "status": "completed", "content": inside}]  # fmt: skip
    result = Result(openhands, b"\n".join(json.dumps(e).encode() for e in events))
    (message,) = result.messages
    assert [(p.kind, p.name, p.call_id, p.text, p.data) for p in message.parts] == [
        ("tool_call", "read", "t", "", {"path": "a.py"}), ("tool_result", "read", "t", "x = 1", None)]  # fmt: skip
    assert sum(result.skipped.values()) == 1
    assert openhands.detect(Probe(json.dumps(events[1]).encode(), complete=True)) >= 80


def test_openhands_v1_sample():
    result = Result(openhands, sample("openhands", "v1-events.json"))
    rows = json.loads(sample("openhands", "v1-events.json"))
    assert len(result.unreadable) == 1
    assert result.skipped == {"ConversationStateUpdateEvent event": 1, "PauseEvent event": 1}
    assert len(result.messages) == len(rows) - 3
    image = next(p for m in result.messages for p in m.parts if p.kind == "image")
    assert image.data["bytes"] == 70
    assert "sha256" in image.data
    rejected = next(m for m in result.messages if m.parts[0].text.startswith("NO!"))
    assert rejected.role == "tool"
    assert rejected.parts[0].is_error is True
    assert result.conversations[-1].project == "/home/sam/work/parcel-tracker"


def test_openhands_file_for_each_event_takes_the_session_from_the_path():
    rows = json.loads(sample("openhands", "v1-events.json"))
    for indent in (None, 2):
        raw = json.dumps(rows[2], indent=indent).encode()
        result = Result(openhands, raw, path="/logs/abc123/events/event-00002-mess-002.json")
        assert [m.session_id for m in result.messages] == ["abc123"]
        assert result.messages[0].native_id == "mess-002"


def test_openhands_delegate_is_a_sub_agent():
    rows = [
        {"id": 0, "source": "user", "action": "message", "args": {"content": "go"}},
        {"id": 1, "source": "agent", "action": "delegate", "args": {"agent": "BrowsingAgent", "inputs": {"task": "t"}}},
        {"id": 2, "source": "agent", "action": "browse", "args": {"url": "u", "thought": "look"}},
        {"id": 3, "source": "agent", "observation": "browse", "content": "page", "cause": 2, "extras": {}},
        {"id": 4, "source": "agent", "observation": "delegate", "content": "", "cause": 1, "extras": {}},
        {"id": 5, "source": "agent", "action": "message", "args": {"content": "done"}},
    ]
    result = Result(openhands, json.dumps(rows).encode())
    assert [m.agent_id for m in result.messages] == [None, None, "BrowsingAgent-1", "BrowsingAgent-1", None, None]


def test_openhands_resumed_stream_keeps_its_session():
    lines = [
        b'{"id": 7, "source": "user", "action": "message", "args": {"content": "more"}, "timestamp": "2026-01-01"}\n'
    ]
    result = Result(openhands, b"".join(lines), start=100, session={"session_id": "old", "meta": {}})
    assert [m.session_id for m in result.messages] == ["old"]
    assert result.messages[0].offset == 100


def test_openhands_rows_have_sessions_of_their_own_while_the_reader_keeps_the_last():
    source = Source("x", io.BytesIO(sample("openhands", "v0-output.jsonl")))
    sessions = set()
    for record in openhands.read(source):
        if isinstance(record, Conversation):
            source.session = {"session_id": record.session_id, "meta": record.meta}
            sessions.add(record.session_id)
    assert len(sessions) == 2


def test_atif_sample():
    result = Result(atif, sample("atif", "trajectory.json"))
    document = json.loads(sample("atif", "trajectory.json"))
    steps = document["steps"] + document["subagent_trajectories"][0]["steps"]
    num_results = sum(len(s.get("observation", {}).get("results", [])) for s in steps)
    assert len(result.unreadable) == 1
    assert result.skipped == {"token ids": 1}
    assert len(result.messages) == len(steps) - 1 + num_results
    known = [s["metrics"]["prompt_tokens"] for s in steps if s.get("metrics")]
    assert sum(m.tokens_in or 0 for m in result.messages) == sum(known)
    assert [m.agent_id for m in result.messages if m.agent_id] == ["sub-wal", "sub-wal"]
    assert result.messages[1].parts[0].kind == "context"
    assert (result.messages[3].meta or {})["completion_token_ids"] == [88, 12, 4]
    assert result.messages[3].parts[0].kind == "thinking"
    delegated = next(p for m in result.messages for p in m.parts if p.name == "delegate" and p.kind == "tool_result")
    assert delegated.data == {"subagent_trajectory_ref": [{"trajectory_id": "sub-wal"}]}
    assert result.conversations[-1].meta["final_metrics"]["total_steps"] == len(document["steps"])


def test_atif_sub_agent_with_its_own_session_is_a_conversation():
    document = json.loads(sample("atif", "trajectory.json"))
    document["subagent_trajectories"][0]["session_id"] = "other"
    lines = json.dumps(document).encode() + b"\n"
    result = Result(atif, lines)
    sub = next(c for c in result.conversations if c.session_id == "other")
    assert sub.parent_session_id == "parcel-locked-0411"
    assert [m.agent_id for m in result.messages if m.session_id == "other"] == [None, None]


def test_atif_documents_that_share_a_session_do_not_revise_each_other():
    ids = []
    for name in ("t1", "t2"):
        steps = [{"step_id": 1, "source": "user", "message": f"go on with {name}"}]
        document = {"schema_version": "ATIF-v1.7", "session_id": "s", "trajectory_id": name, "steps": steps}
        (message,) = Result(atif, json.dumps(document).encode()).messages
        assert message.session_id == "s"
        ids.append(message.native_id)
    assert len(set(ids)) == 2
