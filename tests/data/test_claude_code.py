"""The importer of Claude Code logs: golden samples, real logs against an independent count, damage."""

from __future__ import annotations

import json
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import importer_checks
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from importer_checks import assert_accounted, assert_well_formed, messages

from workbench.data.importers import claude_code
from workbench.data.importers.base import Probe
from workbench.data.records import Conversation, Message, Record, Unreadable

ROOT = Path(__file__).parents[2]
SAMPLES = sorted((ROOT / "data/samples/claude_code").glob("*.jsonl"))
SHARED = Path(os.environ.get("WORKBENCH_SHARED_DATA", ROOT.parent / "shared/data")) / "agent_logs/claude_code"
REAL = sorted(SHARED.rglob("*.jsonl"))
needs_real = pytest.mark.skipif(not REAL, reason=f"no real logs under {SHARED} (set WORKBENCH_SHARED_DATA)")


read = partial(importer_checks.read, claude_code)


def sample(name: str) -> tuple[list[Message], list[Record], Counter[str]]:
    records, skipped = read((ROOT / "data/samples/claude_code" / name).read_bytes())
    return messages(records), records, skipped


def line(**fields: Any) -> bytes:
    row = {"uuid": "u1", "sessionId": "s", "parentUuid": None, "isSidechain": False, **fields}
    return json.dumps(row).encode() + b"\n"


def user(text: Any, **fields: Any) -> bytes:
    return line(type="user", message={"role": "user", "content": text}, **fields)


# -- golden samples -------------------------------------------------------------------------------------------------


def test_sample_tree() -> None:
    found, records, skipped = sample("flaky-test.jsonl")
    by_text = {part.text[:24]: m for m in found for part in m.parts if part.kind == "text"}
    question, abandoned = by_text["It fails here too once t"], by_text["Just put pytest-rerunfai"]
    asked_again, added = by_text["No retries: they would h"], by_text["also make add() reject n"]
    assert abandoned.parent_id == asked_again.parent_id == question.native_id
    assert (added.role, added.native_id) == ("user", f"{added.parent_id}:user")
    assert next(m for m in found if m.parent_id == added.native_id).role == "assistant"
    assert (len({m.native_id for m in found}), len(found)) == (20, 26)
    pieces = [m for m in found if m.native_id == found[1].native_id]
    assert [p.kind for m in pieces for p in m.parts] == ["thinking", "text", "tool_call", "tool_call"]
    assert {m.parent_id for m in pieces} == {found[0].native_id}
    assert len({p.key for m in pieces for p in m.parts}) == 4
    assert all(m.merge for m in pieces)
    assert (max(m.tokens_in or 0 for m in pieces), max(m.tokens_out or 0 for m in pieces)) == (21359, 188)
    unreadable = [r for r in records if isinstance(r, Unreadable)]
    assert len(unreadable) == 1
    assert unreadable[0].raw.endswith(b"that makes the mis\n")
    conversations = [r for r in records if isinstance(r, Conversation)]
    assert conversations[-1].title == "Flaky test: ties and naive datetimes"  # the later ai-title does not replace it
    assert conversations[0].project == "/home/sam/work/parcel-tracker"
    assert (skipped["progress:hook_progress"], skipped["ai-title"]) == (2, 2)


def test_sample_parts() -> None:
    found, _, _ = sample("flaky-test.jsonl")
    first = found[0].parts
    assert [p.kind for p in first] == ["text", "context"]
    assert "".join(p.text for p in first).startswith("tests/test_events.py")
    assert first[0].text.endswith("why.\n\n")
    image = next(p for m in found for p in m.parts if p.kind == "image")
    assert (image.name, image.data["bytes"], len(image.data["sha256"])) == ("image/png", 80, 64)
    result = next(m for m in found if m.parts[0].text.startswith("50 passed"))
    assert result.role == "tool"
    assert [p.text for p in result.parts] == ["50 passed in 4.02s", ""]
    assert {p.call_id for p in result.parts} == {"toolu_01RunAll"}
    assert result.parts[0].is_error is False
    call = next(p for m in found for p in m.parts if p.call_id == "toolu_01RunLoop" and p.kind == "tool_call")
    assert (call.name, call.data["description"]) == ("Bash", "Repeat the test")
    interrupted = next(m for m in found if m.parts[0].text.startswith("[Request interrupted"))
    assert interrupted.parts[0].kind == "event"


