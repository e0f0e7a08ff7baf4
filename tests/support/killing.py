"""Kills the command line at random moments and runs it again until it ends: used by the test and the benchmark."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import store_helpers as helpers


@dataclass
class Kills:
    """What became of the runs of one command: killed ones by the signal, and in which second of their work."""

    kills: int = 0
    finished: int = 0
    moments: list[float] = field(default_factory=list)


def make_logs(folder: Path, seed: int, sessions: int, conversations: int) -> Path:
    """Sessions of Claude Code and one file of many conversations, made up from a seed."""
    rng = random.Random(seed)
    for i in range(sessions):
        rows = helpers.claude_session(rng, f"s{i}", rng.randrange(20, 60))
        helpers.write_jsonl(folder / f"project-{i % 3}" / f"{i}.jsonl", rows)
    helpers.write_jsonl(folder / "chats.jsonl", helpers.many_conversations(rng, conversations))
    return folder


def time_of(store: Path, *arguments: str | Path) -> tuple[float, float]:
    """(start-up, whole) seconds of an undisturbed run, which also makes the store to compare with."""
    started = time.monotonic()
    done = helpers.workbench(store, "methods", "--json")
    start_up = time.monotonic() - started
    started = time.monotonic()
    done = helpers.workbench(store, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return start_up, time.monotonic() - started


def run_with_kills(
    rng: random.Random,
    store: Path,
    kills: int,
    seconds: tuple[float, float],
    *arguments: str | Path,
) -> Kills:
    """Starts the command again and again, ends it after a random time each, and lets the last run finish.

    Args: kills: how often at most; seconds: (start-up, whole) of an undisturbed run.
    """
    result = Kills()
    start_up, whole = seconds
    while result.kills < kills:
        process = subprocess.Popen(
            helpers.command(store, *arguments, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        moment = rng.uniform(start_up * 0.7, whole)
        try:
            _, err = process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            _, err = process.communicate(timeout=60)
        if process.returncode == 0:
            result.finished += 1
            break
        assert process.returncode == -signal.SIGKILL, (process.returncode, err)
        result.kills += 1
        result.moments.append(moment)
    done = helpers.workbench(store, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return result


def campaign(folder: Path, logs: Path, seed: int, kills: int) -> dict[str, Kills]:
    """Kills ingest, then distil, `kills` times each, over as many stores as that takes; all must equal the calm one.

    Raises: AssertionError that names the seed and the first differences.
    """
    rng = random.Random(seed)
    calm = folder / "calm.duckdb"
    ingest_seconds = time_of(calm, "ingest", logs)
    ingested = folder / "ingested.duckdb"
    shutil.copy(calm, ingested)
    verbatim = helpers.verbatim(calm)
    distil_seconds = time_of(calm, "distill")
    expected = {"ingest": helpers.content(ingested), "distill": helpers.content(calm)}
    totals = {"ingest": Kills(), "distill": Kills()}
    round_number = 0
    for name, arguments, seconds in (
        ("ingest", ["ingest", logs], ingest_seconds),
        ("distill", ["distill"], distil_seconds),
    ):
        total = totals[name]
        while total.kills < kills:
            round_number += 1
            store = folder / f"{name}-{round_number}.duckdb"
            if name == "distill":
                shutil.copy(ingested, store)
            # A few kills to a store, then it is left to finish: later moments than the first commit come about, too.
            some = run_with_kills(rng, store, min(4, kills - total.kills), seconds, *arguments)
            total.kills += some.kills
            total.finished += some.finished
            total.moments += some.moments
            what = helpers.difference(expected[name], helpers.content(store))
            assert not what, f"seed {seed}, {name}, store {round_number}:\n{what}"
            assert not helpers.difference(verbatim, helpers.verbatim(store))
            for left in folder.glob(f"{name}-{round_number}.duckdb*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return totals
