"""A made-up recall task and retrievers with known scores, for the tests of the runner and the report.

Also run as a script (`python recall_made.py STORE NUM_QUERIES SLEEP`) by the test that kills a run.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from workbench.evals.tasks.base import Document, Query, RecallTask

WORDS = [
    "cache", "retry", "index", "token", "merge", "queue", "parser", "socket", "budget", "schema", "worker", "commit",
    "branch", "render", "filter",
]  # fmt: skip


def made(num_queries: int = 24, num_documents: int = 30, scopes: int = 2, seed: int = 0) -> RecallTask:
    """Documents of made-up words in threads of five; each query holds rare words of its first relevant document."""
    rng = random.Random(seed)
    documents, queries = [], []
    for number in range(num_documents):
        scope = f"s{number % scopes}"
        words = [*rng.choices(WORDS, k=12), f"name{number}"]
        before = f"d{number - scopes}" if number >= scopes and (number // scopes) % 5 else None
        documents.append(Document(f"d{number}", " ".join(words[:7]), " ".join(words[7:]), scope, before))
    for number in range(num_queries):
        first = number % num_documents
        second = (first + scopes) % num_documents
        relevance = {f"d{first}": 2.0} | ({f"d{second}": 1.0} if number % 3 == 0 else {})
        relevance = {doc: grade for doc, grade in relevance.items() if int(doc[1:]) % scopes == first % scopes}
        queries.append(
            Query(f"q{number}", f"name{first} {rng.choice(WORDS)} ask{number}", relevance, f"s{first % scopes}",
                  category=f"c{number % 2}", cluster=f"k{number // 3}")
        )  # fmt: skip
    return RecallTask("made", "1", tuple(documents), tuple(queries))


class Made:
    """A retriever whose search is a function of (query, documents); counts what it was asked."""

    def __init__(
        self, name: str, search: Callable[[str, Sequence[Document], int], list[tuple[str, float]]], version: str = "1"
    ) -> None:
        self.name, self.version, self.function = name, version, search
        self.num_builds = self.num_searches = 0

    def fingerprint(self) -> str:
        return self.version

    def build(self, documents: Sequence[Document], folder: Path) -> MadeIndex:
        assert not list(folder.iterdir()), "the folder is its own"
        self.num_builds += 1
        return MadeIndex(self, documents)


class MadeIndex:
    def __init__(self, retriever: Made, documents: Sequence[Document]) -> None:
        self.retriever, self.documents = retriever, documents
        self.texts = {document.id: document.text for document in documents}
        self.is_closed = False

    def search(self, text: str, k: int) -> list[tuple[str, float]]:
        assert not self.is_closed
        self.retriever.num_searches += 1
        return self.retriever.function(text, self.documents, k)

    def returned(self, document_id: str) -> str:
        return self.texts[document_id]

    def num_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.texts.values())

    def close(self) -> None:
        self.is_closed = True


def oracle(task: RecallTask, name: str = "oracle") -> Made:
    """Knows the answers."""
    answers = {query.text: list(query.relevance.items()) for query in task.queries}
    return Made(name, lambda text, _, k: answers[text][:k])


def shuffled(name: str = "random", version: str = "1") -> Made:
    """A random order, the same for the same query."""

    def search(text: str, documents: Sequence[Document], k: int) -> list[tuple[str, float]]:
        order = random.Random(f"{version} {text}").sample([document.id for document in documents], len(documents))
        return [(doc, float(-at)) for at, doc in enumerate(order[:k])]

    return Made(name, search, version)


def overlap(name: str = "overlap", sleep: float = 0.0) -> Made:
    """Counts shared words: many equal scores."""

    def search(text: str, documents: Sequence[Document], k: int) -> list[tuple[str, float]]:
        time.sleep(sleep)
        words = set(text.split())
        scores = [(document.id, float(len(words & set(document.text.split())))) for document in documents]
        return sorted((hit for hit in scores if hit[1]), key=lambda hit: (-hit[1], hit[0]))[:k]

    return Made(name, search)


def main() -> None:
    from workbench.evals import recall_run

    store, num_queries, sleep = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    recall_run.COMMIT_RESULTS = 5
    recall_run.code_version = lambda: "test"  # an edit of the source between two calls is not what is tested
    task = made(num_queries)
    print("started", flush=True)
    outcome = recall_run.run(store, task, [overlap(sleep=sleep), oracle(task), shuffled()], split="all", k=10)
    print("done", outcome.num_asked, outcome.num_stored, flush=True)


if __name__ == "__main__":
    main()
