"""Back-references as queries: which turns return to earlier work, and to which."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from workbench import api
from workbench.data.store import Store
from workbench.memory.mined_references import reference_queries


def edit(path: str, new: str = "b") -> dict[str, Any]:
    arguments = {"file_path": f"/w/shop/{path}", "old_string": "a", "new_string": new}
    return {"kind": "tool_call", "name": "Edit", "call_id": path, "data": arguments}


def session(
    path: Path, name: str, *turns: tuple[str, list[dict[str, Any]]], project: str = "/w/shop", day: int = 1
) -> None:
    """A session in the workbench's own format: what the user said, and the tool calls that answered it."""
    rows: list[dict[str, Any]] = [{"workbench": 1, "type": "conversation", "session_id": name, "project": project}]
    for n, (text, calls) in enumerate(turns):
        common = {
            "workbench": 1,
            "type": "message",
            "session_id": name,
            "created_at": f"2026-01-{day:02}T10:{n:02}:00Z",
        }
        rows.append(common | {"role": "user", "native_id": f"{name}u{n}", "parts": [{"kind": "text", "text": text}]})
        answer = [*calls, {"kind": "text", "text": f"That is done, as turn {n} of session {name} asked."}]
        rows.append(common | {"role": "assistant", "native_id": f"{name}a{n}", "parts": answer})
    (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def mined(tmp_path: Path) -> tuple[dict[str, set[str]], Counter[str]]:
    """Query -> the user's words of its answers; the query's own exchange must be named as its source."""
    api.ingest([tmp_path], tmp_path / "s.duckdb")
    dropped: Counter[str] = Counter()
    with Store(tmp_path / "s.duckdb", read_only=True) as store:
        found = list(reference_queries(store.con, dropped))
        texts = dict(store.con.execute("SELECT seq, user_text FROM exchanges").fetchall())
    for query in found:
        assert query.kind == "reference"
        assert query.source not in query.relevant
        assert query.text.split()[0] in texts[query.source]
    return {query.text: {texts[seq] for seq in query.relevant} for query in found}, dropped


FIRST = ("round the totals of the cart before tax", [edit("cart/rounding.py", "def round_total(): ...")])
BACK = "do it in the invoice as we did in cart/rounding.py back then"


def test_a_file_of_an_earlier_session_is_referred_to(tmp_path: Path) -> None:
    session(tmp_path, "s", FIRST)
    session(tmp_path, "t", (BACK, [edit("invoice.py")]), day=2)
    assert mined(tmp_path)[0] == {BACK: {FIRST[0]}}


def test_an_identifier_counts_if_an_edit_held_it_not_if_a_text_did(tmp_path: Path) -> None:
    session(tmp_path, "s", FIRST, ("tell me what round_total does in the code", []))
    session(tmp_path, "t", ("the earlier fix of round_total breaks on negative carts", []), day=2)
    assert mined(tmp_path)[0] == {"the earlier fix of round_total breaks on negative carts": {FIRST[0]}}


def test_what_stands_in_view_or_comes_later_is_no_reference(tmp_path: Path) -> None:
    session(tmp_path, "s", FIRST, ("now add a test for cart/rounding.py please, a short one", []))
    session(tmp_path, "t", ("why is checkout/fees.py so slow on big carts", []), day=1)
    session(tmp_path, "u", ("make the fees of the checkout faster now", [edit("checkout/fees.py")]), day=2)
    found, dropped = mined(tmp_path)
    assert found == {}
    assert dropped["reference_to_nothing_earlier"] == 2


def test_a_turn_further_back_in_the_same_session_counts(tmp_path: Path) -> None:
    between = ("and what is the weather like in the hills", [])
    session(tmp_path, "s", FIRST, between, (BACK, []))
    assert mined(tmp_path)[0] == {BACK: {FIRST[0]}}


def test_another_project_is_no_answer_but_another_checkout_is(tmp_path: Path) -> None:
    session(tmp_path, "s", FIRST)
    session(tmp_path, "t", (BACK, []), project="/w/other", day=2)
    assert mined(tmp_path)[0] == {}
    session(tmp_path, "u", (f"{BACK}, please", []), project="/src/shop/.worktrees/3", day=3)
    assert mined(tmp_path)[0] == {f"{BACK}, please": {FIRST[0]}}


def test_what_many_exchanges_changed_is_no_reference_but_two_names_together_can_be(tmp_path: Path) -> None:
    for n in range(5):
        session(tmp_path, f"s{n}", (f"change number {n} of the rounding of carts", [edit("cart/rounding.py")]))
    for n in range(5):
        session(tmp_path, f"t{n}", (f"change number {n} of the fees of carts", [edit("cart/fees.py")]))
    session(
        tmp_path,
        "both",
        ("tie rounding and fees of all carts together", [edit("cart/fees.py"), edit("cart/rounding.py")]),
    )
    together = "why do cart/fees.py and cart/rounding.py share that helper"
    session(tmp_path, "u", (BACK, []), (together, []), day=2)
    found, dropped = mined(tmp_path)
    assert found == {together: {"tie rounding and fees of all carts together"}}
    assert dropped["reference_common"] == 1


@pytest.mark.parametrize(
    "text",
    [
        "cart/rounding.py",  # too few words
        "<command-name>review cart/rounding.py of the shop</command-name>",
        "This session is being continued from one about cart/rounding.py of the shop",
        "10:11:12 opened cart/rounding.py and wrote nothing to it at all",
        "it fails: --- FAIL: TestRound in cart/rounding.py of the shop again",
        "please update README.md as we did before the release",
        "look at TODO.md as the agent left it before the release",
    ],
)
def test_what_nobody_typed_or_could_mean_is_no_query(tmp_path: Path, text: str) -> None:
    session(tmp_path, "s", FIRST, ("write all the notes of the project", [edit("README.md"), edit("TODO.md")]))
    session(tmp_path, "t", (text, []), ("so what do you think of that idea", []), day=2)
    assert mined(tmp_path)[0] == {}


def test_of_a_long_turn_the_sentences_around_the_name_are_asked(tmp_path: Path) -> None:
    session(tmp_path, "s", FIRST)
    long = " ".join(["Many words stand here that say nothing."] * 9)
    text = f"{long} Please look at cart/rounding.py once more. It is wrong for refunds. {long}"
    session(tmp_path, "t", (text, []), day=2)
    assert mined(tmp_path)[0] == {"Please look at cart/rounding.py once more. It is wrong for refunds.": {FIRST[0]}}


def test_at_most_two_turns_refer_to_the_same_work_and_none_twice(tmp_path: Path) -> None:
    session(tmp_path, "s", FIRST)
    for n in range(2, 6):
        session(tmp_path, f"t{n}", (BACK if n < 4 else f"{BACK}, number {n}", []), day=n)
    found, dropped = mined(tmp_path)
    assert len(found) == 2
    assert dropped["reference_repeated"] == 2
