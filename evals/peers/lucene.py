"""bm25s with Lucene's BM25, its own tokenizer and English stop words, and PyStemmer's English stems if installed.

Deviations: documents of score 0 are left out, where the library fills the list with them; equal scores go by id.
Verified by: tests/evals/test_peers.py, test_peers_parity.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from workbench.evals.peers.base import Documents, best, folder_bytes, installed, need
from workbench.evals.tasks.base import Document

NAME = "bm25s"


class Lucene:
    """Retriever: bm25s."""

    name = NAME

    def fingerprint(self) -> str:
        """Versions; a missing PyStemmer shows as such."""
        return f"{NAME} method=lucene stopwords=en {installed('bm25s', 'PyStemmer')}"

    def build(self, documents: Sequence[Document], folder: Path) -> LuceneIndex:
        """The index, in memory and on disk."""
        return LuceneIndex(documents, folder, need(NAME, "bm25s", "bm25s"))


class LuceneIndex(Documents):
    """A bm25s index and the documents."""

    def __init__(self, documents: Sequence[Document], folder: Path, bm25s: Any) -> None:
        super().__init__(documents)
        self._folder, self._tokenizer = folder, bm25s.tokenize
        self._stemmer = need(NAME, "Stemmer", "PyStemmer").Stemmer("english") if find_spec("Stemmer") else None
        terms = self._terms(self.texts)
        self._engine = None
        if any(terms):
            self._engine = bm25s.BM25(method="lucene")
            self._engine.index(terms, show_progress=False)
            self._engine.save(folder)

    def _terms(self, texts: list[str]) -> list[list[str]]:
        return self._tokenizer(texts, stopwords="en", stemmer=self._stemmer, return_ids=False, show_progress=False)

    def search(self, text: str, k: int) -> list[tuple[str, float]]:
        """Up to k documents of a score above 0."""
        terms = self._terms([text])[0]
        if self._engine is None or not terms:
            return []
        scores = self._engine.get_scores(terms)
        return best(self.ids, scores, k, np.flatnonzero(scores))

    def num_bytes(self) -> int:
        """The files that the library saves, and the texts."""
        return folder_bytes(self._folder) + self.text_bytes()


def load(name: str, folder: str) -> Lucene:
    """The peer."""
    return Lucene()
