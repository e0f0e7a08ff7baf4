"""The Python API: what the command line, the MCP server and the demo are thin layers over."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.data.store import Store, default_path
from workbench.memory.types import Distiller

if TYPE_CHECKING:
    from workbench.data.ingest import Report
    from workbench.evals.recall_run import Progress
    from workbench.memory.distill import DistillReport
    from workbench.memory.recall import Filters, Hit

#: More than this is left to `distill`: a question should be answered soon.
MAX_VECTORS_MADE_BY_RECALL = 2000
MAX_DISTILLED_BY_RECALL = 200

StorePath = str | os.PathLike[str] | None


def ingest(
    paths: Iterable[str | os.PathLike[str]],
    store: StorePath = None,
    *,
    format: str | None = None,
    progress: Callable[[str, Report], None] | None = None,
) -> Report:
    """Reads agent logs into the store; doing it twice adds nothing.

    Args:
        paths: files, folders, zips, or "-" for standard input.
        store: path of the store; None = $WORKBENCH_STORE or the default.
        format: an importer's name; None = detected from the content.
        progress: called with each source's path and the report so far.

    Raises: InputError for a path that does not exist or cannot be read, and an unknown format; StoreError.
    """
    from workbench.data import importers, sources, spool
    from workbench.data.ingest import ingest as run
    from workbench.memory.index import on_change

    path, given = Path(store) if store is not None else default_path(), [os.fspath(p) for p in paths]
    sources.check(given, path)  # before Store: what cannot be meant makes no empty store
    if format is not None:
        importers.importer(format)
    with Store(path) as opened:
        spool.absorb(opened, on_change)
        return run(opened, given, format=format, on_change=on_change, progress=progress)


def distill(
    store: StorePath = None,
    distiller: Callable[[Store], Distiller] | None = None,
    *,
    limit: int | None = None,
    embedder: str | None = None,
    progress: Callable[[DistillReport], None] | None = None,
) -> DistillReport:
    """Makes memories of all exchanges that have none by this distiller.

    Args:
        distiller: makes it from the open store (an LLM's answers are cached there); None = the built-in extractive one.
        limit: at most this many exchanges; None = all.
        embedder: whose vectors are made of what has none yet (memory.vectors.CHOICES); None = as before, at first lsa.
        progress: called with the report so far after each commit.

    Raises: StoreError; EndpointError when a model server can do no request at all.
    """
    from workbench.data import spool
    from workbench.memory import vectors
    from workbench.memory.distill import distill as run
    from workbench.memory.index import on_change, on_memories

    if distiller is None:
        from workbench.memory.distillers.extractive import Extractive

        distiller = lambda _: Extractive()  # noqa: E731
    path = Path(store) if store is not None else default_path()
    with Store(path, create=bool(spool.waiting(path))) as opened:  # a mistyped path is no new store
        spool.absorb(opened, on_change)
        report = run(opened, distiller(opened), on_memories=on_memories, limit=limit, progress=progress)
        report.vectors_added = vectors.update(opened, embedder)
        return report


def recall(
    query: str,
    store: StorePath = None,
    *,
    mode: str = "hybrid",
    layer: str = "both",
    k: int = 10,
    filters: Filters | None = None,
    **options: Any,
) -> list[Hit]:
    """The exchanges that fit a query best; see workbench.memory.recall.Query for the options.

    Notes that wait in the spool, and a few vectors that are missing, are taken in first if no other process writes.
    """
    from workbench.memory import vectors
    from workbench.memory.recall import Query
    from workbench.memory.recall import recall as run

    wanted = Query(query, mode=mode, layer=layer, k=k, filters=filters, **options)
    absorb_if_free(store)
    with Store(store, read_only=True) as opened:
        opened.con.execute("SET threads = 1")  # one short query: more threads cost CPU and save no time
        missing = vectors.num_missing(opened.con) if mode != "keyword" else 0
        if not 0 < missing <= MAX_VECTORS_MADE_BY_RECALL:
            return run(opened, wanted)
    _write_if_free(store, lambda opened: vectors.update(opened, learn=False))
    with Store(store, read_only=True) as opened:
        return run(opened, wanted)


def calibrate(store: StorePath = None) -> dict[str, Any]:
    """Searches the fusion weights that find best what this store itself says should be found, and keeps them.

    Returns: weights, whether they were accepted, the number of queries, and MRR on the half of the queries that the
        search did not see, before and after. Nothing changes with too few queries or without a gain.
    """
    from workbench.memory import calibrate as calibration
    from workbench.memory.arms import Arms
    from workbench.memory.recall import DEFAULT_WEIGHTS, Query, find, main_distiller

    with Store(store, create=False) as opened:
        arms, distiller = Arms(opened, warm=True), main_distiller(opened.con)

        def search(text: str) -> dict[str, Any]:
            found = find(arms, Query(text), distiller)
            return {**found, **arms.priors(found, text)} if found else {}

        result = calibration.calibrate(opened.con, search, DEFAULT_WEIGHTS["both"])
        with opened.transaction() as con:
            calibration.save(con, result)
        return result.as_json()


def evaluate_recall(
    tasks: Sequence[str],
    store: StorePath = None,
    *,
    report: str | os.PathLike[str] | None = None,
    timeout_seconds: float = 60.0,
    retry: bool = False,
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Runs retrievers over recall tasks, keeps every answer in the store, and compares them.

    What the store has already is not asked again; an interrupted evaluation goes on where it stopped.

    Args:
        tasks: names in workbench.evals.tasks.TASKS, or task files.
        report: where to write the HTML report; None = nowhere.
        timeout_seconds: for one query.
        retry: ask again what failed before.
        progress: called after each commit.
        options: as of workbench.evals.recall_request.Request (split, grids, peers, retrievers, k, budget, baseline,
            times).

    Returns: {"command", "times", "tasks": one summary each, "asked", "stored": answers got now and found in the store}.
    Raises: InputError, MissingExtra, StoreError.
    """
    from workbench.errors import InputError
    from workbench.evals.recall_html import html
    from workbench.evals.recall_report import Options, section
    from workbench.evals.recall_request import Request
    from workbench.evals.recall_run import run

    request = Request(tasks=tasks, **options)
    if report is not None and not Path(report).absolute().parent.is_dir():
        raise InputError(f"The folder of {os.fspath(report)} does not exist; make it, or name another file.")
    if report is not None and Path(report).is_dir():
        raise InputError(f"{os.fspath(report)} is a folder; name a file for the report.")
    retrievers, loaded = request.load_retrievers(), request.load_tasks()
    chosen = Options(request.split, request.k, request.command(), request.budget, request.baseline, times=request.times)
    sections, asked, stored = [], 0, 0
    for task in loaded:
        outcome = run(
            store, task, retrievers, split=request.split, k=request.k, timeout_seconds=timeout_seconds, retry=retry,
            progress=progress,
        )  # fmt: skip
        sections.append(section(store, task, outcome, chosen))
        asked, stored = asked + outcome.num_asked, stored + outcome.num_stored
    if report is not None:
        partial = Path(f"{os.fspath(report)}.partial")
        try:
            partial.write_bytes(html(sections, chosen).encode("utf-8", "replace"))
            partial.replace(report)
        except OSError as e:
            raise InputError(f"The report cannot be written to {os.fspath(report)} ({e.strerror or e}).") from e
    summaries = [section.summary for section in sections]
    return {"command": chosen.command, "times": chosen.times, "tasks": summaries, "asked": asked, "stored": stored}


def show(id: str, store: StorePath = None, *, neighbours: int = 1) -> dict[str, Any]:
    """The verbatim source behind an id, with its neighbours."""
    from workbench.memory.show import show as run

    with Store(store, read_only=True) as opened:
        return run(opened.con, id, neighbours)


def remember(
    text: str, store: StorePath = None, *, project: str | None = None, files: Sequence[str] = (), agent: str = "note"
) -> str:
    """Notes something worth remembering; durable when it returns, and never waits for the store's lock.

    Returns: the id of the conversation that the note becomes; the same text for the same project is stored once.
    Raises: InputError for empty text.
    """
    import time

    from workbench.data import spool
    from workbench.data.records import Conversation, Message, Part, conversation_id, digest
    from workbench.errors import InputError

    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # a shell may hand in any bytes
    if not text.strip():
        raise InputError("There is nothing to remember: the text is empty.")
    path = Path(store) if store is not None else default_path()
    if path.is_dir():  # nobody would ever take the note in
        raise InputError(f"{path} is a folder; a store is a file.")
    session_id = "note-" + digest(text, project or "")
    parts = [Part("text", text), *(Part("file", name=name, data={"path": name}) for name in files)]
    note = Conversation(session_id, agent=agent, project=project)
    message = Message(session_id, "user", parts, "note", created_at=int(time.time() * 1e6))
    spool.append(path, [note, message])
    absorb_if_free(path)
    return conversation_id("workbench_log", session_id)


def absorb_if_free(store: StorePath = None) -> None:
    """Takes in what waits in the spool, unless another process has the store; then that one will."""
    from workbench.data import spool

    path = Path(store) if store is not None else default_path()
    if not spool.waiting(path):
        return
    from workbench.memory import vectors
    from workbench.memory.distill import distill as run
    from workbench.memory.distillers.extractive import Extractive
    from workbench.memory.index import on_change, on_memories
    from workbench.memory.recall import main_distiller

    def take_in(opened: Store) -> None:
        spool.absorb(opened, on_change)
        if main_distiller(opened.con) == Extractive.name:  # a store that has memories gets them of the notes at once
            run(opened, Extractive(), on_memories=on_memories, limit=MAX_DISTILLED_BY_RECALL)
        if vectors.current_model(opened.con):
            vectors.update(opened, learn=False)

    _write_if_free(path, take_in)


_writing = threading.Lock()  # DuckDB lets two threads of a process write, and then fails one of them


def _write_if_free(store: StorePath, work: Callable[[Store], object]) -> None:
    """Does the work in the store if neither another thread nor another process has it."""
    from workbench.errors import StoreError

    if not _writing.acquire(blocking=False):
        return
    try:
        with Store(store, wait_seconds=0.2) as opened:
            work(opened)
    except StoreError:  # busy: the other does it; anything else is said by whoever opens the store for itself
        return
    finally:
        _writing.release()


def stats(store: StorePath = None) -> dict[str, Any]:
    """What the store holds."""
    from workbench.data import spool
    from workbench.data.stats import stats as run

    with Store(store, read_only=True) as opened:
        return {**run(opened), "waiting_in_spool": len(spool.waiting(opened.path))}
