"""Calibration: what a store can be asked without labels, and weights that must hold on the half not searched."""

from __future__ import annotations

import duckdb
import numpy as np
import orjson
import pytest

from workbench.memory.calibrate import (
    Judged,
    calibrate,
    choose_weights,
    judge,
    save,
    search_weights,
)
from workbench.memory.fusion import Arm
from workbench.memory.mined_queries import LabelledQuery, commit_subject, store_queries


@pytest.mark.parametrize(
    ("command", "subject"),
    [
        ('git add -A && git commit -m "fix: round totals before tax"', "fix: round totals before tax"),
        ("git commit -am 'Add voucher table'", "Add voucher table"),
        ('git -C /w commit --message="Drop the \\"old\\" path"', 'Drop the \\"old\\" path'),
        ("git commit -m \"$(cat <<'EOF'\nAdd retry to upload\n\nCo-Authored-By: x\nEOF\n)\"", "Add retry to upload"),
        ("git commit --amend --no-edit", None),
        ("git log --grep commit", None),
        ("echo 'git commit'", None),
    ],
)
def test_commit_subject(command: str, subject: str | None) -> None:
    assert commit_subject(command) == subject


def insert(con: duckdb.DuckDBPyConnection, position: int, text: str, *, edits: bool, command: str = "") -> int:
    """An exchange of two messages in conversation c; returns its number."""
    seq, ply = position + 1, position * 2
    files = orjson.dumps([{"path": "a.py", "action": "modified"}] if edits else []).decode()
    con.execute(
        "INSERT INTO exchanges BY NAME SELECT ?::BIGINT AS seq, 'e' || ? AS exchange_id, 'c' AS conversation_id, "
        "'' AS thread, ? AS position, ? AS ply_start, ? AS ply_end, ? AS user_text, '' AS assistant_text, "
        "'s' AS source_id, ?::JSON AS files, [] AS tools, 9 AS num_tokens, 'h' AS content_hash",
        [seq, str(seq), position, ply, ply + 1, text, files],
    )
    con.execute(
        "INSERT INTO messages BY NAME SELECT ?::BIGINT AS seq, 'm' || ? AS message_id, 'c' AS conversation_id, "
        "? AS ply, '' AS thread, 'assistant' AS role, 'n' AS native_id, 's' AS source_id, 0 AS source_offset, "
        "0 AS source_length",
        [seq, str(seq), ply + 1],
    )
    if command:
        con.execute(
            "INSERT INTO parts BY NAME SELECT ?::BIGINT AS seq, 'p' || ? AS part_id, 'm' || ? AS message_id, "
            "'c' AS conversation_id, 'tool_call' AS kind, '' AS text, 'Bash' AS name, ? AS data, 0 AS ordinal",
            [seq, str(seq), str(seq), orjson.dumps({"command": command}).decode()],
        )
    return seq


def title(con: duckdb.DuckDBPyConnection, text: str) -> None:
    con.execute(
        "INSERT INTO conversations BY NAME SELECT 'c' AS conversation_id, 'f' AS format, 's' AS session_id, "
        "? AS title, 's' AS source_id, 'p' AS path, 0 AS first_seq, 4 AS num_messages",
        [text],
    )


def test_a_commit_is_answered_by_what_changed_files_since_the_one_before(con: duckdb.DuckDBPyConnection) -> None:
    one = insert(con, 0, "round it", edits=True)
    insert(con, 1, "what does this do?", edits=False)
    two = insert(con, 2, "go", edits=True, command='git commit -m "fix: totals before tax"')
    alone = insert(con, 3, "commit", edits=False, command="git commit -m 'Write down the release steps'")
    assert store_queries(con) == [
        LabelledQuery("fix: totals before tax", frozenset({one, two}), "commit"),
        LabelledQuery("Write down the release steps", frozenset({alone}), "commit"),
    ]


