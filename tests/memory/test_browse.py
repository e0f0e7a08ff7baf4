"""recent and files_touched against the same questions asked in plain Python."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

from workbench import api
from workbench.data.importers import workbench_log
from workbench.data.records import Conversation, Message, Part
from workbench.data.store import Store
from workbench.errors import InputError
from workbench.memory.browse import NAMED_EXCHANGES, USER_CHARS, files_touched, recent
from workbench.memory.show import iso

TOOLS = {"Read": "read", "Edit": "modified", "delete_file": "deleted"}
START = 1_760_000_000_000_000
HOUR = 3_600_000_000


def log(seed: int, sessions: int = 12, per_session: int = 9) -> tuple[list[Any], list[dict[str, Any]]]:
    """Records of random sessions, and what each exchange of them is."""
    rng = random.Random(seed)
    records: list[Any] = []
    truth: list[dict[str, Any]] = []
    for s in range(sessions):
        project = rng.choice(["/home/sam/Parcel_Tracker", "/home/sam/blog", "/home/sam/größe", None])
        agent = rng.choice(["claude-code", "codex", "gemini-cli"])
        records.append(Conversation(f"s{s}", agent=agent, project=project))
        timed = s % 4 != 3
        for n in range(per_session):
            at = START + rng.randrange(5000) * HOUR if timed else None
            user = f"Question {s}/{n}: " + "please look into this matter again " * rng.randrange(1, 20)
            records.append(Message(f"s{s}", "user", [Part("text", user)], f"{n}u", created_at=at))
            files: dict[str, str] = {}
            parts = []
            for _ in range(rng.randrange(4)):
                tool, path = rng.choice(list(TOOLS)), f"src/{rng.choice(['API', 'main', 'ü'])}_{rng.randrange(4)}.py"
                if path not in files:
                    files[path] = TOOLS[tool]
                    parts.append(Part("tool_call", name=tool, call_id=f"c{len(parts)}", data={"file_path": path}))
            records.append(Message(f"s{s}", "assistant", [*parts, Part("text", "Done, it was easy.")], f"{n}a",
                                   created_at=None if at is None else at + 1))  # fmt: skip
            truth.append({"session": f"s{s}", "n": n, "project": project, "agent": agent, "at": at, "user": user,
                          "files": files})  # fmt: skip
    return records, truth


@pytest.fixture(scope="module")
def truth() -> list[dict[str, Any]]:
    return log(7)[1]


@pytest.fixture(scope="module")
def con(tmp_path_factory: pytest.TempPathFactory) -> Iterator[duckdb.DuckDBPyConnection]:
    folder: Path = tmp_path_factory.mktemp("browse")
    (folder / "log.jsonl").write_bytes(b"".join(workbench_log.encode(r) for r in log(7)[0]))
    api.ingest([folder / "log.jsonl"], folder / "s.duckdb")
    with Store(folder / "s.duckdb", read_only=True) as store:
        yield store.con


def passes(e: dict[str, Any], project: str | None, agent: str | None, since: int | None, until: int | None) -> bool:
    return (
        (project is None or project.lower() in (e["project"] or "").lower())
        and (agent is None or agent.lower() in e["agent"])
        and (since is None or (e["at"] is not None and e["at"] >= since))
        and (until is None or (e["at"] is not None and e["at"] < until))
    )


@pytest.mark.parametrize("seed", range(25))
def test_recent_is_what_plain_python_finds(
    seed: int, con: duckdb.DuckDBPyConnection, truth: list[dict[str, Any]]
) -> None:
    rng = random.Random(seed)
    project = rng.choice([None, "parcel_tracker", "blog", "GRÖSSE", "größe", "%", "_", "nowhere"])
    agent = rng.choice([None, None, "codex", "CLI", "claude"])
    since = rng.choice([None, START + rng.randrange(5000) * HOUR])
    until = rng.choice([None, START + rng.randrange(5000) * HOUR])
    limit = rng.choice([1, 5, 1000])
    found = recent(con, project=project, agent=agent, since=iso(since), until=iso(until), limit=limit)
    expected = [e for e in truth if passes(e, project, agent, since, until)]
    assert len(found) == min(limit, len(expected))
    times = [f["started_at"] for f in found]
    known = [t for t in times if t]
    assert known == sorted(known, reverse=True)
    assert times == known + [None] * (len(times) - len(known))
    best = sorted((e["at"] for e in expected if e["at"]), reverse=True)[:limit]
    assert known == [iso(at) for at in best]
    whole = {(e["session"], e["user"][:USER_CHARS]): e for e in expected}
    for f in found:
        e = whole[f["source"]["session_id"], f["user"]]
        assert (f["project"], f["agent"], f["started_at"]) == (e["project"], e["agent"], iso(e["at"]))
        assert {t["path"]: t["action"] for t in f["files"]} == e["files"]


@pytest.mark.parametrize("seed", range(25))
def test_files_touched_is_what_plain_python_finds(
    seed: int, con: duckdb.DuckDBPyConnection, truth: list[dict[str, Any]]
) -> None:
    rng = random.Random(seed)
    path = rng.choice([None, "api_", "SRC/main", "ü_1", "%", "none.py"])
    project = rng.choice([None, None, "blog", "Parcel"])
    since = rng.choice([None, START + rng.randrange(5000) * HOUR])
    action = rng.choice([None, None, "read", "deleted", "created"])
    limit = rng.choice([2, 1000])
    found = files_touched(con, path=path, project=project, since=iso(since), action=action, limit=limit)
    touches: dict[tuple[str, str | None], list[tuple[int | None, str]]] = {}
    for e in truth:
        if passes(e, project, None, since, None):
            for name, done in e["files"].items():
                if (path is None or path.lower() in name.lower()) and action in (None, done):
                    touches.setdefault((name, e["project"]), []).append((e["at"], done))
    assert len(found) == min(limit, len(touches))
    last = [f["last_at"] for f in found if f["last_at"]]
    assert last == sorted(last, reverse=True)
    for f in found:
        expected = touches[f["path"], f["project"]]
        assert f["actions"] == Counter(done for _, done in expected)
        assert f["num_exchanges"] == len(expected)
        assert f["last_at"] == max((iso(at) or "" for at, _ in expected), default="") or f["last_at"] is None
        assert len(f["exchanges"]) == min(NAMED_EXCHANGES, len(expected))
        newest = sorted((iso(at) for at, _ in expected if at), reverse=True)[:NAMED_EXCHANGES]  # type: ignore[type-var]
        assert [x["started_at"] for x in f["exchanges"] if x["started_at"]] == newest


def test_what_is_no_time_or_action_is_named(con: duckdb.DuckDBPyConnection) -> None:
    with pytest.raises(InputError, match="since: 'last week' is no time"):
        recent(con, since="last week")
    with pytest.raises(InputError, match="until: 'x' is no time"):
        recent(con, until="x")
    with pytest.raises(InputError, match="action must be one of"):
        files_touched(con, action="eaten")


def test_recent_carries_the_memory_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b"".join(workbench_log.encode(r) for r in log(1, 2, 2)[0]))
    store = tmp_path / "s.duckdb"
    api.ingest([tmp_path / "log.jsonl"], store)
    with Store(store, read_only=True) as opened:
        assert [e["core"] for e in recent(opened.con)] == [None] * 4
    api.distill(store)
    with Store(store, read_only=True) as opened:
        cores = dict(opened.con.execute("SELECT exchange_id, core FROM memories").fetchall())
        assert len(cores) == 4
        assert {e["exchange_id"]: e["core"] for e in recent(opened.con)} == cores
