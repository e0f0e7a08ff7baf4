"""Recall sets, measures and paired statistics of the recall study (recall_quality.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.evals import stats
from workbench.evals.tasks import agentlog
from workbench.evals.tasks.base import read_jsonl
from workbench.memory.calibrate import Judged, judge
from workbench.memory.fusion import Arm
from workbench.memory.tokenizers import get_tokenizer
from workbench.memory.tokens import count_tokens
from workbench.memory.types import Distilled, Exchange, FileTouch

TOKENIZER = "stem/1"
SEED = 20260313
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
    """The task's queries; of its documents also the tools, which the distiller reads and a task does not hold."""
    corpus = folder / "agentlog_corpus_dev.jsonl.gz"
    rows = sorted((row.fields for row in read_jsonl(corpus)), key=lambda r: (r["session"], r["idx"]))
    queries = agentlog.load(corpus, folder / "agentlog_queries_dev.jsonl").queries
    number = {row["id"]: i for i, row in enumerate(rows)}
    sessions = {s: i for i, s in enumerate(dict.fromkeys(row["session"] for row in rows))}
    exchanges = [
        Exchange(
            r["id"],
            r["user"],
            r["assistant"],
            files=tuple(FileTouch(f, "modified") for f in r["files"]),
            tools=tuple(r["tools"]),
        )
        for r in rows
    ]
    return Collection(
        exchanges,
        np.array([sessions[row["session"]] for row in rows]),
        [q.text for q in queries],
        [frozenset(number[g] for g in q.relevance) for q in queries],
        np.array([sha256(q.id.encode()).digest()[0] % 2 == 0 for q in queries]),
        np.array([bool(row["files"]) for row in rows]),
    )


def load_locomo(folder: Path) -> list[Collection]:
    """One collection for each conversation; questions without an answer, or without valid evidence, are left out.

    As the committed figures were measured: without the captions, the audit and the lenient reading of evidence that
    workbench.evals.tasks.locomo has.
    """
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
        found = []
        for qa in sample["qa"]:
            gold = frozenset(turns[d] for d in re.findall(r"D\d+:\d+", " ".join(qa["evidence"])) if d in turns)
            if gold and qa["category"] != 5:
                found.append((qa["question"], gold))
        none = np.zeros(len(found), bool)
        collections.append(
            Collection(
                exchanges,
                np.array(session),
                [q for q, _ in found],
                [g for _, g in found],
                none,
                np.zeros(len(exchanges), bool),
            )
        )
    return collections


def judged(rows: Sequence[dict[str, Arm]], collection: Collection, names: Sequence[str]) -> list[Judged]:
    return [judge(row, gold, names) for row, gold in zip(rows, collection.relevant, strict=True)]


def measure(
    queries: Sequence[Judged], relevant: Sequence[frozenset[int]], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Rows MRR, nDCG@10, R@10; a column for each query. Equal scores are ranked in the order of the documents."""
    out = np.zeros((3, len(queries)))
    discount = 1 / np.log2(np.arange(2, 12))
    for i, (scores, is_relevant) in enumerate(queries):
        hits = is_relevant[np.argsort(-(weights @ scores), kind="stable")]
        if hits.any():
            gained = hits[:10]
            ideal = discount[: min(10, len(relevant[i]))].sum()
            out[:, i] = (
                1 / (hits.argmax() + 1),
                (discount[: len(gained)] * gained).sum() / ideal,
                gained.sum() / len(relevant[i]),
            )
    return out


def means(scores: NDArray[np.float64], tuning: NDArray[np.bool_]) -> dict[str, Any]:
    return {
        part: dict(zip(("mrr", "ndcg@10", "recall@10"), scores[:, mask].mean(axis=1).round(4).tolist(), strict=True))
        for part, mask in (("tuning", tuning), ("held_out", ~tuning), ("all", np.ones_like(tuning)))
        if mask.any()
    }


def compare(scores: NDArray[np.float64], baseline: NDArray[np.float64], tuning: NDArray[np.bool_]) -> dict[str, Any]:
    """Reciprocal ranks against the baseline's, query by query: 95 % bootstrap interval, p of sign-flip permutations.

    Wilcoxon's p beside it is of ranks: many tiny changes far down a list can outweigh a few at its top.
    """
    out = {}
    for part, mask in (("held_out", ~tuning), ("all", np.ones_like(tuning))):
        ours, theirs = scores[0][mask], baseline[0][mask]
        interval = stats.paired_bootstrap(ours, theirs, seed=SEED)
        out[part] = {
            "retention": round(float(ours.mean() / theirs.mean()), 4),
            "difference": round(interval.estimate, 4),
            "ci95": [round(interval.low, 4), round(interval.high, 4)],
            "p": stats.paired_randomisation(ours, theirs, seed=SEED).p,
            "p_wilcoxon": stats.wilcoxon(ours, theirs).p,
        }
    return out


def holm(rows: list[dict[str, Any]], part: str) -> None:
    """Adds Holm's adjusted p to every comparison of the study."""
    compared = [row["vs"][part] for row in rows if "vs" in row]
    for comparison, adjusted in zip(compared, stats.holm([c["p"] for c in compared]), strict=True):
        comparison["p_holm"] = float(adjusted)


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
