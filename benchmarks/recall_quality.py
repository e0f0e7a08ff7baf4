"""How much recall a distilled memory keeps: compression against MRR, paired with the best verbatim search.

    python benchmarks/recall_quality.py [--data ../shared/data] [--out benchmarks/results]

Data: the development recall set of recorded coding sessions (a commit's subject → the exchanges that made the commit)
and, for generalisation, LoCoMo (a question → the turns that hold the answer). Every constant was chosen on the tuning
half of the queries (first byte of SHA-256 of the query id even); the held-out half and all queries are reported.
The index, fusion and embedding are the product's own. Both layers get the same arms, and their BM25 options and
fusion weights are searched on the tuning half in the same way. Tokens: workbench.memory.tokens, of all that is indexed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray
from scipy.stats import wilcoxon

from workbench.data.store import migrations
from workbench.memory import embedding, postings
from workbench.memory.bm25 import Bm25Options, WarmBm25
from workbench.memory.calibrate import Judged, judge, search_weights
from workbench.memory.checks import violations
from workbench.memory.distillers.extractive import Extractive, Weights
from workbench.memory.fusion import Arm, top
from workbench.memory.postings import Document
from workbench.memory.tokenizers import TOKENIZERS, get_tokenizer
from workbench.memory.tokens import count_tokens
from workbench.memory.types import Distilled, Exchange, FileTouch

TOKENIZER = "stem/1"
CANDIDATES = 500
SEED = 20260313
BOOTSTRAPS = 10_000
TEXT_ARMS = ("keyword", "window", "vector", "session")
OPTION_GRID = [
    Bm25Options(variant=variant, k1=k1, b=b) for variant in ("okapi", "lucene") for k1 in (1.2, 1.5, 2.0) for b in (0.3, 0.75, 0.9)
]
Texts = list[tuple[str, str]]  # (user, assistant) of each document; the first is empty in a distilled layer


@dataclass
class Collection:
    """Documents in the order of their conversations, and queries with the documents that answer them."""

    exchanges: list[Exchange]
    session: NDArray[np.int64]
    queries: list[str]
    relevant: list[frozenset[int]]
    tuning: NDArray[np.bool_]
    edited: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))

    @property
    def verbatim(self) -> Texts:
        return [(e.user_text, e.assistant_text) for e in self.exchanges]


def load_agentlog(folder: Path) -> Collection:
    with gzip.open(folder / "agentlog_corpus_dev.jsonl.gz", "rt") as lines:
        rows = sorted(map(json.loads, lines), key=lambda r: (r["session"], r["idx"]))
    with open(folder / "agentlog_queries_dev.jsonl") as lines:
        queries = [json.loads(line) for line in lines]
    number = {row["id"]: i for i, row in enumerate(rows)}
    sessions = {s: i for i, s in enumerate(dict.fromkeys(row["session"] for row in rows))}
    exchanges = [
        Exchange(r["id"], r["user"], r["assistant"], files=tuple(FileTouch(f, "modified") for f in r["files"])) for r in rows
    ]
    return Collection(
        exchanges,
        np.array([sessions[row["session"]] for row in rows]),
        [q["query"] for q in queries],
        [frozenset(number[g] for g in q["gold"]) for q in queries],
        np.array([sha256(q["qid"].encode()).digest()[0] % 2 == 0 for q in queries]),
        np.array([bool(row["files"]) for row in rows]),
    )


def load_locomo(folder: Path) -> list[Collection]:
    """One collection for each conversation; questions without an answer, or without valid evidence, are left out."""
    collections = []
    for sample in json.loads((folder / "locomo10.json").read_text()):
        turns: dict[str, int] = {}
        exchanges, session = [], []
        names = [k for k in sample["conversation"] if re.fullmatch(r"session_\d+", k)]
        for name in sorted(names, key=lambda k: int(k[8:])):
            for turn in sample["conversation"][name]:
                turns[turn["dia_id"]] = len(exchanges)
                exchanges.append(Exchange(turn["dia_id"], f"{turn['speaker']}: {turn['text']}", ""))
                session.append(int(name[8:]))
        found = [
            (qa["question"], frozenset(turns[d] for d in re.findall(r"D\d+:\d+", " ".join(qa["evidence"])) if d in turns))
            for qa in sample["qa"] if qa["category"] != 5
        ]  # fmt: skip
        found = [(question, gold) for question, gold in found if gold]
        none = np.zeros(len(found), bool)
        collections.append(
            Collection(exchanges, np.array(session), [q for q, _ in found], [g for _, g in found], none, np.zeros(len(exchanges), bool))
        )
    return collections


class Layer:
    """The arms of one layer of text for every query of a collection."""

    def __init__(self, collection: Collection, texts: Texts, options: Bm25Options, tokenizer: str = TOKENIZER) -> None:
        self.collection, self.texts, self.options = collection, texts, options
        con = duckdb.connect()
        for _, sql in migrations():
            con.execute(sql)
        previous = [i - 1 if i and collection.session[i] == collection.session[i - 1] else None for i in range(len(texts))]
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


def judged(rows: Sequence[dict[str, Arm]], collection: Collection, names: Sequence[str]) -> list[Judged]:
    return [judge(row, gold, names) for row, gold in zip(rows, collection.relevant, strict=True)]


def measure(queries: Sequence[Judged], relevant: Sequence[frozenset[int]], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows MRR, nDCG@10, R@10; a column for each query. Equal scores are ranked in the order of the documents."""
    out = np.zeros((3, len(queries)))
    discount = 1 / np.log2(np.arange(2, 12))
    for i, (scores, is_relevant) in enumerate(queries):
        hits = is_relevant[np.argsort(-(weights @ scores), kind="stable")]
        if hits.any():
            gained = hits[:10]
            ideal = discount[: min(10, len(relevant[i]))].sum()
            out[:, i] = 1 / (hits.argmax() + 1), (discount[: len(gained)] * gained).sum() / ideal, gained.sum() / len(relevant[i])
    return out


