"""The spool: what several processes hand in at once is stored once, and nobody sees a lock."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import store_helpers as helpers

from workbench import api
from workbench.data import spool
from workbench.data.records import Conversation, Message, Part
from workbench.data.store import Store
from workbench.errors import InputError, StoreMissing
from workbench.memory.index import on_change


def notes(path: Path) -> list[str]:
    with Store(path, read_only=True) as store:
        rows = store.con.execute(
            "SELECT text FROM parts JOIN messages USING (message_id) WHERE native_id = 'note' AND kind = 'text'"
        ).fetchall()
    return sorted(text for (text,) in rows)


def test_four_loggers_while_others_ingest_and_recall(tmp_path: Path) -> None:
    path, count = tmp_path / "w.duckdb", 5
    logs = tmp_path / "logs"
    for i in range(12):
        helpers.write_jsonl(logs / f"{i}.jsonl", helpers.claude_session(random.Random(i), f"s{i}", 40))
    api.ingest([logs / "0.jsonl"], path)
    loggers = [
        subprocess.Popen(
            [sys.executable, helpers.__file__, "log", str(path), f"logger-{i}", str(count)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(4)
    ]  # fmt: skip
    ingester = subprocess.Popen(
        helpers.command(path, "ingest", logs, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    recalls = [helpers.workbench(path, "recall", "retry queue parser", "--json") for _ in range(2)]
    for process in (*loggers, ingester):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert err == ""
    for done in recalls:
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)
    api.absorb_if_free(path)
    assert spool.waiting(path) == []
    expected = [
        f"logger-{i} writes down note number {j}: the {helpers._WORDS[j % len(helpers._WORDS)]} is mended."
        for i in range(4) for j in range(count)
    ]  # fmt: skip
    assert notes(path) == sorted(expected), "nothing lost, nothing double"
    with Store(path, read_only=True) as store:
        assert store.con.execute("SELECT count(*) FROM conversations WHERE format = 'claude_code'").fetchone() == (12,)
        assert store.con.execute("SELECT count(*) FROM exchanges WHERE user_text LIKE 'logger-%'").fetchone() == (
            4 * count,
        )
        assert store.con.execute("SELECT count(*) FROM quarantine").fetchone() == (0,)


def test_remember_returns_only_after_the_event_is_durable(tmp_path: Path) -> None:
    path = tmp_path / "w.duckdb"
    script = (
        "import os, sys\nfrom workbench import api\nfrom workbench.data import spool\n"
        "order = []\n"
        "old_sync, old_rename = os.fsync, spool.Path.rename\n"
        "def sync(fd):\n    old_sync(fd); order.append('sync')\n"
        "def rename(self, to):\n    order.append('rename'); return old_rename(self, to)\n"
        "os.fsync, spool.Path.rename = sync, rename\n"
        "api.absorb_if_free = lambda path: (print(*order, flush=True), os.kill(os.getpid(), 9))\n"
        "api.remember('a note to keep', sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "sync rename sync\n", "file, name, folder"
    assert len(spool.waiting(path)) == 1
    with pytest.raises(StoreMissing):
        Store(path, read_only=True)
    api.absorb_if_free(path)
    assert notes(path) == ["a note to keep"]


def test_kill_between_commit_and_delete_adds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "w.duckdb"
    record = [Conversation("s", agent="x"), Message("s", "user", [Part("text", "hello " * 20)], "")]
    spool.append(path, record)
    spool.append(path, record)
    kept = [(p, p.read_bytes()) for p in spool.waiting(path)]
    with Store(path) as store:
        assert spool.absorb(store, on_change) == 1, "the same event twice is one"
        before = helpers.content(path) if False else None
    before = helpers.content(path)
    for p, content in kept:
        p.write_bytes(content)
    with Store(path) as store:
        assert spool.absorb(store, on_change) == 0
        assert spool.absorb(store, on_change) == 0
    assert not helpers.difference(before, helpers.content(path))


def test_half_written_and_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "w.duckdb"
    spool.append(path, [Message("s", "user", [Part("text", "hello " * 20)], "n")])
    folder = spool.folder(path)
    (folder / "0-1-2.tmp").write_bytes(b'{"workbench":1,"type":"mess')
    (folder / "0-1-3.jsonl").write_bytes(b'no json\n{"type":"message","session_id":5}\n')
    with Store(path) as store:
        assert spool.absorb(store, on_change) == 1
        reasons = store.con.execute("SELECT reason FROM quarantine ORDER BY byte_offset").fetchall()
    assert [r.split(":")[0] for (r,) in reasons] == ["not JSON", "unexpected shape"]
    assert spool.waiting(path) == []
    assert (folder / "0-1-2.tmp").exists(), "another process may be writing it"


def test_remember(tmp_path: Path) -> None:
    path = tmp_path / "w.duckdb"
    with pytest.raises(InputError, match="empty"):
        api.remember(" \n", path)
    one = api.remember("use the harbour branch", path, project="p", files=["a.py"])
    assert api.remember("use the harbour branch", path, project="p", files=["a.py"]) == one
    assert api.remember("use the harbour branch", path, project="q") != one
    api.remember("bytes \udcff from a shell", path)
    assert notes(path) == ["bytes \ufffd from a shell", "use the harbour branch", "use the harbour branch"]
    assert [h.exchange_id for h in api.recall("harbour branch", path)], "found however short it is"


def test_remember_succeeds_where_the_store_cannot_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "w.duckdb"
    path.write_bytes(b"damaged")
    assert api.remember("a note for better times", path)
    assert len(spool.waiting(path)) == 1
    path.unlink()
    api.absorb_if_free(path)
    assert notes(path) == ["a note for better times"]


def test_full_disk_is_said(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "w.duckdb"
    api.remember("first", path)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))

    done = helpers.workbench(path, "remember", "second note " * 9, preexec_fn=limited)
    helpers.assert_one_message(done, 14)
    assert list(spool.folder(path).iterdir()) == []
    assert notes(path) == ["first"]
