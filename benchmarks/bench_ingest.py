"""Speed and memory of ingest beside merely parsing the same JSON lines with orjson, in the same process and run.

    python benchmarks/bench_ingest.py [--scale 16] [--repeats 6] [--session-mb 50 400] [--out benchmarks/results]

Corpora are made of the recorded sessions in WORKBENCH_SHARED_DATA (else ../shared/data): `--scale` copies of the Claude
Code logs and 4 times as many of the Codex logs, with other session ids and line ids; and a JSONL file of chats made of
the words of recorded exchanges. Copies repeat words, which favours the tokenizer's cache of terms. Each repeat parses
all lines, then runs the stages, each into a new store; the ratio is time to parse / time of the stage, in the median of
the repeats. The first run stands by itself: it has the imports in it. Peak memory is that of a process that ingests
once and does nothing else. The floor is what would be left if everything but parsing and DuckDB took no time: the SQL
statements of an ingest with their columns, noted once, and given to DuckDB again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("WORKBENCH_SHARED_DATA", ROOT.parent / "shared/data"))
Row = dict[str, Any]
Seconds = tuple[float, float]  # CPU of all threads, wall


def make_claude_code(folder: Path, scale: int) -> None:
    for copy in range(scale):
        for number, path in enumerate(sorted((DATA / "agent_logs/claude_code").rglob("*.jsonl"))):
            session = b"%08x-0000-4000-8000-%012x" % (copy, number)
            (folder / f"{session.decode()}.jsonl").write_bytes(renamed(path.read_bytes(), session, copy))


def renamed(log: bytes, session: bytes, copy: int) -> bytes:
    """A Claude Code log with another session id and other ids of its lines and messages."""
    log = re.sub(rb'"sessionId":"[^"]*"', b'"sessionId":"%b"' % session, log if log.endswith(b"\n") else log + b"\n")
    ids = rb'("(?:uuid|parentUuid|leafUuid)":"|"id":"msg_)....'
    return re.sub(ids, lambda found: found[1] + b"%04x" % copy, log)


def make_codex(folder: Path, scale: int) -> None:
    for copy in range(4 * scale):
        for path in sorted((DATA / "agent_logs/codex").rglob("*.jsonl")):
            old = path.stem[-36:].encode()
            new = b"%08x" % copy + old[8:]
            (folder / f"rollout-{new.decode()}.jsonl").write_bytes(path.read_bytes().replace(old, new))


def make_openai_chat(folder: Path, scale: int) -> None:
    """Chats of three to eight exchanges, one a line."""
    with gzip.open(DATA / "agentlog_corpus_dev.jsonl.gz", "rt") as lines:
        exchanges = [json.loads(line) for line in lines]
    with (folder / "chats.jsonl").open("w") as out:
        for copy in range(scale):
            left = iter(exchanges)
            for number in range(len(exchanges)):
                turns = list(islice(left, 3 + number % 6))
                messages = [
                    {"role": role, "content": turn[role]} for turn in turns for role in ("user", "assistant")
                ]  # fmt: skip
                if messages:
                    out.write(json.dumps({"id": f"{copy}-{number}", "messages": messages}, ensure_ascii=False) + "\n")


def make_session(path: Path, megabytes: int) -> None:
    """One Claude Code session of that size in one file."""
    logs = [log.read_bytes() for log in sorted((DATA / "agent_logs/claude_code").rglob("*.jsonl"))]
    with path.open("wb") as out:
        copy = 0
        while out.tell() < megabytes * 1e6:
            out.write(renamed(logs[copy % len(logs)], b"one-long-session", copy))
            copy += 1


MAKERS: dict[str, Callable[[Path, int], None]] = {
    "claude_code": make_claude_code, "codex": make_codex, "openai_chat": make_openai_chat,
}  # fmt: skip


# -- what is timed ----------------------------------------------------------------------------------------------------


def timed(function: Callable[[], Any]) -> Seconds:
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return time.process_time() - cpu, time.perf_counter() - wall


def parse(folder: Path) -> None:
    import orjson

    for path in sorted(folder.iterdir()):
        with path.open("rb") as lines:
            for line in lines:
                orjson.loads(line)


def convert(folder: Path) -> None:
    from workbench.data.importers import detect, importer
    from workbench.data.importers.base import Source
    from workbench.data.sources import find, opened, probe

    for found in find([str(folder)]):
        with opened(found) as stream:
            head, stream = probe(stream)
            for _ in importer(detect(head) or "").read(Source(found.path, stream)):
                pass


def ingest(folder: Path, store: Path, derive: bool = True) -> None:
    from workbench import api
    from workbench.data.ingest import ingest as into
    from workbench.data.store import Store

    for old in store.parent.glob(store.name + "*"):
        old.unlink()
    if derive:
        api.ingest([folder], store)
    else:
        with Store(store) as opened:
            into(opened, [str(folder)])


class Noted:
    """A connection that notes what it is asked, so that it can be asked again by nobody."""

    def __init__(self, con: Any, notes: list[tuple[str, tuple[Any, ...]]]) -> None:
        self._con, self._notes = con, notes

    def __getattr__(self, name: str) -> Any:
        if name not in ("execute", "register", "unregister"):
            return getattr(self._con, name)

        def called(*arguments: Any) -> Any:
            found = getattr(self._con, name)(*arguments)  # what fails (is there a table yet?) is not noted
            if name == "register":  # the columns are emptied after use
                arguments = (arguments[0], {column: values.copy() for column, values in arguments[1].items()})
            self._notes.append((name, arguments))
            return found

        return called


def noted(folder: Path, store: Path) -> list[tuple[str, tuple[Any, ...]]]:
    """What an ingest asks of DuckDB, with all columns."""
    from workbench.data import store as module

    notes: list[tuple[str, tuple[Any, ...]]] = []
    connect = module._connect
    module._connect = lambda *given, **named: Noted(connect(*given, **named), notes)  # type: ignore[assignment]
    try:
        ingest(folder, store)
    finally:
        module._connect = connect
    return notes


def replay(notes: list[tuple[str, tuple[Any, ...]]], store: Path) -> None:
    """Asks DuckDB the same again in a new file, from nothing to the file that is closed."""
    from workbench.data.store import _connect

    for old in store.parent.glob(store.name + "*"):
        old.unlink()
    con = _connect(store, False)
    for name, arguments in notes:
        answer = getattr(con, name)(*arguments)
        if name == "execute":
            answer.fetchall()
    con.close()


def run_format(folder: Path, store: Path, repeats: int) -> Row:
    """The times of one format's stages, and their ratios to the parsing in the same repeat."""
    stages: dict[str, Callable[[], Any]] = {
        "convert": lambda: convert(folder),
        "store": lambda: ingest(folder, store, derive=False),
        "ingest": lambda: ingest(folder, store),
        "sql": lambda: replay(notes, store),
    }
    notes = noted(folder, store)
    times: dict[str, list[Seconds]] = {"orjson": [], **{name: [] for name in stages}}
    first = parsed_and(stages["ingest"], folder)
    for _ in range(repeats):
        times["orjson"].append(timed(lambda: parse(folder)))
        for name, stage in stages.items():
            times[name].append(timed(stage))
    size = sum(path.stat().st_size for path in folder.iterdir())
    row: Row = {
        "mb": size / 1e6,
        "files": len(list(folder.iterdir())),
        "first_ratio_cpu": first[0],
        "first_ratio_wall": first[1],
    }
    for at, clock in enumerate(("cpu", "wall")):
        floors = [p[at] / (p[at] + sql[at]) for p, sql in zip(times["orjson"], times["sql"], strict=True)]
        row[f"floor_{clock}"] = statistics.median(floors)
    for name, seconds in times.items():
        for at, clock in enumerate(("cpu", "wall")):
            row[f"{name}_s_{clock}"] = statistics.median(each[at] for each in seconds)
            ratios = [base[at] / each[at] for base, each in zip(times["orjson"], seconds, strict=True)]
            row[f"{name}_ratio_{clock}"] = statistics.median(ratios)
    return row


