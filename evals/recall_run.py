"""Runs retrievers over a recall task: asks what the store does not have yet, and stores every answer.

A run is one retriever on one split of one task; its id is a digest of everything that an answer depends on, so that an
answer is taken from the store only if nothing of that changed (evals.md P1). Ctrl-C or a kill loses what was not
committed (at most COMMIT_RESULTS answers or COMMIT_SECONDS of work); the same call goes on from there. A query that
fails is stored with its status and reason, never as an empty answer (P5).

Verified by: tests/evals/test_recall_run.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import duckdb

from workbench.data.columns import Kind, insert_rows, registered
from workbench.data.records import digest
from workbench.data.store import Store
from workbench.errors import InputError, MissingExtra, is_interrupt
from workbench.evals.metrics import rank
from workbench.evals.ours import installed
from workbench.evals.retriever import Index, Retriever
from workbench.evals.tasks.base import Document, Query, RecallTask, Split
from workbench.memory.tokens import count_tokens

StorePath = str | os.PathLike[str] | None
COMMIT_RESULTS = 256
COMMIT_SECONDS = 2.0
#: What a report names with its version, where it is installed.
PACKAGES = ("duckdb", "numpy", "snowballstemmer", "bm25s", "rank-bm25", "sentence-transformers", "torch", "mem0ai")


@dataclass(slots=True)
class Outcome:
    """What a call did.

    Args:
        run_ids: retriever name -> run, in the order given.
        skipped: retriever name -> why it could not run at all (a library that is missing); nothing is stored of it.
        num_asked, num_stored: queries asked now, and answers that were in the store already.
    """

    run_ids: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    num_asked: int = 0
    num_stored: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a call is: `done` of `total` answers are stored, `failed` of those asked now failed."""

    task: str
    done: int
    total: int
    failed: int
    doing: str


@dataclass(frozen=True, slots=True)
class _Answer:
    run_id: str
    query_id: str
    status: str
    error: str | None
    hits: list[tuple[str, float]]
    tokens: list[int]
    cpu_ms: float