def means(scores: NDArray[np.float64], tuning: NDArray[np.bool_]) -> dict[str, Any]:
    return {
        part: dict(zip(("mrr", "ndcg@10", "recall@10"), scores[:, mask].mean(axis=1).round(4).tolist(), strict=True))
        for part, mask in (("tuning", tuning), ("held_out", ~tuning), ("all", np.ones_like(tuning)))
        if mask.any()
    }


def compare(scores: NDArray[np.float64], baseline: NDArray[np.float64], tuning: NDArray[np.bool_]) -> dict[str, Any]:
    """Reciprocal ranks against the baseline's, query by query: 95 % bootstrap interval and Wilcoxon's p."""
    out = {}
    for part, mask in (("held_out", ~tuning), ("all", np.ones_like(tuning))):
        difference = (scores[0] - baseline[0])[mask]
        rng = np.random.default_rng(SEED)
        drawn = difference[rng.integers(0, len(difference), (BOOTSTRAPS, len(difference)))].mean(axis=1)
        low, high = np.percentile(drawn, [2.5, 97.5])
        p = float(wilcoxon(difference, zero_method="zsplit").pvalue) if difference.any() else 1.0
        out[part] = {
            "retention": round(float(scores[0][mask].mean() / baseline[0][mask].mean()), 4),
            "difference": round(float(difference.mean()), 4), "ci95": [round(float(low), 4), round(float(high), 4)], "p": p,
        }  # fmt: skip
    return out


def holm(rows: list[dict[str, Any]], part: str) -> None:
    """Adds Holm's adjusted p to every comparison of the study."""
    compared = sorted((row["vs"][part] for row in rows if "vs" in row), key=lambda c: c["p"])
    running = 0.0
    for i, comparison in enumerate(compared):
        running = max(running, min(1.0, comparison["p"] * (len(compared) - i)))
        comparison["p_holm"] = running


class Study:
    """Collects rows; fusion weights are searched on the tuning half from the keyword arm alone."""

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self.rows: list[dict[str, Any]] = []
        self.scores: dict[str, NDArray[np.float64]] = {}
        self.weights: dict[str, dict[str, float]] = {}

    def add(self, name: str, rows: Sequence[dict[str, Arm]], arms: Sequence[str], ratio: float, **more: Any) -> None:
        """Measures one configuration; `first` in more names the arms that the search starts from (all 1)."""
        c = self.collection
        queries = judged(rows, c, arms)
        start = more.pop("start", None) or {arms[0]: 1.0}
        weights = np.array([start.get(arm, 0.0) for arm in arms])
        if len(arms) > 1:
            weights = search_weights([q for q, t in zip(queries, c.tuning, strict=True) if t], weights)
        self.scores[name] = measure(queries, c.relevant, weights)
        self.weights[name] = {arm: float(w) for arm, w in zip(arms, weights, strict=True)}
        row = {"name": name, "ratio": round(ratio, 2), "weights": self.weights[name], **means(self.scores[name], c.tuning), **more}
        self.rows.append(row)
        print(f"{name:44s} {ratio:6.2f}x  " + "  ".join(f"{part} {row[part]['mrr']:.4f}" for part in ("tuning", "held_out", "all")), flush=True)

    def best(self, names: Sequence[str]) -> str:
        """The one with the best MRR on the tuning half."""
        return max(names, key=lambda name: self.scores[name][0][self.collection.tuning].mean())


