"""The store file: migrations, files that cannot be used, full disks, and how processes pass it to each other."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import duckdb
import pytest
import store_helpers as helpers

from workbench import api
from workbench.data import store as store_module
from workbench.data.store import Store, migrations, schema_version
from workbench.errors import StoreBusy, StoreDamaged, StoreError, StoreMissing, StoreNewer, StoreReadOnly

NEWEST = migrations()[-1][0]


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def beside(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir() if p != path and not p.name.endswith(".wait"))


# Fixtures: a log, a store made of it, and a copy that a test may change.
log, filled, copy = helpers.log, helpers.filled, helpers.copy


# -- schema -----------------------------------------------------------------------------------------------------------


def _first_schema(path: Path) -> None:
    """A store as the first version of the workbench made it, with a row in each table of the logs."""
    with duckdb.connect(str(path)) as con:
        con.execute("CREATE TABLE schema_versions (version INTEGER, applied_at TIMESTAMPTZ)")
        con.execute(migrations()[0][1])
        con.execute("INSERT INTO schema_versions VALUES (1, now())")
        con.execute(
            "INSERT INTO conversations (conversation_id, format, session_id, source_id, path, first_seq, num_messages) "
            "VALUES ('c1', 'claude_code', 's1', 'f1', '/a', 1, 1)"
        )
        con.execute(
            "INSERT INTO messages (seq, message_id, conversation_id, ply, thread, role, native_id, source_id, "
            "source_offset, source_length) VALUES (1, 'm1', 'c1', 0, '', 'user', 'n1', 'f1', 0, 9)"
        )
        con.execute(
            "INSERT INTO parts (seq, part_id, message_id, conversation_id, ordinal, kind, text) "
            "VALUES (1, 'p1', 'm1', 'c1', 0, 'text', 'verbatim \u00e9\U0001f600')"
        )


@pytest.mark.parametrize("read_only", [False, True])
def test_first_schema_is_migrated_with_a_backup(tmp_path: Path, read_only: bool) -> None:
    path = tmp_path / "w.duckdb"
    _first_schema(path)
    before = helpers.verbatim(path)
    with Store(path, read_only=read_only) as store:
        assert schema_version(store.con) == NEWEST
        versions = store.con.execute("SELECT version FROM schema_versions ORDER BY 1").fetchall()
        assert versions == [(v,) for v, _ in migrations()]
    assert not helpers.difference(before, helpers.verbatim(path))
    assert beside(path) == ["w.duckdb.v1.bak"]
    with duckdb.connect(str(tmp_path / "w.duckdb.v1.bak"), read_only=True) as con:
        assert schema_version(con) == 1
    assert not helpers.difference(before, helpers.verbatim(tmp_path / "w.duckdb.v1.bak"))


def test_migration_keeps_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that opens and closes its own database file by other means than DuckDB loses its lock on it."""
    path = tmp_path / "w.duckdb"
    _first_schema(path)
    script = "import duckdb, sys\ntry:\n    duckdb.connect(sys.argv[1])\nexcept duckdb.IOException as e:\n    print(e)"
    seen: list[str] = []

    def after_backup(store: Store, backup: Path) -> None:
        original(store, backup)
        done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
        seen.append(done.stdout)

    original = Store._back_up
    monkeypatch.setattr(Store, "_back_up", after_backup)
    Store(path).close()
    assert len(seen) == 1
    assert "lock on file" in seen[0]