def run(
    path: StorePath,
    task: RecallTask,
    retrievers: Sequence[Retriever],
    *,
    split: Split = "report",
    k: int = 100,
    timeout_seconds: float = 60.0,
    retry: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Outcome:
    """Brings the answers of every retriever to every query of the split into the store.

    The store is open only while something is read or written: indexes can take minutes to build, and others want it.

    Args:
        path: of the store; None = $WORKBENCH_STORE or the default.
        k: hits to ask for.
        timeout_seconds: of the clock, for one query; only in a process's main thread.
        retry: ask again what failed before.
    Raises: InputError for two retrievers of one name, a split without queries, ids that cannot be stored; StoreError.
    """
    queries = task.split(split)
    _check(task, queries, retrievers, k)
    if not 0 < timeout_seconds < math.inf:
        raise InputError(f"The timeout of a query must be a number of seconds above 0, not {timeout_seconds}.")
    outcome = Outcome()
    runs: dict[str, Retriever] = {}
    fingerprints: dict[str, str] = {}
    for retriever in retrievers:
        try:
            fingerprint = retriever.fingerprint()
        except MissingExtra as e:
            outcome.skipped[retriever.name] = str(e)
            continue
        run_id = digest("eval", task.fingerprint, retriever.name, fingerprint, split, str(k), code_version())
        outcome.run_ids[retriever.name], runs[run_id], fingerprints[run_id] = run_id, retriever, fingerprint
    with Store(path) as store:
        with store.transaction() as con:
            for run_id, retriever in runs.items():
                _register(con, run_id, task, retriever.name, fingerprints[run_id], split, k)
        attempts = _attempts(store.con, list(runs))
    done = {key for key, (_, status) in attempts.items() if status == "ok" or not retry}
    outcome.num_stored = len(done)
    work = _Work(path, k, timeout_seconds, attempts, progress, task.name, len(queries) * len(runs), len(done))
    try:
        for scope, documents in task.scopes().items():
            asked = [query for query in queries if query.scope == scope]
            pending = {r: [q for q in asked if (r, q.id) not in done] for r in runs}
            if chosen := {r: retriever for r, retriever in runs.items() if pending[r]}:
                outcome.skipped |= work.scope(scope, documents, asked, chosen, pending)
    finally:
        work.flush()
    outcome.num_asked = work.num_asked
    outcome.run_ids = {name: r for name, r in outcome.run_ids.items() if name not in outcome.skipped}
    return outcome


def _check(task: RecallTask, queries: Sequence[Query], retrievers: Sequence[Retriever], k: int) -> None:
    if k < 1:
        raise InputError(f"k must be 1 or more, not {k}.")
    if not queries:
        raise InputError(f"Task {task.name} has no query in this split. Choose another one (all).")
    if not retrievers:
        raise InputError("There is nothing to compare: name a grid, a peer or a retriever.")
    seen: set[str] = set()
    for retriever in retrievers:
        if retriever.name in seen:
            raise InputError(f"Two retrievers are called {retriever.name!r}. Give each a name of its own.")
        seen.add(retriever.name)
    for id in (*(query.id for query in queries), *(document.id for document in task.documents)):
        try:
            id.encode()
        except UnicodeEncodeError as e:
            raise InputError(f"Task {task.name}: the id {id!r} holds half of a surrogate pair; rename it.") from e


class _Work:
    """The answers of one call on their way into the store."""

    def __init__(
        self, path: StorePath, k: int, timeout_seconds: float, attempts: dict[tuple[str, str], tuple[int, str]],
        progress: Callable[[Progress], None] | None, task: str, total: int, done: int,
    ) -> None:  # fmt: skip
        self.path, self.k, self.timeout_seconds, self.attempts = path, k, timeout_seconds, attempts
        self.progress, self.task, self.total, self.done = progress, task, total, done
        self.num_asked = self.failed = 0
        self._batch: list[_Answer] = []
        self._builds: list[tuple[str, str, float, int, int]] = []
        self._committed_at = time.monotonic()

    def scope(
        self, scope: str, documents: list[Document], queries: list[Query], runs: dict[str, Retriever],
        pending: dict[str, list[Query]],
    ) -> dict[str, str]:  # fmt: skip
        """Builds the indexes of a scope and asks them; returns the retrievers that lack a library."""
        skipped: dict[str, str] = {}
        known = {document.id for document in documents}
        todo = {run_id: {query.id for query in pending[run_id]} for run_id in runs}
        with tempfile.TemporaryDirectory(prefix="workbench-eval-") as folder:
            indexes: dict[str, Index] = {}
            try:
                for number, (run_id, retriever) in enumerate(runs.items()):
                    self._say(f"indexing {retriever.name}")
                    own = Path(folder) / str(number)
                    own.mkdir()
                    try:
                        # Its own list: what one retriever does to it must not reach the next.
                        indexes[run_id] = self._build(run_id, scope, retriever, list(documents), own)
                    except MissingExtra as e:
                        skipped[retriever.name] = str(e)
                    except Exception as e:  # stored as what it is, for every query of the scope
                        if is_interrupt(e):
                            raise KeyboardInterrupt from e
                        for query in pending[run_id]:
                            self._take(_Answer(run_id, query.id, "error", f"build: {_told(e)}", [], [], 0.0))
                tokens: dict[str, dict[str, int]] = {run_id: {} for run_id in indexes}
                for query in queries:  # all retrievers on one query: configurations of ours share its arms
                    for run_id, index in indexes.items():
                        if query.id in todo[run_id]:
                            self._take(self._ask(run_id, index, query, known, tokens[run_id]))
            finally:
                for index in indexes.values():
                    index.close()
        return skipped

    def _build(self, run_id: str, scope: str, retriever: Retriever, documents: list[Document], folder: Path) -> Index:
        start = time.process_time()
        index = retriever.build(documents, folder)
        seconds = time.process_time() - start
        try:
            # An index that shares work with others tells what it costs by itself, and what it lost (ours do).
            seconds, lost = getattr(index, "build_seconds", seconds), getattr(index, "num_unindexed", 0)
            self._builds.append((run_id, scope, float(seconds), int(index.num_bytes()), lost))
        except BaseException:
            index.close()
            raise
        return index

    def _ask(self, run_id: str, index: Index, query: Query, known: set[str], tokens: dict[str, int]) -> _Answer:
        hits: list[tuple[str, float]] = []
        status, error = "ok", None
        start = time.process_time()
        milliseconds = 0.0
        with _alarm(self.timeout_seconds) as alarm:
            try:
                found = index.search(query.text, self.k)
                milliseconds = (time.process_time() - start) * 1000
                if alarm.rang:  # the retriever caught it, and what it gave then is no answer
                    raise TimeoutError(f"no answer within {self.timeout_seconds:g} s")
                hits = _checked(found, self.k, known)
                for doc, _ in hits:
                    if doc not in tokens:
                        tokens[doc] = count_tokens(index.returned(doc))
            except Exception as e:  # a failure is a result with a status, not an empty list and not the end of the run
                if is_interrupt(e) and not alarm.rang:
                    raise KeyboardInterrupt from e
                hits, error = [], _told(e)
                status = "timeout" if alarm.rang or isinstance(e, TimeoutError) else "error"
                milliseconds = milliseconds or (time.process_time() - start) * 1000
        if status == "ok":
            milliseconds = getattr(index, "query_ms", None) or milliseconds
        return _Answer(run_id, query.id, status, error, hits, [tokens[doc] for doc, _ in hits], milliseconds)

    def _take(self, answer: _Answer) -> None:
        self._batch.append(answer)
        self.num_asked += 1
        self.failed += answer.status != "ok"
        if len(self._batch) >= COMMIT_RESULTS or time.monotonic() - self._committed_at > COMMIT_SECONDS:
            self.flush()
            self._say("asking")

    def _say(self, doing: str) -> None:
        if self.progress:
            self.progress(Progress(self.task, self.done, self.total, self.failed, doing))

    def flush(self) -> None:
        """Commits what has come."""
        batch, self._batch = self._batch, []
        builds, self._builds = self._builds, []
        if batch or builds:
            rows = [
                (
                    a.run_id, a.query_id, self.attempts.get((a.run_id, a.query_id), (0, ""))[0] + 1, a.status, a.error,
                    json.dumps([doc for doc, _ in a.hits]), json.dumps([score for _, score in a.hits]),
                    json.dumps(a.tokens), a.cpu_ms,
                )
                for a in batch
            ]  # fmt: skip
            with (
                Store(self.path) as store,
                store.transaction() as con,
                registered(con, "new_results", _RESULTS, rows),
                registered(con, "new_builds", _BUILDS, builds),
            ):  # another process may have run the same meanwhile: its rows stay
                con.execute(
                    "INSERT INTO eval_results BY NAME SELECT * REPLACE (from_json(docs, '[\"VARCHAR\"]') AS docs, "
                    "from_json(scores, '[\"DOUBLE\"]') AS scores, from_json(tokens, '[\"INTEGER\"]') AS tokens) "
                    "FROM new_results ANTI JOIN eval_results USING (run_id, query_id, attempt)"
                )
                con.execute(
                    "INSERT INTO eval_builds BY NAME SELECT * FROM new_builds ANTI JOIN eval_builds "
                    "USING (run_id, scope)"
                )
            self.done += len(batch)
        self._committed_at = time.monotonic()


def _checked(found: Any, k: int, known: set[str]) -> list[tuple[str, float]]:
    """The hits in the one order that counts; raises InputError for what a retriever must not give back."""
    hits = rank(found)  # raises for documents that come twice and for nan
    for doc, score in hits:
        if doc not in known:
            raise InputError(f"It returned {doc!r}, which is no document of the scope.")
        if math.isinf(score):
            raise InputError(f"The score of document {doc!r} is {score}.")
    if len(hits) > k:
        raise InputError(f"It returned {len(hits)} documents where {k} were asked for.")
    return hits


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].encode("utf-8", "replace").decode()


