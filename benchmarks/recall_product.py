"""The development recall set through the product itself: store, distill, vectors and recall() at their defaults.

    python benchmarks/recall_product.py

recall_quality.py studies what is possible; this measures what a user gets from `workbench recall`. The exchanges of the
set are put into a store as they are (their ids must survive), everything after that is the product's own code. Nothing
is chosen here. Tokens are those of all that a layer indexes.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from recall_measures import load_agentlog

from workbench.data.records import digest
from workbench.data.store import Store
from workbench.evals import stats
from workbench.memory import vectors
from workbench.memory.arms import Arms
from workbench.memory.distill import distill
from workbench.memory.distillers.extractive import Extractive
from workbench.memory.exchanges import insert_exchanges
from workbench.memory.index import TOKENIZER, VERBATIM, on_memories
from workbench.memory.postings import Document, add
from workbench.memory.recall import Query, recall
from workbench.memory.tokens import count_tokens

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("WORKBENCH_SHARED_DATA", ROOT.parent / "shared" / "data"))
RESULTS = ROOT / "benchmarks" / "results"


def fill(store: Store, collection: Any) -> None:
    """Puts the set's exchanges into the store, one conversation per session, and indexes them."""
    rows, documents, position = [], [], 0
    for i, (exchange, session) in enumerate(zip(collection.exchanges, collection.session, strict=True)):
        position = position + 1 if i and collection.session[i - 1] == session else 0
        files = json.dumps([{"path": f.path, "action": f.action} for f in exchange.files])
        tokens = count_tokens(exchange.user_text) + count_tokens(exchange.assistant_text)
        cid = f"session-{session}"
        rows.append((i + 1, exchange.exchange_id, cid, "", position, position, position, "set", None, None,
                     exchange.user_text, exchange.assistant_text, files, "[]", tokens,
                     digest(exchange.user_text, exchange.assistant_text)))  # fmt: skip
        documents.append(Document(i + 1, exchange.user_text, exchange.assistant_text, i if position else None))
    with store.transaction() as con:
        for session in np.unique(collection.session).tolist():
            con.execute(
                "INSERT INTO conversations BY NAME SELECT ? AS conversation_id, 'set' AS format, ? AS session_id, "
                "'set' AS source_id, 'set' AS path, 1 AS first_seq, 1 AS num_messages",
                [f"session-{session}", str(session)],
            )
        insert_exchanges(con, rows)
        add(con, VERBATIM, TOKENIZER, documents)


def measure(store: Store, collection: Any, mode: str, layer: str) -> np.ndarray:
    """Reciprocal rank and nDCG@10 of each query, rows of an array."""
    arms, out = Arms(store, warm=True), []
    number = {exchange.exchange_id: i for i, exchange in enumerate(collection.exchanges)}
    for query, gold in zip(collection.queries, collection.relevant, strict=True):
        hits = [number[hit.exchange_id] for hit in recall(store, Query(query, mode=mode, layer=layer, k=500), arms)]
        found = np.array([hit in gold for hit in hits], bool)
        discount = 1 / np.log2(np.arange(2, 12))
        gain = float(discount[: len(found[:10])][found[:10]].sum() / discount[: min(10, len(gold))].sum())
        out.append((1 / (1 + int(found.argmax())) if found.any() else 0.0, gain))
    return np.array(out).T


def main() -> None:
    """Prints the table and writes benchmarks/results/recall_product.{md,json}."""
    collection = load_agentlog(SHARED)
    scores: dict[tuple[str, str], np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "set.duckdb") as store:
        fill(store, collection)
        report = distill(store, Extractive(), on_memories=on_memories)
        vectors.update(store)
        for layer in ("verbatim", "distilled", "both"):
            for mode in ("keyword", "vector", "hybrid"):
                scores[layer, mode] = measure(store, collection, mode, layer)
    best = max((key for key in scores if key[0] == "verbatim"), key=lambda key: scores[key][0].mean())
    ratio = report.verbatim_tokens / report.memory_tokens
    head = (
        f"{len(collection.queries)} queries, {report.memories_added} memories, {ratio:.2f}x fewer tokens than "
        f"verbatim ({report.verbatim_tokens} to {report.memory_tokens}). Difference: MRR against {best[0]} {best[1]}, "
        "95 % paired bootstrap; p: paired sign flips, Holm."
    )
    command = f"`python benchmarks/recall_product.py` · {date.today()} · {platform.machine()}"
    lines = [f"# Recall of the product at its defaults, development set\n\n{command}\n\n{head}\n"]
    lines += ["| layer | mode | MRR | nDCG@10 | of best verbatim | difference | p (Holm) |", "|---" * 7 + "|"]
    others = [key for key in scores if key != best]
    p_values = stats.holm([stats.paired_randomisation(scores[key][0], scores[best][0]).p for key in others])
    rows: list[dict[str, Any]] = []
    for key, (mrr, ndcg) in scores.items():
        interval = stats.paired_bootstrap(mrr, scores[best][0])
        p = float(p_values[others.index(key)]) if key != best else None
        kept = mrr.mean() / scores[best][0].mean()
        row = {"layer": key[0], "mode": key[1], "mrr": mrr.mean(), "ndcg@10": ndcg.mean(), "retention": kept}
        rows.append({**row, "ci95": [interval.low, interval.high], "p": p})
        bounds = f"{interval.estimate:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
        shown = "baseline | " if p is None else f"{bounds} | {p:.2g}"
        lines.append(f"| {key[0]} | {key[1]} | {mrr.mean():.3f} | {ndcg.mean():.3f} | {kept:.1%} | {shown} |")
    print("\n".join(lines))
    (RESULTS / "recall_product.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "recall_product.json").write_text(
        json.dumps({"compression": ratio, "rows": rows}, indent=1, default=float)
    )


if __name__ == "__main__":
    main()
