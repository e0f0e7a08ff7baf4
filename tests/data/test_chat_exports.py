"""Importers of chats (ChatGPT, Claude.ai, OpenAI messages, ShareGPT) and, for what all share, Gemini CLI and Pi."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from importer_checks import messages

from workbench.data.importers import importer
from workbench.data.importers.base import HEAD_BYTES, Probe, Source
from workbench.data.records import PART_KINDS, ROLES, Checkpoint, Conversation, Message, Part, Record, Unreadable

ROOT = Path(__file__).parents[2]
FORMATS = ("gemini_cli", "pi", "chatgpt", "claude_ai", "openai_chat", "sharegpt")
SAMPLES = [path for name in FORMATS for path in sorted((ROOT / "data/samples" / name).iterdir())]
SHARED = Path(os.environ.get("WORKBENCH_SHARED_DATA", ROOT.parent / "shared/data"))
needs_real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real logs in {SHARED} (set WORKBENCH_SHARED_DATA)")
WRONG = st.sampled_from(
    [None, True, 7, -1, 1.5, "", "x", [], {}, [None], ["x"], [[1]], {"a": 1}, [{"b": []}], 2**64 - 1]
)


def read(name: str, content: bytes, start: int = 0) -> tuple[list[Record], Counter[str]]:
    source = Source("log", io.BytesIO(content[start:]), start)
    return list(importer(name).read(source)), source.skipped


def sample(name: str, file: str) -> tuple[list[Record], Counter[str]]:
    return read(name, (ROOT / "data/samples" / name / file).read_bytes())


def by_id(records: list[Record]) -> dict[str, Message]:
    return {message.native_id: message for message in messages(records)}


def probe(content: bytes) -> Probe:
    return Probe(content[:HEAD_BYTES], complete=len(content) <= HEAD_BYTES)


def assert_well_formed(records: list[Record], size: int) -> None:
    announced = set()
    for record in records:
        if isinstance(record, Conversation):
            announced.add(record.session_id)
            orjson.dumps(record.meta)
            for text in (record.agent, record.project, record.title, record.model, record.active_leaf):
                assert text is None or isinstance(text, str)
        elif isinstance(record, Message):
            assert record.session_id in announced
            assert record.role in ROLES
            assert isinstance(record.native_id, str)
            assert record.native_id
            assert record.parent_id is None or isinstance(record.parent_id, str)
            assert record.parts
            assert 0 <= record.offset <= record.offset + record.length <= size
            orjson.dumps(record.meta)
            for value in (record.tokens_in, record.tokens_out, record.tokens_cached, record.created_at):
                assert value is None or (type(value) is int and abs(value) < 1 << 63)
            for part in record.parts:
                assert part.kind in PART_KINDS
                assert isinstance(part.text, str)
                assert all(v is None or isinstance(v, str) for v in (part.name, part.call_id))
                assert part.is_error is None or isinstance(part.is_error, bool)
                orjson.dumps(part.data)
        elif isinstance(record, Unreadable):
            assert 0 <= record.offset <= record.offset + record.length <= size


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_samples_are_well_formed_and_detected(path: Path) -> None:
    content = path.read_bytes()
    assert len(content) <= 40_000
    records, _ = read(path.parent.name, content)
    assert_well_formed(records, len(content))
    assert len(messages(records)) >= 3
    scores = {name: importer(name).detect(probe(content)) for name in FORMATS}
    assert [name for name, score in scores.items() if score > 0] == [path.parent.name]
    assert b"base64" not in orjson.dumps([str(r) for r in records])


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_corrupt_first_record_is_survived(path: Path) -> None:
    content = path.read_bytes()
    head = content.split(b"\n", 1)[0] if path.suffix == ".jsonl" else content[:200]
    broken = head[:30] + b"\xff" + head[31:] + content[len(head) :]
    assert importer(path.parent.name).detect(probe(broken)) > 0
    whole, bad = read(path.parent.name, content)[0], read(path.parent.name, broken)[0]
    assert any(isinstance(r, Unreadable) for r in bad)
    texts = {part.text for message in messages(whole) for part in message.parts if part.text}
    kept = {part.text for message in messages(bad) for part in message.parts if part.text}
    assert kept <= texts
    assert len(kept) >= 2


@given(content=st.binary(max_size=200), name=st.sampled_from(FORMATS), start=st.sampled_from([0, 10]))
@settings(max_examples=300, deadline=None)
def test_arbitrary_bytes_never_raise(content: bytes, name: str, start: int) -> None:
    assert importer(name).detect(probe(content)) == 0
    source = Source("log", io.BytesIO(content), start)
    records = list(importer(name).read(source))
    assert_well_formed(records, start + len(content))
    if content.strip(b"\xef\xbb\xbf \t\r\n\v\f\x1c\x1d\x1e\x1f\x85\xa0") and not source.skipped:
        assert records


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, child in pairs for deeper in _paths(child, (*path, key)))]


def _replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _replaced(copy[path[0]], path[1:], new)
    return copy


def _rows(path: Path) -> list[Any]:
    rows = []
    for line in path.read_bytes().splitlines() if path.suffix == ".jsonl" else [path.read_bytes()]:
        try:
            rows.append(orjson.loads(line))
        except orjson.JSONDecodeError:
            continue
    return rows


PARSED = [(path, row, _paths(row)) for path in SAMPLES for row in _rows(path)]


@given(data=st.data(), new=WRONG)
@settings(max_examples=1500, deadline=None)
def test_wrong_types_never_raise_and_are_accounted_for(data: st.DataObject, new: Any) -> None:
    path, row, places = data.draw(st.sampled_from(PARSED))
    changed = _replaced(row, data.draw(st.sampled_from(places)), new)
    content = json.dumps(changed).encode()
    records, skipped = read(path.parent.name, content)
    assert_well_formed(records, len(content))
    for record in records:
        assert not isinstance(record, Unreadable) or record.reason
    if changed not in ([], {}):
        assert records or skipped
    importer(path.parent.name).detect(probe(content))


@needs_real
def test_other_formats_are_left_alone() -> None:
    seen = 0
    for path in sorted([*(SHARED / "agent_logs").rglob("*.json*"), *(SHARED / "trajectories").rglob("*.*")]):
        if not path.is_file():
            continue
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
        scores = {n for n in FORMATS if importer(n).detect(Probe(head, path.stat().st_size <= HEAD_BYTES)) > 0}
        mine = (
            {"gemini_cli"} if "gemini" in path.parts else {"openai_chat"} if path.name.startswith("gpt-4o") else set()
        )
        assert scores == mine, path
        seen += 1
    assert seen > 10


@needs_real
def test_real_tau_bench_results() -> None:
    content = (SHARED / "trajectories/tau_bench/gpt-4o-airline.json").read_bytes()
    records, skipped = read("openai_chat", content)
    rows = orjson.loads(content)
    assert not skipped
    assert not any(isinstance(r, Unreadable) for r in records)
    talks = [r for r in records if isinstance(r, Conversation)]
    assert [t.meta["reward"] for t in talks] == [row["reward"] for row in rows]
    assert len({t.session_id for t in talks}) == len(rows)
    assert Counter(m.role for m in messages(records)) == Counter(m["role"] for row in rows for m in row["traj"])
    said = [m["content"] for row in rows for m in row["traj"] if m["role"] in ("user", "assistant") and m["content"]]
    assert [p.text for m in messages(records) for p in m.parts if p.kind == "text"] == said
    calls = [c["function"] for row in rows for m in row["traj"] for c in m.get("tool_calls") or []]
    got = [p for m in messages(records) for p in m.parts if p.kind == "tool_call"]
    assert [(p.name, p.data) for p in got] == [(c["name"], orjson.loads(c["arguments"])) for c in calls]


def test_chatgpt_keeps_every_branch() -> None:
    records, skipped = sample("chatgpt", "conversations.json")
    found = by_id(records)
    first, second = (r for r in records if isinstance(r, Conversation))
    assert first.active_leaf == "recap"
    assert (found["u1"].parent_id, found["u1b"].parent_id) == (None, "")
    assert {m for m in found if found[m].parent_id == "u2"} == {"a3", "a3b"}
    assert found["x4"].parent_id == "x2"  # the node between them is broken
    assert [p.kind for p in found["u1b"].parts] == ["image", "text", "file"]
    assert found["u1b"].parts[0].data["pointer"] == "file-service://file-Qk2grafana"
    assert {p.kind for p in found["ctx"].parts} == {"context"}
    assert found["th"].parts[0].kind == "thinking"
    assert found["call"].parts[0] == Part("tool_call", name="python", data={"input": "print(40 / 60)"})
    assert (found["out"].role, found["out"].parts[0].kind) == ("tool", "tool_result")
    assert found["a2"].created_at == 1767950080000000
    assert skipped == {"empty node": 2, "hidden node": 1}
    bad = [r for r in records if isinstance(r, Unreadable)]
    assert [b'"author":"broken"' in r.raw for r in bad] == [True, False]
    assert sum(isinstance(r, Checkpoint) for r in records) == 2
    assert second.title == "502 on import"


def test_chatgpt_tree_in_any_order_and_with_cycles() -> None:
    rows = orjson.loads((ROOT / "data/samples/chatgpt/conversations.json").read_bytes())
    row = rows[0]
    expected = {m.native_id: m.parent_id or "" for m in messages(read("chatgpt", json.dumps([row]).encode())[0])}
    row["mapping"] = dict(reversed(row["mapping"].items()))
    records, _ = read("chatgpt", json.dumps([row]).encode())
    assert {m.native_id: m.parent_id or "" for m in messages(records)} == expected
    row["mapping"]["u1"]["parent"] = "a1"
    records, _ = read("chatgpt", json.dumps([row]).encode())
    assert {m.native_id for m in messages(records)} == set(expected)


def test_claude_ai_attachments_results_and_branches() -> None:
    records, skipped = sample("claude_ai", "conversations.json")
    found = by_id(records)
    text, log, image = found["c-01"].parts
    assert (log.kind, log.name) == ("file", "backup.log")
    assert "btreeInitPage() returns error code 11\n" in log.text
    assert (text.kind, image.kind, image.name) == ("text", "image", "disk-usage.png")
    assert [(m, found[m].role) for m in ("c-02", "c-02/1", "c-02/2")] == [
        ("c-02", "assistant"), ("c-02/1", "tool"), ("c-02/2", "assistant"),
    ]  # fmt: skip
    assert found["c-02/1"].parent_id == "c-02"
    assert found["c-03"].parent_id == found["c-05"].parent_id == "c-02/2"
    assert found["d-02"].parent_id == "d-01"
    first = next(r for r in records if isinstance(r, Conversation))
    assert first.active_leaf == "c-06"
    assert skipped == {"empty message": 1}
    assert [b"not" in r.raw for r in records if isinstance(r, Unreadable)] == [True]


def test_openai_rows_batches_and_resuming() -> None:
    content = (ROOT / "data/samples/openai_chat/support-rows.jsonl").read_bytes()
    records, _ = read("openai_chat", content)
    assert [r.offset for r in records if isinstance(r, Unreadable)] == [
        content.index(b'{"messages": [{"role": "user", "content": "torn')
    ]
    parts = [p for m in messages(records) for p in m.parts]
    assert {p.kind for p in parts} == {"context", "text", "tool_call", "tool_result", "image", "event"}
    assert [p.data for p in parts if p.kind == "tool_call"] == [
        {"parcel_id": "PT-3141"},
        {"input": '{"parcel_id": "PT-1"'},
    ]
    assert [p.name for p in parts if p.kind == "tool_result"] == ["get_parcel", "cancel_parcel"]
    assert next(p.data["url"] for p in parts if p.kind == "image").startswith("https://")
    answered = next(m for m in messages(records) if m.tokens_out == 22)
    assert (answered.session_id, answered.model) == ("batch_req_68c1f00dfeed0001", "gpt-5-mini")
    places = [r.offset for r in records if isinstance(r, Checkpoint)]
    assert places[-1] == len(content)
    for place in places[:-1]:
        assert place is not None
        rest, _ = read("openai_chat", content, start=place)
        assert rest == records[len(records) - len(rest) :]


def test_openai_responses_items() -> None:
    row = {
        "custom_id": "a", "body": {
            "model": "gpt-5", "instructions": "Be kind.", "input": "Why 429?",
            "output": [
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "one bucket"}]},
                {"type": "function_call", "call_id": "c1", "name": "read", "arguments": '{"path": "ratelimit.py"}'},
                {"type": "function_call_output", "call_id": "c1", "output": "def client_key"},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Shared."}]},
            ],
            "usage": {"input_tokens": 5, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 2}},
        },
    }  # fmt: skip
    found = messages(read("openai_chat", json.dumps(row).encode())[0])
    assert [(m.role, m.parts[0].kind) for m in found] == [
        ("system", "context"), ("user", "text"), ("assistant", "thinking"), ("assistant", "tool_call"),
        ("tool", "tool_result"), ("assistant", "text"),
    ]  # fmt: skip
    assert found[3].parts[0].data == {"path": "ratelimit.py"}
    assert found[4].parts[0].name == "read"
    assert (found[-1].tokens_in, found[-1].tokens_out, found[-1].tokens_cached) == (5, 3, 2)


@pytest.mark.parametrize("name", ["openai_chat", "sharegpt"])
def test_lines_array_and_document_hold_the_same(name: str) -> None:
    path = (
        ROOT / f"data/samples/{name}" / ("support-rows.jsonl" if name == "openai_chat" else "tracker-dialogues.jsonl")
    )
    rows = _rows(path)
    said = [[p for m in messages(read(name, json.dumps(row).encode())[0]) for p in m.parts] for row in rows]
    for indent in (None, 2):
        records, _ = read(name, json.dumps(rows, indent=indent).encode())
        assert [p for m in messages(records) for p in m.parts] == [p for parts in said for p in parts]
        for row, parts in zip(rows, said, strict=True):
            records, _ = read(name, json.dumps(row, indent=indent).encode())
            assert [p for m in messages(records) for p in m.parts] == parts


def test_sharegpt_roles_tools_and_images() -> None:
    records, _ = sample("sharegpt", "tracker-dialogues.json")
    parts = [(m.role, p) for m in messages(records) for p in m.parts]
    assert next(p.data for _, p in parts if p.kind == "image") == {"url": "dashboards/notify.png"}
    assert next(p for _, p in parts if p.kind == "tool_call") == Part(
        "tool_call", name="find_scan", data={"parcel_id": "PT-99"}
    )
    assert next(role for role, p in parts if p.kind == "tool_result") == "tool"
    talks = [r for r in records if isinstance(r, Conversation)]
    assert talks[0].meta["id"] == "tracker_0"
    assert talks[1].meta["tools"][0]["name"] == "find_scan"
    assert [r.reason for r in records if isinstance(r, Unreadable)] == [
        "unexpected shape: ValueError: unknown speaker alien"
    ]
