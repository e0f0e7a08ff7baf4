"""Our best recall configuration against every peer, tuned on one half of the queries and reported on the other.

    python benchmarks/recall_study.py [--cache FOLDER]

Weights of one CombSUM are searched on the tuning halves of LoCoMo and of the coding-agent set together (one set of
weights for both); the reporting halves are ranked once, with what came out. Also: weights tuned on one corpus alone and
reported on the other, and sets on which nothing was tuned. Peers are evals/peers at their own defaults (mem0 without a
model of its own is its bi-encoder; a cross-encoder was not at hand).

Equal returned tokens: in every comparison our list is cut, query by query, where it would return more tokens than the
peer's first ten documents. Intervals: paired bootstrap over clusters (a conversation; the session of the first answer),
level 1 - 0.05 / (m - i) for the i-th of m comparisons of a configuration by p (Holm). Questions that both halves of
LoCoMo ask are left out of the reporting half. The arms are in recall_study_arms.py. "files edited" is what a log of an
agent records and LoCoMo has nothing of: a prior for exchanges that changed files (84 % of the coding set's answers did,
47 % of its exchanges).
--cache keeps MiniLM's vectors between runs; without it they are computed anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
from recall_study_arms import LENGTH_OFFSET, Remembering, Scope, make_scope, only, search_weights

from workbench.evals import metrics, stats
from workbench.evals.peers import bi_encoder, load_peer
from workbench.evals.tasks import load_task, locomo
from workbench.evals.tasks.base import Query, RecallTask, judgements, read_json, read_jsonl, shared_data
from workbench.memory.tokens import count_tokens

RESULTS = Path(__file__).resolve().parent / "results"
SEED, RESAMPLES, DEPTH = 20261122, 20_000, 200
LIGHT = ("keyword", "window", "session", "vector", "distilled", "speaker", "date")
CONFIGURATIONS = {
    "light": LIGHT,
    "light + MiniLM": (*LIGHT, "minilm", "minilm window"),
    "light + files edited": (*LIGHT, "edited"),
    "light + MiniLM + files edited": (*LIGHT, "minilm", "minilm window", "edited"),
}
PEERS = ("rank-bm25", "rank-bm25-stem", "bm25s", "fts5", "bi-encoder", "combsum-minilm", "combsum-minilm-window")
KEYS = ("mrr", "ndcg@10", "recall@10")
CAVEATS = """
- The reporting halves were ranked twice. The first run had windows of two neighbours and no fourth configuration; one
  neighbour was chosen on the tuning halves before its figures were seen, the fourth configuration and LoCoMo under
  "files edited" were added after.
- "files edited" is a prior for exchanges that changed files (84 % of the coding set's answers did, 47 % of its
  exchanges): right for queries about changes, not for every query. LoCoMo has no files; there it is silent. Peers are
  not told of files.
- The speaker arm loses where a question names the wrong person (LoCoMo adversarial).
- Queries are split by id: queries of one session, and in the coding set with the same answers, are in both halves.
- The distiller of the `distilled` arm was developed on the coding set with another split of its queries.
- p: sign flips by query; intervals resample whole clusters (10 conversations in LoCoMo). Holm within a configuration.
"""
Run = dict[str, list[tuple[str, float]]]


# --- runs and comparisons ---------------------------------------------------------------------------------------------


def fused_run(scopes: Sequence[Scope], weights: Mapping[str, float]) -> Run:
    """Our results, DEPTH a query."""
    run: Run = {}
    for scope in scopes:
        fused = scope.fused(weights)
        ids = np.array([document.id for document in scope.documents])
        by_id = np.argsort(ids, kind="stable")
        for query, scores in zip(scope.queries, np.asarray(fused, np.float64), strict=True):
            order = by_id[np.argsort(-scores[by_id], kind="stable")[:DEPTH]]
            run[query.id] = list(zip(ids[order].tolist(), scores[order].tolist(), strict=True))
    return run


def peer_run(name: str, scopes: Sequence[Scope], folder: Path) -> Run:
    """A peer's results, DEPTH a query."""
    peer, run = load_peer(name), {}
    for number, scope in enumerate(scopes):
        (place := folder / f"{name}-{number}-{time.monotonic_ns()}").mkdir()
        index = peer.build(scope.documents, place)
        run |= {query.id: index.search(query.text, DEPTH) for query in scope.queries}
        index.close()
    return run


def cut(run: Run, budgets: Mapping[str, int], tokens: Mapping[str, int]) -> Run:
    """The first ten of each list, ended where their tokens would exceed the query's budget."""
    out: Run = {}
    for query, found in run.items():
        spent = np.cumsum([tokens[doc] for doc, _ in found[:10]])
        out[query] = found[: int(np.searchsorted(spent, budgets[query], side="right"))]
    return out


