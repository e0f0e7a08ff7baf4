"""What the tests of stores share: sample logs, the command line in a process of its own, a store's content to compare.

Also run as a script (`python store_helpers.py log STORE NAME COUNT`) by the test of several processes that log at once.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import pytest

from workbench import api

#: Moments of insertion, numbers of insertion, and what one of them was taken from.
_NOT_CONTENT = {
    "sources": ("mtime_ns", "updated_at"),
    "conversations": ("first_seq",),
    "messages": ("seq",),
    "parts": ("seq",),
    "quarantine": ("created_at",),
    "exchanges": ("seq",),
    "memories": ("created_at",),
    "llm_cache": ("created_at",),
    "embedding_spaces": ("space", "revision"),
    "embedding_models": ("created_at",),
    "schema_versions": ("applied_at",),
}
_BY_NUMBER = ("embeddings",)
Content = dict[str, Counter[tuple[Any, ...]]]


def content(store: Path, places: bool = True) -> Content:
    """All rows of a store, without numbers and times of insertion; the index as each document's terms.

    Args: places: with where in its source each message lies (spool files differ in that).
    """
    with duckdb.connect(str(store), read_only=True) as con:
        con.execute("SET TimeZone = 'UTC'")
        tables = [r[0] for r in con.execute("SELECT table_name FROM duckdb_tables() WHERE NOT internal").fetchall()]
        found: Content = {}
        for table in tables:
            if not table.startswith("lexical_") and table not in _BY_NUMBER:
                names = _NOT_CONTENT.get(table, ())
                if table == "messages" and not places:
                    names = (*names, "source_offset", "source_length")
                left_out = ", ".join(names)
                columns = f"* EXCLUDE ({left_out})" if left_out else "*"
                found[table] = Counter(con.execute(f'SELECT COLUMNS({columns})::VARCHAR FROM "{table}"').fetchall())
        if "lexical_documents" in tables:
            found["index"] = _index(con)
        if set(_BY_NUMBER) <= set(tables):
            vectors = con.execute(
                "SELECT layer, model, exchange_id, md5(vector) FROM embeddings "
                "LEFT JOIN embedding_spaces USING (space) LEFT JOIN exchanges e ON e.seq = doc"
            ).fetchall()
            found["embeddings"] = Counter(vectors)
    return found


def _index(con: duckdb.DuckDBPyConnection) -> Counter[tuple[Any, ...]]:
    """(layer, exchange, previous exchange, lengths, sorted postings) of every document."""
    ids = dict(con.execute("SELECT seq, exchange_id FROM exchanges").fetchall())
    terms: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for layer, doc, *posting in con.execute(
        "SELECT layer, doc, term, tf, tf_user FROM lexical_postings UNION ALL "
        "SELECT layer, doc, term, tf, tf_user FROM lexical_recent"
    ).fetchall():
        terms.setdefault((layer, doc), []).append(tuple(posting))
    names = dict(con.execute("SELECT layer, name FROM lexical_layers").fetchall())
    documents: Counter[tuple[Any, ...]] = Counter()
    for layer, doc, back, length, user in con.execute(
        "SELECT layer, doc, back, length, length_user FROM lexical_documents"
    ).fetchall():
        postings = tuple(sorted(terms.pop((layer, doc), [])))
        before = ids[doc - back] if back else None
        documents[names[layer], ids[doc], before, length, user, postings] += 1
    assert not terms, f"postings of {len(terms)} documents that are not there"
    return documents


def difference(a: Content, b: Content) -> str:
    """ "" if equal, else the tables that differ and some of their rows."""
    lines = []
    for table in sorted(a.keys() | b.keys()):
        for sign, more, less in (("-", a, b), ("+", b, a)):
            rows = more.get(table, Counter()) - less.get(table, Counter())
            lines += [f"{sign} {table}: {str(row)[:300]}" for row in list(rows)[:3]]
            if len(rows) > 3:
                lines.append(f"{sign} {table}: and {len(rows) - 3} more")
    return "\n".join(lines)


def verbatim(store: Path, places: bool = True) -> Content:
    """The rows that nothing may change once they are stored, without what is derived (threads)."""
    rows = content(store, places)
    left_out = "seq, thread" if places else "seq, thread, source_offset, source_length"
    with duckdb.connect(str(store), read_only=True) as con:
        con.execute("SET TimeZone = 'UTC'")
        messages = con.execute(f"SELECT COLUMNS(* EXCLUDE ({left_out}))::VARCHAR FROM messages").fetchall()
    return {"messages": Counter(messages), "parts": rows["parts"]}


# -- logs -------------------------------------------------------------------------------------------------------------

_TEXT = """retry queue parser cache timeout checksum worker socket fixture branch index ledger valve turbine sensor
    batch shard cursor token schema migration lantern harbour pebble orchard compass anvil"""
_WORDS = _TEXT.split()


def _sentence(rng: random.Random, words: int = 14) -> str:
    return (
        " ".join(rng.choices(_WORDS, k=words)).capitalize()
        + f" in module_{rng.randrange(400)}.py line {rng.randrange(900)}."
    )


def claude_session(rng: random.Random, session: str, turns: int, result_bytes: int = 600) -> list[dict[str, Any]]:
    """The lines of a Claude Code session that we made up: words, thinking, tool calls with parallel results."""
    rows: list[dict[str, Any]] = []
    parent: str | None = None
    clock = 1_760_000_000 + rng.randrange(10**7)

    def add(kind: str, message: dict[str, Any]) -> None:
        nonlocal parent, clock
        clock += rng.randrange(1, 40)
        uuid = f"{session}-{len(rows):05d}"
        moment = (
            f"20{25 + clock % 2}-0{1 + clock % 9}-1{clock % 9}T0{clock % 9}:{clock % 50 + 10}:{clock % 50 + 10}.000Z"
        )
        rows.append(
            {"parentUuid": parent, "isSidechain": False, "cwd": "/home/ada/harbour", "sessionId": session,
             "version": "2.0.1", "gitBranch": "main", "type": kind, "message": message, "uuid": uuid,
             "timestamp": moment}
        )  # fmt: skip
        parent = uuid

    for turn in range(turns):
        add("user", {"role": "user", "content": f"Please look at {_sentence(rng)} {_sentence(rng)}"})
        base = {"id": f"msg_{session}_{turn}", "type": "message", "role": "assistant", "model": "claude-x"}
        for i, block in enumerate((
            {"type": "thinking", "thinking": _sentence(rng, 30), "signature": "s"},
            {"type": "text", "text": f"I fixed {_sentence(rng)} The test `test_{rng.randrange(99)}` passes now."},
            {"type": "tool_use", "id": f"toolu_{session}_{turn}", "name": "Read",
             "input": {"file_path": f"/home/ada/harbour/module_{rng.randrange(400)}.py"}},
        )):  # fmt: skip
            add(
                "assistant",
                {**base, "content": [block], "usage": {"input_tokens": 10 + i, "output_tokens": 5 * (i + 1)}},
            )
        text = "\n".join(_sentence(rng) for _ in range(max(1, result_bytes // 110)))
        result = {"type": "tool_result", "tool_use_id": f"toolu_{session}_{turn}", "content": text}
        add("user", {"role": "user", "content": [result]})
    return rows


def many_conversations(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Rows of a chat data set that we made up: each is a conversation."""
    return [
        {"messages": [m for _ in range(rng.randrange(1, 4)) for m in (
            {"role": "user", "content": f"Row {i}: why does {_sentence(rng)}"},
            {"role": "assistant", "content": f"Because {_sentence(rng, 25)}"})]}
        for i in range(count)
    ]  # fmt: skip


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


