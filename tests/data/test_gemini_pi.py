"""The importers of Gemini CLI sessions (document and lines) and of Pi sessions."""

from __future__ import annotations

import io
import json
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from importer_checks import messages, read

from workbench.data.importers import gemini_cli, pi
from workbench.data.importers.base import Source
from workbench.data.records import Conversation, Message, Part, Unreadable

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "data/samples"
SHARED = Path(os.environ.get("WORKBENCH_SHARED_DATA", ROOT.parent / "shared/data"))
REAL = sorted((SHARED / "agent_logs/gemini").rglob("*.json"))
LINES = (SAMPLES / "gemini_cli/session-2026-04-02T16-20-b81e77aa.jsonl").read_bytes()
DOCUMENT = (SAMPLES / "gemini_cli/session-2026-01-14T09-02-6f1d2c30.json").read_bytes()
PI = (SAMPLES / "pi/2026-03-05T08-40-00_3d9a61c2.jsonl").read_bytes()


def lines(*rows: Any) -> bytes:
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


def gemini(native_id: str, text: str = "words", kind: str = "user") -> dict[str, Any]:
    return {"id": native_id, "timestamp": "2026-04-02T16:20:05.000Z", "type": kind, "content": text}


def test_gemini_document() -> None:
    records, skipped = read(gemini_cli, DOCUMENT)
    found = {m.native_id: m for m in messages(records)}
    talk = next(r for r in records if isinstance(r, Conversation))
    assert (talk.session_id[:8], talk.project) == ("6f1d2c30", "/home/sam/work/parcel-tracker")
    assert [p.kind for p in found["g-02"].parts] == ["text", "context", "context", "context", "context"]
    assert [p.kind for p in found["g-03"].parts] == ["thinking", "tool_call", "tool_call"]
    good, bad = found["g-03/results"].parts
    assert (good.text, good.is_error, good.call_id) == ("2026-01-12T23:30:05+00:00", False, "run_shell_command-1")
    assert (bad.is_error, "ZoneInfoNotFoundError" in bad.text) == (True, True)
    assert found["g-04"].parent_id == "g-03/results"
    assert found["g-06"].parts[0].data["bytes"] == 70
    assert found["g-08"].parts == [
        Part("event", "[API Error: 503 The model is overloaded. Please try again later.]", "error")
    ]
    assert (found["g-04"].tokens_in, found["g-04"].tokens_out, found["g-04"].tokens_cached) == (8420, 118, 8120)
    assert found["g-02"].created_at == 1768381360120000
    assert not skipped
    assert DOCUMENT[found["g-02"].offset :][: found["g-02"].length].startswith(b'{\n      "id": "g-02"')


def test_gemini_metadata_after_the_messages() -> None:
    whole = orjson.loads(DOCUMENT)
    late = {"sessionId": whole["sessionId"], "messages": whole["messages"], "summary": "late"}
    records, _ = read(gemini_cli, json.dumps(late).encode())
    assert records[-1] == Conversation(whole["sessionId"], agent="gemini-cli", title="late")
    assert len(messages(records)) == len(messages(read(gemini_cli, DOCUMENT)[0]))


def test_gemini_rewind_leaves_a_side_branch() -> None:
    records, skipped = read(gemini_cli, LINES)
    parents = {m.native_id: m.parent_id for m in messages(records)}
    assert parents == {
        "j-01": None, "j-02": "j-01", "j-02/results": "j-02", "j-03": "j-02/results", "j-04": "j-03", "j-05": "j-04",
        "j-06": "j-03", "j-08": "j-06", "j-09": "j-08",
    }  # fmt: skip
    assert [m.native_id for m in messages(records)].count("j-02") == 2
    assert skipped == {"metadata": 1, "$set": 1, "$rewindTo": 1}
    assert [r.unfinished for r in records if isinstance(r, Unreadable)] == [False, True]
    assert [r.title for r in records if isinstance(r, Conversation)] == [None, "Webhooks answered with 401"]


