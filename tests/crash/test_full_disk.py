"""A full disk: one message, what was committed stays, and the same command goes on when there is space."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import store_helpers as helpers

from workbench import api

# Fixtures: a log, a store made of it, and a copy that a test may change.
log, filled, copy = helpers.log, helpers.filled, helpers.copy


# -- full disks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _big_log(folder: Path) -> Path:
    for i in range(6):
        rows = helpers.claude_session(random.Random(10 + i), f"big-{i}", turns=80, result_bytes=9000)
        helpers.write_jsonl(folder / f"big-{i}.jsonl", rows)
    return folder


def test_full_disk(small_disk: Path, tmp_path: Path, log: Path) -> None:
    logs = _big_log(tmp_path / "logs")
    calm, store = tmp_path / "calm.duckdb", small_disk / "w.duckdb"
    api.ingest([log], calm)
    api.ingest([logs], calm)
    assert helpers.workbench(store, "ingest", log, "--json").returncode == 0
    before = helpers.content(store)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 300_000))
    helpers.assert_one_message(helpers.workbench(store, "ingest", logs), 14)
    shutil.copy(store, tmp_path / "seen.duckdb")
    for table, rows in before.items():
        assert not rows - helpers.content(store)[table], table
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=90m", str(small_disk)], check=True)
    assert helpers.workbench(store, "ingest", logs, "--json").returncode == 0
    assert not helpers.difference(helpers.content(calm), helpers.content(store))
    # the same for memories
    api.distill(calm)
    verbatim = helpers.verbatim(store)
    filler.write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 60_000))
    helpers.assert_one_message(helpers.workbench(store, "distill"), 14)
    assert not helpers.difference(verbatim, helpers.verbatim(store))
    filler.unlink()
    assert helpers.workbench(store, "distill", "--json").returncode == 0
    assert not helpers.difference(helpers.content(calm), helpers.content(store))


def test_file_size_limit(copy: Path, tmp_path: Path, log: Path) -> None:
    """The same without a disk of its own: the system refuses to let files grow."""
    logs = _big_log(tmp_path / "logs")
    before = helpers.content(copy)
    limit = copy.stat().st_size + 100_000

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    helpers.assert_one_message(helpers.workbench(copy, "ingest", logs, preexec_fn=limited), 14)
    after = helpers.content(copy)
    for table, rows in before.items():
        assert not rows - after[table], table
    assert helpers.workbench(copy, "ingest", logs, "--json").returncode == 0
    assert helpers.workbench(copy, "distill", "--json").returncode == 0
    calm = tmp_path / "calm.duckdb"
    api.ingest([log], calm)
    api.ingest([logs], calm)
    api.distill(calm)
    assert not helpers.difference(helpers.content(calm), helpers.content(copy))
