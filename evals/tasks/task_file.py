"""A recall task as one file of JSON lines that a person can write by hand.

    {"kind": "task", "name": "my-notes", "version": "1", "licence": "private"}
    {"kind": "document", "id": "d1", "user": "how do we deploy?", "assistant": "with make ship"}
    {"kind": "document", "id": "d2", "user": "the tests hang"}
    {"kind": "query", "id": "q1", "text": "deployment command", "relevant": ["d1"]}

The task comes first; documents stand in the order of their thread. A query names its documents in `relevant` (grade 1
each) or with grades in `relevance` ({"d1": 2}). All other fields of tasks/base.py may stand, none else. A query with
template marks ({{name}}) is taken for one that was never rendered, unless its row has "literal": true. `.gz` is packed.

Verified by: tests/evals/test_task_file.py.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from workbench.errors import InputError
from workbench.evals.tasks.base import Document, Query, RecallTask, Row, is_finite, read_jsonl, short
from workbench.evals.templates import template_mark

_FIELDS: Mapping[str, tuple[str, ...]] = {
    "task": ("kind", "name", "version", "relevant_from", "licence", "notes"),
    "document": ("kind", "id", "user", "assistant", "scope", "previous", "time", "files"),
    "query": (
        "kind", "id", "text", "relevance", "relevant", "scope", "category", "cluster", "answer", "literal",
    ),
}  # fmt: skip


def load(path: str | os.PathLike[str]) -> RecallTask:
    """The task in a file.

    Raises: InputError that names file and line for what is wrong in a row or contradicts another one.
    """
    rows = read_jsonl(Path(path))
    head = next(rows, None)
    if head is None:
        raise InputError(f'{path}: is empty; the first line is {{"kind": "task", "name": …, "version": …}}.')
    if _kind(head) != "task":
        raise head.error('the first line must be {"kind": "task", "name": …, "version": …}')
    documents: dict[str, Document] = {}
    queries: list[tuple[Row, Query]] = []
    seen: set[str] = set()
    for row in rows:
        kind = _kind(row)
        if kind == "task":
            raise row.error("there is a second task; a file holds one")
        if kind == "query":
            queries.append((row, _query(row, seen)))
            continue
        document = _document(row, documents)
        documents[document.id] = document
    scopes = {document.scope for document in documents.values()}
    for row, query in queries:
        for doc in query.relevance:
            if doc not in documents:
                near = get_close_matches(doc, documents, 1)
                raise row.error(
                    f"the relevant document {doc!r} does not exist{f'; did you mean {near[0]!r}?' if near else ''}"
                )
            if documents[doc].scope != query.scope:
                where = f"is in scope {documents[doc].scope!r}, the query in {query.scope!r}"
                raise row.error(f"the relevant document {doc!r} {where}")
        if query.scope not in scopes:
            near = get_close_matches(query.scope, scopes, 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise row.error(f"its scope {query.scope!r} holds no document{meant}")
    if not queries:
        raise InputError(f"{path}: holds no query.")
    return RecallTask(
        name=head.words("name"), version=head.words("version"), documents=tuple(documents.values()),
        queries=tuple(query for _, query in queries), relevant_from=_relevant_from(head),
        licence=_text(head, "licence"), notes=_notes(head),
    )  # fmt: skip


def save(task: RecallTask, path: str | os.PathLike[str]) -> None:
    """Writes a task so that `load` gives the same one; an existing file is replaced in one step.

    Raises: InputError if the file cannot be written.
    """
    target = Path(path)
    content = b"".join(_line(row) for row in _rows(task))
    if target.suffix == ".gz":
        content = gzip.compress(content, mtime=0)  # the same task gives the same bytes
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        try:
            unfinished.write_bytes(content)
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as e:
        raise InputError(f"{target}: cannot be written ({e.strerror or e}).") from e


def _rows(task: RecallTask) -> Iterator[dict[str, Any]]:
    head: dict[str, Any] = {"kind": "task", "name": task.name, "version": task.version}
    if task.relevant_from != 1.0 or not isinstance(task.relevant_from, float):
        head["relevant_from"] = task.relevant_from
    yield head | _given({"licence": task.licence, "notes": dict(task.notes)})
    for d in task.documents:
        more = {"assistant": d.assistant, "scope": d.scope, "previous": d.previous, "time": d.time,
                "files": list(d.files)}  # fmt: skip
        yield {"kind": "document", "id": d.id, "user": d.user} | _given(more)
    for q in task.queries:
        marked = {"literal": any(template_mark(text) for text in (q.text, q.answer))}
        more = {"scope": q.scope, "category": q.category, "cluster": q.cluster, "answer": q.answer} | marked
        yield {"kind": "query", "id": q.id, "text": q.text, "relevance": dict(q.relevance)} | _given(more)


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value}


def _line(row: dict[str, Any]) -> bytes:
    try:
        return f"{json.dumps(row, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:  # half a character, as broken logs have it
        return f"{json.dumps(row)}\n".encode()


def _kind(row: Row) -> str:
    kind = row.get("kind", str)
    if kind not in _FIELDS:
        raise row.error(f"the kind must be one of {', '.join(_FIELDS)}, not {kind!r}")
    for name in row.fields:
        if name not in _FIELDS[kind]:
            near = get_close_matches(name, _FIELDS[kind], 1)
            meant = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_FIELDS[kind])}"
            raise row.error(f"a {kind} has no field {name!r}; {meant}")
    return kind


def _document(row: Row, before: Mapping[str, Document]) -> Document:
    document = Document(
        id=row.words("id"), user=row.get("user", str), assistant=_text(row, "assistant"), scope=_text(row, "scope"),
        previous=None if row.fields.get("previous") is None else row.get("previous", str), time=_text(row, "time"),
        files=tuple(row.texts("files")) if "files" in row.fields else (),
    )  # fmt: skip
    if document.id in before:
        raise row.error(f"the document {document.id!r} comes twice")
    if document.previous is not None:
        earlier = before.get(document.previous)
        if earlier is None or earlier.scope != document.scope:
            raise row.error(f"its previous document {document.previous!r} does not stand before it in the same scope")
    return document


def _query(row: Row, seen: set[str]) -> Query:
    query = Query(
        id=row.new_id("id", seen), text=row.words("text"), relevance=_relevance(row), scope=_text(row, "scope"),
        category=_text(row, "category"), cluster=_text(row, "cluster"), answer=_text(row, "answer"),
    )  # fmt: skip
    is_meant = row.get("literal", bool) if "literal" in row.fields else False
    for name, text in (("text", query.text), ("answer", query.answer)):
        if (mark := template_mark(text)) and not is_meant:
            raise row.error(
                f'the {name} still has the template mark {mark!r}; render it, or add "literal": true if it is meant'
            )
    return query


def _relevance(row: Row) -> dict[str, float]:
    if ("relevance" in row.fields) == ("relevant" in row.fields):
        raise row.error("a query needs `relevant` (a list of document ids) or `relevance` (id -> grade), not both")
    if "relevant" in row.fields:
        listed = row.texts("relevant")
        if len(set(listed)) < len(listed):
            raise row.error("a document stands twice in 'relevant'")
        return dict.fromkeys(listed, 1.0)
    grades = row.get("relevance", dict)
    for doc, grade in grades.items():
        if not (is_finite(grade) and grade > 0):
            raise row.error(f"the grade of {doc!r} must be a number above 0, not {short(grade)}")
    return grades


def _text(row: Row, name: str) -> str:
    return row.get(name, str) if name in row.fields else ""


def _relevant_from(row: Row) -> float:
    value = row.fields.get("relevant_from", 1.0)
    if not (is_finite(value) and value > 0):
        raise row.error(f"the field 'relevant_from' must be a number above 0, not {short(value)}")
    return value


def _notes(row: Row) -> dict[str, int]:
    notes = row.get("notes", dict) if "notes" in row.fields else {}
    for name, count in notes.items():
        if not isinstance(count, int) or isinstance(count, bool):
            raise row.error(f"the note {name!r} must be a whole number, not {json.dumps(count)}")
    return notes