# -- the command line -------------------------------------------------------------------------------------------------


def command(store: Path, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "workbench", "--store", str(store), *map(str, arguments)]


def workbench(store: Path, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own and waits for it."""
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    return subprocess.run(
        command(store, *arguments), capture_output=True, text=True, timeout=300, env=environment, **options
    )


def assert_one_message(done: subprocess.CompletedProcess[str], code: int) -> None:
    """The exit code, and on stderr one line for people: no traceback, no second error."""
    assert done.returncode == code, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("workbench: "), lines


def _log(store: Path, name: str, count: int) -> None:
    for i in range(count):
        api.remember(
            f"{name} writes down note number {i}: the {_WORDS[i % len(_WORDS)]} is mended.", store, project=name
        )


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = claude_session(random.Random(1), "s-one", turns=60)
    return write_jsonl(tmp_path_factory.mktemp("logs") / "a.jsonl", rows)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, log: Path) -> Path:
    """A store with memories; copy it before changing it."""
    path = tmp_path_factory.mktemp("filled") / "w.duckdb"
    api.ingest([log], path)
    api.distill(path)
    return path


@pytest.fixture
def copy(filled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(filled, tmp_path / "w.duckdb"))


if __name__ == "__main__" and sys.argv[1:2] == ["log"]:
    _log(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
