"""What an embedding model finds by itself, and beside BM25, on the development recall sets.

    python benchmarks/bench_embedding.py [--models lsa/1 hashed/1 sentence-transformers/NAME] [--out FOLDER]

Sets: agentlog (a commit's subject → the exchanges that made the commit, verbatim text) and LoCoMo (a question → the
turns with the answer; one collection for each conversation). lsa/1 is learnt from each collection's own text, never
from its queries. "+ BM25": min-max CombSUM, 0.6 BM25 (okapi, stem/1) + 0.4 vector. Times are CPU seconds for all texts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from recall_measures import Collection, load_agentlog, load_locomo

from workbench.memory import dense, embedding, fusion, postings
from workbench.memory.bm25 import WarmBm25

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


def quality(docs: np.ndarray, relevant: frozenset[int]) -> tuple[float, float, float]:
    """Reciprocal rank, nDCG@10 and recall@10 of one query."""
    hits = np.flatnonzero(np.isin(docs, list(relevant)))
    gain = (1 / np.log2(hits[hits < 10] + 2)).sum()
    ideal = (1 / np.log2(np.arange(2, 2 + min(10, len(relevant))))).sum()
    return 1 / (1 + hits[0]) if len(hits) else 0.0, gain / ideal, float((hits < 10).sum()) / len(relevant)


def evaluate(collection: Collection, model: str, row: Row) -> list[list[tuple[float, float, float]]]:
    """Qualities of each query: vector alone, with BM25, BM25 alone."""
    texts = [f"{user}\n{assistant}" for user, assistant in collection.verbatim]
    con = duckdb.connect()
    con.execute((ROOT / "data/schema/0002_recall.sql").read_text())
    postings.add(con, "verbatim", "stem/1", [(doc, "", text) for doc, text in enumerate(texts)])  # type: ignore[arg-type]
    start = time.process_time()
    embedder = embedding.learn(texts) if model == embedding.LEARNT else embedding.get_embedder(con, model)
    row["learn_s"] += time.process_time() - start
    start = time.process_time()
    vectors = embedder.embed(texts)
    row["embed_s"] += time.process_time() - start
    dense.add(con, "verbatim", embedder.name, range(len(texts)), vectors)
    index, keyword = dense.DenseIndex(con, "verbatim", embedder.name), WarmBm25(con, "verbatim")
    found = []
    for query, relevant in zip(collection.queries, collection.relevant, strict=True):
        by_vector, by_word = index.search(embedder.embed([query])[0]), keyword.search(query)
        both = fusion.comb_sum([by_word, by_vector], [0.6, 0.4])
        found.append([quality(arm[0], relevant) for arm in (by_vector, both, by_word)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[embedding.LEARNT, embedding.HASHED])
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("WORKBENCH_SHARED_DATA", ROOT.parent / "shared/data")
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args()
    sets = {"agentlog": [load_agentlog(arguments.data)], "locomo": load_locomo(arguments.data)}
    rows: list[Row] = []
    for name, collections in sets.items():
        for model in arguments.models:
            row: Row = {"set": name, "model": model, "learn_s": 0.0, "embed_s": 0.0}
            scores = np.array([each for collection in collections for each in evaluate(collection, model, row)])
            row["queries"] = len(scores)
            for at, arm in enumerate(("vector", "vector + BM25", "BM25")):
                row[arm] = dict(zip(("mrr", "ndcg@10", "recall@10"), scores[:, at].mean(axis=0).round(3), strict=True))
            rows.append(row)
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/bench_embedding.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    lines = ["# Embedding models", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    lines += [
        "| set | model | queries | arm | MRR | nDCG@10 | recall@10 | learn s | embed s |",
        "|---|---|---:|---|" + "---:|" * 5,
    ]
    for row in rows:
        for arm in ("vector", "vector + BM25", "BM25"):
            values = " | ".join(f"{value:.3f}" for value in row[arm].values())
            lines.append(
                f"| {row['set']} | {row['model']} | {row['queries']} | {arm} | {values} | "
                f"{row['learn_s']:.1f} | {row['embed_s']:.1f} |"
            )
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "recall_embedding.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    (arguments.out / "recall_embedding.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