def test_kill_during_migration_leaves_the_old_store(tmp_path: Path) -> None:
    for moment in ("_back_up", "transaction"):
        path = tmp_path / moment / "w.duckdb"
        path.parent.mkdir()
        _first_schema(path)
        before = helpers.verbatim(path)
        script = (
            "import os, signal, sys\nfrom workbench.data import store as s\nfrom pathlib import Path\n"
            f"old = s.Store.{moment}\n"
            "def new(self, *a):\n"
            "    if sys.argv[2] == 'transaction':\n"
            "        self.con.execute('BEGIN'); self.con.execute(s.migrations()[1][1]); os.kill(os.getpid(), 9)\n"
            "    old(self, *a); os.kill(os.getpid(), 9)\n"
            f"s.Store.{moment} = new\ns.Store(Path(sys.argv[1]))"
        )
        done = subprocess.run([sys.executable, "-c", script, str(path), moment], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        with duckdb.connect(str(path), read_only=True) as con:
            assert schema_version(con) == 1
        with Store(path) as store:
            assert schema_version(store.con) == NEWEST
        assert not helpers.difference(before, helpers.verbatim(path))
        assert beside(path) == ["w.duckdb.v1.bak"]


@pytest.mark.parametrize("with_wal", [False, True])
def test_newer_schema_is_refused_and_left_alone(copy: Path, with_wal: bool) -> None:
    script = "import duckdb, os, sys\ncon = duckdb.connect(sys.argv[1])\n" \
             f"con.execute('INSERT INTO schema_versions VALUES ({NEWEST + 7}, now())')\n"  # fmt: skip
    script += "os.kill(os.getpid(), 9)" if with_wal else "con.close()"
    subprocess.run([sys.executable, "-c", script, str(copy)], check=not with_wal)
    wal = copy.with_name(copy.name + ".wal")
    assert wal.exists() == with_wal
    before = file_hash(copy), file_hash(wal) if with_wal else None
    for read_only in (False, True):
        with pytest.raises(StoreNewer, match=f"schema {NEWEST + 7}.*--store"):
            Store(copy, read_only=read_only)
    helpers.assert_one_message(helpers.workbench(copy, "stats"), 11)
    assert (file_hash(copy), file_hash(wal) if with_wal else None) == before


# -- damage -----------------------------------------------------------------------------------------------------------


def test_truncated_store_is_refused_and_left_alone(copy: Path, log: Path) -> None:
    whole = copy.read_bytes()
    rng = random.Random(2)
    lengths = [0, 1, 7, 4095, 4096, 8192, 12287, 12288, 12289, len(whole) - 1, len(whole) - 262144]
    lengths += [rng.randrange(12289, len(whole)) for _ in range(12)]
    for length in lengths:
        copy.write_bytes(whole[:length])
        before = file_hash(copy)
        for read_only in (False, True):
            with pytest.raises(StoreDamaged, match="Move it away"):
                Store(copy, read_only=read_only)
        with pytest.raises(StoreDamaged):
            api.ingest([log], copy)
        with pytest.raises(StoreDamaged):
            api.recall("retry", copy)
        assert file_hash(copy) == before, length
        assert beside(copy) == []


def test_garbage_is_refused_and_left_alone(tmp_path: Path) -> None:
    rng = random.Random(3)
    for i, content in enumerate((b"hello\n" * 999, rng.randbytes(300_000), b"SQLite format 3\0" + bytes(99_999))):
        path = tmp_path / f"{i}.duckdb"
        path.write_bytes(content)
        with pytest.raises(StoreDamaged):
            Store(path)
        assert path.read_bytes() == content


def test_database_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "sales.duckdb"
    with duckdb.connect(str(path)) as con:
        con.execute("CREATE TABLE sales AS SELECT 1 AS id")
    before = file_hash(path)
    for read_only in (False, True):
        with pytest.raises(StoreDamaged, match="another program"):
            Store(path, read_only=read_only)
    assert file_hash(path) == before
    assert beside(path) == []


def test_damage_through_the_command_line(copy: Path, log: Path) -> None:
    os.truncate(copy, copy.stat().st_size // 2)
    before = file_hash(copy)
    for arguments in (["ingest", log], ["distill"], ["recall", "retry"], ["stats"]):
        helpers.assert_one_message(helpers.workbench(copy, *arguments), 12)
    assert file_hash(copy) == before


def test_free_blocks_at_the_end_are_no_damage(copy: Path) -> None:
    """DuckDB cuts them off after it has written the number of blocks: the file is then shorter than it says."""
    with Store(copy) as store:
        store.con.execute(
            "CREATE TABLE big AS SELECT range i, md5(range::VARCHAR) || md5((-range)::VARCHAR) t FROM range(300000)"
        )
        store.con.execute("CHECKPOINT")
        store.con.execute("DROP TABLE big")
        store.con.execute("CHECKPOINT")
    with duckdb.connect(str(copy), read_only=True) as con:
        row = con.execute("SELECT total_blocks * block_size + 12288 FROM pragma_database_size()").fetchone()
    assert row
    assert copy.stat().st_size < row[0], "the case does not arise any more: simplify Store._check_whole"
    Store(copy).close()
    Store(copy, read_only=True).close()


# -- not writable -----------------------------------------------------------------------------------------------------


def test_read_only_file_and_folder(copy: Path, log: Path) -> None:
    before = file_hash(copy)
    copy.chmod(0o444)
    helpers.assert_one_message(helpers.workbench(copy, "ingest", log), 13)
    helpers.assert_one_message(helpers.workbench(copy, "distill"), 13)
    with pytest.raises(StoreReadOnly, match="chmod"):
        Store(copy)
    assert api.recall("retry queue parser", copy)
    copy.chmod(0o644)
    copy.parent.chmod(0o555)
    try:
        with pytest.raises(StoreReadOnly, match="read-only"):
            Store(copy)
        with pytest.raises(StoreReadOnly):
            Store(copy.with_name("other.duckdb"))
        assert api.recall("retry queue parser", copy)
        assert file_hash(copy) == before
    finally:
        copy.parent.chmod(0o755)


def test_paths_that_cannot_be_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreReadOnly, match="cannot be made"):
        Store(tmp_path / "file" / "w.duckdb")
    for read_only in (False, True):
        with pytest.raises(StoreError, match="is a folder"):
            Store(tmp_path, read_only=read_only)
    with pytest.raises(StoreMissing, match="workbench ingest"):
        Store(tmp_path / "none.duckdb", read_only=True)
    helpers.assert_one_message(helpers.workbench(tmp_path / "none.duckdb", "stats"), 16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_kill_while_the_store_is_made_leaves_none(tmp_path: Path) -> None:
    path = tmp_path / "w.duckdb"
    script = (
        "import os, sys\nfrom workbench.data import store as s\n"
        "old = s._connect\ndef new(*a, **k):\n    con = old(*a, **k); os.kill(os.getpid(), 9)\n"
        "s._connect = new\ns.Store(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    Store(path).close()
    with Store(path, read_only=True) as store:
        assert schema_version(store.con) == NEWEST


# -- several processes ------------------------------------------------------------------------------------------------

_LONG_WRITER = """
import sys, time
from pathlib import Path
from workbench.data.store import Store
with Store(sys.argv[1]) as store:
    print("open", flush=True)
    end, turns = time.monotonic() + float(sys.argv[2]), 0
    while time.monotonic() < end and not Path(sys.argv[1] + ".stop").exists():
        with store.transaction() as con:
            con.execute("INSERT INTO settings VALUES ('x', '1')")
        time.sleep(0.05)
        turns += store.hand_over()
    print("handed over", turns, flush=True)
"""


def test_long_writer_hands_over_to_readers_and_writers(copy: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", _LONG_WRITER, str(copy), "60"], stdout=subprocess.PIPE, text=True)
    assert writer.stdout
    assert writer.stdout.readline() == "open\n"
    assert helpers.workbench(copy, "stats", "--json").returncode == 0
    with Store(copy, wait_seconds=20) as store, store.transaction() as con:
        con.execute("INSERT INTO settings VALUES ('y', '2')")
    assert helpers.workbench(copy, "recall", "retry queue", "--json").returncode == 0
    Path(f"{copy}.stop").touch()
    out = writer.communicate(timeout=30)[0]
    assert writer.returncode == 0
    assert int(out.split()[-1]) >= 1, "one hand-over can serve several that wait"
    with Store(copy, read_only=True) as store:
        assert store.con.execute("SELECT count(*) FROM settings WHERE name = 'y'").fetchone() == (1,)


def test_store_busy_after_the_wait(copy: Path) -> None:
    script = "import duckdb, sys\nc = duckdb.connect(sys.argv[1])\nprint('open', flush=True)\ninput()"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(copy)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout
        assert holder.stdout.readline() == "open\n"
        for read_only in (False, True):
            with pytest.raises(StoreBusy, match=r"within 0\.1 s"):
                Store(copy, read_only=read_only, wait_seconds=0.1)
        wait = Path(f"{copy}.wait")
        assert list(wait.iterdir()) == [], "a waiter takes its note away"
        script = (
            "from workbench.data.store import Store\nStore.__init__.__kwdefaults__['wait_seconds'] = 0.1\n"
            "from workbench.cli import main\nmain()"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, "--store", str(copy), "stats"], capture_output=True, text=True
        )
        helpers.assert_one_message(done, 15)
    finally:
        holder.communicate("\n", timeout=20)


def test_notes_of_dead_waiters_are_ignored(copy: Path) -> None:
    with Store(copy) as store:
        folder = Path(f"{copy}.wait")
        folder.mkdir(exist_ok=True)
        note = folder / "999999-dead"
        note.touch()
        long_ago = time.time() - store_module.STALE_NOTE_SECONDS - 1
        os.utime(note, (long_ago, long_ago))
        assert store.hand_over() is False
        assert not note.exists()
        note.touch()
        assert store.hand_over() is True
        assert schema_version(store.con) == NEWEST
    note.unlink()


def test_threads_of_one_process(copy: Path) -> None:
    """A reader waits for a writer of the same process, as it would for another's."""
    opened, errors = threading.Event(), []

    def read() -> None:
        opened.wait()
        try:
            with Store(copy, read_only=True, wait_seconds=20) as store:
                store.con.execute("SELECT count(*) FROM messages").fetchall()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    with Store(copy) as store:
        opened.set()
        time.sleep(0.2)
        with store.transaction() as con:
            con.execute("INSERT INTO settings VALUES ('z', '3')")
    thread.join()
    assert not errors
