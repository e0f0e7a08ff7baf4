"""ingest --watch: what is added is read; files that come, go and rotate do not end it."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import store_helpers as helpers

from workbench import api, watch
from workbench.data.ingest import Report
from workbench.data.store import Store
from workbench.errors import InputError, StoreBusy


class Rounds:
    """Stands in for the clock: before each look, the next step happens."""

    def __init__(self, *steps: Any) -> None:
        self.steps = list(steps)

    def sleep(self, seconds: float) -> None:
        if self.steps:
            self.steps.pop(0)()


def follow(monkeypatch: pytest.MonkeyPatch, store: Path, paths: list[Path], *steps: Any) -> list[Report]:
    reports: list[Report] = []
    monkeypatch.setattr(watch.time, "sleep", Rounds(*steps).sleep)
    watch.watch(store, [str(p) for p in paths], on_report=reports.append, rounds=len(steps))
    return reports


def nothing() -> None:
    pass


def test_follows_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, logs = tmp_path / "w.duckdb", tmp_path / "logs"
    rows = helpers.claude_session(random.Random(1), "s", 4)
    log = helpers.write_jsonl(logs / "a.jsonl", rows[:5])
    api.ingest([logs], store)
    reports = follow(
        monkeypatch, store, [logs],
        nothing,
        lambda: helpers.write_jsonl(log, rows[:9]),
        nothing,
        lambda: helpers.write_jsonl(logs / "new" / "b.jsonl", helpers.claude_session(random.Random(2), "t", 2)),
        log.unlink,
        lambda: api.remember("noted meanwhile", store),
        lambda: helpers.write_jsonl(log, rows),
    )  # fmt: skip
    assert [r.conversations_added for r in reports] == [0, 1, 0]
    assert all(r.messages_added for r in reports)
    with Store(store, read_only=True) as opened:
        counts = opened.con.execute(
            "SELECT num_messages FROM conversations WHERE format = 'claude_code' ORDER BY session_id"
        )
        assert counts.fetchall() == [(12,), (6,)]


def test_given_file_that_goes_and_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "w.duckdb"
    log = helpers.write_jsonl(tmp_path / "foo!" / "a.jsonl", helpers.claude_session(random.Random(1), "s", 2))
    zipped = tmp_path / "half.zip"
    zipped.write_bytes(b"PK\x03\x04 half copied")
    later = helpers.claude_session(random.Random(3), "later", 2)
    reports = follow(
        monkeypatch, store, [log, zipped], nothing, log.unlink, nothing, lambda: helpers.write_jsonl(log, later)
    )
    assert [r.conversations_added for r in reports] == [1, 1]


def test_damaged_zip_in_a_folder_does_not_hide_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, logs = tmp_path / "w.duckdb", tmp_path / "logs"
    helpers.write_jsonl(logs / "a.jsonl", helpers.claude_session(random.Random(1), "s", 2))
    (logs / "cut.zip").write_bytes(b"PK\x03\x04 cut")
    more = helpers.claude_session(random.Random(2), "t", 2)
    reports = follow(
        monkeypatch, store, [logs], nothing, nothing, lambda: helpers.write_jsonl(logs / "b.jsonl", more), nothing
    )
    assert [r.conversations_added for r in reports] == [1, 1]


def test_busy_store_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "w.duckdb"
    log = helpers.write_jsonl(tmp_path / "a.jsonl", helpers.claude_session(random.Random(1), "s", 2))
    original, calls = api.ingest, []

    def ingest(*args: Any, **options: Any) -> Report:
        calls.append(args)
        if len(calls) == 1:
            raise StoreBusy("another process")
        return original(*args, **options)

    monkeypatch.setattr(api, "ingest", ingest)
    reports = follow(monkeypatch, store, [log], nothing, nothing, nothing)
    assert [r.conversations_added for r in reports] == [1]
    assert len(calls) == 2


def test_standard_input_cannot_be_followed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="standard input"):
        watch.watch(tmp_path / "w.duckdb", ["-"], on_report=lambda report: None, rounds=1)


def test_interrupt_ends_it(tmp_path: Path) -> None:
    store, logs = tmp_path / "w.duckdb", tmp_path / "logs"
    rows = helpers.claude_session(random.Random(1), "s", 6)
    log = helpers.write_jsonl(logs / "a.jsonl", rows[:7])
    process = subprocess.Popen(
        helpers.command(store, "ingest", logs, "--watch", "--every", "0.1", "--json"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**helpers.os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout
    assert '"added":1' in process.stdout.readline()
    helpers.write_jsonl(log, rows)
    assert '"added":13' in process.stdout.readline()
    with Store(store, wait_seconds=20) as opened:  # the store is free between rounds
        assert opened.con.execute("SELECT num_messages FROM conversations").fetchall() == [(18,)]
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.startswith("workbench: Interrupted")