def parsed_and(function: Callable[[], Any], folder: Path) -> Seconds:
    """The ratio of parsing to a function that runs for the first time, CPU and wall."""
    base, each = timed(lambda: parse(folder)), timed(function)
    return base[0] / each[0], base[1] / each[1]


def child(what: str, folder: Path, store: Path, repeats: int) -> Row:
    """Runs in a process of its own."""
    if what == "memory":
        ingest(folder, store)
        row: Row = {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        row["store_mb"] = store.stat().st_size / 1e6
        return row
    return run_format(folder, store, repeats)


def in_process(what: str, folder: Path, work: Path, repeats: int) -> Row:
    command = [sys.executable, __file__, "--child", what, str(folder), str(work / "bench.duckdb"), str(repeats)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


# -- results ----------------------------------------------------------------------------------------------------------

_TABLE = [
    ("format", "{format}"), ("MB", "{mb:.0f}"), ("files", "{files}"), ("orjson MB/s", "{orjson_rate:.0f}"),
    ("ingest MB/s", "{ingest_rate:.0f}"), ("ratio, CPU", "{ingest_ratio_cpu:.3f}"),
    ("ratio, wall", "{ingest_ratio_wall:.3f}"), ("floor, CPU", "{floor_cpu:.2f}"),
    ("floor, wall", "{floor_wall:.2f}"), ("first run, CPU", "{first_ratio_cpu:.3f}"),
    ("peak MB", "{peak_mb:.0f}"), ("store MB", "{store_mb:.0f}"),
]  # fmt: skip
_STAGES = (("orjson", "parse"), ("convert", "+ detect, convert"), ("store", "+ ids, store"),
           ("ingest", "+ exchanges, postings"))  # fmt: skip


def write(rows: list[Row], sessions: list[Row], options: argparse.Namespace) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.strip(),
        "command": f"python benchmarks/bench_ingest.py --scale {options.scale} --repeats {options.repeats} "
        f"--session-mb {' '.join(map(str, options.session_mb))}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end",
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("duckdb", "orjson", "numpy")}},
    }
    lines = ["# Ingest beside parsing the same lines with orjson", "", *(f"- {k}: {v}" for k, v in facts.items()), ""]
    lines += [f"| {' | '.join(n for n, _ in _TABLE)} |", f"|{'---|' * len(_TABLE)}"]
    lines += [f"| {' | '.join(form.format(**row) for _, form in _TABLE)} |" for row in rows]
    lines += ["", "Floor: parse / (parse + the SQL statements alone, their columns ready).", ""]
    lines += ["Seconds of CPU up to and with each stage (and parse / stage):", ""]
    lines += [f"| format | {' | '.join(name for _, name in _STAGES)} |", f"|{'---|' * (len(_STAGES) + 1)}"]
    for row in rows:
        cells = (f"{row[f'{key}_s_cpu']:.2f} ({row[f'{key}_ratio_cpu']:.2f})" for key, _ in _STAGES)
        lines.append(f"| {row['format']} | {' | '.join(cells)} |")
    lines += ["", "One session in one file, one transaction:", "", "| MB | peak MB | store MB |", "|---|---|---|"]
    lines += [f"| {row['mb']:.0f} | {row['peak_mb']:.0f} | {row['store_mb']:.0f} |" for row in sessions]
    text = "\n".join(lines) + "\n"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "ingest.md").write_text(text)
    (options.out / "ingest.json").write_text(
        json.dumps({**facts, "formats": rows, "sessions": sessions}, indent=1) + "\n"
    )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--session-mb", type=int, nargs="*", default=[50, 400])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"{DATA} is missing: set WORKBENCH_SHARED_DATA to the folder with agent_logs.")
    rows, sessions = [], []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for format, make in MAKERS.items():
            folder = work / format
            folder.mkdir()
            make(folder, options.scale)
            row = {"format": format, **in_process("format", folder, work, options.repeats)}
            row |= in_process("memory", folder, work, 1)
            row |= {f"{stage}_rate": row["mb"] / row[f"{stage}_s_cpu"] for stage in ("orjson", "ingest")}
            rows.append(row)
        for megabytes in options.session_mb:
            folder = work / f"session-{megabytes}"
            folder.mkdir()
            make_session(folder / "session.jsonl", megabytes)
            sessions.append({"mb": megabytes, **in_process("memory", folder, work, 1)})
            (folder / "session.jsonl").unlink()
    print(write(rows, sessions, options))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))))
    else:
        main()
