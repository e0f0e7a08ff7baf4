"""Speed of recall beside rank-bm25, bm25s, SQLite FTS5 and plain numpy: build, cold and warm query, addition, memory.

    python benchmarks/bench_recall.py [--sizes 100000 1000000] [--engines …] [--out benchmarks/results]

Documents have the lengths of distilled memories and their words, with their frequencies: what the extractive distiller
makes of recorded coding sessions (WORKBENCH_SHARED_DATA, else ../shared/data; without it Zipf's law over made-up
words); one word in 50 is new. Queries are the commit subjects of the development set, else words of a document.
Every engine runs in a process of its own on the same texts. Times are CPU time of the process, all threads, in the
median (and the 95th percentile) of the queries; memory is the peak. rank-bm25 is left out above 200,000 documents.

cold_query: open the store, one query, close. first_sql_query: the first of an open store. next_sql_query: the lengths
of the documents are read by then. Both ask the postings by SQL, on one DuckDB thread. warm_query: all in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
WORDS, NUM_QUERIES, DIM, NEIGHBOURS = 45, 50, 256, 8
ENGINES = ["workbench", "rank-bm25", "bm25s", "fts5", "workbench dense", "numpy dense"]
RANK_BM25_UP_TO = 200_000
TOKENIZER, LAYER = "stem/1", "distilled"
Row = dict[str, Any]


def memories() -> tuple[list[list[str]], list[str]]:
    """Words of each memory that the extractive distiller makes of the development set, and the set's queries."""
    data = Path(os.environ.get("WORKBENCH_SHARED_DATA", ROOT.parent / "shared/data"))
    if not (data / "agentlog_corpus_dev.jsonl.gz").exists():
        return [], []
    from recall_measures import load_agentlog

    from workbench.memory.distillers.extractive import Extractive
    from workbench.memory.types import Distilled

    collection = load_agentlog(data)
    records = [record for _, record in Extractive().distil(collection.exchanges) if isinstance(record, Distilled)]
    return [record.text.split() for record in records], collection.queries[:NUM_QUERIES]


def make_texts(path: Path, num_texts: int, seed: int = 0) -> list[str]:
    """Writes one text a line; returns the queries."""
    rng = np.random.default_rng(seed)
    texts, queries = memories()
    if not texts:
        texts = [[f"word{rank}" for rank in rng.zipf(1.3, WORDS) % 200_000] for _ in range(10_000)]
    vocabulary = np.array([word[:60] for text in texts for word in text], object)
    sizes = np.array([max(len(text), 5) for text in texts])
    made_up = not queries
    with open(path, "w") as out:
        for start in range(0, num_texts, 10_000):
            lengths = rng.choice(sizes, min(10_000, num_texts - start))
            chosen = vocabulary[rng.integers(0, len(vocabulary), int(lengths.sum()))]
            new = np.flatnonzero(rng.random(len(chosen)) < 0.02)
            chosen[new] = [f"id{number:x}" for number in rng.integers(0, 1 << 40, len(new))]
            for end, length in zip(np.cumsum(lengths), lengths, strict=True):
                line = " ".join(chosen[end - length : end])
                if made_up and len(queries) < NUM_QUERIES:
                    queries.append(" ".join(rng.choice(line.split(), 6)))
                out.write(line + "\n")
    return queries


