"""Coding-agent recall: a commit's subject -> the exchanges with the agent that made the commit.

Data: real Claude Code and Gemini CLI sessions of entireio/cli (MIT), joined to commits through their trailers; labels
are automatic (see shared/data/PROVENANCE.md). Deviations: none.
Verified by: tests/evals/test_tasks.py.
"""

from __future__ import annotations

from pathlib import Path

from workbench.evals.tasks.base import Document, Query, RecallTask, Row, read_jsonl, shared_data


def load(corpus_path: Path | None = None, queries_path: Path | None = None) -> RecallTask:
    """The development split; one scope a repository, one document an exchange.

    Args: agentlog_corpus_dev.jsonl.gz and agentlog_queries_dev.jsonl, None = the shared data.
    Raises: InputError that names file and line.
    """
    documents: list[Document] = []
    seen: set[str] = set()
    latest: dict[str, str] = {}
    last_at: dict[str, int] = {}
    for row in read_jsonl(corpus_path or shared_data("agentlog_corpus_dev.jsonl.gz")):
        session, at, scope = row.get("session", str), row.get("idx", int), row.get("repo", str)
        if at <= last_at.get(session, -1):
            raise row.error(f"exchange {at} of session {session!r} stands after exchange {last_at[session]}")
        document = Document(
            row.new_id("id", seen), row.get("user", str), row.get("assistant", str), scope, latest.get(session),
            row.get("ts", str), tuple(row.texts("files") if "files" in row.fields else ()),
        )  # fmt: skip
        latest[session], last_at[session] = document.id, at
        documents.append(document)
    known = {document.id for document in documents}
    queries = [_query(row, known) for row in read_jsonl(queries_path or shared_data("agentlog_queries_dev.jsonl"))]
    return RecallTask("agentlog", "2", tuple(documents), tuple(queries), licence="MIT")


def _query(row: Row, known: set[str]) -> Query:
    gold = row.texts("gold")
    if missing := [doc for doc in gold if doc not in known]:
        raise row.error(f"its gold exchange {missing[0]!r} is not in the corpus")
    return Query(
        id=row.words("qid"), text=row.words("query"), relevance=dict.fromkeys(gold, 1.0), scope=row.get("repo", str),
        cluster=min(row.texts("gold_sessions"), default=""),
    )  # fmt: skip