@dataclass(slots=True)
class _Alarm:
    rang: bool = False


@contextmanager
def _alarm(seconds: float) -> Iterator[_Alarm]:
    """Raises TimeoutError inside the block after so many seconds; never, outside the main thread."""
    alarm = _Alarm()
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield alarm
        return

    def ring(*_: object) -> None:
        alarm.rang = True
        raise TimeoutError(f"no answer within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield alarm
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _register(
    con: duckdb.DuckDBPyConnection, run_id: str, task: RecallTask, name: str, fingerprint: str, split: str, k: int
) -> None:
    if not con.execute("SELECT 1 FROM eval_runs WHERE run_id = ?", [run_id]).fetchall():
        row = (run_id, task.name, task.version, task.fingerprint, name, fingerprint, split, k, code_version(),
               json.dumps(installed(*PACKAGES), sort_keys=True), time.time_ns() // 1000)  # fmt: skip
        insert_rows(con, "eval_runs", _RUNS, [row])


def _attempts(con: duckdb.DuckDBPyConnection, run_ids: list[str]) -> dict[tuple[str, str], tuple[int, str]]:
    """(run, query) -> number and status of the last attempt."""
    rows = con.execute(
        "SELECT run_id, query_id, max(attempt), arg_max(status, attempt) FROM eval_results "
        "WHERE run_id IN (SELECT unnest($1::VARCHAR[])) GROUP BY ALL", [run_ids]
    ).fetchall()  # fmt: skip
    return {(run_id, query): (attempt, status) for run_id, query, attempt, status in rows}


@cache
def code_version() -> str:
    """Digest of our own source that answers depend on."""
    return digest_of_sources(Path(__file__).parents[1])


def digest_of_sources(house: Path) -> str:
    """Of the store, the memory, the adapters and the peers; not of tasks (they have fingerprints) and reports."""
    sources = [*(house / "data").rglob("*.py"), *(house / "data").rglob("*.sql"), *(house / "memory").rglob("*.py")]
    evals = house / "evals"
    sources += [evals / f"{name}.py" for name in ("baseline_distillers", "ours", "recall_grid", "recall_run")]
    sources += (evals / "peers").rglob("*.py")
    found = hashlib.sha256()
    for path in sorted(sources, key=lambda path: path.relative_to(house).as_posix()):
        found.update(path.relative_to(house).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:20]


_RUNS: dict[str, Kind] = {
    "run_id": "valid", "task": "text", "task_version": "text", "task_fingerprint": "valid", "retriever": "text",
    "retriever_fingerprint": "text", "split": "valid", "k": "int", "code_version": "valid", "packages": "text",
    "created_at": "time",
}  # fmt: skip
_RESULTS: dict[str, Kind] = {
    "run_id": "valid", "query_id": "valid", "attempt": "int", "status": "valid", "error": "text", "docs": "valid",
    "scores": "valid", "tokens": "valid", "cpu_ms": "real",
}  # fmt: skip
_BUILDS: dict[str, Kind] = {
    "run_id": "valid", "scope": "text", "cpu_seconds": "real", "index_bytes": "int", "num_unindexed": "int",
}  # fmt: skip
