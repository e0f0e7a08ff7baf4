"""What a recall task is: documents, queries, graded relevance, and a fingerprint of all of it.

A task is one file with a function `load(…) -> RecallTask` and a line in `workbench.evals.tasks`. A query is searched
among the documents of its own scope (a conversation, a repository). Nothing here knows a retriever.

Verified by: tests/evals/test_tasks.py.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from workbench.errors import InputError

SPLITS = ("all", "tune", "report")
Split = Literal["all", "tune", "report"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Document:
    """What can be found.

    Args:
        id: unique in the task.
        user, assistant: its words by role; where roles mean nothing, everything is in `user`.
        scope: the corpus it belongs to; a query sees its own scope only.
        previous: id of the document before it in the same thread.
        time: ISO 8601, or as the source writes it; "" if unknown.
        files: paths that it changed, where the source records them.
    """

    id: str
    user: str
    assistant: str = ""
    scope: str = ""
    previous: str | None = None
    time: str = ""
    files: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """All its words."""
        return "\n".join(part for part in (self.user, self.assistant) if part)


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked, and what should be found.

    Args:
        id: unique in the task, and the same whatever the order of the file: the split hangs on it.
        relevance: document id -> grade > 0; a document without a grade has 0.
        scope: as in Document.
        category: for tables per category; "" if there is none.
        cluster: queries of one cluster are not independent (one conversation, one session); "" = its own.
        answer: what should be answered, for graders; "" if the task has no answers.
    """

    id: str
    text: str
    relevance: Mapping[str, float]
    scope: str = ""
    category: str = ""
    cluster: str = ""
    answer: str = ""


@dataclass(frozen=True, slots=True)
class RecallTask:
    """Documents, queries and their relevance; checked when it is made.

    Args:
        name, version: the version changes when the same files would give other data.
        documents: neighbours in a thread are in order.
        relevant_from: binary metrics call a document relevant from this grade on.
        licence: of the data.
        notes: counts of what was left out or repaired on the way, for the report.
    Raises: InputError for a query or document that contradicts itself or the others.
    """

    name: str
    version: str
    documents: tuple[Document, ...]
    queries: tuple[Query, ...]
    relevant_from: float = 1.0
    licence: str = ""
    notes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        scopes: dict[str, str] = {}
        for document in self.documents:
            if document.id in scopes:
                raise InputError(f"Task {self.name}: document id {document.id!r} comes twice.")
            if document.previous is not None and scopes.get(document.previous) != document.scope:
                raise InputError(
                    f"Task {self.name}: document {document.id!r} follows {document.previous!r}, which does not stand "
                    "before it in the same scope."
                )
            scopes[document.id] = document.scope
        seen: set[str] = set()
        known = set(scopes.values())
        for query in self.queries:
            problem = "its id comes twice" if query.id in seen else _problem(query, scopes, known)
            if problem:
                raise InputError(f"Task {self.name}: query {query.id!r}: {problem}.")
            seen.add(query.id)
        if not self.queries:
            raise InputError(f"Task {self.name} has no query.")

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that a score depends on; does not change with the order of the queries."""
        queries = sorted((asdict(query) for query in self.queries), key=lambda query: query["id"])
        head = [self.name, self.version, self.relevant_from]
        content = json.dumps([head, [asdict(document) for document in self.documents], queries], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def split(self, part: Split) -> tuple[Query, ...]:
        """The queries of one part: tune on one half, report the other; which half hangs on the query's id alone."""
        if part not in SPLITS:
            raise InputError(f"The split must be one of {', '.join(SPLITS)}, not {part!r}.")
        return tuple(query for query in self.queries if part in ("all", split_of(query.id)))

    def scopes(self) -> dict[str, list[Document]]:
        """The documents of each scope, in order."""
        found: dict[str, list[Document]] = {}
        for document in self.documents:
            found.setdefault(document.scope, []).append(document)
        return found


def _problem(query: Query, scopes: Mapping[str, str], known: Set[str]) -> str:
    if not query.text.strip():
        return "its text is empty"
    for doc, grade in query.relevance.items():
        if not (math.isfinite(grade) and grade > 0):
            return f"the grade of {doc!r} is {grade}; grades are above 0, leave out what is not relevant"
        if scopes.get(doc) != query.scope:
            where = "does not exist" if doc not in scopes else f"is in scope {scopes[doc]!r}, not {query.scope!r}"
            return f"its relevant document {doc!r} {where}"
    return "" if query.scope in known else f"its scope {query.scope!r} holds no document"


def split_of(query_id: str) -> Literal["tune", "report"]:
    """The half that a query belongs to: the first bit of the SHA-256 of its id."""
    return "tune" if hashlib.sha256(query_id.encode("utf-8", "surrogatepass")).digest()[0] < 128 else "report"


def judgements(queries: Iterable[Query]) -> dict[str, Mapping[str, float]]:
    """Relevance by query, as `metrics.evaluate` takes it."""
    return {query.id: query.relevance for query in queries}