def test_gemini_rewind_to_the_first_and_to_an_unknown_message() -> None:
    for target in ("a", "gone"):
        content = lines(
            {"sessionId": "s", "projectHash": "h"}, gemini("a"), gemini("b"), {"$rewindTo": target}, gemini("c")
        )
        assert {m.native_id: m.parent_id for m in messages(read(gemini_cli, content)[0])} == {
            "a": None,
            "b": "a",
            "c": "",
        }


def test_gemini_set_messages_continues_the_session() -> None:
    shown = {"$set": {"messages": [gemini("b"), gemini("summary")]}}
    content = lines({"sessionId": "s", "projectHash": "h"}, gemini("a"), gemini("b"), shown, gemini("c"))
    found = messages(read(gemini_cli, content)[0])
    assert {m.native_id: m.parent_id for m in found} == {"a": None, "b": "a", "summary": "b", "c": "summary"}


def read_in_two(content: bytes, boundary: int) -> tuple[list[Message], int]:
    """The messages of both reads, and how often the second one read the beginning again."""
    first = Source("log", io.BytesIO(content[:boundary]))
    before = list(gemini_cli.read(first))
    times = 0

    def earlier() -> AbstractContextManager[BinaryIO]:
        nonlocal times
        times += 1
        return nullcontext(io.BytesIO(content))

    session_id = next((r.session_id for r in before if isinstance(r, Conversation)), None)
    session = {"session_id": session_id, "meta": {}} if session_id else None
    state = orjson.loads(orjson.dumps(first.state))
    rest = Source("log", io.BytesIO(content[boundary:]), boundary, session, state=state, earlier=earlier)
    return messages(before) + messages(list(gemini_cli.read(rest))), times


def line_ends(content: bytes) -> list[int]:
    return [i + 1 for i, byte in enumerate(content) if byte == 10]


def test_gemini_resumes_at_every_line() -> None:
    whole = messages(read(gemini_cli, LINES)[0])
    assert [read_in_two(LINES, end)[0] for end in line_ends(LINES)] == [whole] * len(line_ends(LINES))


def test_gemini_reads_the_beginning_again_only_for_what_it_does_not_know() -> None:
    def at(number: int) -> dict[str, Any]:
        return {**gemini(f"m{number}"), "timestamp": f"2026-04-02T16:{number // 60:02}:{number % 60:02}.000Z"}

    first = [{"sessionId": "s", "projectHash": "h"}, *map(at, range(200))]
    boundary = len(lines(*first))
    for rest, times in (
        ([at(200), at(201)], 0),
        ([at(198), at(200)], 0),  # written again, and near
        ([{"$rewindTo": "m190"}, at(200)], 0),
        ([{"$rewindTo": "m3"}, at(200), {"$rewindTo": "m1"}, at(201)], 1),
        ([at(3), at(200)], 1),
        ([{"$set": {"messages": [at(0), at(1), at(200)]}}, at(201)], 1),
        ([{"$rewindTo": "gone"}, at(200)], 1),
        ([gemini("untimed") | {"timestamp": None}], 1),
    ):
        content = lines(*first, *rest)
        assert read_in_two(content, boundary) == (messages(read(gemini_cli, content)[0]), times), rest


@given(st.lists(st.integers(0, 12), max_size=25), st.integers(0, 25))
@settings(max_examples=150, deadline=None)
def test_gemini_read_in_two_is_read_once(steps: list[int], cut: int) -> None:
    rows = [{"sessionId": "s", "projectHash": "h"}]
    rows += [{"$rewindTo": f"m{step - 8}"} if step >= 8 else gemini(f"m{step}", "words") for step in steps]
    content = lines(*rows)
    boundary = line_ends(content)[cut % len(rows)]
    assert read_in_two(content, boundary)[0] == messages(read(gemini_cli, content)[0])