def test_sample_with_agent_compaction_and_queue() -> None:
    found, records, skipped = sample("rate-limit.jsonl")
    assert next(r for r in records if isinstance(r, Conversation)).title == "NordPost rate limit across workers"
    agent = [m for m in found if m.agent_id == "b7d21e0"]
    assert [m.role for m in agent] == ["user", "assistant", "tool"]
    call = next(m for m in found for p in m.parts if p.name == "Task")
    assert agent[0].parent_id == call.native_id
    assert agent[1].parent_id == agent[0].native_id
    queued = next(m for m in found if m.parts and m.parts[0].text.startswith("do not add Redis"))
    assert queued.role == "user"
    assert queued.parts[0].kind == "text"
    assert skipped["queue-operation:enqueue"] == 1
    error = next(m for m in found if m.parts[0].name == "api_error")
    assert error.parent_id == queued.native_id  # what followed the tool result follows the queued words
    shown = next(m for m in found if m.parts[0].text.startswith("API Error"))
    assert shown.parts[0].kind == "event"
    assert shown.model is None
    assert shown.tokens_out is None
    boundary = next(m for m in found if m.parts[0].name == "compact_boundary")
    summary = next(m for m in found if m.parts[0].kind == "summary")
    assert summary.parent_id == boundary.native_id
    assert next(m for m in found if m.native_id == boundary.parent_id).role == "assistant"
    assert [p.kind for m in found[:3] for p in m.parts] == ["context", "event", "context"]
    by_parent = {m.native_id: m for m in found}
    main = [m for m in found if m.agent_id is None]
    assert all(by_parent[m.parent_id].agent_id is None for m in main if m.parent_id)


def test_agent_file_repeats_what_the_session_shows() -> None:
    in_session = [m for m in sample("rate-limit.jsonl")[0] if m.agent_id]
    in_file, records, _ = sample("agent-b7d21e0.jsonl")
    assert len(in_file) == 4
    assert {m.agent_id for m in in_file} == {"b7d21e0"}
    assert {r.session_id for r in records if isinstance(r, Conversation)} == {in_session[0].session_id}
    known = {m.native_id: m.parts for m in in_file}
    assert all(known[m.native_id] == m.parts for m in in_session)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.name)
def test_samples_are_accounted_for(path: Path) -> None:
    content = path.read_bytes()
    records, skipped = read(content)
    assert_accounted(content, records, skipped)
    assert_well_formed(records)
    assert len(content) < 60_000
    assert claude_code.detect(Probe(content[:65536], True)) > 90


# -- single rules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "kinds"),
    [
        ("fix it", ["text"]),
        ("<b>bold</b> claim", ["text"]),
        ("a <system-reminder>x</system-reminder> b", ["text", "context", "text"]),
        ("<system-reminder>x</system-reminder>\n<system-reminder>y</system-reminder>\n", ["context"]),
        ("  \n<ide_opened_file>a.py</ide_opened_file>\nwhy?", ["context", "text"]),
        ("<command-name>/clear</command-name>\n <command-args></command-args>", ["event"]),
        ("<bash-input>ls</bash-input>", ["event"]),
        ("<local-command-stdout></local-command-stdout>", ["context"]),
        ("<system-reminder>never closed", ["text"]),
        ("[Request interrupted by user]", ["event"]),
        ("This session is being continued from a previous conversation that ran out of context.", ["summary"]),
    ],
)
def test_user_text_is_split_without_loss(content: str, kinds: list[str]) -> None:
    for form in (content, [{"type": "text", "text": content}]):
        (message,) = messages(read(user(form))[0])
        assert [p.kind for p in message.parts] == kinds
        assert "".join(p.text for p in message.parts) == content


