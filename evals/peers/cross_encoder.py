"""The first 100 documents of rank-bm25-stem, reordered by a cross-encoder from a local folder.

There is no default: no cross-encoder's weights come with the packages of the extra, and nothing is downloaded.
Paper: Nogueira and Cho 2019, "Passage Re-ranking with BERT" (1901.04085).
Deviations: scores are logits, without the sigmoid at which sentence-transformers saturates to equal float32 numbers.
    At most 100 documents come back, whatever k is.
Verified by: tests/evals/test_peers.py, test_peers_parity.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import InputError
from workbench.evals.peers.base import best, encodable, folder_sha256, installed, model_folder, need, no_progress_bar
from workbench.evals.peers.okapi import Okapi, OkapiIndex
from workbench.evals.tasks.base import Document

NUM_CANDIDATES = 100


class CrossEncoder:
    """Retriever: BM25, then a model that reads query and document together.

    Args: name: of the peer; folder: of the model.
    Raises: InputError if the folder holds no model.
    """

    def __init__(self, name: str, folder: str) -> None:
        self.name = name
        self._folder = model_folder(folder, name)
        self._first = Okapi("rank-bm25-stem")

    def fingerprint(self) -> str:
        """Versions, the content of the model's files, and the first stage."""
        versions = installed("sentence-transformers", "transformers", "torch")
        first = f"first={NUM_CANDIDATES} of {self._first.fingerprint()}"
        return f"cross-encoder {versions} model={folder_sha256(self._folder)} {first}"

    def build(self, documents: Sequence[Document], folder: Path) -> CrossEncoderIndex:
        """BM25's index; raises InputError if the model gives more than one score a pair."""
        return CrossEncoderIndex(self._first.build(documents, folder), self.model)

    @cached_property
    def model(self) -> Any:
        """The loaded model, on the CPU."""
        library = need(self.name, "sentence_transformers", "sentence-transformers")
        identity = need(self.name, "torch", "torch").nn.Identity()
        with no_progress_bar():
            model = library.CrossEncoder(str(self._folder), device="cpu", local_files_only=True, activation_fn=identity)
        if model.num_labels != 1:
            raise InputError(f"The model in {self._folder} gives {model.num_labels} scores a pair; a reranker gives 1.")
        return model


class CrossEncoderIndex:
    """BM25's index and the model that reorders what it finds."""

    def __init__(self, first: OkapiIndex, model: Any) -> None:
        self._first, self._model = first, model

    def search(self, text: str, k: int) -> list[tuple[str, float]]:
        """The k documents of highest logit among BM25's first."""
        ids = [id for id, _ in self._first.search(text, NUM_CANDIDATES)]
        if not ids:
            return []
        pairs = [(encodable(text), encodable(self._first.returned(id))) for id in ids]
        return best(ids, np.asarray(self._model.predict(pairs, show_progress_bar=False)), k)

    def returned(self, document_id: str) -> str:
        """All words of the document."""
        return self._first.returned(document_id)

    def num_bytes(self) -> int:
        """BM25's index and the texts; the model not counted."""
        return self._first.num_bytes()

    def close(self) -> None:
        """Nothing is held beside memory."""


def load(name: str, folder: str) -> CrossEncoder:
    """The peer, over the model in this folder."""
    return CrossEncoder(name, folder)