def choose_options(layer: Layer) -> Bm25Options:
    c = layer.collection
    def tuned(options: Bm25Options) -> float:
        queries = judged([{"keyword": arm} for arm in layer.keyword(options)], c, ["keyword"])
        return float(measure(queries, c.relevant, np.ones(1))[0][c.tuning].mean())
    return max(OPTION_GRID, key=tuned)


def distilled(collection: Collection, weights: Weights) -> list[Distilled]:
    records = [record for _, record in Extractive(weights).distil(collection.exchanges)]
    assert all(isinstance(r, Distilled) for r in records)
    return [r for r in records if isinstance(r, Distilled)]


def as_texts(records: Sequence[Distilled]) -> Texts:
    return [("", record.text) for record in records]


def num_tokens(texts: Texts) -> int:
    return sum(count_tokens(user) + count_tokens(assistant) for user, assistant in texts)


def span(text: str, budget: int, start: int) -> str:
    """Words of the text from the start-th on, as many as fit the budget in tokens."""
    kept: list[str] = []
    for word in text.split()[start:]:
        budget -= count_tokens(f" {word}")
        if budget < 0:
            break
        kept.append(word)
    return " ".join(kept)


def survival(collection: Collection, records: Sequence[Distilled]) -> float:
    """Mean share of an exchange's 15 terms of highest idf (in the corpus) that its record still holds (card 001)."""
    tokenizer = get_tokenizer(TOKENIZER)
    terms = [set(tokenizer(e.text)) for e in collection.exchanges]
    df: dict[str, int] = {}
    for found in terms:
        for term in found:
            df[term] = df.get(term, 0) + 1
    shares = []
    for found, record in zip(terms, records, strict=True):
        rarest = sorted(found, key=lambda t: (df[t], t))[:15]
        kept = set(tokenizer(record.text))
        if rarest:
            shares.append(sum(t in kept for t in rarest) / len(rarest))
    return float(np.mean(shares))


def study_agentlog(c: Collection) -> dict[str, Any]:
    study = Study(c)
    whole = num_tokens(c.verbatim)
    main = distilled(c, Weights())
    ratio = whole / num_tokens(as_texts(main))
    layers = {"verbatim": Layer(c, c.verbatim, Bm25Options()), "distilled": Layer(c, as_texts(main), Bm25Options())}
    arms: dict[str, list[dict[str, Arm]]] = {}
    for name, layer in layers.items():
        size = ratio if name == "distilled" else 1.0
        study.add(f"{name}: keyword, default options", [{"keyword": a} for a in layer.keyword(layer.options)], ["keyword"], size)
        layer.options = choose_options(layer)
        arms[name] = layer.arms()
        for label, chosen in (
            ("keyword", ["keyword"]), ("vector", ["vector"]), ("hybrid", ["keyword", "vector"]), ("all text arms", TEXT_ARMS),
            ("all text arms + edited", (*TEXT_ARMS, "edited")),
        ):  # fmt: skip
            study.add(f"{name}: {label}", arms[name], chosen, size, options=str(layer.options) if label == "keyword" else "")
    cross = [
        {**{f"v:{k}": a for k, a in v.items()}, **{f"d:{k}": a for k, a in d.items()}}
        for v, d in zip(arms["verbatim"], arms["distilled"], strict=True)
    ]
    text = study.best([n for n in study.scores if n.startswith("verbatim") and "edited" not in n])
    edited = "verbatim: all text arms + edited"
    study.add("cross: verbatim keyword + distilled vector", cross, ["v:keyword", "d:vector"], 1.0)
    for label, baseline, chosen in (("all text arms", text, TEXT_ARMS), ("all text arms + edited", edited, (*TEXT_ARMS, "edited"))):
        start = {f"v:{arm}": w for arm, w in study.weights[baseline].items()}
        names = [f"v:{a}" for a in chosen] + [f"d:{a}" for a in chosen if a != "edited"]
        study.add(f"cross: {label}", cross, names, 1.0, start=start)
    curve(study, layers["distilled"].options, whole, main)
    for row in study.rows:
        if row["name"] not in (text, edited):
            row["baseline"] = edited if "edited" in row["name"] else text
            row["vs"] = compare(study.scores[row["name"]], study.scores[row["baseline"]], c.tuning)
    for part in ("held_out", "all"):
        holm(study.rows, part)
    started = time.process_time()
    distilled(c, Weights())
    return {
        "documents": len(c.exchanges), "queries": len(c.queries), "tokens": {"verbatim": whole, "distilled": round(whole / ratio)},
        "distil_per_cpu_second": round(len(c.exchanges) / (time.process_time() - started)),
        "records_that_break_a_check": sum(bool(violations(e, r)) for e, r in zip(c.exchanges, main, strict=True)),
        "vocabulary_survival": round(survival(c, main), 4),
        "best_verbatim_text": text,
        "best_distilled_text": study.best([n for n in study.scores if n.startswith("distilled") and "edited" not in n]),
        "rows": study.rows,
    }  # fmt: skip