def test_flags_of_lines() -> None:
    (message,) = messages(read(user("look", isSidechain=True, parentUuid=[]))[0])
    assert (message.agent_id, message.parent_id) == ("sidechain", None)
    (message,) = messages(read(user([{"type": "text", "text": "You are a reviewer."}], isMeta=True))[0])
    assert [p.kind for p in message.parts] == ["context"]


def test_two_sessions_in_a_file() -> None:
    content = user("one", sessionId="a", uuid="1") + user("two", sessionId="b", uuid="2", parentUuid="1")
    records, _ = read(content)
    assert [type(r).__name__ for r in records] == ["Conversation", "Message", "Conversation", "Message"]
    assert isinstance(records[2], Conversation)
    assert records[2].parent_session_id == "a"
    assert [m.parent_id for m in messages(records)] == ["", None]


def test_parent_through_lines_that_are_no_messages() -> None:
    content = user("one", uuid="1") + b"".join(
        line(type="progress", uuid=f"p{i}", parentUuid=f"p{i - 1}" if i else "1", data={"type": "hook_progress"})
        for i in range(3)
    )
    found = messages(read(content + user("two", uuid="2", parentUuid="p2"))[0])
    assert found[1].parent_id == "1"


def test_nested_and_odd_blocks() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    blocks = [
        {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "x"}, image]},
        {"type": "tool_result", "tool_use_id": "c2"},
        {"type": "something_new", "value": 1},
    ]
    (message,) = messages(read(user(blocks))[0])
    assert [(p.kind, p.call_id) for p in message.parts] == [
        ("tool_result", "c1"), ("image", "c1"), ("tool_result", "c2"), ("event", None),
    ]  # fmt: skip
    assert message.parts[1].data["bytes"] == 3
    assert message.parts[3].text == '{"type":"something_new","value":1}'


def test_queued_words_are_delivered_once() -> None:
    operation = {"type": "queue-operation", "sessionId": "s"}
    enqueue = json.dumps({**operation, "operation": "enqueue", "content": "and the docs"}).encode() + b"\n"
    remove = json.dumps({**operation, "operation": "remove"}).encode() + b"\n"
    attachment = line(type="attachment", attachment={"type": "queued_command", "prompt": "and the docs"})
    for content in (enqueue + remove + attachment, enqueue + attachment + remove):
        found, skipped = read(content)
        assert [p.text for m in messages(found) for p in m.parts] == ["and the docs"]
        assert_accounted(content, found, skipped)
    dequeue = remove.replace(b"remove", b"dequeue")
    assert len(messages(read(enqueue + dequeue + user("and the docs"))[0])) == 1


def test_detect() -> None:
    real_start = user("hi")
    assert claude_code.detect(Probe(b'{"cut\n' + real_start, True)) > 90
    assert claude_code.detect(Probe(b'{"parentUuid":null,"isSidechain":false,"sessionId":"' + b"x" * 70000)) > 50
    for other in (
        b"", b"{}", b"[]", b"hello\n", b'{"type":"session_meta","payload":{}}\n', b'{"messages":[{"role":"user"}]}\n',
        b'{"type":"message","id":"1","parentId":null,"message":{"role":"user","content":[]}}\n',
        b'{"sessionId":"x","projectHash":"y","messages":[]}', b'{"conversations":[{"from":"human","value":"x"}]}\n',
    ):  # fmt: skip
        assert claude_code.detect(Probe(other, True)) == 0


# -- real logs ------------------------------------------------------------------------------------------------------


