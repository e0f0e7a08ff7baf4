"""Segmentation as in the card, and the exchanges of growing conversations: equal to those built at once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import store_helpers as helpers
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import api
from workbench.data import spool
from workbench.data.records import Conversation, Message, Part
from workbench.data.store import Store
from workbench.memory.exchanges import MAX_PLIES, Ply, segment
from workbench.memory.index import on_change

LONG = "x" * 60


def plies(*turns: tuple[str, str]) -> list[Ply]:
    return [Ply(i, role, text) for i, (role, text) in enumerate(turns)]


def cut(*turns: tuple[str, str], keep_short: bool = False) -> list[list[int]]:
    return [[p.number for p in chunk] for chunk in segment(plies(*turns), keep_short)]


def test_fixture_of_the_card() -> None:
    turns = [("user", "a"), ("user", "b"), ("assistant", ""), ("tool", ""), ("assistant", "done"), ("user", "c")]
    assert cut(*turns, keep_short=True) == [[0, 1, 2, 3, 4], [5]]
    assert cut(*turns) == [], "both are too short"
    longer = [("user", LONG), *turns[1:5], ("user", LONG)]
    assert cut(*longer) == [[0, 1, 2, 3, 4], [5]]


def test_what_is_no_exchange() -> None:
    assert cut() == []
    assert cut(("assistant", LONG), ("assistant", LONG)) == [], "no word of the user"
    assert cut(("assistant", LONG), ("user", LONG), ("assistant", "b")) == [[1, 2]], "leading words of the agent"
    assert cut(("user", " \n "), ("assistant", LONG)) == []
    assert cut(("user", "x" * 20), ("assistant", "y" * 29)) == []
    assert cut(("user", "x" * 20), ("assistant", "y" * 30)) == [[0, 1]]
    assert cut(("tool", ""), ("user", LONG)) == [[0, 1]]


def test_blank_words_neither_answer_nor_open() -> None:
    assert cut(("user", LONG), ("assistant", " \n"), ("user", LONG)) == [[0, 1, 2]]
    assert cut(("user", LONG), ("assistant", "yes"), ("user", "  "), ("assistant", "more")) == [[0, 1, 2, 3]]


def test_long_exchanges_are_cut_by_messages_with_words() -> None:
    turns = [("user", LONG)]
    for i in range(50):
        turns += [("assistant", f"step {i}"), ("tool", ""), ("tool", "")]
    chunks = cut(*turns)
    assert [n for chunk in chunks for n in chunk] == list(range(len(turns))), "nothing is lost, in order"
    spoken = [sum(bool(turns[n][1]) for n in chunk) for chunk in chunks]
    assert spoken == [MAX_PLIES, MAX_PLIES, 51 - 2 * MAX_PLIES]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["user", "assistant", "tool", "system"]), st.sampled_from(["", " ", "ab", LONG])),
        max_size=60,
    )
)
def test_chunks_are_runs_of_messages(turns: list[tuple[str, str]]) -> None:
    turns = [(role, text if role in ("user", "assistant") else "") for role, text in turns]
    chunks = cut(*turns)
    seen = [n for chunk in chunks for n in chunk]
    assert seen == sorted(set(seen))
    for chunk in chunks:
        assert chunk == list(range(chunk[0], chunk[-1] + 1))
        assert sum(bool(turns[n][1]) for n in chunk) <= MAX_PLIES
    everything = cut(*turns, keep_short=True)
    assert [c for c in everything if c in chunks] == chunks


# -- in the store -----------------------------------------------------------------------------------------------------


def _grow(path: Path, records: list[Conversation | Message]) -> None:
    spool.append(path, records)
    with Store(path) as store:
        spool.absorb(store, on_change)


def _check_numbers(path: Path) -> None:
    with Store(path, read_only=True) as store:
        bad = store.con.execute(
            "SELECT * FROM (SELECT seq, position, lag(seq) OVER w AS before_seq, "
            "lag(position) OVER w AS before_position FROM exchanges "
            "WINDOW w AS (PARTITION BY conversation_id, thread ORDER BY position)) "
            "WHERE seq <= before_seq OR position <> coalesce(before_position, -1) + 1"
        ).fetchall()
        assert bad == [], "numbers ascend along a thread, positions have no gap"
        orphans = store.con.execute(
            "SELECT (SELECT count(*) FROM memories ANTI JOIN exchanges USING (exchange_id, content_hash)), "
            "(SELECT count(*) FROM memory_rooms ANTI JOIN memories USING (memory_id)), "
            "(SELECT count(*) FROM lexical_documents d WHERE doc NOT IN (SELECT seq FROM exchanges)), "
            "(SELECT count(*) FROM lexical_recent d WHERE doc NOT IN (SELECT seq FROM exchanges)), "
            "(SELECT count(*) FROM exchanges) - (SELECT count(DISTINCT (exchange_id)) FROM exchanges)"
        ).fetchone()
        assert orphans == (0, 0, 0, 0, 0)


def _tree(rng: random.Random, size: int) -> list[Message]:
    """A session with rewinds, sub-agents, tools, revisions and short turns."""
    messages: list[Message] = []
    for i in range(size):
        role = rng.choice(["user", "assistant", "assistant", "tool"])
        text = rng.choice(["", "ok", f"{i} " + helpers._sentence(rng), f"{i} " + helpers._sentence(rng, 40)])
        parts = [Part("tool_result" if role == "tool" else "text", text)]
        if role == "assistant" and rng.random() < 0.4:
            parts.append(Part("tool_call", name="Edit", data={"file_path": f"/w/f{rng.randrange(9)}.py"}))
        native = f"n{i}" if rng.random() < 0.93 or not messages else rng.choice(messages).native_id
        parent = rng.choice(messages[-6:]).native_id if messages and rng.random() < 0.2 else None
        agent = rng.choice(["one", "two"]) if rng.random() < 0.15 else None
        messages.append(Message("s", role, parts, native, parent, agent, 1_700_000_000_000_000 + i * 10**6))
    return messages


@pytest.mark.parametrize("seed", range(3))
def test_growing_equals_built_at_once(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    messages = _tree(rng, 40)
    start = [Conversation("s", agent="x", project="/w")]
    at_once, grown = tmp_path / "once.duckdb", tmp_path / "grown.duckdb"
    _grow(at_once, [*start, *messages])
    cuts = sorted(rng.sample(range(1, len(messages)), 5))
    for low, high in zip([0, *cuts], [*cuts, len(messages)], strict=True):
        _grow(grown, [*start, *messages[low:high]])
        if rng.random() < 0.4:
            api.distill(grown)
        _check_numbers(grown)
    assert not helpers.difference(helpers.verbatim(at_once, places=False), helpers.verbatim(grown, places=False))
    api.distill(at_once)
    before = helpers.verbatim(grown, places=False)
    api.distill(grown)
    assert not helpers.difference(before, helpers.verbatim(grown, places=False))
    one, two = helpers.content(at_once, places=False), helpers.content(grown, places=False)
    for rows in (one, two):  # rooms stay when the memories that made them go
        del rows["rooms"]
    assert not helpers.difference(one, two)
    _check_numbers(grown)


def test_new_pieces_of_a_stored_message_reach_its_exchange(tmp_path: Path) -> None:
    """Claude Code writes a message in several lines: between two reads it grows, but not the number of messages."""
    rows = helpers.claude_session(random.Random(5), "s", turns=1)
    log, path = tmp_path / "a.jsonl", tmp_path / "w.duckdb"
    helpers.write_jsonl(log, rows[:2])  # the question and the thinking
    api.ingest([log], path)
    helpers.write_jsonl(log, rows[:3])
    report = api.ingest([log], path)
    assert report.exchanges_added == 1
    with Store(path, read_only=True) as store:
        row = store.con.execute("SELECT assistant_text FROM exchanges").fetchone()
    assert row
    assert row[0].startswith("I fixed")


def test_a_project_that_comes_late_reaches_rooms(tmp_path: Path) -> None:
    path = tmp_path / "w.duckdb"
    words = Message("s", "user", [Part("text", "the retry queue in `src/queue.py` is broken " + LONG)], "n1")
    _grow(path, [Conversation("s"), words])
    api.distill(path)
    _grow(path, [Conversation("s", project="/w")])
    assert api.distill(path).memories_added == 1
    with Store(path, read_only=True) as store:
        assert store.con.execute("SELECT DISTINCT project FROM rooms JOIN memory_rooms USING (room_id)").fetchall() == [
            ("/w",)
        ]
    _check_numbers(path)