@dataclass
class Part:
    """Queries that are reported, with every peer's run on them."""

    name: str
    scopes: list[Scope]
    relevant_from: float
    tokens: dict[str, int]
    peers: dict[str, Run]

    def measure(self, run: Run) -> metrics.Evaluation:
        """MRR, nDCG@10 and recall@10 by query."""
        queries = [query for scope in self.scopes for query in scope.queries]
        return metrics.evaluate(run, judgements(queries), KEYS, relevant_from=self.relevant_from)

    def returned(self, run: Run) -> dict[str, int]:
        """Tokens of each query's first ten documents."""
        return {query: sum(self.tokens[doc] for doc, _ in found[:10]) for query, found in run.items()}


def compare(parts: Sequence[Part], ours: Mapping[str, Run]) -> list[dict[str, Any]]:
    """Each part, peer and metric at equal returned tokens, with Holm's p and interval over all of them."""
    rows: list[dict[str, Any]] = []
    for part in parts:
        cluster = {query.id: query.cluster or query.id for scope in part.scopes for query in scope.queries}
        for peer, run in part.peers.items():
            budgets = part.returned(run)
            mine, theirs = (part.measure(cut(each, budgets, part.tokens)) for each in (ours[part.name], run))
            for key in KEYS[:2]:
                a, b = metrics.paired(mine, theirs, key)
                p = stats.paired_randomisation(a, b, num_resamples=RESAMPLES, seed=SEED).p
                row = {
                    "set": part.name,
                    "peer": peer,
                    "metric": key,
                    "ours": float(a.mean()),
                    "theirs": float(b.mean()),
                }
                rows.append({**row, "p": p, "pair": (a, b, [cluster[query] for query in mine.query_ids])})
    adjusted = stats.holm([row["p"] for row in rows])
    for place, at in enumerate(np.argsort([row["p"] for row in rows], kind="stable").tolist()):
        a, b, clusters = rows[at].pop("pair")
        level = 1 - 0.05 / (len(rows) - place)
        found = stats.paired_bootstrap(a, b, clusters, level=level, num_resamples=RESAMPLES, seed=SEED)
        rows[at] |= {"difference": found.estimate, "low": found.low, "high": found.high, "p_holm": float(adjusted[at])}
    return rows


# --- sets -------------------------------------------------------------------------------------------------------------


def observations() -> RecallTask:
    """LoCoMo's own statements about the speakers, each a query for the turns that it was drawn from."""
    task, queries = load_task("locomo"), []
    known = {document.id for document in task.documents}
    for sample in read_json(shared_data("locomo10.json"), list):
        name = sample["sample_id"]
        for key, speakers in sample["observation"].items():
            facts = [(speaker, at, fact) for speaker, found in speakers.items() for at, fact in enumerate(found)]
            for speaker, at, (text, turns) in facts:
                cited = {f"{name}/{turn}": 1.0 for turn in re.findall(r"D\d+:\d+", str(turns))}
                relevance = {turn: grade for turn, grade in cited.items() if turn in known}
                if relevance:
                    queries.append(Query(f"{name}/{key}/{speaker}/{at}", text, relevance, name, cluster=name))
    return RecallTask("LoCoMo statements", "1", task.documents, tuple(queries))


def scopes_of(task: RecallTask, queries: Sequence[Query], model: Remembering, edited: set[str]) -> list[Scope]:
    """The scopes that these queries search, with all arms."""
    scopes = []
    for name, documents in task.scopes().items():
        asked = [query for query in queries if query.scope == name]
        if asked:
            scopes.append(make_scope(documents, asked, model, edited))
    return scopes


def make_part(name: str, task: RecallTask, scopes: list[Scope], folder: Path) -> Part:
    """A part with every peer's run."""
    tokens = {document.id: count_tokens(document.text) for document in task.documents}
    return Part(name, scopes, task.relevant_from, tokens, {peer: peer_run(peer, scopes, folder) for peer in PEERS})


def halves(scopes: Sequence[Scope], task: RecallTask) -> tuple[list[Scope], list[Scope]]:
    """Tuning and reporting half; what the tuning half asks as well, word for word, is not reported."""
    tuning = {query.id for query in task.split("tune")}
    asked = {(query.scope, query.text) for query in task.split("tune")}
    return only(scopes, lambda q: q.id in tuning), only(
        scopes, lambda q: q.id not in tuning and (q.scope, q.text) not in asked
    )


# --- the study --------------------------------------------------------------------------------------------------------


