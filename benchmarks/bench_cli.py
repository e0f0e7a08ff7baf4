"""CPU seconds of one `workbench recall` as a cold process on a store of 100,000 memories, and of making that store.

    python benchmarks/bench_cli.py [--memories 100000] [--keep FOLDER]

The store is made by the product itself (ingest, distil, vectors) from exchanges whose words are drawn from real ones
(shared data; Zipf words where it is missing). The peer, in the same run: a cold process that reads the same memories
from a pickle, builds rank-bm25's BM25Okapi and asks it once. Bytecode is kept between the runs, as it is after an
installation, even where PYTHONDONTWRITEBYTECODE is set: else each run would compile our modules anew.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import pickle
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("WORKBENCH_SHARED_DATA", ROOT.parent / "shared" / "data"))
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
QUERIES = ["restore the step count guard after a commit", "flaky integration test in the hooks package", "rate limit"]
PEER = """
import pickle, sys
from rank_bm25 import BM25Okapi
texts = pickle.load(open(sys.argv[1], "rb"))
index = BM25Okapi([t.lower().split() for t in texts])
index.get_scores(sys.argv[2].lower().split()).argsort()[-10:]
"""


def cpu_of(*command: str) -> tuple[float, str]:
    """User plus system seconds of a child process, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def words() -> list[str]:
    """Words of the real exchanges in their order, so that draws have their frequencies."""
    corpus = SHARED / "agentlog_corpus_dev.jsonl.gz"
    if not corpus.exists():
        print("shared data is missing: Zipf words instead of real ones")
        return [f"word{int(random.Random(i).paretovariate(1.1))}" for i in range(500_000)]
    with gzip.open(corpus) as lines:
        rows = [json.loads(line) for line in lines]
    return [w for row in rows for w in re.findall(r"\S+", f"{row['user']} {row['assistant']}") if len(w) < 40]


def write_logs(path: Path, count: int) -> None:
    """`count` conversations of one exchange: some 15 words asked, some 60 answered (runs of real words)."""
    rng, pool = random.Random(7), words()
    with path.open("w") as out:
        for i in range(count):
            a, b = rng.randrange(len(pool) - 200), rng.randrange(len(pool) - 200)
            asked = " ".join(pool[a : a + rng.randint(8, 22)])
            said = " ".join(pool[b : b + rng.randint(30, 90)])
            messages = [{"role": "user", "content": f"{asked} {i}"}, {"role": "assistant", "content": said}]
            out.write(json.dumps({"messages": messages}) + "\n")


def main() -> None:
    """Makes the store, asks it, prints a table and writes benchmarks/results/cli.{json,md}."""
    parser = argparse.ArgumentParser(description="CPU seconds of one cold `workbench recall`.")
    parser.add_argument("--memories", type=int, default=100_000)
    parser.add_argument("--keep", type=Path, help="use or make the store in this folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        rows = measure(folder, arguments.memories)
    head = f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    lines = [
        f"`python {' '.join(['benchmarks/bench_cli.py', *sys.argv[1:]])}` · {head} · CPU seconds, minimum of 5",
        "",
    ]
    lines += ["| what | CPU s |", "|---|---|", *(f"| {name} | {seconds:.2f} |" for name, seconds in rows.items())]
    print("\n".join(lines))
    results = ROOT / "benchmarks" / "results"
    (results / "cli.md").write_text("\n".join(lines) + "\n")
    (results / "cli.json").write_text(
        json.dumps({"head": head, "memories": arguments.memories, "cpu_s": rows}, indent=1)
    )


def measure(folder: Path, count: int) -> dict[str, float]:
    """CPU seconds by name of what was done."""
    store, logs, texts = folder / "big.duckdb", folder / "logs.jsonl", folder / "texts.pickle"
    workbench = [sys.executable, "-m", "workbench", "--store", str(store)]
    rows: dict[str, float] = {}
    if not store.exists():
        write_logs(logs, count)
        rows["ingest"], _ = cpu_of(*workbench, "ingest", str(logs), "--json")
        rows["distill, with learning and making vectors"], out = cpu_of(*workbench, "distill", "--json")
        print(out)
    from workbench.data.store import Store

    with Store(store, read_only=True) as opened:
        texts.write_bytes(pickle.dumps([r[0] for r in opened.con.execute("SELECT text FROM memories").fetchall()]))
    rows["python -c 'import duckdb, numpy, typer'"] = best([sys.executable, "-c", "import duckdb, numpy, typer"])
    cpu_of(*workbench, "recall", "first", "--json")  # makes the matrix files
    for mode in ("keyword", "vector", "hybrid"):
        for layer in ("verbatim", "distilled", "both"):
            rows[f"recall --mode {mode} --layer {layer}"] = best(
                *([*workbench, "recall", query, "--mode", mode, "--layer", layer, "--json"] for query in QUERIES)
            )
    rows["peer: rank-bm25, cold, memories only"] = best([sys.executable, "-c", PEER, str(texts), QUERIES[0]], repeats=2)
    return rows


def best(*commands: list[str], repeats: int = 5) -> float:
    """The worst command's minimum over the repeats."""
    return max(min(cpu_of(*command)[0] for _ in range(repeats)) for command in commands)


if __name__ == "__main__":
    main()
