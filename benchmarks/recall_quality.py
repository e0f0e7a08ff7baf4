"""How much recall a distilled memory keeps: compression against MRR, paired with the best verbatim search.

    python benchmarks/recall_quality.py [--data ../shared/data] [--out benchmarks/results]

Data: the development recall set of recorded coding sessions (a commit's subject → the exchanges that made the commit)
and, for generalisation, LoCoMo (a question → the turns that hold the answer). Every constant was chosen on the tuning
half of the queries (first byte of SHA-256 of the query id even); the held-out half and all queries are reported.
The held-out half is not untouched: its figures were in sight while the distiller was made, the allotment of tokens by
edits was introduced on figures of all queries (and suits this set, whose answers are mostly exchanges with edits), and
the list of common words was written after a look at the corpus' frequent stems. A clean test needs another corpus.
The index, fusion and embedding are the product's own. Both layers get the same arms, and their BM25 options and
fusion weights are searched on the tuning half in the same way. Tokens: workbench.memory.tokens, of all that is indexed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray
from recall_measures import (
    SEED,
    TOKENIZER,
    Collection,
    Texts,
    compare,
    holm,
    judged,
    load_agentlog,
    load_locomo,
    means,
    measure,
    num_tokens,
    span,
    survival,
)

from workbench.data.store import migrations
from workbench.memory import embedding, postings
from workbench.memory.bm25 import Bm25Options, WarmBm25
from workbench.memory.calibrate import Judged, search_weights
from workbench.memory.checks import violations
from workbench.memory.distillers.extractive import Extractive, Weights
from workbench.memory.fusion import Arm, top
from workbench.memory.postings import Document
from workbench.memory.tokenizers import TOKENIZERS
from workbench.memory.tokens import count_tokens
from workbench.memory.types import Distilled

CANDIDATES = 500
TEXT_ARMS = ("keyword", "window", "vector", "session")
ALL_ARMS = (*TEXT_ARMS, "edited")
# One set for all modes and layers of recall, which has no session arm; rounded from the search on the tuning half.
RECOMMENDED = {
    "v:keyword": 1.0, "v:window": 0.2, "v:vector": 0.3, "d:keyword": 0.75, "d:window": 0.15, "d:vector": 0.25,
}  # fmt: skip
BUDGET_FACTORS = (5.5, 3.6, 2.2, 1.6, 1.25, 0.75, 0.5, 0.36, 0.27)
OPTION_GRID = [
    Bm25Options(variant=variant, k1=k1, b=b)
    for variant in ("okapi", "lucene")
    for k1 in (1.2, 1.5, 2.0)
    for b in (0.3, 0.75, 0.9)
]


class Layer:
    """The arms of one layer of text for every query of a collection."""

    def __init__(self, collection: Collection, texts: Texts, options: Bm25Options, tokenizer: str = TOKENIZER) -> None:
        self.collection, self.texts, self.options = collection, texts, options
        con = duckdb.connect()
        for _, sql in migrations():
            con.execute(sql)
        previous = [
            i - 1 if i and collection.session[i] == collection.session[i - 1] else None for i in range(len(texts))
        ]
        postings.add(con, "x", tokenizer, [Document(i, u, a, previous[i]) for i, (u, a) in enumerate(texts)])
        self.bm25 = WarmBm25(con, "x")

    def keyword(self, options: Bm25Options, n: int | None = CANDIDATES) -> list[Arm]:
        return [self.bm25.search(query, n, options=options) for query in self.collection.queries]

    def arms(self) -> list[dict[str, Arm]]:
        c = self.collection
        plain = [f"{u}\n\n{a}" if u and a else u or a for u, a in self.texts]
        model = embedding.learn(plain)
        similarity = model.embed(c.queries) @ model.embed(plain).T
        everything = np.arange(len(plain))
        edited = np.flatnonzero(c.edited)
        rows = []
        for i, whole in enumerate(self.keyword(self.options, None)):
            rows.append({
                "keyword": (whole[0][:CANDIDATES], whole[1][:CANDIDATES]),
                "window": self.bm25.search(c.queries[i], CANDIDATES, options=replace(self.options, window=True)),
                "vector": top(everything, similarity[i].astype(float), CANDIDATES),
                "session": _session_arm(whole, c.session),
                "edited": (edited, np.ones(len(edited))),
            })  # fmt: skip
        return rows


def _session_arm(found: Arm, session: NDArray[np.int64]) -> Arm:
    """Every document of a conversation gets the best score that one of its documents has."""
    docs, scores = found
    best = np.zeros(session.max() + 1)
    np.maximum.at(best, session[docs], scores)
    chosen = np.flatnonzero(best[session] > 0)
    return chosen, best[session[chosen]]


class Study:
    """Collects rows. Fusion weights are searched on the tuning half, from the first arm alone or from `start`."""

    def __init__(self, collection: Collection, verbatim_tokens: int) -> None:
        self.collection, self.verbatim_tokens = collection, verbatim_tokens
        self.rows: list[dict[str, Any]] = []
        self.scores: dict[str, NDArray[np.float64]] = {}
        self.weights: dict[str, dict[str, float]] = {}

    def search(
        self, name: str, rows: Sequence[dict[str, Arm]], arms: Sequence[str], tokens: int,
        start: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        """Measures a configuration with the weights that are best on the tuning half."""
        queries = judged(rows, self.collection, arms)
        initial = np.array([(start or {arms[0]: 1.0}).get(arm, 0.0) for arm in arms])
        tuning = [query for query, chosen in zip(queries, self.collection.tuning, strict=True) if chosen]
        weights = search_weights(tuning, initial) if len(arms) > 1 else initial
        self._record(name, queries, dict(zip(arms, weights.tolist(), strict=True)), tokens)

    def fixed(self, name: str, rows: Sequence[dict[str, Arm]], weights: dict[str, float], tokens: int) -> None:
        """Measures a configuration with given weights."""
        self._record(name, judged(rows, self.collection, list(weights)), weights, tokens)

    def _record(self, name: str, queries: list[Judged], weights: dict[str, float], tokens: int) -> None:
        c = self.collection
        self.scores[name] = measure(queries, c.relevant, np.array(list(weights.values())))
        self.weights[name] = weights
        ratio = round(self.verbatim_tokens / tokens, 2)
        row = {"name": name, "ratio": ratio, "weights": weights, **means(self.scores[name], c.tuning)}
        self.rows.append(row)
        mrr = "  ".join(f"{part} {row[part]['mrr']:.4f}" for part in ("tuning", "held_out", "all"))
        print(f"{name:60s} {ratio:6.2f}x  {mrr}", flush=True)

    def best(self, prefix: str) -> str:
        """The text-only configuration with the best MRR on the tuning half."""
        names = [name for name in self.scores if name.startswith(prefix) and "edited" not in name]
        return max(names, key=lambda name: self.scores[name][0][self.collection.tuning].mean())


def choose_options(layer: Layer) -> Bm25Options:
    """The BM25 options with the best keyword MRR on the tuning half."""
    c = layer.collection

    def tuned(options: Bm25Options) -> float:
        queries = judged([{"keyword": arm} for arm in layer.keyword(options)], c, ["keyword"])
        return float(measure(queries, c.relevant, np.ones(1))[0][c.tuning].mean())

    return max(OPTION_GRID, key=tuned)


def distilled(collection: Collection, weights: Weights | None = None) -> list[Distilled]:
    """The records of the built-in distiller."""
    records = [record for _, record in Extractive(weights).distil(collection.exchanges)]
    return [record if isinstance(record, Distilled) else Distilled("", "") for record in records]


def without_tools(collection: Collection) -> Collection:
    """The same exchanges as a log without tool calls would give them."""
    return replace(collection, exchanges=[replace(e, files=(), tools=()) for e in collection.exchanges])


def as_texts(records: Sequence[Distilled]) -> Texts:
    """What is indexed of the records: core and context, nothing else."""
    return [("", record.text) for record in records]


def scaled(factor: float) -> Weights:
    """The distiller with a budget so many times larger."""
    base = Weights()
    return replace(base, scale=base.scale * factor, least=base.least * factor)


def study_agentlog(c: Collection) -> dict[str, Any]:
    """All configurations on the recorded coding sessions."""
    whole = num_tokens(c.verbatim)
    study = Study(c, whole)
    records = distilled(c)
    kept = num_tokens(as_texts(records))
    layers = {"verbatim": Layer(c, c.verbatim, Bm25Options()), "distilled": Layer(c, as_texts(records), Bm25Options())}
    arms: dict[str, list[dict[str, Arm]]] = {}
    for name, layer in layers.items():
        tokens = kept if name == "distilled" else whole
        default = [{"keyword": arm} for arm in layer.keyword(layer.options)]
        study.search(f"{name}: keyword, default options", default, ["keyword"], tokens)
        layer.options = choose_options(layer)
        arms[name] = layer.arms()
        for arm in TEXT_ARMS:
            study.search(f"{name}: {arm}", arms[name], [arm], tokens)
        study.search(f"{name}: hybrid", arms[name], ["keyword", "vector"], tokens)
        study.search(f"{name}: all text arms", arms[name], TEXT_ARMS, tokens)
        study.search(f"{name}: all text arms + edited", arms[name], ALL_ARMS, tokens)
    best = study.best("verbatim")
    with_prior = "verbatim: all text arms + edited"
    study_cross(study, arms, {"all text arms": best, "all text arms + edited": with_prior})
    study_curve(study, layers["distilled"].options, records)
    for row in study.rows:
        if row["name"] not in (best, with_prior):
            row["baseline"] = with_prior if "edited" in row["name"] else best
            row["vs"] = compare(study.scores[row["name"]], study.scores[row["baseline"]], c.tuning)
    for part in ("held_out", "all"):
        holm(study.rows, part)
    started = time.process_time()
    distilled(c)
    return {
        "documents": len(c.exchanges),
        "queries": len(c.queries),
        "queries_tuning": int(c.tuning.sum()),
        "tokens": {"verbatim": whole, "distilled": kept},
        "options": {name: asdict(layer.options) for name, layer in layers.items()},
        "distil_per_cpu_second": round(len(c.exchanges) / (time.process_time() - started)),
        "records_that_break_a_check": sum(
            bool(violations(exchange, record)) for exchange, record in zip(c.exchanges, records, strict=True)
        ),
        "vocabulary_survival": round(survival(c, records), 4),
        "best_verbatim": best,
        "best_distilled": study.best("distilled"),
        "rows": study.rows,
    }


def study_cross(study: Study, arms: dict[str, list[dict[str, Arm]]], baselines: dict[str, str]) -> None:
    """Fusion across layers: the search starts from the best verbatim weights, so that it can only add."""
    rows = [
        {**{f"v:{k}": a for k, a in v.items()}, **{f"d:{k}": a for k, a in d.items()}}
        for v, d in zip(arms["verbatim"], arms["distilled"], strict=True)
    ]
    tokens = study.verbatim_tokens
    study.search("cross: verbatim keyword + distilled vector", rows, ["v:keyword", "d:vector"], tokens)
    study.search("cross: keyword on both", rows, ["v:keyword", "d:keyword"], tokens)
    study.fixed("cross: recommended weights", rows, RECOMMENDED, tokens)
    for label, baseline in baselines.items():
        start = {f"v:{arm}": weight for arm, weight in study.weights[baseline].items()}
        names = [f"v:{arm}" for arm in (ALL_ARMS if "edited" in label else TEXT_ARMS)] + [f"d:{a}" for a in TEXT_ARMS]
        study.search(f"cross: {label}", rows, names, tokens, start)


def study_curve(study: Study, options: Bm25Options, records: Sequence[Distilled]) -> None:
    """Other budgets, the card's baselines, and what single choices are worth; fusion weights of the main record."""
    c = study.collection
    budgets = [count_tokens(record.text) for record in records]
    rng = np.random.default_rng(SEED)
    starts = [
        int(rng.integers(0, max(1, len(e.text.split()) - b // 2))) for e, b in zip(c.exchanges, budgets, strict=True)
    ]
    mean = round(float(np.mean(budgets)))
    variants: dict[str, Callable[[], Texts]] = {
        **{f"budget x{f}": lambda f=f: as_texts(distilled(c, scaled(f))) for f in BUDGET_FACTORS},
        "same budget for edits and talk": lambda: as_texts(distilled(c, replace(scaled(1.9), changed_files=1.0))),
        "core only": lambda: [("", record.core) for record in records],
        "edits guessed from the answer's words": lambda: as_texts(distilled(without_tools(c))),
        "truncated, same budgets": lambda: [
            ("", span(e.text, b, 0)) for e, b in zip(c.exchanges, budgets, strict=True)
        ],
        "truncated, one budget": lambda: [("", span(e.text, mean, 0)) for e in c.exchanges],
        "random span, same budgets": lambda: [
            ("", span(e.text, b, start)) for e, b, start in zip(c.exchanges, budgets, starts, strict=True)
        ],
    }  # fmt: skip
    for name, make in variants.items():
        texts = make()
        rows, tokens = Layer(c, texts, options).arms(), num_tokens(texts)
        study.search(f"{name}: keyword", rows, ["keyword"], tokens)
        study.fixed(f"{name}: all text arms", rows, study.weights["distilled: all text arms"], tokens)
    for tokenizer in TOKENIZERS:
        for name, texts in (("verbatim", c.verbatim), ("distilled", as_texts(records))):
            layer = Layer(c, texts, Bm25Options(), tokenizer)
            rows = [{"keyword": arm} for arm in layer.keyword(choose_options(layer))]
            study.search(f"tokenizer {tokenizer}, {name}: keyword", rows, ["keyword"], num_tokens(texts))


def study_locomo(collections: Sequence[Collection], tuned: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether what was tuned on coding sessions hurts on talk between two people: nothing is searched here."""
    weights_of = {row["name"]: row["weights"] for row in tuned["rows"]}
    whole = sum(num_tokens(c.verbatim) for c in collections)
    kinds: dict[str, Callable[[Collection], Texts]] = {
        "verbatim": lambda c: c.verbatim,
        "distilled": lambda c: as_texts(distilled(c)),
        "distilled x0.5": lambda c: as_texts(distilled(c, scaled(0.5))),
    }
    rows = []
    for kind, make in kinds.items():
        layer_name = kind.split()[0]
        options = Bm25Options(**tuned["options"][layer_name])
        settings = {
            "keyword, tuned options": {"keyword": 1.0},
            "all text arms, equal weights": dict.fromkeys(TEXT_ARMS, 1.0),
            "all text arms, weights of the coding sessions": weights_of[f"{layer_name}: all text arms"],
            "recommended weights": {a[2:]: w for a, w in RECOMMENDED.items() if a[0] == layer_name[0]},
        }
        measured: dict[str, list[NDArray[np.float64]]] = {"keyword, default options": [], **{s: [] for s in settings}}
        tokens = 0
        for c in collections:
            layer = Layer(c, make(c), options)
            tokens += num_tokens(layer.texts)
            plain = [{"keyword": arm} for arm in layer.keyword(Bm25Options())]
            found = layer.arms()
            for setting, scores in measured.items():
                weights, arms = settings.get(setting, {"keyword": 1.0}), plain if "default" in setting else found
                scores.append(measure(judged(arms, c, list(weights)), c.relevant, np.array(list(weights.values()))))
        for setting, scores in measured.items():
            together = np.concatenate(scores, axis=1)
            row = {"name": f"{kind}: {setting}", "ratio": round(whole / tokens, 2), "queries": together.shape[1]}
            rows.append({**row, **means(together, np.zeros(together.shape[1], bool))["all"]})
            print("LoCoMo", rows[-1], flush=True)
    return rows


def as_markdown(result: dict[str, Any]) -> str:
    """The tables of the committed report."""
    study = result["agentlog"]
    lines = [
        "# Recall quality of distilled memories",
        "",
        f"`{result['command']}` · {result['date']} · {result['machine']}",
        "",
        f"Best verbatim (chosen on the tuning half): {study['best_verbatim']}. "
        f"Best distilled: {study['best_distilled']}. "
        f"Tokens: {study['tokens']['verbatim']} verbatim, {study['tokens']['distilled']} distilled. "
        f"BM25 options: {study['options']}. Vocabulary survival {study['vocabulary_survival']}. "
        f"{study['distil_per_cpu_second']} exchanges a CPU second. "
        f"{study['records_that_break_a_check']} records break a check.",
        "",
        "MRR; retention and difference are against the best verbatim text search, for rows with `edited` (a prior for "
        "exchanges that changed files) against the verbatim one with that prior; 95 % paired bootstrap; "
        "p: paired permutation of signs, Holm. All queries together include the tuning half; the held-out half "
        "was in sight during development (headnote of the script).",
        "",
        "| configuration | tokens | tuning | held out | all | nDCG@10 | R@10 | kept held out | kept all "
        "| difference (all) | p |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in study["rows"]:
        vs = row.get("vs")
        right = ["", "", "baseline", ""]
        if vs:
            low, high = vs["all"]["ci95"]
            right = [
                f"{vs['held_out']['retention']:.1%}", f"{vs['all']['retention']:.1%}",
                f"{vs['all']['difference']:+.3f} [{low:+.3f}, {high:+.3f}]", f"{vs['all']['p_holm']:.2g}",
            ]  # fmt: skip
        mrr = [f"{row[part]['mrr']:.3f}" for part in ("tuning", "held_out", "all")]
        rest = [f"{row['all']['ndcg@10']:.3f}", f"{row['all']['recall@10']:.3f}"]
        lines.append(f"| {row['name']} | {row['ratio']}x | {' | '.join([*mrr, *rest, *right])} |")
    lines += [
        "",
        "## LoCoMo (nothing tuned on it)",
        "",
        "| configuration | tokens | MRR | nDCG@10 | R@10 |",
        "|---|---|---|---|---|",
    ]
    for row in result["locomo"]:
        lines.append(
            f"| {row['name']} | {row['ratio']}x | {row['mrr']:.3f} | {row['ndcg@10']:.3f} | {row['recall@10']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    here = Path(__file__).resolve().parent
    default = os.environ.get("WORKBENCH_SHARED_DATA", here.parents[1] / "shared" / "data")
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--out", type=Path, default=here / "results")
    arguments = parser.parse_args()
    agentlog = study_agentlog(load_agentlog(arguments.data))
    result = {
        "command": "python benchmarks/recall_quality.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "agentlog": agentlog,
        "locomo": study_locomo(load_locomo(arguments.data), agentlog),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "recall_quality.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "recall_quality.md").write_text(as_markdown(result))


if __name__ == "__main__":
    main()