def cpu(function: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a call, and its result."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def milliseconds(row: Row, name: str, seconds: Iterable[float]) -> None:
    values = 1e3 * np.array(list(seconds))
    row[f"{name}_ms"], row[f"{name}_p95_ms"] = float(np.median(values)), float(np.percentile(values, 95))


def file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def read_lines(path: Path) -> Iterator[str]:
    with open(path) as lines:
        yield from (line.rstrip("\n") for line in lines)


def run_workbench(texts: Path, queries: list[str], folder: Path) -> Row:
    row, file = Row(), str(folder / "store.duckdb")
    count = build_store(row, texts, file)
    row["file_bytes"] = file_bytes(folder)
    time_queries(row, queries, file)
    time_additions(row, texts, file, count)
    return row


def build_store(row: Row, texts: Path, file: str) -> int:
    import duckdb

    from workbench.memory import postings

    con, count = duckdb.connect(file), 0
    con.execute((ROOT / "data/schema/0002_recall.sql").read_text())

    def build() -> int:
        lines, count = read_lines(texts), 0
        while batch := list(islice(lines, 10_000)):
            docs = [(doc, "", text, doc - 1 if doc % NEIGHBOURS else None) for doc, text in enumerate(batch, count)]
            transact(con, lambda d=docs: postings.add(con, LAYER, TOKENIZER, d))  # type: ignore[arg-type]
            count += len(batch)
        return count

    row["build_s"], count = cpu(build)
    row["compact_s"], _ = cpu(lambda: transact(con, lambda: postings.compact(con, LAYER)))
    row["build_s"] += row["compact_s"]
    con.execute("CHECKPOINT")
    con.close()
    return count


def time_queries(row: Row, queries: list[str], file: str) -> None:
    import duckdb

    from workbench.memory import postings
    from workbench.memory.bm25 import Bm25Options, ColdBm25, WarmBm25
    from workbench.memory.tokenizers import get_tokenizer

    plain, window = Bm25Options(), Bm25Options(window=True)

    def connect() -> duckdb.DuckDBPyConnection:
        return duckdb.connect(file, read_only=True, config={"threads": 1})

    def cold(query: str, options: Bm25Options) -> None:
        with connect() as reader:
            ColdBm25(reader, LAYER).search(query, 10, options=options)

    milliseconds(row, "open", [cpu(lambda: connect().close())[0] for _ in range(20)])
    milliseconds(row, "cold_query", [cpu(lambda q=q: cold(q, plain))[0] for q in queries])
    milliseconds(row, "cold_window_query", [cpu(lambda q=q: cold(q, window))[0] for q in queries])
    with duckdb.connect(file, read_only=True) as reader:
        milliseconds(
            row, "first_sql_query", [cpu(lambda q=q: ColdBm25(reader, LAYER).search(q, 10))[0] for q in queries]
        )
        searcher = ColdBm25(reader, LAYER)
        searcher.search(queries[0], 10)
        asked = [list(set(get_tokenizer(TOKENIZER).hashes(query))) for query in queries]
        found = [len(piece[1]) for terms in asked for piece in postings.read_postings(reader, 1, terms)]
        row["postings_per_query"] = sum(found) / len(queries)  # what every engine has to add up
        milliseconds(row, "next_sql_query", [cpu(lambda q=q: searcher.search(q, 10))[0] for q in queries[1:]])
        row["warm_load_s"], warm = cpu(lambda: WarmBm25(reader, LAYER))
        for name, options in (("warm_query", plain), ("warm_window_query", window)):
            warm.search(queries[0], 10, options=options)
            times = [cpu(lambda q=q, o=options: warm.search(q, 10, options=o))[0] for q in queries[1:]]
            milliseconds(row, name, times)


def time_additions(row: Row, texts: Path, file: str, count: int) -> None:
    import duckdb

    from workbench.memory import postings

    con, more = duckdb.connect(file), list(islice(read_lines(texts), 2_000))

    def add(docs: range) -> None:
        documents = [(count + doc, "", more[doc], None) for doc in docs]
        transact(con, lambda: (postings.add(con, LAYER, TOKENIZER, documents), postings.maintain(con)))  # type: ignore[arg-type]

    milliseconds(row, "add_one", [cpu(lambda i=i: add(range(i, i + 1)))[0] for i in range(100)])
    batches = [cpu(lambda i=i: add(range(i, i + 100)))[0] / 100 for i in range(100, 2_000, 100)]
    milliseconds(row, "add_in_batches_of_100", batches)
    terms = con.execute("SELECT sum(df) FROM lexical_terms").fetchall()[0][0]
    between = max(postings._RECENT_ROWS, postings._RECENT_SHARE * terms) / (terms / count)
    row["compaction_share_of_add_ms"] = 1e3 * row["compact_s"] / between
    con.close()


def transact(con: Any, function: Callable[[], Any]) -> None:
    con.execute("BEGIN")
    function()
    con.execute("COMMIT")


def run_rank_bm25(texts: Path, queries: list[str], folder: Path) -> Row:
    from rank_bm25 import BM25Okapi

    from workbench.memory.tokenizers import get_tokenizer

    tokenize, row = get_tokenizer(TOKENIZER), Row()
    row["build_s"], engine = cpu(lambda: BM25Okapi([tokenize(text) for text in read_lines(texts)]))

    def search(query: str) -> Any:
        scores = engine.get_scores(tokenize(query))
        return np.argpartition(-scores, 10)[:10]

    milliseconds(row, "warm_query", [cpu(lambda q=q: search(q))[0] for q in queries[:20]])
    return row


def run_bm25s(texts: Path, queries: list[str], folder: Path) -> Row:
    import bm25s

    from workbench.memory.tokenizers import get_tokenizer

    tokenize, row = get_tokenizer(TOKENIZER), Row()

    def build() -> bm25s.BM25:
        engine = bm25s.BM25(method="lucene")
        engine.index([tokenize(text) for text in read_lines(texts)], show_progress=False)
        return engine

    row["build_s"], engine = cpu(build)
    engine.save(folder / "bm25s")
    row["file_bytes"] = file_bytes(folder)

    def search(some: bm25s.BM25, query: str) -> None:
        some.retrieve([tokenize(query)], k=10, show_progress=False)

    def cold(query: str) -> None:
        search(bm25s.BM25.load(folder / "bm25s", mmap=True), query)

    search(engine, queries[0])
    milliseconds(row, "warm_query", [cpu(lambda q=q: search(engine, q))[0] for q in queries[1:]])
    milliseconds(row, "cold_query", [cpu(lambda q=q: cold(q))[0] for q in queries[:20]])
    return row


def run_fts5(texts: Path, queries: list[str], folder: Path) -> Row:
    import re
    import sqlite3

    row, file = Row(), folder / "fts5.sqlite"
    con = sqlite3.connect(file)
    con.execute("PRAGMA journal_mode = WAL")
    con.execute("CREATE VIRTUAL TABLE docs USING fts5(text, content='', tokenize='porter unicode61')")

    def add(rows: Iterable[tuple[int, str]]) -> None:
        with con:
            con.executemany("INSERT INTO docs(rowid, text) VALUES (?, ?)", rows)

    row["build_s"], _ = cpu(lambda: add(enumerate(read_lines(texts))))
    con.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    row["file_bytes"] = file_bytes(folder)

    def search(some: sqlite3.Connection, query: str) -> None:
        asked = " OR ".join(f'"{word}"' for word in re.findall(r"\w+", query))
        some.execute("SELECT rowid FROM docs WHERE docs MATCH ? ORDER BY rank LIMIT 10", [asked]).fetchall()

    milliseconds(row, "warm_query", [cpu(lambda q=q: search(con, q))[0] for q in queries])
    milliseconds(row, "cold_query", [cpu(lambda q=q: search(sqlite3.connect(file), q))[0] for q in queries[:20]])
    count = con.execute("SELECT max(rowid) FROM docs").fetchone()[0] + 1
    more = list(islice(read_lines(texts), 100))
    milliseconds(row, "add_one", [cpu(lambda i=i: add([(count + i, more[i])]))[0] for i in range(100)])
    return row


def unit_vectors(rows: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, DIM), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def run_workbench_dense(texts: Path, queries: list[str], folder: Path) -> Row:
    import duckdb

    from workbench.memory import dense

    row, file = Row(), str(folder / "store.duckdb")
    count, con = sum(1 for _ in read_lines(texts)), duckdb.connect(file)
    con.execute((ROOT / "data/schema/0002_recall.sql").read_text())
    row["build_s"] = 0.0
    for start in range(0, count, 50_000):
        vectors = unit_vectors(min(50_000, count - start), start)
        docs = range(start, start + len(vectors))
        row["build_s"] += cpu(lambda d=docs, v=vectors: transact(con, lambda: dense.add(con, "d", "m", d, v)))[0]
    con.execute("CHECKPOINT")
    con.close()
    row["database_bytes"] = file_bytes(folder)
    asked, cache = unit_vectors(NUM_QUERIES, 1), folder / "vectors"

    def cold(query: np.ndarray, cache: Path | None) -> None:
        with duckdb.connect(file, read_only=True, config={"threads": 1}) as reader:
            dense.DenseIndex(reader, "d", "m", cache).search(query, 10)

    row["no_matrix_file_query_s"] = cpu(lambda: cold(asked[0], None))[0]
    row["make_matrix_file_s"] = cpu(lambda: cold(asked[0], cache))[0]
    row["file_bytes"] = file_bytes(folder)
    milliseconds(row, "cold_query", [cpu(lambda q=q: cold(q, cache))[0] for q in asked[:20]])
    with duckdb.connect(file, read_only=True) as reader:
        index = dense.DenseIndex(reader, "d", "m", cache)
        index.search(asked[0], 10)
        milliseconds(row, "warm_query", [cpu(lambda q=q: index.search(q, 10))[0] for q in asked[1:]])
        few = np.arange(0, count, 50)
        times = [cpu(lambda q=q: index.search(q, 10, allowed=few))[0] for q in asked]
        milliseconds(row, "warm_query_of_2_percent", times)
    with duckdb.connect(file) as con:
        new = unit_vectors(50, 2)

        def add(i: int) -> None:
            transact(con, lambda: dense.add(con, "d", "m", [count + i], new[i : i + 1]))

        milliseconds(row, "add_one", [cpu(lambda i=i: add(i))[0] for i in range(50)])
    return row


def run_numpy_dense(texts: Path, queries: list[str], folder: Path) -> Row:
    count = sum(1 for _ in read_lines(texts))
    matrix = np.empty((count, DIM), np.float32)
    for start in range(0, count, 50_000):
        matrix[start : start + 50_000] = unit_vectors(min(50_000, count - start), start)

    def search(query: np.ndarray) -> np.ndarray:
        products = matrix @ query
        best = np.argpartition(products, -10)[-10:]
        return best[np.argsort(-products[best])]

    asked, row = unit_vectors(NUM_QUERIES, 1), Row()
    search(asked[0])
    milliseconds(row, "warm_query", [cpu(lambda q=q: search(q))[0] for q in asked[1:]])
    return row


RUNNERS = (run_workbench, run_rank_bm25, run_bm25s, run_fts5, run_workbench_dense, run_numpy_dense)


def run_child(engine: str, work: Path) -> None:
    queries = json.loads((work / "queries.json").read_text())
    with tempfile.TemporaryDirectory(dir=work) as folder:
        row = RUNNERS[ENGINES.index(engine)](work / "texts", queries, Path(folder))
    # Not getrusage, whose maximum counts what the parent had when it forked.
    row["peak_rss_bytes"] = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    print(json.dumps(row))


def write_results(rows: list[Row], arguments: argparse.Namespace, seconds: float) -> str:
    packages = ["workbench", "duckdb", "numpy", "rank_bm25", "bm25s", "numba"]
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/bench_recall.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end",
        "python": platform.python_version(),
        "packages": ", ".join(f"{package} {version(package)}" for package in packages if find_spec(package)),
        "wall_seconds": round(seconds),
    }
    measures = list(dict.fromkeys(key for row in rows for key in row if key not in ("engine", "documents")))
    heads = [f"{row['engine']} {row['documents']:,}" for row in rows]
    lines = ["# Recall: speed", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += [f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for measure in measures:
        scale = 1e-6 if measure.endswith("_bytes") else 1
        cells = [f"{scale * row[measure]:,.3g}" if measure in row else "" for row in rows]
        lines.append(f"| {measure.replace('_bytes', '_mb')} | {' | '.join(cells)} |")
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / "recall_speed"
    stem.with_suffix(".json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments.child[0], Path(arguments.child[1]))
        return
    start, rows = time.time(), []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            (work / "queries.json").write_text(json.dumps(make_texts(work / "texts", size)))
            for engine in arguments.engines:
                if engine == "rank-bm25" and size > RANK_BM25_UP_TO:
                    continue
                command = [sys.executable, __file__, "--child", engine, str(work)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                rows.append({"engine": engine, "documents": size, **json.loads(done.stdout.splitlines()[-1])})
                print(json.dumps(rows[-1]), file=sys.stderr)
    print(write_results(rows, arguments, time.time() - start))


if __name__ == "__main__":
    main()
