"""A kill at any moment: run again, and the content is that of an undisturbed run (many more: bench_crash.py)."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import killing
import pytest
import store_helpers as helpers

from workbench import api
from workbench.data import spool
from workbench.data.store import Store


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return killing.make_logs(tmp_path_factory.mktemp("logs"), seed=11, sessions=6, conversations=500)


def test_kill_ingest_and_distill(tmp_path: Path, logs: Path) -> None:
    totals = killing.campaign(tmp_path, logs, seed=3, kills=3)
    assert all(total.kills == 3 for total in totals.values())


def test_interrupt_loses_nothing(tmp_path: Path, logs: Path) -> None:
    calm, store = tmp_path / "calm.duckdb", tmp_path / "w.duckdb"
    api.ingest([logs], calm)
    codes = []
    for wait in (0.05, 0.2, 0.4):
        process = subprocess.Popen(helpers.command(store, "ingest", logs), stderr=subprocess.PIPE, text=True)
        while not store.exists():
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (0, 130), err
        assert "Traceback" not in err
        codes.append(process.returncode)
    assert 130 in codes
    assert helpers.workbench(store, "ingest", logs, "--json").returncode == 0
    assert not helpers.difference(helpers.content(calm), helpers.content(store))


# Moments that random ones seldom hit: each script ends itself in the middle of one statement.

_AT = """
import os, sys
from workbench import api
from workbench.data import store as s, ingest as g
class Connection:
    def __init__(self, con): object.__setattr__(self, "con", con)
    def __getattr__(self, name): return getattr(self.con, name)
    def execute(self, sql, *a):
        before, text = sys.argv[3] == "before", sys.argv[4]
        if before and text in sql: os.kill(os.getpid(), 9)
        result = self.con.execute(sql, *a)
        if not before and text in sql: os.kill(os.getpid(), 9)
        return result
old = s._connect
s._connect = lambda *a, **k: Connection(old(*a, **k))
getattr(api, sys.argv[5])(*([[sys.argv[2]]] if sys.argv[5] == "ingest" else []), store=sys.argv[1])
"""


def _killed_at(store: Path, logs: Path, when: str, statement: str, command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _AT, str(store), str(logs), when, statement, command], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, (done.returncode, done.stderr[-2000:])


@pytest.mark.parametrize(
    ("when", "statement"),
    [("before", "COMMIT"), ("after", "COMMIT"), ("before", "INSERT INTO sources"), ("after", "INSERT INTO exchanges")],
)
def test_kill_ingest_at(tmp_path: Path, logs: Path, when: str, statement: str) -> None:
    some = logs / "project-0"
    calm, store = tmp_path / "calm.duckdb", tmp_path / "w.duckdb"
    api.ingest([some], calm)
    Store(store).close()
    _killed_at(store, some, when, statement, "ingest")
    api.ingest([some], store)
    assert not helpers.difference(helpers.content(calm), helpers.content(store))


@pytest.mark.parametrize("statement", ["COMMIT", "INSERT INTO memories"])
def test_kill_distill_at(tmp_path: Path, logs: Path, statement: str) -> None:
    calm, store = tmp_path / "calm.duckdb", tmp_path / "w.duckdb"
    api.ingest([logs / "project-1"], calm)
    shutil.copy(calm, store)
    api.distill(calm)
    _killed_at(store, logs, "after", statement, "distill")
    api.distill(store)
    assert not helpers.difference(helpers.content(calm), helpers.content(store))


@pytest.mark.parametrize("statement", ["COMMIT", "INSERT INTO exchanges"])
def test_kill_while_the_spool_is_absorbed(tmp_path: Path, statement: str) -> None:
    calm, store = tmp_path / "calm.duckdb", tmp_path / "w.duckdb"
    Store(store).close()
    with Store(store):  # while the store is taken, notes stay in the spool
        done = [helpers.workbench(store, "remember", f"note {i}") for i in range(3)]
    assert [d.returncode for d in done] == [0, 0, 0], done[0].stderr
    waiting = spool.waiting(store)
    assert len(waiting) == 3
    shutil.copytree(spool.folder(store), spool.folder(calm))
    _killed_at(store, tmp_path, "after", statement, "absorb_if_free")
    assert len(spool.waiting(store)) == 3, "deleted only after the commit"
    for path in (calm, store):
        api.absorb_if_free(path)
        assert spool.waiting(path) == []
    assert not helpers.difference(helpers.content(calm), helpers.content(store))


def test_kill_during_the_checkpoint(tmp_path: Path, logs: Path) -> None:
    """The file is being rewritten while the log (.wal) is there: a limit of file sizes ends it at several sizes."""
    calm, store = tmp_path / "calm.duckdb", tmp_path / "w.duckdb"
    api.ingest([logs / "project-2"], calm)
    script = (
        "import os, resource, signal, sys\nfrom workbench import api\nfrom workbench.data.store import Store\n"
        "close = Store.close\n"
        "def end(self):\n"
        "    size = os.path.getsize(self.path)\n"
        "    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (size + int(sys.argv[3]), -1))\n"
        "    close(self)\n"
        "Store.close = end\n"
        "api.ingest([sys.argv[2]], sys.argv[1])"
    )
    ended = 0
    for more in (0, 4096, 100_000, 300_000, 1_200_000):
        Store(store).close()
        done = subprocess.run(
            [sys.executable, "-c", script, str(store), str(logs / "project-2"), str(more)], capture_output=True
        )
        ended += done.returncode == -signal.SIGXFSZ
        assert not helpers.difference(helpers.content(calm), helpers.content(store)), more
        with Store(store) as opened:
            opened.con.execute("CHECKPOINT")
        assert not helpers.difference(helpers.content(calm), helpers.content(store)), more
        store.unlink()
    assert ended >= 3
