"""Commits and titles as queries, and how copies of a query are found; more in test_calibrate.py."""

from __future__ import annotations

from collections import Counter

import duckdb
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.memory.mined_queries import commit_queries, copied, plain, shell_commands, title_queries


def committed(con: duckdb.DuckDBPyConnection, seq: int, text: str, message: str, *, edits: bool = True) -> None:
    """An exchange of its own conversation whose agent commits."""
    files = orjson.dumps([{"path": "a.py", "action": "modified"}] if edits else []).decode()
    con.execute(
        "INSERT INTO exchanges BY NAME SELECT ?::BIGINT AS seq, 'e' || ? AS exchange_id, 'c' || ? AS conversation_id, "
        "'' AS thread, 0 AS position, 0 AS ply_start, 1 AS ply_end, ? AS user_text, '' AS assistant_text, "
        "'s' AS source_id, ?::JSON AS files, [] AS tools, 9 AS num_tokens, 'h' AS content_hash",
        [seq, str(seq), str(seq), text, files],
    )
    con.execute(
        "INSERT INTO messages BY NAME SELECT ?::BIGINT AS seq, 'm' || ? AS message_id, 'c' || ? AS conversation_id, "
        "1 AS ply, '' AS thread, 'assistant' AS role, 'n' AS native_id, 's' AS source_id, 0 AS source_offset, "
        "0 AS source_length",
        [seq, str(seq), str(seq)],
    )
    con.execute(
        "INSERT INTO parts BY NAME SELECT ?::BIGINT AS seq, 'p' || ? AS part_id, 'm' || ? AS message_id, "
        "'c' || ? AS conversation_id, 'tool_call' AS kind, '' AS text, 'Bash' AS name, ? AS data, 0 AS ordinal",
        [seq, str(seq), str(seq), str(seq), orjson.dumps({"command": f"git commit -m '{message}'"}).decode()],
    )


def test_what_is_no_query_is_counted_by_reason(con: duckdb.DuckDBPyConnection) -> None:
    committed(con, 1, "please", "wip")
    committed(con, 2, "Did: round totals, before tax!", "round totals before tax")
    committed(con, 3, "go on", "Write down the release steps")
    dropped: Counter[str] = Counter()
    assert [q.text for q in commit_queries(con, dropped)] == ["Write down the release steps"]
    assert dropped == {"commit_too_short": 1, "commit_copied": 1}
    kept = [q.text for q in commit_queries(con, keep_copied=True)]
    assert kept == ["round totals before tax", "Write down the release steps"]


def test_titles_are_counted_too(con: duckdb.DuckDBPyConnection) -> None:
    for seq, title in enumerate(["Short", "Rounding errors in checkout", "The text says just this"], 1):
        committed(con, seq, "see: the text says, just this", "x")
        con.execute(
            "INSERT INTO conversations BY NAME SELECT 'c' || ? AS conversation_id, 'f' AS format, 's' AS session_id, "
            "? AS title, 's' AS source_id, 'p' AS path, 0 AS first_seq, 4 AS num_messages",
            [str(seq), title],
        )
    dropped: Counter[str] = Counter()
    assert [(q.text, q.relevant) for q in title_queries(con, dropped)] == [("Rounding errors in checkout", {2})]
    assert dropped == {"title_too_short": 1, "title_copied": 1}
    assert len(list(title_queries(con, keep_copied=True))) == 2


@pytest.mark.parametrize(
    ("data", "commands"),
    [
        ('{"command": "ls"}', ["ls"]),
        ('{"cmd": ["bash", "-lc", "ls"]}', ["ls"]),
        ('"ls"', ["ls"]),
        ('{"path": "x"}', []),
        ("null", []),
        ("[1]", []),
        ('{"command": []}', []),
    ],
)
def test_shell_commands(data: str, commands: list[str]) -> None:
    assert shell_commands(data) == commands


words = st.lists(st.sampled_from(["fix", "the", "Bug", "now", "bug,"]), max_size=8).map(" ".join)


@given(st.lists(words, max_size=5), st.lists(words, max_size=5))
def test_copies_are_found_as_a_search_for_each_query_finds_them(queries: list[str], texts: list[str]) -> None:
    found = copied(queries, enumerate(texts))
    for query, numbers in zip(queries, found, strict=True):
        wanted = f" {plain(query)} "
        expected = {at for at, text in enumerate(texts) if wanted.strip() and wanted in f" {plain(text)} "}
        assert numbers == expected
