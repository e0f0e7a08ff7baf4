"""The long crash test: kill -9 at random moments of `ingest` and of `distill`, run again, compare with a calm run.

    python benchmarks/bench_crash.py [--kills 30] [--seed 1] [--write]

Each command is killed `--kills` times (60 kills in all by default). Fails at the first store whose content differs;
`--write` puts the figures into benchmarks/results/crash.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))
import killing  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="of each command")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/crash.md")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        logs = killing.make_logs(folder / "logs", options.seed, sessions=20, conversations=3000)
        size = sum(p.stat().st_size for p in logs.rglob("*.jsonl"))
        totals = killing.campaign(folder, logs, options.seed, options.kills)
    rows = ["| command | kills | moments of the kills, s after the start | differences |", "|---|---|---|---|"]
    for command, total in totals.items():
        low, high = min(total.moments), max(total.moments)
        rows.append(f"| {command} | {total.kills} | {low:.2f} to {high:.2f} | 0 |")
    table = "\n".join(rows)
    seconds = time.monotonic() - started
    print(f"{table}\n{size / 2**20:.1f} MiB of logs, {seconds:.0f} s")
    if options.write:
        target = ROOT / "benchmarks/results/crash.md"
        target.parent.mkdir(exist_ok=True)
        target.write_text(
            "# kill -9 at random moments, then run again\n\n"
            f"{datetime.now(UTC):%Y-%m-%d}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python "
            f"{platform.python_version()}; `python benchmarks/bench_crash.py --kills {options.kills} --seed "
            f"{options.seed} --write`; {size / 2**20:.1f} MiB of made-up logs, {seconds:.0f} s in all.\n\n"
            "After at most four kills a store is left to finish; then all its rows (without numbers and times of "
            "insertion) and the terms and vectors of every document are compared with those of an undisturbed run.\n\n"
            f"{table}\n"
        )


if __name__ == "__main__":
    main()
