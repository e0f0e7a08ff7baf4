"""What is compared in a recall evaluation: a retriever, which builds an index of the documents of one scope.

Ours and its peers implement this; so can a user's own module (`workbench eval recall --retriever FILE.py:NAME`). A
retriever sees documents and query texts, never relevance.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from workbench.evals.tasks.base import Document


class Index(Protocol):
    """The searchable documents of one scope."""

    def search(self, text: str, k: int) -> list[tuple[str, float]]:
        """Up to k (document id, score), best first; no document twice, no score that is not a number."""
        ...

    def returned(self, document_id: str) -> str:
        """What a prompt gets for this hit, word for word: returned tokens are counted of it."""
        ...

    def num_bytes(self) -> int:
        """Size of the index, on disk or in memory, the text that it returns included."""
        ...

    def close(self) -> None:
        """Frees what the index holds."""
        ...


class Retriever(Protocol):
    """One way to search.

    Attributes: name: unique in a run; what tables show.
    """

    name: str

    def fingerprint(self) -> str:
        """Everything beside the documents that results depend on: versions, options, the content of model weights."""
        ...

    def build(self, documents: Sequence[Document], folder: Path) -> Index:
        """Index these documents, all of one scope; files may be written into `folder`, which is empty and its own.

        Raises: MissingExtra if a library is not installed.
        """
        ...
