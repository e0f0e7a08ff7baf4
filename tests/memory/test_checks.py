"""What is refused on write."""

from __future__ import annotations

import pytest

from workbench.memory.checks import identifiers, unknown_identifiers, violations
from workbench.memory.types import Distilled, Exchange, FileTouch, Room

EXCHANGE = Exchange(
    "e1",
    "why does `parse_row` fail with --strict on 1,887 rows?",
    "It raised ValueError: bad header in src/io/reader.py:41 after 30s. Set maxRows to 2000 and rerun.",
    files=(FileTouch("docs/notes.md", "modified"),),
    tools=("Edit", "mcp__db__query"),
)
ROOM = (Room("concept", "reader", "reader"),)


def record(core: str = "Set maxRows", context: str = "", rooms: tuple[Room, ...] = ROOM) -> Distilled:
    return Distilled(core, context, rooms)


@pytest.mark.parametrize(
    "core",
    [
        "parse_row fails with --strict: `ValueError: bad header`",
        "reader.py line 41, 1887 rows in 30 seconds",
        "maxRows is now 2000; docs/notes.md and notes.md were edited with mcp__db__query",
        "Plain words of one's own and/or others are no identifiers, e.g. these.",
    ],
)
def test_accepts(core: str) -> None:
    assert violations(EXCHANGE, record(core)) == []


@pytest.mark.parametrize(
    ("core", "named"),
    [
        ("renamed to parse_rows", "parse_rows"),
        ("in reader.go", "reader.go"),
        ("raised KeyError", "KeyError"),
        ("took 3 s", "3"),
        ("`fast mode` was set", "fast mode"),
        ('said "never again"', "never again"),
        ("--stric", "--stric"),
        ("max_rows", "max_rows"),
        ("src/io/writer.py", "src/io/writer.py"),
        ("parse_ro", "parse_ro"),
    ],
)
def test_refuses_identifiers_that_the_exchange_does_not_hold(core: str, named: str) -> None:
    assert unknown_identifiers(core, EXCHANGE) == [named]
    assert named in violations(EXCHANGE, record(core))[0]


def test_context_is_compared_letter_by_letter() -> None:
    assert violations(EXCHANGE, record(context="ValueError: bad header")) == []
    assert "verbatim" in violations(EXCHANGE, record(context="valueerror: bad header"))[0]
    assert "verbatim" in violations(EXCHANGE, record(context="bad  header"))[0]


def test_core_rooms_and_relevance() -> None:
    assert violations(EXCHANGE, record(core=" ")) == ["core is empty"]
    assert "0 rooms" in violations(EXCHANGE, record(rooms=()))[0]
    assert "4 rooms" in violations(EXCHANGE, record(rooms=ROOM * 4))[0]
    assert "relevance" in violations(EXCHANGE, record(rooms=(Room("concept", "a", "a", 1.5),)))[0]


def test_what_counts_as_an_identifier() -> None:
    text = 'Now `x y`, "z" in a/b/c, fooBar, HTTPServer, snake_case, v2.1, --flag, C:\\tmp\\a or module.name; no more.'
    expected = [
        "x y", "z", "a/b/c", "fooBar", "HTTPServer", "snake_case", "v2.1", "--flag", "C:\\tmp\\a", "module.name",
    ]  # fmt: skip
    assert identifiers(text) == expected