def study(model: Remembering, folder: Path) -> dict[str, Any]:
    """Everything that the report shows."""
    edited = {
        row.get("id", str) for row in read_jsonl(shared_data("agentlog_corpus_dev.jsonl.gz")) if row.fields["files"]
    }
    tasks = {name: load_task(name) for name in ("locomo", "agentlog")}
    split = {n: halves(scopes_of(task, task.queries, model, edited), task) for n, task in tasks.items()}
    parts = [make_part(name, tasks[name], report, folder) for name, (_, report) in split.items()]
    out: dict[str, Any] = {"weights": {}, "quality": [], "comparisons": {}, "transfer": [], "without": []}
    for name, arms in CONFIGURATIONS.items():
        weights = out["weights"][name] = search_weights([tuning for tuning, _ in split.values()], arms)
        runs = {part.name: fused_run(part.scopes, weights) for part in parts}
        out["quality"] += [row_of(part, name, runs[part.name]) for part in parts]
        out["comparisons"][name] = compare(parts, runs)
    out["quality"] += [row_of(part, peer, run) for part in parts for peer, run in part.peers.items()]
    for (tuned, (tuning, _)), part in zip(split.items(), reversed(parts), strict=True):
        for name in ("light", "light + MiniLM"):
            run = fused_run(part.scopes, search_weights([tuning], CONFIGURATIONS[name]))
            out["transfer"].append(row_of(part, f"{name}, tuned on {tuned} alone", run))
    for arm in LIGHT:
        for part, (tuning, _) in zip(parts, split.values(), strict=True):
            tuned = Part(part.name, tuning, part.relevant_from, part.tokens, {})
            run = fused_run(tuning, {**out["weights"]["light"], arm: 0.0})
            out["without"].append(row_of(tuned, f"without {arm}", run))
    adversarial = locomo.load(adversarial=True)
    others = {
        "LoCoMo statements": (task := observations(), task.split("report")),
        "LoCoMo adversarial": (adversarial, [q for q in adversarial.queries if q.category == "adversarial"]),
        "skills": (task := load_task("skills"), task.queries),
    }
    out["others"] = []
    for name, (task, queries) in others.items():
        part = make_part(name, task, scopes_of(task, queries, model, set()), folder)
        out["others"] += [row_of(part, peer, run) for peer, run in part.peers.items()]
        for configuration in ("light", "light + MiniLM"):
            run = fused_run(part.scopes, out["weights"][configuration])
            out["others"].append(row_of(part, configuration, run))
    return out


def row_of(part: Part, system: str, run: Run) -> dict[str, Any]:
    """One row of a table: means over the queries of a part, and tokens of the first ten documents."""
    found, tokens = part.measure(run), list(part.returned(run).values())
    return {"set": part.name, "system": system, "queries": len(found.query_ids), **found.means(),
            "tokens": sum(tokens) / len(tokens)}  # fmt: skip


def as_markdown(result: Mapping[str, Any]) -> str:
    """The committed report."""
    lines = [f"# Recall study\n\n`{result['command']}` · {result['date']} · {result['machine']}\n"]
    lines += [
        f"Seed {SEED}, {RESAMPLES} resamples, length offset {LENGTH_OFFSET}. Weights, one set for both corpora:\n"
    ]
    lines += [f"- {name}: {', '.join(f'{arm} {w:g}' for arm, w in weights.items())}"
              for name, weights in result["weights"].items()]  # fmt: skip
    for title, key in (
        ("Reporting halves", "quality"),
        ("Tuned on one corpus, reported on the other", "transfer"),
        ("Sets on which nothing was tuned", "others"),
        ("One arm left out (tuning halves)", "without"),
    ):
        lines += [
            f"\n## {title}\n",
            "| set | system | queries | MRR | nDCG@10 | R@10 | tokens of ten |",
            "|---" * 7 + "|",
        ]
        for row in sorted(result[key], key=lambda row: row["set"]):
            values = " | ".join(f"{row[metric]:.3f}" for metric in KEYS)
            lines.append(f"| {row['set']} | {row['system']} | {row['queries']} | {values} | {row['tokens']:.0f} |")
    for name, rows in result["comparisons"].items():
        lines += [f"\n## {name}: differences at equal returned tokens (reporting halves)\n",
                  "| set | peer | metric | ours | peer | difference, Holm-corrected 95 % interval | p (Holm) |",
                  "|---" * 7 + "|"]  # fmt: skip
        for row in rows:
            bounds = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
            means = f"{row['ours']:.3f} | {row['theirs']:.3f}"
            lines.append(
                f"| {row['set']} | {row['peer']} | {row['metric']} | {means} | {bounds} | {row['p_holm']:.2g} |"
            )
    return "\n".join(lines) + f"\n\n## Caveats\n{CAVEATS}"


def main() -> None:
    """Runs the study and writes benchmarks/results/recall_study.{md,json}."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, help="folder for MiniLM's vectors")
    arguments = parser.parse_args()
    peer, real = bi_encoder.BiEncoder("bi-encoder"), bi_encoder.BiEncoder.model
    model = Remembering(arguments.cache, lambda: real.__get__(peer))
    try:
        # Every peer with MiniLM asks for the same texts: they share what is remembered.
        with TemporaryDirectory() as folder, patch.object(bi_encoder.BiEncoder, "model", model):
            result = study(model, Path(folder))
    finally:
        model.save()
    spent = f"{time.process_time():.0f} CPU s"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {spent}"
    cached = " --cache FOLDER (vectors kept from an earlier run)" if arguments.cache else ""
    head = {"command": f"python benchmarks/recall_study.py{cached}", "date": f"{date.today()}", "machine": machine}
    (RESULTS / "recall_study.json").write_text(json.dumps(head | result, indent=1) + "\n")
    (RESULTS / "recall_study.md").write_text(as_markdown(head | result))
    print(as_markdown(head | result))


if __name__ == "__main__":
    main()
