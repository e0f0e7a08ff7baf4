"""ingest: twice, growing, cut, replaced, moved and broken logs; what JSON allows and programs write nevertheless."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import orjson
import pytest
import store_helpers as helpers

from workbench import api
from workbench.data import ingest
from workbench.data.ingest import Report
from workbench.data.store import Store
from workbench.errors import InputError

SAMPLES = Path(__file__).parents[2] / "data/samples"
LOGS = sorted(p for p in SAMPLES.rglob("*") if p.is_file() and p.suffix != ".md")
#: Formats of lines that are read on where the last read ended, whether or not programs add to such files.
GROWING = [
    p
    for p in LOGS
    if p.suffix == ".jsonl"
    and p.parent.name in ("claude_code", "codex", "gemini_cli", "pi", "openai_chat", "openhands", "sharegpt")
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store" / "w.duckdb"


def query(path: Path, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
    with Store(path, read_only=True) as store:
        return store.con.execute(sql, list(parameters)).fetchall()


def quarantined(path: Path) -> list[tuple[Any, ...]]:
    return query(
        path, "SELECT byte_offset, byte_length, reason, raw, unfinished FROM quarantine ORDER BY path, byte_offset"
    )


def added(report: Report) -> tuple[int, int, int]:
    return report.conversations_added, report.messages_added, report.exchanges_added


# -- twice, and bit by bit --------------------------------------------------------------------------------------------


def test_all_samples_twice(path: Path) -> None:
    first = api.ingest([SAMPLES], path)
    assert first.conversations_added > 10
    before = helpers.content(path)
    second = api.ingest([SAMPLES], path)
    assert added(second) == (0, 0, 0)
    assert second.bytes_read == 0
    assert second.conversations_unchanged == len(query(path, "SELECT 1 FROM conversations"))
    assert second.messages_unchanged == first.messages_added
    assert not helpers.difference(before, helpers.content(path))
    # Read again from the start, as after a change of the clock of each file.
    with Store(path) as store:
        store.con.execute("UPDATE sources SET mtime_ns = 0, bytes_read = 0, fingerprint = ''")
    third = api.ingest([SAMPLES], path)
    assert added(third) == (0, 0, 0)
    assert third.bytes_read > 100_000
    assert not helpers.difference(before, helpers.content(path))


@pytest.mark.parametrize("sample", [pytest.param(p, id=f"{p.parent.name}-{p.stem[:12]}") for p in GROWING])
def test_growing_log_reads_only_what_is_new(path: Path, tmp_path: Path, sample: Path) -> None:
    """Cut at line ends and in the middle of lines; each step reads the bytes that the step before did not."""
    rng = random.Random(sample.name)
    whole = sample.read_bytes()
    log = tmp_path / sample.name
    log.write_bytes(whole)
    format = api.ingest([log], tmp_path / "once.duckdb").formats.most_common(1)[0][0]
    ends = [i + 1 for i, c in enumerate(whole) if c == 10]
    cuts = sorted({*rng.sample(ends, min(2, len(ends))), *(rng.randrange(1, len(whole)) for _ in range(1)), len(whole)})
    for cut in cuts:
        log.write_bytes(whole[:cut])
        done = query(path, "SELECT bytes_read FROM sources")[0][0] if path.exists() else 0
        report = api.ingest([log], path, format=format)
        line_start = whole.rfind(b"\n", 0, cut) + 1
        rest = whole[line_start:cut]
        is_unfinished = bool(rest.strip()) and not _is_json(rest)
        assert report.bytes_read == cut - done
        if query(path, "SELECT 1 FROM sources WHERE bytes_read > 0"):
            assert [row[0] for row in quarantined(path) if row[4]] == ([line_start] if is_unfinished else [])
        assert api.ingest([log], path, format=format).messages_added == 0
    once = tmp_path / "once.duckdb"
    for sql in (
        "SELECT COLUMNS(* EXCLUDE first_seq)::VARCHAR FROM conversations ORDER BY ALL",
        "SELECT COLUMNS(* EXCLUDE seq)::VARCHAR FROM messages ORDER BY ALL",
        "SELECT COLUMNS(* EXCLUDE seq)::VARCHAR FROM parts ORDER BY ALL",
    ):
        assert query(path, sql) == query(once, sql)
    for table in ("exchanges", "index"):
        assert helpers.content(path)[table] == helpers.content(once)[table], table
    assert quarantined(path) == quarantined(once)


@pytest.mark.parametrize("format", ["langsmith", "otel"])
def test_growing_trace_says_the_same_on_the_active_thread(path: Path, tmp_path: Path, format: str) -> None:
    """Spans that come later can give earlier words another place: these stay as branches, and nothing is missing."""
    [sample] = (SAMPLES / format).iterdir()
    log, once, content = tmp_path / "a.jsonl", tmp_path / "once.duckdb", b""
    for line in sample.read_bytes().splitlines(keepends=True):
        content += line
        log.write_bytes(content)
        report = api.ingest([log], path, format=format)
        assert report.bytes_read == len(content), "read again as a whole"
    api.ingest([log], once, format=format)
    native = "SELECT conversation_id, native_id FROM messages"
    assert set(query(path, native)) > set(query(once, native))
    said = native + " WHERE thread = '' AND role IN ('user', 'assistant') ORDER BY conversation_id, ply"
    assert query(path, said) == query(once, said)


def _is_json(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


def _session(name: str, turns: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    return helpers.claude_session(random.Random(seed), name, turns)


def test_unfinished_line_leaves_quarantine_when_it_is_completed(path: Path, tmp_path: Path) -> None:
    log = helpers.write_jsonl(tmp_path / "a.jsonl", _session("s"))
    whole = log.read_bytes()
    log.write_bytes(whole[:-40])
    report = api.ingest([log], path)
    assert report.quarantined == 1
    [(offset, length, reason, raw, unfinished)] = quarantined(path)
    assert (offset, bytes(raw), unfinished) == (
        whole[:-1].rfind(b"\n") + 1,
        whole[whole[:-1].rfind(b"\n") + 1 : -40],
        True,
    )
    assert length == len(raw)
    assert "still being written" in reason
    log.write_bytes(whole)
    report = api.ingest([log], path)
    assert (report.quarantined, report.messages_added, report.bytes_read) == (0, 1, len(whole) - offset)
    assert quarantined(path) == []


@pytest.mark.parametrize(
    ("name", "share"),
    [("openai_chat/support-rows.jsonl", 0.83), ("swe_agent", 0.2), ("swe_agent", 0.6), ("swe_agent", 0.8)],
)
def test_a_document_that_is_still_being_written_is_no_conversation_of_its_own(
    name: str, share: float, path: Path, tmp_path: Path
) -> None:
    sample = SAMPLES / name
    whole = (sample if sample.is_file() else next(sample.iterdir())).read_bytes()
    end = whole.index(b"\n") if sample.is_file() else len(whole)  # of the first line, or of the document
    log = tmp_path / "log.json"
    log.write_bytes(whole[: int(end * share)])
    api.ingest([log], path)
    assert any(unfinished for *_, unfinished in quarantined(path))
    log.write_bytes(whole)
    api.ingest([log], path)
    api.ingest([log], tmp_path / "once")
    for sql in ("SELECT conversation_id FROM conversations", "SELECT message_id FROM messages"):
        assert sorted(query(path, sql)) == sorted(query(tmp_path / "once", sql))
    assert quarantined(path) == quarantined(tmp_path / "once")


def test_truncated_replaced_and_rotated(path: Path, tmp_path: Path) -> None:
    log = helpers.write_jsonl(tmp_path / "a.jsonl", _session("one"))
    whole = log.read_bytes()
    api.ingest([log], path)
    before = helpers.verbatim(path)
    log.write_bytes(whole[: len(whole) // 2])
    assert api.ingest([log], path).messages_added == 0
    log.write_bytes(b"")
    assert added(api.ingest([log], path)) == (0, 0, 0)
    assert not before["parts"] - helpers.verbatim(path)["parts"], "what was stored stays"
    helpers.write_jsonl(log, _session("two", turns=9, seed=2))
    report = api.ingest([log], path)
    assert (report.conversations_added, report.bytes_read) == (1, log.stat().st_size)
    log.rename(tmp_path / "a.jsonl.1")
    helpers.write_jsonl(log, _session("three", seed=3))
    report = api.ingest([tmp_path], path)
    assert report.conversations_added == 1
    assert report.conversations_updated == 0
    assert [r[0] for r in query(path, "SELECT session_id FROM conversations ORDER BY 1")] == ["one", "three", "two"]


def test_moved_file_and_session_in_two_files(path: Path, tmp_path: Path) -> None:
    rows = _session("s", turns=6)
    a = helpers.write_jsonl(tmp_path / "a.jsonl", rows[:18])
    b = helpers.write_jsonl(tmp_path / "b.jsonl", rows[12:])
    once = helpers.write_jsonl(tmp_path / "once.jsonl", rows)
    api.ingest([a, b], path)
    api.ingest([once], tmp_path / "once.duckdb")
    sql = "SELECT message_id, ply, role, thread FROM messages ORDER BY ALL"
    assert query(path, sql) == query(tmp_path / "once.duckdb", sql)
    assert query(path, "SELECT count(*) FROM conversations") == [(1,)]
    moved = tmp_path / "elsewhere" / "c.jsonl"
    moved.parent.mkdir()
    a.rename(moved)
    report = api.ingest([moved], path)
    assert added(report) == (0, 0, 0)
    assert report.messages_unchanged > 0


def test_forced_format(path: Path, tmp_path: Path) -> None:
    log = helpers.write_jsonl(tmp_path / "a.jsonl", _session("s"))
    wrong = api.ingest([log], path, format="sharegpt")
    assert wrong.messages_added == 0
    assert wrong.quarantined + sum(wrong.skipped.values()) == len(log.read_bytes().splitlines())
    right = api.ingest([log], path, format="claude_code")
    assert right.conversations_added == 1, "another format reads from the start"
    with pytest.raises(InputError, match=r"'claude'.*claude_code"):
        api.ingest([log], path, format="claude")


def test_interrupted_in_the_middle_of_a_file_goes_on_there(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = helpers.write_jsonl(tmp_path / "many.jsonl", helpers.many_conversations(random.Random(4), 400))
    api.ingest([log], tmp_path / "once.duckdb")
    monkeypatch.setattr(ingest, "COMMIT_BYTES", 20_000)
    calls = 0
    original = ingest._Ingest._commit

    def commit(self: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(ingest._Ingest, "_commit", commit)
    with pytest.raises(KeyboardInterrupt):
        api.ingest([log], path)
    [(size, read)] = query(path, "SELECT size_bytes, bytes_read FROM sources")
    assert size == -1
    assert 3 * 20_000 <= read < log.stat().st_size / 2, "commits are this far apart, not at every conversation"
    report = api.ingest([log], path)
    assert report.bytes_read == log.stat().st_size - read
    assert not helpers.difference(helpers.content(tmp_path / "once.duckdb"), helpers.content(path))


@pytest.mark.parametrize("num_logs", [1, 5])
def test_who_derives_is_told_what_follows(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_logs: int
) -> None:
    monkeypatch.setattr(ingest, "COMMIT_BYTES", 1)
    logs = [
        helpers.write_jsonl(tmp_path / f"{i}.jsonl", helpers.claude_session(random.Random(i), f"s{i}", 3))
        for i in range(num_logs)
    ]
    calls: list[tuple[int, bool]] = []

    def on_change(con: Any, conversation_ids: list[str], more_follows: bool = False) -> tuple[int, int]:
        calls.append((len(conversation_ids), more_follows))
        return 0, 0

    with Store(path) as store:
        ingest.ingest(store, [*map(str, logs)], on_change=on_change)
        assert calls == [(1, True)] * num_logs + [(0, False)]
        calls.clear()
        ingest.ingest(store, [*map(str, logs)], on_change=on_change)
        assert calls == [], "nothing changed"
        monkeypatch.setattr(ingest, "COMMIT_BYTES", 1 << 30)
        more = helpers.write_jsonl(tmp_path / "more.jsonl", helpers.claude_session(random.Random(9), "more", 3))
        ingest.ingest(store, [str(more)], on_change=on_change)
        assert calls == [(1, False)]


# -- what JSON allows, and what programs write nevertheless -----------------------------------------------------------


def _line(text: str) -> bytes:
    return (
        b'{"workbench":1,"type":"message","session_id":"s","role":"user","native_id":"n%d","parts":[{"kind":"text","text":"x"},'
        b'{"kind":"tool_call","data":%s}]}\n' % (len(text), text.encode())
    )


def _messages(path: Path) -> list[tuple[Any, ...]]:
    return query(
        path,
        "SELECT m.native_id, p.data, m.meta FROM messages m JOIN parts p USING (message_id) WHERE p.kind = 'tool_call'",
    )


@pytest.mark.parametrize(
    ("json_text", "stored", "is_repaired"),
    [
        (r'"\ud83d alone"', '"\ufffd alone"', True),
        (r'"\ude00\ud83d\ude00"', '"\ufffd\U0001f600"', True),
        (r'"\\ud83d"', r'"\\ud83d"', False),
        (r'{"\udc00":1}', '{"\ufffd":1}', True),
        ("[NaN,Infinity,-Infinity]", "[null,null,null]", True),
        ("123456789012345678901234567890", "1.2345678901234568e29", False),
        (r'"a\u0000b"', r'"a\u0000b"', False),
    ],
)
def test_json_that_orjson_refuses(path: Path, tmp_path: Path, json_text: str, stored: str, is_repaired: bool) -> None:
    log = tmp_path / "a.jsonl"
    log.write_bytes(_line(json_text))
    assert api.ingest([log], path).quarantined == 0
    [(_, data, meta)] = _messages(path)
    assert orjson.loads(data) == orjson.loads(stored)
    assert (orjson.loads(meta or "{}").get("json_repaired") is True) == is_repaired


@pytest.mark.parametrize("depth", [200, 300, 900, 1015])
def test_deep_nesting_is_kept(path: Path, tmp_path: Path, depth: int) -> None:
    log, nested = tmp_path / "a.jsonl", "[" * depth + "]" * depth
    log.write_bytes(_line(nested))
    assert api.ingest([log], path).quarantined == 0
    [(_, data, _)] = _messages(path)
    value = orjson.loads(data)
    assert data == nested or value == nested


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}\n", "nested too deeply"),
        (b'{"a": \n', "not JSON"),
        (b'{"a":"\xff\xfe"}\n', "not JSON"),
        (b"[1]\n", "a JSON object was expected, not an array"),
        (b'{"type":"message"}\n', "unexpected shape"),
    ],
)
def test_lines_that_cannot_be_read(path: Path, tmp_path: Path, line: bytes, reason: str) -> None:
    log = tmp_path / "a.jsonl"
    log.write_bytes(_line("1") + line + _line("22"))
    report = api.ingest([log], path)
    assert (report.messages_added, report.quarantined) == (2, 1)
    [(offset, length, why, raw, unfinished)] = quarantined(path)
    assert (offset, length, bytes(raw), unfinished) == (len(_line("1")), len(line), line, False)
    assert why.startswith(reason)
    helpers_exit = helpers.workbench(tmp_path / "cli.duckdb", "ingest", log, "--json")
    assert helpers_exit.returncode == 3


def test_byte_order_mark_and_nul(path: Path, tmp_path: Path) -> None:
    log = tmp_path / "a.jsonl"
    text = "nul \\u0000 and \\ufeff"
    line = '{"workbench":1,"type":"message","session_id":"s","role":"user","parts":[{"kind":"text","text":"' + text
    line += '"}]}\n'
    log.write_bytes(b"\xef\xbb\xbf" + line.encode())
    assert api.ingest([log], path).quarantined == 0
    assert query(path, "SELECT text FROM parts") == [("nul \0 and \ufeff",)]


def test_messages_keep_apart_what_only_a_separator_joins(path: Path, tmp_path: Path) -> None:
    """Ids are hashes of content: two messages of one native id differ, however their parts are cut."""
    rows = [
        {"workbench": 1, "type": "message", "session_id": "s", "role": "user", "native_id": "n", "parts": parts}
        for parts in (
            [{"kind": "text", "text": "a\0text\0b"}],
            [{"kind": "text", "text": "a"}, {"kind": "text", "text": "b"}],
            [{"kind": "text", "text": "a\0None\0None\0text\0b"}],
        )
    ]
    helpers.write_jsonl(tmp_path / "a.jsonl", rows)
    assert api.ingest([tmp_path / "a.jsonl"], path).messages_added == 3
    assert api.ingest([tmp_path], path).messages_added == 0


def test_pieces_of_a_message_that_come_later_stand_behind_the_earlier_ones(path: Path, tmp_path: Path) -> None:
    log = tmp_path / "a.jsonl"
    rows = helpers.claude_session(random.Random(1), "s", 1)[:2]
    for i in range(8):
        call = {"type": "tool_use", "id": f"t{i}", "name": "Read", "input": {"file_path": f"/{i}.py"}}
        piece = {**rows[1], "uuid": f"u{i}", "message": {**rows[1]["message"], "content": [call]}}
        helpers.write_jsonl(log, [*rows, piece])
        rows.append(piece)
        api.ingest([log], path)
    found = query(path, "SELECT call_id, seq FROM parts WHERE kind = 'tool_call' ORDER BY seq, ordinal")
    assert [call_id for call_id, _ in found][-8:] == [f"t{i}" for i in range(8)]
    assert len({seq for _, seq in found[-8:]}) == 8


@pytest.mark.parametrize("at_once", [True, False])
def test_the_path_of_a_conversation_is_that_of_its_main_log(path: Path, at_once: bool) -> None:
    folder = SAMPLES / "claude_code"
    agent, main = folder / "agent-b7d21e0.jsonl", folder / "rate-limit.jsonl"
    for paths in [[agent, main]] if at_once else [[agent], [main], [agent]]:
        api.ingest(paths, path)
    assert query(path, "SELECT path FROM conversations") == [(str(main),)]
    assert api.ingest([agent, main], path).conversations_unchanged == 1
    [(cid,)] = query(path, "SELECT conversation_id FROM conversations")
    assert api.show(cid, path)["source"]["path"] == str(main)
