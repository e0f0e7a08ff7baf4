"""What training runs of all engines share: the id, the lock, the rows in the store, the done-check, the model card.

An engine's run says what it is made of (recipe and lineage), trains and saves a model, and writes its card's text.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import platform
import shutil
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import duckdb

import workbench
from workbench import train_rows
from workbench.data.records import digest
from workbench.data.store import Store
from workbench.errors import InputError, StoreFull, is_interrupt
from workbench.loop_recipes import LoopRecipe
from workbench.policies.versions import folder_version
from workbench.recipes import Recipe
from workbench.train_rows import Tracker

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "numpy")
#: With less free space than this, what failed has failed for want of it.
_FULL_BYTES = 1 << 16
#: What decides a result: a change of one of these files makes another run.
_CODE = (
    "kernels",
    "policies",
    "evals/environments",
    "evals/benches",
    "evals/generation.py",
    "evals/verifiers.py",
    "train.py",
    "train_data.py",
    "train_run.py",
    "train_scores.py",
    "recipes.py",
    "recipe_values.py",
    "loop_inputs.py",
    "loop_measures.py",
    "loop_recipes.py",
    "loop_run.py",
)


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run.

    Args: folder: of the run; model: of the trained model; version: digest of its weights; was_done: it was done before
        this call, and nothing was trained; rollouts: of each policy, how many were found in the store and how many were
        made; scores: the same of each teacher's; pools: the same of each table of pairs; other_code: runs, with their
        status, that are the same but for the code's version, and so were neither taken nor continued; metrics: the last
        value of each.
    """

    run_id: str
    method: str
    folder: Path
    model: Path
    version: str
    was_done: bool
    other_code: list[str]
    metrics: dict[str, float]
    seconds: float
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    pools: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """All fields by name."""
        found = {name: getattr(self, name) for name in self.__slots__}
        return found | {"folder": str(self.folder), "model": str(self.model)}


class Run(ABC):
    """One run, from its id to its model card.

    Args: lineage: digests of the models and data; supplies: what the store gave and what was made for it, by the
        field of `RunResult`; code: version of the code.
    """

    def __init__(
        self, recipe: Recipe | LoopRecipe, store: Path, lineage: Mapping[str, Any],
        supplies: Mapping[str, list[dict[str, Any]]], code: str, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.store, self.lineage, self.supplies, self.say = store, lineage, supplies, say
        self.method, self.resolved = recipe.method, recipe.as_json()
        self.code, self.packages = code, package_versions()
        self.run_id = digest("run", *(json.dumps(one, sort_keys=True) for one in (self.resolved, lineage)), code)
        self.folder = Path(recipe.output) / self.run_id
        self.model = self.folder / "model"

    # -- what engines differ in ----------------------------------------------------------------------------------------

    @abstractmethod
    def check(self) -> None:
        """Raises before anything is trained, where that can be known."""

    @abstractmethod
    def fit(self, rows: Tracker) -> dict[str, tuple[Path, str]]:
        """Trains and saves into `model`; returns artifacts: kind -> (path, digest)."""

    @abstractmethod
    def card(self, version: str, con: duckdb.DuckDBPyConnection) -> str:
        """Text of the model card. Args: version: digest of the trained weights; con: of the store."""

    def tracker(self) -> Tracker:
        """Writes the run's rows."""
        return Tracker(self.store, self.run_id, self.say)

    # -- what they share -----------------------------------------------------------------------------------------------

    def result(self) -> RunResult:
        """Carries the run out unless it is done, and brings its card up to date."""
        started = time.monotonic()
        with self._locked():
            was_done = self._is_done()
            if not was_done:
                self._carry_out()
            version = folder_version(self.model)
            with Store(self.store, read_only=True) as opened:
                text = self.card(version, opened.con)
                others = train_rows.by_other_code(opened.con, self.resolved, self.lineage, self.run_id)
                metrics = train_rows.last_metrics(opened.con, self.run_id)
            (self.model / "README.md").write_text(text, "utf-8")
        return RunResult(
            self.run_id, self.method, self.folder, self.model, version, was_done, others, metrics,
            time.monotonic() - started, **self.supplies,
        )  # fmt: skip

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Two processes in one run folder would mix their checkpoints."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise InputError(
                f"The run's folder {self.folder} cannot be written ({error.strerror}). Name another `output`."
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(f"Another process is training this run in {self.folder}. Wait for it.") from error
            yield

    def _is_done(self) -> bool:
        """Whether the store says so, and the model is there."""
        with Store(self.store, read_only=True) as opened:
            found = train_rows.find(opened.con, self.run_id)
        return bool(found and found["status"] == "done" and (self.model / "config.json").exists())

    def _carry_out(self) -> None:
        """Checks, trains and saves; the run's row says how it ended."""
        self.check()
        rows = self.tracker()
        rows.begin(self.method, self.resolved, self.lineage, self.code, self.packages, self.folder)
        try:
            artifacts = self.fit(rows)
        except (KeyboardInterrupt, Exception) as error:
            if is_interrupt(error):
                rows.end("interrupted")
            else:
                rows.end("failed", f"{type(error).__name__}: {error}")
                if shutil.disk_usage(self.folder).free < _FULL_BYTES:  # libraries say it in words of their own
                    raise StoreFull(
                        f"The disk that holds {self.folder} is full. Free some space and run the command again: it "
                        "goes on from the last checkpoint."
                    ) from error
            raise
        rows.end("done", artifacts=artifacts)


@cache
def code_version() -> str:
    """The workbench's version, and a digest of the source files that decide what a run does."""
    return f"{workbench.__version__}+{digest('code', *(path.read_bytes() for path in code_files()))}"


def code_files() -> list[Path]:
    """The source files that `code_version` looks at, sorted."""
    home = Path(workbench.__file__).parent
    return sorted(path for name in _CODE for path in ([home / name] if "." in name else (home / name).rglob("*.py")))


def package_versions() -> dict[str, str]:
    """Python's and the packages' that training uses."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers' own, and not its complaint about a name that TRL still uses."""
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            yield
    finally:
        if was_shown:
            logging.enable_progress_bar()
