"""ingest of any bytes with every importer, and its memory."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import store_helpers as helpers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.data import importers, ingest
from workbench.data.ingest import Report
from workbench.data.store import Store

SAMPLES = Path(__file__).parents[2] / "data/samples"
LOGS = sorted(p for p in SAMPLES.rglob("*") if p.is_file() and p.suffix != ".md")


def added(report: Report) -> tuple[int, int, int]:
    return report.conversations_added, report.messages_added, report.exchanges_added


# -- any bytes --------------------------------------------------------------------------------------------------------

_CHUNKS = [line for p in LOGS for line in p.read_bytes().splitlines(keepends=True)[:6] if len(line) < 4000]


def _spoil(draw: Callable[..., Any], whole: bytes) -> bytes:
    content = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(content)))
        how = draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
        if how == "flip" and at < len(content):
            content[at] = draw(st.integers(0, 255))
        elif how == "cut":
            del content[at : at + draw(st.integers(1, 300))]
        elif how == "insert":
            content[at:at] = draw(
                st.sampled_from([b"\n", b"\0", b'"', b"{", b"]", b"\xff", b"\\ud83d", b"NaN", b"[" * 300])
            )
        else:
            content[at:at] = content[at : at + draw(st.integers(1, 500))]
    return bytes(content)


@st.composite
def broken_logs(draw: Callable[..., Any]) -> bytes:
    kind = draw(st.sampled_from(["bytes", "lines", "sample", "sample"]))
    if kind == "bytes":
        return draw(st.binary(max_size=400))
    if kind == "lines":
        return b"".join(draw(st.lists(st.sampled_from(_CHUNKS), max_size=5)))
    return _spoil(draw, draw(st.sampled_from(LOGS)).read_bytes()[: draw(st.sampled_from([3000, 40_000]))])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


@pytest.mark.parametrize("format", [None, *importers.IMPORTERS])
def test_any_bytes(shared: Path, format: str | None) -> None:
    store, log = shared / f"{format}.duckdb", shared / f"{format}.log"

    @settings(max_examples=8, deadline=None, database=None, derandomize=True,
              suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])  # fmt: skip
    @given(broken_logs())
    def check(content: bytes) -> None:
        log.write_bytes(content)
        with opened.transaction() as con:
            con.execute("DELETE FROM sources")
        first = _run(opened, log, format)
        if content.strip() and not first.not_logs:
            seen = first.messages_added + first.messages_unchanged + sum(first.skipped.values()) + first.quarantined
            assert seen or first.conversations_added + first.conversations_unchanged, content[:200]
        with opened.transaction() as con:
            con.execute("UPDATE sources SET mtime_ns = 0")
        again = _run(opened, log, format)
        assert added(again) == (0, 0, 0), content[:200]

    with Store(store) as opened:
        check()


def _run(store: Store, log: Path, format: str | None) -> Report:
    from workbench.memory.index import on_change

    return ingest.ingest(store, [str(log)], format=format, on_change=on_change)


# -- memory -----------------------------------------------------------------------------------------------------------

_PEAK = """
import resource, sys
from workbench.cli.app import run
from workbench.data import ingest
ingest.COMMIT_BYTES, ingest.COMMIT_SECONDS, ingest.MEMORY_LIMIT = 16 << 20, 1e9, "96MB"
code = run(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)
sys.exit(code)
"""


def _peak(log: Path, store: Path) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, "--store", str(store), "ingest", str(log), "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stderr)


def test_memory_stays_flat(tmp_path: Path) -> None:
    """Peak memory (MiB) of a file of many conversations does not grow with it, that of one conversation slowly."""
    rng, peaks, sizes = random.Random(6), [], []
    rows = helpers.many_conversations(rng, 30)
    filler = " ".join(helpers._sentence(rng) for _ in range(600))
    for copies in (45, 90):
        log = tmp_path / "many.jsonl"
        with log.open("w") as f:
            for i in range(copies):
                for j, row in enumerate(rows):
                    f.write(
                        json.dumps({"messages": [*row["messages"], {"role": "tool", "content": f"{i} {j} {filler}"}]})
                        + "\n"
                    )
        peaks.append(_peak(log, tmp_path / f"many{copies}.duckdb"))
        sizes.append(log.stat().st_size >> 20)
    assert sizes[1] > 1.9 * sizes[0] > 150, sizes
    assert peaks[1] - peaks[0] < 90, (sizes, peaks)
    ones = []
    for turns in (60, 180):
        session = helpers.claude_session(rng, f"s{turns}", turns, result_bytes=100_000)
        log = helpers.write_jsonl(tmp_path / f"{turns}.jsonl", session)
        ones.append((log.stat().st_size / 2**20, _peak(log, tmp_path / f"one{turns}.duckdb")))
    (small, low), (large, high) = ones
    assert high - low < 5 * (large - small), ones
