"""What a recall evaluation is asked to do: names in, tasks and retrievers out, and the command that asks the same.

Verified by: tests/evals/test_recall_request.py.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from workbench.data.records import digest
from workbench.errors import InputError, WorkbenchError
from workbench.evals.recall_grid import grid
from workbench.evals.retriever import Index, Retriever
from workbench.evals.tasks import load_task
from workbench.evals.tasks.base import SPLITS, Document, RecallTask, Split

_PROTOCOL = "workbench/evals/retriever.py"


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Options of an evaluation.

    Args:
        tasks: names, or paths of JSON-lines task files.
        split: tune, report or all.
        grids: of our configurations; names in recall_grid.GRIDS.
        peers: names in evals.peers.PEERS; "all" stands for those that need no model folder.
        retrievers: FILE.py:NAME of a user's own.
        k: hits to ask for.
        budget: tokens that a list may return; None = no limit.
        baseline: a configuration's name; None = the best that returns verbatim text, by each metric.
        times: with what clocks say in the report.
    Raises: InputError for what cannot be meant.
    """

    tasks: Sequence[str]
    split: Split = "report"
    grids: Sequence[str] = ("default",)
    peers: Sequence[str] = ()
    retrievers: Sequence[str] = ()
    k: int = 100
    budget: int | None = None
    baseline: str | None = None
    times: bool = True

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InputError("Name a task (--task); `workbench eval tasks` lists them.")
        if self.split not in SPLITS:
            raise InputError(f"The split must be one of {', '.join(SPLITS)}, not {self.split!r}.")
        if self.k < 1:
            raise InputError(f"k must be 1 or more, not {self.k}.")
        if self.budget is not None and self.budget < 1:
            raise InputError(f"The budget is a number of tokens from 1 on, not {self.budget}.")

    def command(self) -> str:
        """The command line that asks for the same; without where it writes, which changes nothing."""
        words = ["workbench", "eval", "recall"]
        for option, values in (
            ("--task", self.tasks), ("--grid", self.grids), ("--peer", self.peers), ("--retriever", self.retrievers),
        ):  # fmt: skip
            for value in values:
                words += [option, value]
        words += ["--split", self.split, "-k", str(self.k)]
        words += ["--budget", str(self.budget)] if self.budget is not None else []
        words += ["--baseline", self.baseline] if self.baseline is not None else []
        words += [] if self.times else ["--no-times"]
        return shlex.join(words)

    def load_tasks(self) -> list[RecallTask]:
        """The tasks in order; raises InputError for an unknown name, a broken file, or two tasks of one name."""
        found: dict[str, RecallTask] = {}
        for name in self.tasks:
            task = _load_task(name)
            if task.name in found:
                raise InputError(f"Two tasks are called {task.name!r}.")
            found[task.name] = task
        return list(found.values())

    def load_retrievers(self) -> list[Retriever]:
        """Configurations, then peers, then the user's own.

        Raises: InputError also if the named baseline is none of them.
        """
        from workbench.evals.ours import Corpora, OurRecall
        from workbench.evals.peers import NEEDS_FOLDER, PEERS, load_peer

        corpora = Corpora()
        found: list[Retriever] = [OurRecall(configuration, corpora) for configuration in grid(*self.grids)]
        for name in self.peers:
            names = [peer for peer in PEERS if peer not in NEEDS_FOLDER] if name == "all" else [name]
            found += [load_peer(peer) for peer in names]
        found += [load_retriever(name) for name in self.retrievers]
        names = [retriever.name for retriever in found]
        if self.baseline is not None and self.baseline not in names:
            raise InputError(f"The baseline {self.baseline!r} is none of {', '.join(names)}.")
        return found


def _load_task(name: str) -> RecallTask:
    if name.endswith((".jsonl", ".jsonl.gz")):
        return import_module("workbench.evals.tasks.task_file").load(Path(name))
    return load_task(name)


class UserRetriever:
    """A user's retriever; its fingerprint also holds the content of its file, so that an edit is another run."""

    def __init__(self, retriever: Retriever, path: Path) -> None:
        self._retriever, self._path = retriever, path
        self.name = retriever.name

    def fingerprint(self) -> str:
        """Of the retriever and of its file; raises InputError if the retriever gives no text."""
        content = hashlib.sha256(self._path.read_bytes()).hexdigest()
        try:
            own: Any = self._retriever.fingerprint()
        except WorkbenchError:
            raise
        except Exception as e:
            raise InputError(f"The fingerprint of {self.name} in {self._path} failed ({_told(e)}).") from e
        if not isinstance(own, str):
            raise InputError(f"The fingerprint of {self.name} in {self._path} must be a text, not {own!r}.")
        return digest("user", own, content)

    def build(self, documents: Sequence[Document], folder: Path) -> Index:
        """As the user's; raises InputError for an index that lacks a method."""
        index = self._retriever.build(documents, folder)
        if missing := [part for part in ("search", "returned", "num_bytes", "close") if not hasattr(index, part)]:
            raise InputError(f"The index that it built has no {', '.join(missing)}; see {_PROTOCOL}.")
        return index


def load_retriever(place: str) -> Retriever:
    """The retriever at FILE.py:NAME; NAME is an object with name, fingerprint and build, or makes one when called.

    Raises: InputError that says what is missing.
    """
    file, colon, name = place.rpartition(":")
    path = Path(file)
    if not colon or path.suffix != ".py" or not name.isidentifier():
        raise InputError(f"A retriever is named FILE.py:NAME, not {place!r}.")
    if not path.is_file():
        raise InputError(f"There is no file {path} (in --retriever {place}).")
    found: Any = getattr(_module(path), name, None)
    if found is None:
        raise InputError(f"{path} has no {name} (in --retriever {place}).")
    if isinstance(found, type) or not hasattr(found, "build"):
        if not callable(found):
            raise InputError(f"{name} in {path} is neither a retriever nor a function that makes one.")
        try:
            found = found()
        except WorkbenchError:
            raise
        except Exception as e:
            raise InputError(f"{name} in {path} could not be called without arguments ({_told(e)}).") from e
    if missing := [part for part in ("name", "fingerprint", "build") if not hasattr(found, part)]:
        raise InputError(f"{name} in {path} has no {', '.join(missing)}; see {_PROTOCOL}.")
    if not isinstance(found.name, str) or not found.name.strip():
        raise InputError(f"The name of {name} in {path} must be a text, not {found.name!r}.")
    return UserRetriever(found, path)


def _module(path: Path) -> Any:
    key = f"workbench_user_{digest(str(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except WorkbenchError:
        raise
    except Exception as e:
        raise InputError(f"{path} could not be imported ({_told(e)}).") from e
    return module


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
