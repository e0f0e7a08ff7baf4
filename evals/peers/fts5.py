"""SQLite FTS5: tokenizer `porter unicode61`, its bm25(), any word of the query that is no stop word.

Every word is quoted, so that nothing in a query is FTS5 syntax. With the stop words in the query LoCoMo's nDCG@10 is
.415 instead of .467; the starting figure of the recall study (memory.md §6) was taken without them.
Deviations: none.
Verified by: tests/evals/test_peers.py, test_peers_parity.py.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from workbench.errors import InputError
from workbench.evals.peers.base import Documents, encodable
from workbench.evals.peers.okapi import STOP_WORDS, STOP_WORDS_SHA256
from workbench.evals.tasks.base import Document

NAME = "fts5"
_WORD = re.compile(r"\w+")


class Fts5:
    """Retriever: SQLite FTS5."""

    name = NAME

    def fingerprint(self) -> str:
        """SQLite's version and the stop words."""
        return f"{NAME} porter unicode61 sqlite={sqlite3.sqlite_version} stop={STOP_WORDS_SHA256}"

    def build(self, documents: Sequence[Document], folder: Path) -> Fts5Index:
        """The index, a file; raises InputError if Python's SQLite was built without FTS5."""
        return Fts5Index(documents, folder / "fts5.sqlite")


class Fts5Index(Documents):
    """A database with the one table `docs`; rows are numbered in the order of the ids, so that ties go by id."""

    def __init__(self, documents: Sequence[Document], file: Path) -> None:
        super().__init__(sorted(documents, key=lambda document: document.id))
        self._con = sqlite3.connect(file)
        try:
            self._con.execute("CREATE VIRTUAL TABLE docs USING fts5(text, tokenize = 'porter unicode61')")
        except sqlite3.OperationalError as error:
            self._con.close()
            raise InputError(
                f"The peer {NAME!r} needs SQLite with FTS5; this Python has SQLite {sqlite3.sqlite_version}: {error}."
            ) from error
        with self._con:
            rows = ((row, encodable(text)) for row, text in enumerate(self.texts))
            self._con.executemany("INSERT INTO docs (rowid, text) VALUES (?, ?)", rows)

    def search(self, text: str, k: int) -> list[tuple[str, float]]:
        """Up to k documents that hold a word of the query."""
        words = [word for word in _WORD.findall(text) if word.lower() not in STOP_WORDS]
        if not words or k <= 0:
            return []
        found = self._con.execute(
            "SELECT rowid, -bm25(docs) FROM docs WHERE docs MATCH ? ORDER BY bm25(docs), rowid LIMIT ?",
            [" OR ".join(f'"{word}"' for word in words), k],
        )
        return [(self.ids[row], score) for row, score in found.fetchall()]

    def num_bytes(self) -> int:
        """The pages of the database, which holds the texts as well."""
        pages, page_bytes = (
            self._con.execute(f"PRAGMA {what}").fetchall()[0][0] for what in ("page_count", "page_size")
        )
        return pages * page_bytes

    def close(self) -> None:
        """Closes the file."""
        self._con.close()


def load(name: str, folder: str) -> Fts5:
    """The peer."""
    return Fts5()