# --- checks with known scores -----------------------------------------------------------------------------------------


def oracle_run(queries: Iterable[Query]) -> dict[str, list[tuple[str, float]]]:
    """The run of a retriever that knows the answers: nDCG, MRR and R-precision are 1."""
    return {query.id: list(query.relevance.items()) for query in queries}


def random_run(task: RecallTask, queries: Iterable[Query], seed: int = 0) -> dict[str, list[tuple[str, float]]]:
    """A random order of each query's scope: expected recall@k is k / documents of the scope."""
    ids = {scope: [document.id for document in documents] for scope, documents in task.scopes().items()}
    run = {}
    for query in queries:
        order = random.Random(f"{seed}/{query.id}").sample(ids[query.scope], len(ids[query.scope]))
        run[query.id] = [(doc, -float(at)) for at, doc in enumerate(order)]
    return run


# --- reading files ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """A JSON object and where it stands; `get` names that place if a field is missing or of another type."""

    where: str
    fields: Mapping[str, Any]

    def get(self, name: str, kind: type[T]) -> T:
        """The field, of this type; raises InputError otherwise."""
        if name not in self.fields:
            raise self.error(f"the field {name!r} is missing; there are {', '.join(sorted(self.fields)) or 'none'}")
        value = self.fields[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(f"the field {name!r} must be {_KINDS.get(kind, kind.__name__)}, not {short(value)}")
        return value

    def words(self, name: str) -> str:
        """The field, a text that is not blank."""
        if not (text := self.get(name, str)).strip():
            raise self.error(f"the field {name!r} is empty")
        return text

    def new_id(self, name: str, seen: set[str]) -> str:
        """The field, an id that is not among `seen`, where it is added."""
        if (new := self.words(name)) in seen:
            raise self.error(f"the {name} {new!r} comes twice")
        seen.add(new)
        return new

    def texts(self, name: str) -> list[str]:
        """The field, a list of strings."""
        for at, item in enumerate(values := self.get(name, list)):
            if not isinstance(item, str):
                raise self.error(f"item {at} of the field {name!r} must be a text, not {short(item)}")
        return values

    def error(self, problem: str) -> InputError:
        """What is wrong, and where."""
        return InputError(f"{self.where}: {problem}.")


_KINDS: dict[type, str] = {str: "a text", list: "a list", dict: "an object", int: "a whole number"}


def short(value: object) -> str:
    """As JSON, cut to what a message can hold."""
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"


def shared_data(name: str) -> Path:
    """A file among the evaluation data: in the folder WORKBENCH_SHARED_DATA, else in ../shared/data.

    Raises: InputError if it is not there.
    """
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("WORKBENCH_SHARED_DATA") or beside)
    if not (folder / name).is_file():
        raise InputError(
            f"There is no {name} in {folder}. Set WORKBENCH_SHARED_DATA to the folder with the evaluation data, or "
            "give the file's path."
        )
    return folder / name


def read_jsonl(path: Path) -> Iterator[Row]:
    """The objects of a JSON-lines file, blank lines left out; `.gz` is unpacked.

    Raises: InputError that names file and line for what is no JSON object, and for a file that cannot be read.
    """
    line = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line, raw in enumerate(file, 1):
                if raw.strip():
                    yield _row(f"{path}, line {line}", raw)
    except (OSError, EOFError, zlib.error) as e:
        raise InputError(f"{path}: cannot be read after line {line} ({e}).") from e


def read_json(path: Path, kind: type) -> Any:
    """The value of a JSON file, of this type; raises InputError that names the line otherwise."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e}).") from e
    except json.JSONDecodeError as e:
        raise InputError(f"{path}, line {e.lineno}: not valid JSON ({e.msg}, column {e.colno}).") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 at byte {e.start}.") from e
    except (RecursionError, ValueError) as e:  # nested too deep, or a number of thousands of digits
        raise InputError(f"{path}: cannot be read as JSON ({e}).") from e
    if not isinstance(value, kind):
        raise InputError(f"{path}: must hold {_KINDS.get(kind, kind.__name__)}, not {short(value)}.")
    return value


def _row(where: str, raw: bytes) -> Row:
    try:
        value = json.loads(raw)
    except json.JSONDecodeError as e:
        raise InputError(f"{where}: not valid JSON ({e.msg}, column {e.colno}).") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{where}: not UTF-8 at byte {e.start}.") from e
    except (RecursionError, ValueError) as e:  # nested too deep, or a number of thousands of digits
        raise InputError(f"{where}: cannot be read as JSON ({e}).") from e
    return row_of(where, value)


def is_finite(value: object) -> bool:
    """Whether it is a number that a float can hold; JSON has others."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def row_of(where: str, value: object) -> Row:
    """A value that must be a JSON object, and where it stands; raises InputError if it is none."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be an object, not {short(value)}.")
    return Row(where, value)
