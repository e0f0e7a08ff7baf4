"""rank-bm25's BM25Okapi at its defaults, with two tokenizers.

rank-bm25: lower case, runs of \\w. rank-bm25-stem: camel case divided, runs of letters, digits and apostrophes in lower
case, without English stop words, Snowball stems; the tokenizer that comes nearest to the starting figures of the recall
study (memory.md §6: LoCoMo nDCG@10 .470, MRR .458, R@10 .609; agentlog .384, .430, .462).
Deviations: documents of score 0 (no term of the query, or only terms in exactly half of the documents) are left out;
    the library's get_top_n would fill the list with them.
Verified by: tests/evals/test_peers.py, test_peers_parity.py.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.evals.peers.base import Documents, best, installed, need
from workbench.evals.tasks.base import Document

_FUNCTION_WORDS = """
    a about above after again against all also am an and any are as at be because been before being below between
    both but by can could did do does doing down during each few for from further had has have having he her here
    hers him his how i if in into is it its just me more most my no nor not now of off on once only or other our
    ours out over own same she should so some such than that the their them then there these they this those
    through to too under until up very was we were what when where which while who whom why will with would you
    your yours"""
#: Of the peers that take none from their library; not ours (memory.tokenizers), which may change with the product.
STOP_WORDS = frozenset(_FUNCTION_WORDS.split())
STOP_WORDS_SHA256 = hashlib.sha256(" ".join(sorted(STOP_WORDS)).encode()).hexdigest()
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_WORD = re.compile(r"(?:[^\W_]|')+")


def plain_words(text: str) -> list[str]:
    """Runs of \\w in lower case."""
    return re.findall(r"\w+", text.lower())


def stemmed_words(text: str) -> list[str]:
    """Snowball stems of the words that are no stop words."""
    return [_stem(word) for word in _WORD.findall(_CAMEL.sub(" ", text).lower()) if word not in STOP_WORDS]


@lru_cache(100_000)
def _stem(word: str) -> str:
    return _stemmer().stemWord(word)


@cache
def _stemmer() -> Any:
    import snowballstemmer

    return snowballstemmer.stemmer("english")


_TOKENIZERS: dict[str, Callable[[str], list[str]]] = {"rank-bm25": plain_words, "rank-bm25-stem": stemmed_words}


class Okapi:
    """Retriever: BM25Okapi over one of the two tokenizers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._tokenize = _TOKENIZERS[name]

    def fingerprint(self) -> str:
        """Versions and, with stems, the stop words."""
        if self._tokenize is plain_words:
            return f"{self.name} {installed('rank-bm25')}"
        versions = installed("rank-bm25", "snowballstemmer")
        return f"{self.name} {versions} stop={STOP_WORDS_SHA256} pattern={_WORD.pattern} camel={_CAMEL.pattern}"

    def build(self, documents: Sequence[Document], folder: Path) -> OkapiIndex:
        """The index, in memory."""
        return OkapiIndex(documents, self._tokenize, need(self.name, "rank_bm25", "rank-bm25").BM25Okapi)


class OkapiIndex(Documents):
    """BM25Okapi and the documents."""

    def __init__(self, documents: Sequence[Document], tokenize: Callable[[str], list[str]], engine: Any) -> None:
        super().__init__(documents)
        self._tokenize = tokenize
        terms = [tokenize(text) for text in self.texts]
        # The library divides by the number of terms.
        self._engine = engine(terms) if any(terms) else None

    def scores(self, text: str) -> NDArray[np.float64]:
        """The library's score of every document."""
        return np.zeros(len(self.ids)) if self._engine is None else self._engine.get_scores(self._tokenize(text))

    def search(self, text: str, k: int) -> list[tuple[str, float]]:
        """Up to k documents of a score other than 0."""
        scores = self.scores(text)
        return best(self.ids, scores, k, np.flatnonzero(scores))

    def num_bytes(self) -> int:
        """The library's object as pickle writes it, and the texts."""
        return len(pickle.dumps(self._engine)) + self.text_bytes()


def load(name: str, folder: str) -> Okapi:
    """The peer of that name."""
    return Okapi(name)
