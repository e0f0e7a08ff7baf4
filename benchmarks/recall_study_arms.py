"""Arms, their scaling and the search of weights for recall_study.py.

Scores are dense arrays, queries by documents of a scope: the sets are small, and every experiment on weights is then a
matter of seconds. The formulas are those of memory.bm25, memory.fusion and memory.arms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from workbench.evals.tasks.base import Document, Query
from workbench.memory import embedding
from workbench.memory.distillers.extractive import Extractive
from workbench.memory.named import date_scores, speaker_of, speaker_scores
from workbench.memory.tokenizers import get_tokenizer
from workbench.memory.types import Distilled, Exchange
from workbench.memory.windowed import windowed

CANDIDATES = 500  # of each searching arm, as in the product
LENGTH_OFFSET = 30  # tokens added to every length and to the mean: a word or two more do not tell short texts apart
GRID = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
Scores = NDArray[np.float32]
TOKENS = get_tokenizer("stem/1")


# --- arms -------------------------------------------------------------------------------------------------------------


@dataclass
class Scope:
    """The documents of one scope, its queries, and each arm's scaled scores, shape (queries, documents)."""

    documents: list[Document]
    queries: list[Query]
    arms: dict[str, Scores]

    def fused(self, weights: Mapping[str, float]) -> Scores:
        """The weighted sum of the arms, shape (queries, documents)."""
        used = [weight * self.arms[name] for name, weight in weights.items() if weight]
        return np.asarray(np.sum(used, axis=0), np.float32)

    @property
    def gold(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Rows (query) and columns (document) of what is relevant."""
        at = {document.id: i for i, document in enumerate(self.documents)}
        pairs = [(i, at[doc]) for i, query in enumerate(self.queries) for doc in query.relevance]
        return np.array([row for row, _ in pairs]), np.array([column for _, column in pairs])


def counts_of(texts: Iterable[str], vocabulary: dict[str, int]) -> sparse.csr_matrix:
    """Term frequencies, a row for each text; new terms enter the vocabulary."""
    rows, columns, values = [], [], []
    for row, text in enumerate(texts):
        for term, tf in Counter(TOKENS(text)).items():
            rows.append(row)
            columns.append(vocabulary.setdefault(term, len(vocabulary)))
            values.append(float(tf))
    return sparse.csr_matrix((values, (rows, columns)), (max(rows, default=-1) + 1, len(vocabulary)))


def bm25(
    queries: sparse.csr_matrix,
    counts: sparse.csr_matrix,
    df: NDArray,
    *,
    variant: str,
    k1: float,
    b: float,
    offset: int,
) -> Scores:
    """Scores of memory/bm25.py's formulas, with `offset` tokens added to every length."""
    num, known = len(counts.indptr) - 1, df > 0
    idf = np.zeros(len(df))
    if variant == "okapi":
        idf[known] = np.log(num - df[known] + 0.5) - np.log(df[known] + 0.5)
        idf[known] = np.where(idf[known] < 0, 0.25 * idf[known].mean(), idf[known])
    else:
        idf[known] = np.log1p((num - df[known] + 0.5) / (df[known] + 0.5))
    length = np.asarray(counts.sum(axis=1)).ravel() + offset
    norm = k1 * (1 - b + b * length / length.mean())
    weights = counts.copy()
    rows = np.repeat(np.arange(num), np.diff(counts.indptr))
    weights.data = counts.data / (counts.data + norm[rows]) * idf[counts.indices]
    return (queries @ weights.T).toarray().astype(np.float32)


def scaled(scores: Scores, *, positive: bool = False, num: int | None = CANDIDATES) -> Scores:
    """Min-max over each query's best documents, as the product's fusion does it; 0 for the rest.

    Args: positive: documents with a score of 0 are no candidates (keyword arms); num: candidates, None = all (priors).
    """
    out = np.zeros(scores.shape, np.float32)
    for row, values in enumerate(scores):
        chosen = np.argsort(-values, kind="stable")[:num]
        chosen = chosen[values[chosen] > 0] if positive else chosen
        if len(chosen) and (low := values[chosen].min()) < (high := values[chosen].max()):
            out[row, chosen] = (values[chosen] - low) / (high - low)
        elif positive:
            out[row, chosen] = 1
    return out


def neighbours(documents: Sequence[Document]) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Rows of the documents before and after (their number where there is none), and each document's thread."""
    at = {document.id: i for i, document in enumerate(documents)}
    before, after = (np.full(len(documents) + 1, len(documents)) for _ in range(2))
    thread = np.arange(len(documents))
    for i, document in enumerate(documents):
        if document.previous is not None:
            before[i], after[at[document.previous]] = at[document.previous], i
            thread[i] = thread[at[document.previous]]
    return before, after, thread


def keyword_arms(documents: Sequence[Document], queries: Sequence[Query]) -> dict[str, Scores]:
    """BM25 of documents, of documents with their neighbours, of the session's best, of the distilled text."""
    vocabulary: dict[str, int] = {}
    distilled = [record.text if isinstance(record, Distilled) else "" for _, record in Extractive().distil(
        [Exchange(document.id, document.user, document.assistant) for document in documents])]  # fmt: skip
    tables = [counts_of(texts, vocabulary) for texts in
              ([d.text for d in documents], distilled, [q.text for q in queries])]  # fmt: skip
    for table, rows in zip(tables, (documents, documents, queries), strict=True):
        table.resize(len(rows), len(vocabulary))
    counts, short, asked = tables
    before, after, thread = neighbours(documents)
    padded = sparse.vstack([counts, sparse.csr_matrix((1, len(vocabulary)))]).tocsr()
    window = sum((padded[at[:-1]] for at in (before, after)), counts).tocsr()
    df, df_short = (np.bincount(table.indices, minlength=len(vocabulary)) for table in (counts, short))
    options: dict[str, Any] = {"variant": "okapi", "k1": 1.5, "b": 0.75, "offset": LENGTH_OFFSET}
    keyword = bm25(asked, counts, df, **options)
    best = np.zeros((len(queries), len(documents)), np.float32)
    np.maximum.at(best.T, thread, keyword.T)
    memories = bm25(asked, short, df_short, variant="lucene", k1=1.2, b=0.3, offset=0)
    return {
        "keyword": scaled(keyword, positive=True),
        "window": scaled(bm25(asked, window, df, **options), positive=True),
        "session": scaled(best[:, thread], num=None),
        "distilled": scaled(memories, positive=True),
    }


def make_scope(documents: list[Document], queries: list[Query], model: Any, edited: set[str]) -> Scope:
    """All arms; the vectors of LSA are learnt from these documents alone."""
    arms, texts = keyword_arms(documents, queries), [document.text for document in documents]
    asked = [query.text for query in queries]
    before, after, _ = (links[: len(documents)] for links in neighbours(documents))
    learnt = embedding.learn(texts)
    arms["vector"] = scaled(learnt.embed(asked) @ windowed(learnt.embed(texts), before, after).T)
    vectors, wanted = model.encode_document(texts), model.encode_query(asked)
    arms["minilm"] = scaled(wanted @ vectors.T)
    arms["minilm window"] = scaled(wanted @ windowed(vectors, before, after).T)
    speakers, times = [speaker_of(document.user) for document in documents], [d.time for d in documents]
    arms["speaker"] = scaled(np.array([speaker_scores(text, speakers) for text in asked], np.float32), num=None)
    arms["date"] = scaled(np.array([date_scores(text, times) for text in asked], np.float32), num=None)
    files = np.array([document.id in edited for document in documents], np.float32)
    arms["edited"] = np.tile(files, (len(queries), 1))
    return Scope(documents, queries, arms)


class Remembering:
    """MiniLM with the vectors of texts that it has seen; a peer asks for the same text more than once."""

    def __init__(self, folder: Path | None, load: Callable[[], Any]) -> None:
        self._model: Any = None
        self._load = load
        self._path = folder / "minilm.npz" if folder else None
        self._known: dict[str, NDArray[np.float32]] = {}
        if self._path and self._path.is_file():
            with np.load(self._path) as file:
                self._known = dict(zip(file["keys"].tolist(), file["rows"], strict=True))

    def encode_document(self, texts: Sequence[str], **_: Any) -> NDArray[np.float32]:
        """One row of length 1 a text; MiniLM has no prompts, so that queries and documents are the same to it."""
        keys = [sha256(text.encode("utf-8", "replace")).hexdigest() for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._known}
        if new:
            self._model = self._model or self._load()
            rows = self._model.encode(list(new.values()), normalize_embeddings=True, show_progress_bar=False)
            self._known |= dict(zip(new, rows, strict=True))
        return np.array([self._known[key] for key in keys], np.float32)

    encode_query = encode_document

    def save(self) -> None:
        """Keep the vectors, if there is a folder for them."""
        if self._path:
            np.savez(self._path, keys=np.array(list(self._known)), rows=np.array(list(self._known.values())))


# --- weights ----------------------------------------------------------------------------------------------------------


def quality(scopes: Sequence[Scope], weights: Mapping[str, float]) -> float:
    """Mean over queries of (MRR + nDCG@10) / 2; equal scores count against what is relevant."""
    total = num = 0.0
    discount = 1 / np.log2(np.arange(2, 12))
    for scope in scopes:
        fused = scope.fused(weights)
        rows, columns = scope.gold
        grown = fused[rows] - fused[rows, columns][:, None]
        rank = np.count_nonzero(grown >= 0, axis=1)  # its own place among those not below it
        first = np.full(len(scope.queries), np.inf)
        np.minimum.at(first, rows, rank)
        gain = np.zeros(len(scope.queries))
        np.add.at(gain, rows, np.where(rank <= 10, 1 / np.log2(rank + 1), 0))
        ideal = np.cumsum(discount)[np.minimum(np.bincount(rows, minlength=len(scope.queries)), 10) - 1]
        total, num = total + float((1 / first + gain / ideal).sum()) / 2, num + len(scope.queries)
    return total / num


def search_weights(corpora: Sequence[Sequence[Scope]], names: Sequence[str]) -> dict[str, float]:
    """Coordinate ascent over GRID from equal weights, every corpus counting the same."""

    def reached(weights: Mapping[str, float]) -> float:
        return sum(quality(scopes, weights) for scopes in corpora) / len(corpora)

    weights = dict.fromkeys(names, 1.0)
    best = reached(weights)
    while True:
        before = best
        for name in names:
            for value in GRID:
                tried = {**weights, name: value}
                if any(tried.values()) and (found := reached(tried)) > best + 1e-6:
                    weights, best = tried, found
        if best == before:
            return weights


def only(scopes: Sequence[Scope], wanted: Callable[[Query], bool]) -> list[Scope]:
    """The same scopes with fewer queries; those that are left without any are dropped."""
    kept = []
    for scope in scopes:
        at = [i for i, query in enumerate(scope.queries) if wanted(query)]
        if at:
            arms = {name: scores[at] for name, scores in scope.arms.items()}
            kept.append(Scope(scope.documents, [scope.queries[i] for i in at], arms))
    return kept