def count_independently(rows: list[dict[str, Any]]) -> tuple[set[str], Counter[str]]:
    """Ids of the messages and numbers of blocks, from the raw rows, by the letter of the format only."""
    ids: set[str] = set()
    blocks: Counter[str] = Counter()
    for row in rows:
        if row["type"] == "progress" and row["data"]["type"] == "agent_progress":
            row = row["data"]["message"]
        if row["type"] in ("user", "assistant"):
            content = row["message"]["content"]
            kinds = ["text"] if isinstance(content, str) else [block["type"] for block in content]
            blocks.update(kinds)
            ids.add(row["message"]["id"] if row["type"] == "assistant" else row["uuid"])
            if {"text", "tool_result"} <= set(kinds):
                ids.add(row["uuid"] + ":user")
    return ids, blocks


@needs_real
@pytest.mark.parametrize("path", REAL, ids=lambda p: p.stem[:8])
def test_real_log(path: Path) -> None:
    content = path.read_bytes()
    records, skipped = read(content)
    assert not [r for r in records if isinstance(r, Unreadable)]
    assert_accounted(content, records, skipped)
    assert_well_formed(records)
    rows = [json.loads(raw) for raw in content.splitlines()]
    ids, blocks = count_independently(rows)
    found = messages(records)
    delivered = sum(row["type"] == "queue-operation" and row["operation"] == "remove" for row in rows)
    assert {m.native_id for m in found if not m.native_id.startswith("@")} == ids
    assert sum(m.native_id.startswith("@") for m in found) == delivered
    parts = Counter(p.kind for m in found for p in m.parts)
    assert parts["tool_call"] == blocks["tool_use"]
    assert parts["thinking"] == blocks["thinking"]
    calls = {p.call_id for m in found for p in m.parts if p.kind == "tool_result"}
    assert len(calls) == blocks["tool_result"]
    known = {m.native_id: m for m in found}
    assert all(m.parent_id in known for m in found if m.parent_id)
    uuids = {row.get("uuid") for row in rows}
    roots = sum("uuid" in row and row["parentUuid"] not in uuids - {None} for row in rows)
    assert sum(not m.parent_id for m in found) <= roots
    assert all(known[m.parent_id].agent_id is None for m in found if m.parent_id and m.agent_id is None)
    usage = {m.native_id: m.tokens_out for m in found if m.tokens_out is not None}
    assert len(usage) == len({m.native_id for m in found if m.role == "assistant" and m.model})


# -- damage ---------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "a", "text", "user", "assistant", "tool_use", "tool_result", "image", "base64", "remove"])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["type", "text", "content", "message", "id", "input", "source", "data", "usage", "input_tokens",
             "tool_use_id", "attachment", "prompt", "thinking", "name", "model", "agentId", "sessionId"]
        ), inner, max_size=5),
    max_leaves=12,
)  # fmt: skip
KINDS = st.sampled_from(
    ["user", "assistant", "system", "progress", "attachment", "summary", "ai-title", "custom-title", "queue-operation"]
)
FIELDS = [
    "message", "uuid", "parentUuid", "sessionId", "timestamp", "isMeta", "isSidechain", "agentId", "data", "content",
    "attachment", "operation", "summary", "leafUuid", "customTitle", "cwd", "version", "forkedFrom", "subtype",
    "isCompactSummary", "logicalParentUuid", "error", "hookErrors", "requestId",
]  # fmt: skip
CONTENTS = st.lists(VALUES, max_size=3) | st.text(max_size=30)
MESSAGES = st.builds(lambda role, content: {"role": role, "content": content, "id": "m"}, KINDS, CONTENTS)
ROWS = st.builds(
    lambda kind, row, message: {**row, **({"message": message} if message else {}), "type": kind},
    KINDS | VALUES, st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=8), st.none() | MESSAGES,
)  # fmt: skip
LINES = ROWS.map(lambda row: json.dumps(row).encode()) | st.sampled_from([b"", b" ", b"[]", b'{"a":']) | st.binary()


@settings(max_examples=200, deadline=None)
@given(st.lists(LINES, max_size=8))
def test_any_objects_and_bytes_are_accounted_for(lines: list[bytes]) -> None:
    content = b"\n".join(lines)
    records, skipped = read(content)
    assert_accounted(content, records, skipped)
    assert_well_formed(records)
    claude_code.detect(Probe(content, True))
