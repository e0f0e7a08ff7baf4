"""Error lines as queries: what is one, what is taken out of it, and which exchanges answer it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from workbench import api
from workbench.data.store import Store
from workbench.memory.mined_errors import error_queries, error_query
from workbench.memory.mined_queries import LabelledQuery


@pytest.mark.parametrize(
    ("line", "query"),
    [
        ("fatal: 'has space' is not a valid branch name", "fatal: 'has space' is not a valid branch name"),
        ("cmd/cli/push.go:33:15: undefined: OpenRepository (typecheck)", "undefined: OpenRepository (typecheck)"),
        ("cmd/cli/push.go:191:2: undefined: OpenRepository (typecheck)", "undefined: OpenRepository (typecheck)"),
        ("zsh:1: command not found: entire-brain", "command not found: entire-brain"),
        ("E   ModuleNotFoundError: No module named 'orjson'", "ModuleNotFoundError: No module named 'orjson'"),
        (
            "\x1b[31m2026-01-02T10:11:12Z ERROR: upload of 4f3c2b1a9d failed after 12.5s\x1b[0m",
            "ERROR: upload of failed after",
        ),
        (
            "FileNotFoundError: [Errno 2] No such file or directory: '/home/dev/x/settings.toml'",
            "FileNotFoundError: [Errno 2] No such file or directory: 'settings.toml'",
        ),
        # No error, source code, lists, a path alone, generic words alone, comparisons of values.
        ("all 12 tests passed", ""),
        ('    return "", fmt.Errorf("failed to read input: %w", err)', ""),
        ('    30→        t.Fatalf("unexpected error: %v", err)', ""),
        ("+    raise ValueError('not a valid name')", ""),
        ("// Should not error when the directory does not exist", ""),
        ("- the parser fails with an unexpected token error", ""),
        ("error: /home/dev/src/thing", ""),
        ("Error: exit status 1", ""),
        ("make: *** [test] Error: command failed", ""),
        ('Error: "0" is not greater than or equal to "1"', ""),
        ("error: " + "very long " * 40, ""),
    ],
)
def test_what_a_person_would_type_of_a_line(line: str, query: str) -> None:
    assert error_query(line) == query


def session(path: Path, name: str, *turns: list[dict[str, Any]]) -> None:
    """A session in the workbench's own format; each turn is a user message and the parts that answered it."""
    rows: list[dict[str, Any]] = [{"workbench": 1, "type": "conversation", "session_id": name, "project": "/w/shop"}]
    for number, parts in enumerate(turns):
        ask, *rest = parts
        common = {"workbench": 1, "type": "message", "session_id": name}
        rows.append(common | {"role": "user", "native_id": f"{name}u{number}", "parts": [ask]})
        answer = [*rest, {"kind": "text", "text": f"This is done now, number {number} of session {name}."}]
        rows.append(common | {"role": "assistant", "native_id": f"{name}a{number}", "parts": answer})
    (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def say(text: str) -> dict[str, Any]:
    return {"kind": "text", "text": text}


def run(command: str, output: str, call_id: str, is_error: bool | None = True) -> list[dict[str, Any]]:
    return [
        {"kind": "tool_call", "name": "Bash", "call_id": call_id, "data": {"command": command}},
        {"kind": "tool_result", "call_id": call_id, "text": output, "is_error": is_error},
    ]


def edit(path: str = "/w/shop/cart.py") -> dict[str, Any]:
    arguments = {"file_path": path, "old_string": "a", "new_string": "b"}
    return {"kind": "tool_call", "name": "Edit", "call_id": f"edit{path}", "data": arguments}


def mined(tmp_path: Path) -> tuple[dict[str, list[int]], Counter[str], dict[int, str]]:
    api.ingest([tmp_path], tmp_path / "s.duckdb")
    dropped: Counter[str] = Counter()
    with Store(tmp_path / "s.duckdb", read_only=True) as store:
        found = list(error_queries(store.con, dropped))
        rows = store.con.execute("SELECT seq, user_text FROM exchanges").fetchall()
    assert all(isinstance(query, LabelledQuery) and query.kind == "error" and query.source == 0 for query in found)
    return {query.text: sorted(query.relevant) for query in found}, dropped, dict(rows)


BROKEN = "src/cart.py:12:3: undefined: roundTotal (typecheck)"


@pytest.mark.parametrize("follow_up", ["then repair roundTotal, but nothing else", "yes please"])
def test_an_error_is_answered_where_it_came_and_where_the_next_turn_goes_on(tmp_path: Path, follow_up: str) -> None:
    session(
        tmp_path, "s",
        [say("run the tests of the cart please"), *run("make test", BROKEN, "1")],
        [say(follow_up), edit()],
        [say("now write the release notes for it"), edit("/w/shop/NEWS.md")],
    )  # fmt: skip
    found, dropped, texts = mined(tmp_path)
    assert {text: [texts[s][:8] for s in seqs] for text, seqs in found.items()} == {
        "undefined: roundTotal (typecheck)": ["run the ", follow_up[:8]]
    }
    assert dropped["error_without_change"] == 0


def test_the_same_error_in_two_sessions_is_one_query_with_all_answers(tmp_path: Path) -> None:
    for name, line in (("s", BROKEN), ("t", "lib/cart.py:99:1: undefined: roundTotal (typecheck)")):
        session(tmp_path, name, [say(f"run the tests of {name} please"), *run("make test", line, "1"), edit()])
    found, _, texts = mined(tmp_path)
    assert {text: [texts[s] for s in seqs] for text, seqs in found.items()} == {
        "undefined: roundTotal (typecheck)": ["run the tests of s please", "run the tests of t please"]
    }


@pytest.mark.parametrize(
    "turns",
    [
        [[say("run the tests of the cart please"), *run("make test", BROKEN, "1")]],
        [[say("run the tests of the cart please"), edit(), *run("make test", BROKEN, "1")]],  # changed before
        [[say("run the tests of the cart please"), *run("make test", BROKEN, "1"), edit("/tmp/x.py")]],
        [  # the next turn is about something else
            [say("run the tests of the cart please"), *run("make test", BROKEN, "1")],
            [say("write the release notes, all of them"), edit()],
        ],
        [  # two turns later it is about something else
            [say("run the tests of the cart please"), *run("make test", BROKEN, "1")],
            [say("what is the weather like in the hills?")],
            [say("write the release notes, all of them"), edit()],
        ],
    ],
)
def test_an_error_after_which_nothing_changed_is_no_query(tmp_path: Path, turns: list[list[dict[str, Any]]]) -> None:
    session(tmp_path, "s", *turns)
    found, dropped, _ = mined(tmp_path)
    assert found == {}
    assert dropped["error_without_change"] == 1


@pytest.mark.parametrize("is_error", [False, None])
def test_of_a_command_that_succeeded_only_unmistakable_lines_count(tmp_path: Path, is_error: bool | None) -> None:
    output = f"{BROKEN}\n--- FAIL: TestCartRounding (0.04s)\npanic: totals of the cart are negative"
    session(
        tmp_path,
        "s",
        [say("run the tests of the cart please"), *run("make test | tail", output, "1", is_error), edit()],
    )
    found, _, _ = mined(tmp_path)
    assert list(found) == ["panic: totals of the cart are negative"]


def test_what_is_read_from_a_file_or_written_by_a_person_is_no_error(tmp_path: Path) -> None:
    read = [
        {"kind": "tool_call", "name": "Read", "call_id": "1", "data": {"file_path": "/w/shop/log.txt"}},
        {"kind": "tool_result", "call_id": "1", "text": BROKEN, "is_error": True},
    ]
    prose = "I think the error: roundTotal is undefined because we never import it, can you look?"
    pasted = "please fix this in the cart:\n\nTypeError: roundTotal of undefined cart cannot be read"
    session(tmp_path, "s", [say(prose), *read, edit()])
    session(tmp_path, "t", [say(pasted), edit()])
    found, _, _ = mined(tmp_path)
    assert list(found) == ["TypeError: roundTotal of undefined cart cannot be read"]


def test_one_broken_build_gives_two_queries_at_most(tmp_path: Path) -> None:
    output = "\n".join(
        f"a.go:{n}:1: undefined: helper{name} (typecheck)" for n, name in enumerate(("Alpha", "Beta", "Gamma", "Delta"))
    )
    session(tmp_path, "s", [say("run the tests of the cart please"), *run("make test", output, "1"), edit()])
    found, dropped, _ = mined(tmp_path)
    assert list(found) == ["undefined: helperAlpha (typecheck)", "undefined: helperBeta (typecheck)"]
    assert dropped["error_beyond_two_an_exchange"] == 2


def test_an_error_that_comes_everywhere_is_no_query(tmp_path: Path) -> None:
    for number in range(7):
        session(
            tmp_path, f"s{number}", [say(f"run the tests of part {number} please"), *run("make", BROKEN, "1"), edit()]
        )
    found, dropped, _ = mined(tmp_path)
    assert found == {}
    assert dropped["error_too_common"] == 1
