"""Claude Code logs that grow: two reads give what one gives, and look back only where they must."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import importer_checks
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from importer_checks import messages

from workbench.data.importers import claude_code
from workbench.data.importers.base import Source
from workbench.data.records import Conversation, Record

ROOT = Path(__file__).parents[2]
SAMPLES = sorted((ROOT / "data/samples/claude_code").glob("*.jsonl"))
SHARED = Path(os.environ.get("WORKBENCH_SHARED_DATA", ROOT.parent / "shared/data")) / "agent_logs/claude_code"
REAL = sorted(SHARED.rglob("*.jsonl"))
needs_real = pytest.mark.skipif(not REAL, reason=f"no real logs under {SHARED} (set WORKBENCH_SHARED_DATA)")


read = partial(importer_checks.read, claude_code)


def read_in_two(content: bytes, boundary: int) -> tuple[list[Record], list[Record], Counter[str], int]:
    """The records before and after, all that was skipped, and how often the beginning was read again."""
    first = Source("log.jsonl", io.BytesIO(content[:boundary]))
    before = list(claude_code.read(first))
    times = 0

    def earlier() -> AbstractContextManager[BinaryIO]:
        nonlocal times
        times += 1
        return nullcontext(io.BytesIO(content))

    state = orjson.loads(orjson.dumps(first.state))
    rest = Source("log.jsonl", io.BytesIO(content[boundary:]), boundary, state=state, earlier=earlier)
    after = list(claude_code.read(rest))
    return before, after, first.skipped + rest.skipped, times


def assert_resumes(content: bytes, boundary: int) -> int:
    whole, skipped = read(content)
    before, after, skipped_in_two, times = read_in_two(content, boundary)
    assert messages(before) + messages(after) == messages(whole)
    assert skipped_in_two == skipped
    facts = ("title", "model", "parent_session_id", "project", "started_at")
    for session_id in {m.session_id for m in messages(whole)}:
        for name in facts:
            told = [
                [v for r in records if isinstance(r, Conversation) and r.session_id == session_id
                 and (v := getattr(r, name)) is not None]
                for records in (whole, before + after)
            ]  # fmt: skip
            assert told[0] == told[1], name
    return times


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.name)
def test_samples_resume_at_every_line(path: Path) -> None:
    content = path.read_bytes()
    boundary = 0
    times = []
    for raw in io.BytesIO(content):
        times.append(assert_resumes(content, boundary))
        boundary += len(raw)
    assert max(times) <= 1
    assert sum(times) == 0, "all lines of a sample are near those that they hang on"


@needs_real
@pytest.mark.parametrize("path", REAL[:4], ids=lambda p: p.stem[:8])
def test_real_log_resumes(path: Path) -> None:
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == 10]
    for k in range(1, 6):
        assert_resumes(content, ends[len(ends) * k // 6])


def line(uuid: str, parent: str | None, kind: str = "user", session: str = "s", **fields: Any) -> bytes:
    message: dict[str, Any] = {"role": kind, "content": f"words of {uuid}"}
    if kind == "assistant":
        message = {"id": f"msg-{uuid}", "model": "m-1", "content": [{"type": "text", "text": f"words of {uuid}"}]}
    row = {"type": kind, "uuid": uuid, "sessionId": session, "parentUuid": parent, "isSidechain": False}
    return json.dumps({**row, "message": message, **fields}).encode() + b"\n"


CHAIN = line("l0", None) + b"".join(line(f"l{i}", f"l{i - 1}") for i in range(1, 100))


def operation(name: str, text: str | None = None) -> bytes:
    return (
        json.dumps({"type": "queue-operation", "operation": name, "content": text, "sessionId": "s"}).encode() + b"\n"
    )


ATTACHED = {"type": "attachment", "uuid": "q", "parentUuid": "l99", "sessionId": "s"}


@pytest.mark.parametrize(
    ("before", "after", "times"),
    [
        (CHAIN, line("x", "l99"), 0),
        (CHAIN, line("x", "l90") + line("y", "x"), 0),
        (CHAIN, line("x", "l5") + line("y", "x") + line("z", "l7"), 1),
        (CHAIN, line("x", "elsewhere") + line("y", "elsewhere2"), 1),
        (CHAIN, line("a", "l50", session="fork"), 1),
        (CHAIN + line("a", "l50", session="fork"), line("b", "a", session="fork") + line("x", "l99"), 1),
        (CHAIN, line("a", "l99", "assistant") + line("b", "a", "assistant"), 0),
        (
            CHAIN + line("a", "l99", "assistant"),
            line("b", "a", "assistant", message={"model": "m-2", "content": []}),
            0,
        ),
        (CHAIN + operation("enqueue", "wait"), operation("remove") + line("x", "l99") + line("y", "l99"), 0),
        (CHAIN + operation("enqueue", "wait") + operation("remove"), line("x", "l99") + line("y", "l3"), 1),
        (
            CHAIN + operation("enqueue", "wait") + operation("remove"),
            json.dumps({**ATTACHED, "attachment": {"type": "queued_command", "prompt": "wait"}}).encode() + b"\n",
            0,
        ),
        (b'{"type":"summary","summary":"Title","leafUuid":"l3"}\n', CHAIN, 0),
        (
            CHAIN + b'{"type":"custom-title","customTitle":"Mine","sessionId":"s"}\n',
            b'{"type":"ai-title","aiTitle":"Its","sessionId":"s"}\n',
            0,
        ),
    ],
)
def test_what_hangs_on_earlier_lines(before: bytes, after: bytes, times: int) -> None:
    assert assert_resumes(before + after, len(before)) == times


@given(st.lists(st.tuples(st.integers(0, 45), st.sampled_from("sst")), min_size=1, max_size=50), st.integers(0, 49))
@settings(max_examples=150, deadline=None)
def test_any_tree_read_in_two_is_read_once(rows: list[tuple[int, str]], cut: int) -> None:
    lines = [
        line(f"l{i}", f"l{i - 1 - back}" if back < i else None, ("user", "assistant")[i % 2], session)
        for i, (back, session) in enumerate(rows)
    ]
    assert_resumes(b"".join(lines), len(b"".join(lines[: cut % len(lines)])))


def test_notes_that_are_missing_are_made_anew() -> None:
    """A store of an older version has none."""
    content = CHAIN + line("x", "l5")
    rest = Source("log", io.BytesIO(line("x", "l5")), len(CHAIN), earlier=lambda: nullcontext(io.BytesIO(content)))
    assert messages(list(claude_code.read(rest))) == messages(read(content)[0])[100:]
