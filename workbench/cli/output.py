"""How results reach people and programs: JSON on stdout with --json, else tables; progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import orjson
import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs, on one line.")]
#: What a terminal would obey instead of showing it: control characters but tab and newline.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}


def harmless(text: str) -> str:
    """Text from a log as a terminal may show it: escape sequences in it move no cursor and rename no window."""
    return text.replace("\r\n", "\n").translate(_CONTROLS)


def say(text: str, **style: Any) -> None:
    """A line for people; style as of typer.secho."""
    typer.secho(harmless(text), **style)


def print_json(value: Any) -> None:
    """One line of JSON."""
    try:
        text = orjson.dumps(value)
    except orjson.JSONEncodeError:  # half of a surrogate pair, as a file of a user may have it
        text = json.dumps(value).encode()
    typer.echo(text)


def table(title: str, rows: list[tuple[str, ...]], headers: tuple[str, ...] = ()) -> None:
    """A small table; the first column names, the others hold values."""
    from rich.console import Console
    from rich.table import Table

    say(title, bold=True)
    shown = Table(show_header=bool(headers), box=None, pad_edge=False)
    for i in range(max((len(row) for row in rows), default=0)):
        shown.add_column(headers[i] if headers else "", justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*map(harmless, row))
    Console(soft_wrap=False, markup=False).print(shown)  # a text in brackets is a text, not a colour


def number(value: float) -> str:
    """1234567 -> 1,234,567."""
    return f"{value:,.0f}"


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A status line on stderr that is updated in place; nothing where nobody looks."""
    if quiet or not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status("starting") as status:
        yield lambda text: status.update(Text(text))  # a path in brackets is no colour
