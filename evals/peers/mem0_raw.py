"""mem0 without a language model: `add(…, infer=False)`, all-MiniLM-L6-v2, Qdrant in a folder; no network, no telemetry.

One memory a document, which its metadata names; scores and the threshold of 0.1 are mem0's own. mem0 2's keyword and
entity arms need fastembed and spaCy, whose models are downloaded; without these packages it is mem0's dense arm. The
fingerprint says which of them were installed.
Deviations: a document that user and assistant share is one memory, not one for each of them.
Verified by: tests/evals/test_peers.py, test_peers_parity.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workbench.errors import InputError
from workbench.evals.peers.base import (
    Documents,
    encodable,
    folder_bytes,
    folder_sha256,
    installed,
    minilm_folder,
    need,
    no_progress_bar,
)
from workbench.evals.tasks.base import Document

NAME = "mem0"
_USER = "workbench"


class Mem0:
    """Retriever: a mem0 store."""

    name = NAME

    def fingerprint(self) -> str:
        """Versions, those of the optional arms included, and the content of the model's files."""
        versions = installed("mem0ai", "qdrant-client", "fastembed", "spacy", "sentence-transformers", "torch")
        return f"{NAME} infer=False {versions} model={folder_sha256(minilm_folder(NAME))}"

    def build(self, documents: Sequence[Document], folder: Path) -> Mem0Index:
        """The store, in this folder.

        Raises: MissingExtra without mem0; InputError if mem0 was imported before with its telemetry on.
        """
        # Both are read when mem0 is imported; it makes the folder then, by default in the home of the user.
        os.environ["MEM0_TELEMETRY"] = "False"
        os.environ.setdefault("MEM0_DIR", str(folder / "settings"))
        library = need(NAME, "mem0", "mem0ai", extra="mem0")
        if need(NAME, "mem0.memory.telemetry", "mem0ai", extra="mem0").MEM0_TELEMETRY:
            raise InputError("mem0 was imported with its telemetry on. Set MEM0_TELEMETRY=False and start anew.")
        need(NAME, "sentence_transformers", "sentence-transformers")
        with no_progress_bar():
            return Mem0Index(documents, folder, library.Memory.from_config(_configuration(folder)))


def _configuration(folder: Path) -> dict[str, Any]:
    model = {"device": "cpu", "local_files_only": True}
    store = {"collection_name": "peer", "path": str(folder / "qdrant"), "embedding_model_dims": 384, "on_disk": True}
    return {
        "embedder": {
            "provider": "huggingface",
            "config": {"model": str(minilm_folder(NAME)), "embedding_dims": 384, "model_kwargs": model},
        },
        "vector_store": {"provider": "qdrant", "config": store},
        # mem0 makes a client when it starts; without inference nothing is ever asked of it.
        "llm": {"provider": "openai", "config": {"api_key": "unused"}},
        "history_db_path": str(folder / "history.db"),
    }


class Mem0Index(Documents):
    """A mem0 Memory of one user, and the documents."""

    def __init__(self, documents: Sequence[Document], folder: Path, memory: Any) -> None:
        super().__init__(documents)
        self._folder, self._memory = folder, memory
        for id, text in zip(self.ids, self.texts, strict=True):
            message = {"role": "user", "content": encodable(text)}
            memory.add([message], user_id=_USER, infer=False, metadata={"document": id})

    def search(self, text: str, k: int) -> list[tuple[str, float]]:
        """The k documents that mem0 ranks first; none for a blank query."""
        if not text.strip() or k <= 0:
            return []
        # mem0's ids are random, and so is its order of equal scores: ask on until the last score differs from the k-th.
        asked = k + 1
        while len(found := self._asked(text, asked)) == asked and found[k - 1][1] == found[-1][1]:
            asked *= 2
        return sorted(found, key=lambda hit: (-hit[1], hit[0]))[:k]

    def _asked(self, text: str, k: int) -> list[tuple[str, float]]:
        hits = self._memory.search(encodable(text), top_k=k, filters={"user_id": _USER})["results"]
        return [(hit["metadata"]["document"], float(hit["score"])) for hit in hits]

    def num_bytes(self) -> int:
        """The files of the vector store, which hold the texts, and of the history."""
        return folder_bytes(self._folder)

    def close(self) -> None:
        """Closes the vector store and the history."""
        self._memory.vector_store.client.close()
        self._memory.close()


def load(name: str, folder: str) -> Mem0:
    """The peer."""
    return Mem0()