@given(st.lists(st.integers(0, 9), max_size=25))
@settings(max_examples=200, deadline=None)
def test_gemini_rewinds_agree_with_truncating_a_list(steps: list[int]) -> None:
    rows: list[Any] = [{"sessionId": "s", "projectHash": "h"}]
    shown: list[str] = []
    for number, step in enumerate(steps):
        if step < 4 and shown:
            target = shown[step % len(shown)]
            rows.append({"$rewindTo": target})
            shown = shown[: shown.index(target)]
        else:
            rows.append(gemini(f"m{number}"))
            shown.append(f"m{number}")
    found = messages(read(gemini_cli, lines(*rows))[0])
    parents = {m.native_id: m.parent_id for m in found}
    if shown:
        path, node = [], shown[-1]
        while node:
            path.append(node)
            node = parents[node] or ""
        assert path[::-1] == shown
    assert len(found) == sum("id" in row for row in rows)


@pytest.mark.skipif(not REAL, reason=f"no real Gemini logs in {SHARED} (set WORKBENCH_SHARED_DATA)")
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_gemini_real_logs(path: Path) -> None:
    content = path.read_bytes()
    rows = orjson.loads(content)["messages"]
    records, skipped = read(gemini_cli, content)
    found = messages(records)
    assert not skipped
    assert not any(isinstance(r, Unreadable) for r in records)
    assert [m.native_id for m in found if m.role != "tool"] == [row["id"] for row in rows]
    assert [p.text for m in found for p in m.parts if p.kind == "text"] == [r["content"] for r in rows if r["content"]]
    calls = [call for row in rows for call in row.get("toolCalls", [])]
    assert [(p.name, p.data) for m in found for p in m.parts if p.kind == "tool_call"] == [
        (c["name"], c["args"]) for c in calls
    ]
    outputs = [c["result"][0]["functionResponse"]["response"]["output"] for c in calls]
    assert [p.text for m in found for p in m.parts if p.kind == "tool_result"] == outputs


def test_pi_tree() -> None:
    records, skipped = read(pi, PI)
    found = {m.native_id: m for m in messages(records)}
    rows = [json.loads(line) for line in PI.splitlines() if line.startswith(b"{")]
    assert {m.native_id: m.parent_id for m in found.values()} == {r["id"]: r["parentId"] or "" for r in rows[1:]}
    assert (found["a0000004"].tokens_in, found["a0000006"].tokens_in, found["a0000006"].tokens_cached) == (
        2100,
        2400,
        2100,
    )
    assert [p.kind for p in found["a0000004"].parts] == ["thinking", "text", "tool_call"]
    assert found["a0000009"].parts[0].is_error is True
    assert (found["a0000010"].parts[0].kind, found["a0000014"].parts[0].kind) == ("summary", "summary")
    assert [p.kind for p in found["a0000011"].parts] == ["text", "image"]
    assert found["a0000013"].parts == [Part("context", "$ pytest -q\n66 passed in 8.02s", "bash", is_error=False)]
    assert [r.title for r in records if isinstance(r, Conversation) and r.title] == ["429 for everybody behind nginx"]
    assert skipped == {"session": 1}
    assert sum(isinstance(r, Unreadable) for r in records) == 1


def test_pi_second_root_and_leaf() -> None:
    def entry(native_id: str, parent: str | None) -> dict[str, Any]:
        message = {"role": "user", "content": "words"}
        return {"type": "message", "id": native_id, "parentId": parent, "message": message}

    session = {"type": "session", "version": 3, "id": "s-1", "cwd": "/home/sam"}
    content = lines(session, entry("a", None), entry("b", None), {"type": "leaf", "id": "l", "targetId": "a"})
    records, _ = read(pi, content)
    assert [m.parent_id for m in messages(records)] == ["", ""]
    assert records[-1] == Conversation("s-1", active_leaf="a")


def test_pi_resumes_at_every_line() -> None:
    whole = messages(read(pi, PI)[0])
    at = 0
    for line in PI.splitlines(keepends=True):
        at += len(line)
        session = {"session_id": "3d9a61c2-93a7-4e8c-8a0e-1b6d5f4c7a03", "meta": {}}
        assert messages(read(pi, PI, at, session)[0]) == [m for m in whole if m.offset >= at]
