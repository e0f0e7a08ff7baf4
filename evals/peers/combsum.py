"""Min-max CombSUM of BM25 and MiniLM, the strongest systems among the starting figures of the recall study.

Each arm's scores of all documents of the scope are scaled to 0..1, and the sums are ranked.
combsum-minilm: rank-bm25-stem and the bi-encoder over the documents. combsum-minilm-window: these two, and both over
windows, a document with its neighbours before and after it in the same thread.
Paper: Fox and Shaw 1994, "Combination of Multiple Searches", TREC-2 (CombSUM).
Deviations: the study (memory.md §6) does not say how many documents of each arm it scaled. Scaling all of them needs no
    constant, gives its figures on agentlog, and better ones than its .464 (two arms) and .526 (four) on LoCoMo.
Verified by: tests/evals/test_peers.py, test_peers_parity.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.evals.peers.base import best
from workbench.evals.peers.bi_encoder import BiEncoder, BiEncoderIndex, query_vector
from workbench.evals.peers.okapi import Okapi, OkapiIndex
from workbench.evals.tasks.base import Document

_WINDOW = "combsum-minilm-window"


class CombSum:
    """Retriever: the sum of two or four arms."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lexical, self._dense = Okapi("rank-bm25-stem"), BiEncoder(name)

    def fingerprint(self) -> str:
        """The arms'."""
        return f"{self.name} {self._lexical.fingerprint()} {self._dense.fingerprint()}"

    def build(self, documents: Sequence[Document], folder: Path) -> CombSumIndex:
        """The arms' indexes, in memory."""
        layers = [documents, windows(documents)] if self.name == _WINDOW else [documents]
        lexical = [self._lexical.build(layer, folder) for layer in layers]
        return CombSumIndex(lexical, [self._dense.build(layer, folder) for layer in layers], self._dense.model)


def windows(documents: Sequence[Document]) -> list[Document]:
    """Each document's id with its text between those of its neighbours in the thread."""
    before = {document.id: document.text for document in documents}
    after = {document.previous: document.text for document in documents if document.previous is not None}
    texts = ((before.get(document.previous or ""), document.text, after.get(document.id)) for document in documents)
    return [
        replace(document, user="\n".join(filter(None, text)), assistant="")
        for document, text in zip(documents, texts, strict=True)
    ]


def min_max(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """The scores scaled so that the lowest is 0 and the highest 1; all 0 if they are equal."""
    low, high = float(scores.min()), float(scores.max())
    return (scores.astype(np.float64) - low) / (high - low if high > low else 1.0)


class CombSumIndex:
    """The arms; the first lexical one holds the documents as they were given."""

    def __init__(self, lexical: Sequence[OkapiIndex], dense: Sequence[BiEncoderIndex], model: Any) -> None:
        self._lexical, self._dense, self._model = lexical, dense, model

    def search(self, text: str, k: int) -> list[tuple[str, float]]:
        """The k documents of highest sum; none for a blank query."""
        ids = self._lexical[0].ids
        if not ids or not text.strip():
            return []
        vector = query_vector(self._model, text)
        arms = [index.scores(text) for index in self._lexical] + [index.scores(vector) for index in self._dense]
        return best(ids, np.sum([min_max(arm) for arm in arms], axis=0), k)

    def returned(self, document_id: str) -> str:
        """All words of the document, without its window."""
        return self._lexical[0].returned(document_id)

    def num_bytes(self) -> int:
        """The arms, their texts counted once."""
        texts = sum(index.text_bytes() for index in (*self._lexical, *self._dense))
        arms = sum(index.num_bytes() for index in (*self._lexical, *self._dense))
        return arms - texts + self._lexical[0].text_bytes()

    def close(self) -> None:
        """Nothing is held beside memory."""


def load(name: str, folder: str) -> CombSum:
    """The peer of that name."""
    return CombSum(name)