def test_queries_that_would_measure_copying_or_nothing_are_dropped(con: duckdb.DuckDBPyConnection) -> None:
    insert(
        con, 0, "Committed as 'Fix totals, before tax'.", edits=True, command='git commit -m "fix totals before tax"'
    )
    insert(con, 1, "x", edits=True, command='git commit -m "wip"')
    title(con, "Committed as fix totals")
    assert store_queries(con) == []


def test_a_title_is_answered_by_its_conversation(con: duckdb.DuckDBPyConnection) -> None:
    docs = {insert(con, i, f"text {i}", edits=False) for i in range(3)}
    title(con, "Rounding errors in the checkout")
    assert store_queries(con) == [LabelledQuery("Rounding errors in the checkout", frozenset(docs), "title")]


def arm(*pairs: tuple[int, float]) -> Arm:
    return np.array([d for d, _ in pairs], np.int64), np.array([s for _, s in pairs])


def test_judge_lines_up_the_arms() -> None:
    found = judge({"a": arm((7, 4.0), (3, 2.0)), "b": arm((9, 5.0))}, frozenset({3, 100}), ["a", "b", "absent"])
    assert found.scores.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    assert found.relevant.tolist() == [True, False, False]


def queries(num: int, seed: int, good_first: bool = True) -> list[Judged]:
    """Arm `good` tells the one relevant document in nine cases of ten; arm `noise` never does."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(num):
        scores = rng.random((2, 30))
        gold = int(rng.integers(30))
        if rng.random() < 0.9:
            scores[0 if good_first else 1, gold] = 2.0
        out.append(Judged(scores, np.arange(30) == gold))
    return out


def test_search_finds_the_arm_that_tells() -> None:
    weights = search_weights(queries(60, 1), np.array([0.1, 1.0]))
    assert weights[0] > weights[1]


def test_weights_are_kept_only_if_the_other_half_agrees() -> None:
    start = {"good": 0.1, "noise": 1.0}
    half = [i % 2 == 0 for i in range(80)]
    agreed = choose_weights(queries(80, 2), half, ["good", "noise"], start)
    assert agreed.accepted
    assert agreed.mrr_after > agreed.mrr_before
    assert agreed.weights["good"] > agreed.weights["noise"]
    # Negative control: the halves contradict each other.
    mixed = [a if chosen else b for a, b, chosen in zip(queries(80, 2), queries(80, 3, False), half, strict=True)]
    refused = choose_weights(mixed, half, ["good", "noise"], start)
    assert not refused.accepted
    assert refused.weights == start


def test_constant_scores_are_worth_nothing() -> None:
    flat = [Judged(np.ones((1, 50)), np.arange(50) == 3)] * 30
    result = choose_weights(flat, [i % 2 == 0 for i in range(30)], ["flat"], {"flat": 1.0})
    assert result.mrr_before == pytest.approx(1 / 50)


def test_too_few_queries_change_nothing(con: duckdb.DuckDBPyConnection) -> None:
    doc = insert(con, 0, "go", edits=True, command='git commit -m "fix: totals before tax"')
    result = calibrate(con, lambda _: {"a": arm((doc, 1.0))}, {"a": 1.0, "b": 0.5})
    assert (result.accepted, result.num_queries, result.weights) == (False, 1, {"a": 1.0, "b": 0.5})
    save(con, result)
    assert con.execute("SELECT count(*) FROM settings").fetchone() == (0,)


def test_accepted_weights_are_kept_and_replaced(con: duckdb.DuckDBPyConnection) -> None:
    half = [i % 2 == 0 for i in range(80)]
    result = choose_weights(queries(80, 2), half, ["good", "noise"], {"good": 0.1, "noise": 1.0})
    for _ in range(2):
        save(con, result)
    rows = con.execute("SELECT value FROM settings WHERE name = 'fusion_weights'").fetchall()
    assert [orjson.loads(value) for (value,) in rows] == [result.weights]