def curve(study: Study, options: Bm25Options, whole: int, main: Sequence[Distilled]) -> None:
    """Other budgets, the card's baselines at the main budget, and what single choices are worth (fusion weights of main)."""
    c = study.collection
    base = Weights()
    budgets = [count_tokens(record.text) for record in main]
    rng = np.random.default_rng(SEED)
    variants: dict[str, Callable[[], Texts]] = {
        f"distilled x{f}": lambda f=f: as_texts(distilled(c, replace(base, scale=base.scale * f, least=base.least * f)))
        for f in (3.6, 2.2, 1.6, 1.25, 0.75, 0.55, 0.4, 0.28)
    }
    variants |= {
        "distilled, same budget for edits and talk": lambda: as_texts(distilled(c, replace(base, changed_files=1.0, scale=base.scale * 1.98))),
        "distilled, core only": lambda: [("", record.core) for record in main],
        "truncated to the same budgets": lambda: [("", span(e.text, b, 0)) for e, b in zip(c.exchanges, budgets, strict=True)],
        "truncated to one budget": lambda: [("", span(e.text, round(float(np.mean(budgets)) * 1.2), 0)) for e in c.exchanges],
        "random span of the same budgets": lambda: [
            ("", span(e.text, b, int(rng.integers(0, max(1, len(e.text.split()) - b // 2))))) for e, b in zip(c.exchanges, budgets, strict=True)
        ],
    }  # fmt: skip
    weights = study.weights["distilled: all text arms"]
    for name, make in variants.items():
        texts = make()
        rows = Layer(c, texts, options).arms()
        ratio = whole / num_tokens(texts)
        study.add(f"{name}: keyword", rows, ["keyword"], ratio)
        fused = judged(rows, c, list(weights))
        study.fixed(f"{name}: all text arms", fused, weights, ratio)
    for tokenizer in TOKENIZERS:
        for name, texts in (("verbatim", c.verbatim), ("distilled", as_texts(main))):
            rows = [{"keyword": a} for a in Layer(c, texts, options, tokenizer).keyword(options)]
            study.add(f"{name}, tokenizer {tokenizer}: keyword", rows, ["keyword"], whole / num_tokens(texts))


def study_locomo(collections: Sequence[Collection], study: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether anything tuned on the coding sessions hurts on talk between two people: same options and weights, nothing re-tuned."""
    tuned = {row["name"]: row for row in study["rows"]}
    rows = []
    whole = sum(num_tokens(c.verbatim) for c in collections)
    kinds: dict[str, Callable[[Collection], Texts]] = {
        "verbatim": lambda c: c.verbatim,
        "distilled": lambda c: as_texts(distilled(c, Weights())),
        "distilled x0.5": lambda c: as_texts(distilled(c, replace(Weights(), scale=Weights().scale / 2, least=Weights().least / 2))),
    }
    for kind, make in kinds.items():
        texts = [make(c) for c in collections]
        ratio = whole / sum(map(num_tokens, texts))
        layer_name = kind.split()[0]
        options = eval_options(tuned[f"{layer_name}: keyword"]["options"])
        settings = {
            "keyword, default options": (Bm25Options(), {"keyword": 1.0}),
            "keyword, tuned options": (options, {"keyword": 1.0}),
            "all arms, equal weights": (options, dict.fromkeys(TEXT_ARMS, 1.0)),
            "all arms, weights of the coding sessions": (options, tuned[f"{layer_name}: all text arms"]["weights"]),
        }
        for label, (chosen, weights) in settings.items():
            scores = []
            for c, made in zip(collections, texts, strict=True):
                rows_of = Layer(c, made, chosen).arms()
                scores.append(measure(judged(rows_of, c, list(weights)), c.relevant, np.array(list(weights.values()))))
            together = np.concatenate(scores, axis=1)
            row = {"name": f"{kind}: {label}", "ratio": round(ratio, 2), **means(together, np.zeros(together.shape[1], bool))}
            rows.append(row)
            print(f"LoCoMo {row['name']:60s} {ratio:5.2f}x {row['all']}", flush=True)
    return rows
