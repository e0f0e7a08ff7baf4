"""Trains a student as a recipe says: makes what the method needs and the store lacks, runs, and keeps the lineage.

    from workbench.recipes import read
    from workbench.train import train
    result = train(read("recipes/rooms-on-policy.yaml"))

A run is known by the digest of its resolved recipe, its data, its models and the code. The same call on a run that is
done returns it; on one that was interrupted or killed it goes on from the last checkpoint.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import workbench
from workbench import model_card, recipes, train_rows
from workbench.data.records import digest
from workbench.data.store import Store, default_path
from workbench.errors import InputError, MissingExtra
from workbench.recipes import ModelSource, Recipe

if TYPE_CHECKING:
    from workbench.policies.lm.local_models import LocalModel
    from workbench.train_data import Data

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "numpy")
#: What decides a result: a change of one of these files makes another run.
_CODE = (
    "kernels",
    "policies",
    "evals/environments",
    "evals/benches",
    "evals/verifiers.py",
    "train.py",
    "train_data.py",
    "recipes.py",
)


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run.

    Args: folder: of the run; model: of the trained model; version: digest of its weights; was_done: it was done before
        this call, and nothing was trained; rollouts: of each policy, how many were found in the store and how many were
        made; other_code: runs, with their status, that are the same but for the code's version, and so were neither
        taken nor continued; metrics: the last value of each.
    """

    run_id: str
    method: str
    folder: Path
    model: Path
    version: str
    was_done: bool
    rollouts: list[dict[str, Any]]
    other_code: list[str]
    metrics: dict[str, float]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """All fields by name."""
        found = {name: getattr(self, name) for name in self.__slots__}
        return found | {"folder": str(self.folder), "model": str(self.model)}


def train(
    recipe: Recipe, store: str | os.PathLike[str] | None = None, *, say: Callable[[str], None] = lambda _: None
) -> RunResult:
    """Trains what the recipe describes, or returns the run if it is done.

    Args: store: path; None = $WORKBENCH_STORE or the default; say: told in one line what is going on.

    Raises: InputError, NotFound, TrainingError, MissingExtra, StoreError; `policies.lm.run.Interrupted` after Ctrl-C:
        the run is saved, and the same call goes on.
    """
    started = time.monotonic()
    _check_can_train()
    path = Path(store) if store is not None else default_path()
    with _quiet():
        run = _prepared(recipe, path, say)
        with run.locked():
            metrics = None if run.is_done() else run.carry_out()
            version = run.refresh_card()
    return RunResult(
        run.run_id, recipe.method, run.folder, run.model, version, metrics is None,
        [supply.as_json() for supply in run.data.supplies], run.by_other_code(), metrics or {},
        time.monotonic() - started,
    )  # fmt: skip


def _prepared(recipe: Recipe, store: Path, say: Callable[[str], None]) -> _Run:
    """The run with its models loaded, and what it reads in the store."""
    from workbench.train_data import Gatherer, choose_judge, choose_tasks

    judge = choose_judge(recipe)
    models = {
        name: _model(source, recipe, judge.environment, store, say)
        for name, source in {"student": recipe.student, **recipe.models}.items()
    }
    student = models.pop("student")
    data = Gatherer(recipe, store, student, models, judge, say).gather(choose_tasks(recipe, judge, store))
    return _Run(recipe, store, student, models, judge.environment, data, say)


def _check_can_train() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "`workbench train` runs in one process, because one process writes the store. For several, call "
            "workbench.policies.lm.run.run_method in a script of your own under `accelerate launch`."
        )
    try:
        from workbench.policies.lm.local_models import stay_offline

        stay_offline()  # before trl is imported
        import trl  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(f"Training needs the package {error.name!r}", "train") from error


def _model(
    source: ModelSource, recipe: Recipe, environment: Any, store: Path, say: Callable[[str], None]
) -> LocalModel:
    import torch

    from workbench.policies.lm import local_models

    device = "cuda" if torch.cuda.is_available() and not recipe.settings.cpu else "cpu"
    if source.new:
        if not hasattr(environment, "words"):
            raise InputError("A new model is made over an environment's words: name an environment, or a model folder.")
        new = source.new
        return local_models.make(
            environment.words(), hidden=new.hidden, layers=new.layers, seed=new.seed, device=device
        )
    folder = source.folder
    if source.recipe:
        say(f"first {Path(source.recipe).name}")
        folder = str(train(recipes.read(source.recipe), store, say=say).model)
    say(f"loading {folder}")
    # the student's own weights stay in float32 under bf16: updates of a small learning rate vanish in bfloat16
    is_student = source is recipe.student
    dtype = "bfloat16" if recipe.settings.bf16 and not is_student else "float32"
    return local_models.load(folder or "", dtype=dtype, device=device)


class _Run:
    """One run, from its id to its model card."""

    def __init__(
        self, recipe: Recipe, store: Path, student: LocalModel, models: Mapping[str, LocalModel], environment: Any,
        data: Data, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.recipe, self.store, self.student, self.models = recipe, store, student, models
        self.environment, self.data, self.say = environment, data, say
        self.resolved = recipe.as_json()
        self.lineage = self._lineage()
        self.code, self.packages = code_version(), package_versions()
        self.run_id = digest(
            "run", *(json.dumps(one, sort_keys=True) for one in (self.resolved, self.lineage)), self.code
        )
        self.folder = Path(recipe.output) / self.run_id
        self.model = self.folder / "model"

    def _lineage(self) -> dict[str, Any]:
        def described(model: LocalModel) -> dict[str, str]:
            return {"version": model.version, "vocabulary": model.tokens, "source": model.source}

        from workbench.train_data import set_name

        choice, tasks = self.recipe.tasks, self.data.tasks
        names = ("policy", "num", "tasks", "digest", "versions")
        return {
            "student": described(self.student),
            "models": {name: described(model) for name, model in sorted(self.models.items())},
            "tasks": {
                "set": set_name(self.recipe),
                "split": choice.split,
                "count": len(tasks),
                "digest": self.data.tasks_digest(),
            },
            "rollouts": [{name: s.as_json()[name] for name in names} for s in self.data.supplies],
        }

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Two processes in one run folder would mix their checkpoints."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(f"Another process is training this run in {self.folder}. Wait for it.") from error
            yield

    def is_done(self) -> bool:
        """Whether the store says so, and the model is there."""
        with Store(self.store, read_only=True) as opened:
            found = train_rows.find(opened.con, self.run_id)
        return bool(found and found["status"] == "done" and (self.model / "config.json").exists())

    def by_other_code(self) -> list[str]:
        """The same runs by another version of the code."""
        with Store(self.store, read_only=True) as opened:
            return train_rows.by_other_code(opened.con, self.resolved, self.lineage, self.run_id)

    def carry_out(self) -> dict[str, float]:
        """Checks, trains and saves; the run's row says how it ended. Returns the last value of each metric."""
        import torch

        from workbench.policies.lm.run import run_method

        self._check()
        versions = {name: model.version for name, model in self.models.items()}
        temperature = self.recipe.settings.temperature
        rows = train_rows.Tracker(self.store, self.run_id, self.say, self.student, versions, temperature)
        rows.begin(self.recipe.method, self.resolved, self.lineage, self.code, self.packages, self.folder)
        try:
            torch.manual_seed(self.recipe.settings.seed)  # adapters begin with random weights
            trained = run_method(
                self.student.model, self.student.tokenizer, self.recipe.config, self.data.tasks, self.recipe.settings,
                self.folder, models={name: model.model for name, model in self.models.items()}, stored=self.data.stored,
                environment=self.environment, keep=rows.keep if self.recipe.keep_rollouts else None,
                on_metrics=rows.on_metrics,
            )  # fmt: skip
            artifacts = self._save(trained)
        except KeyboardInterrupt:
            rows.end("interrupted")
            raise
        except Exception as error:
            rows.end("failed", f"{type(error).__name__}: {error}")
            raise
        rows.end("done", artifacts=artifacts)
        return rows.last

    def _check(self) -> None:
        from workbench.policies.lm import preflight

        self.say("checks before training")
        preflight.check(
            preflight.Job(
                self.student.model, self.student.tokenizer, self.recipe.config, self.data.tasks, self.recipe.settings,
                {name: model.model for name, model in self.models.items()},
                {name: model.tokenizer for name, model in self.models.items()}, self.data.stored, self.environment,
            )
        )  # fmt: skip

    def _save(self, trained: Any) -> dict[str, tuple[Path, str]]:
        from workbench.policies.lm.local_models import folder_version

        whole = trained.merge_and_unload() if hasattr(trained, "merge_and_unload") else trained
        unfinished = self.folder / "model.part"
        for folder in (unfinished, self.model):
            shutil.rmtree(folder, ignore_errors=True)
        whole.save_pretrained(unfinished)
        self.student.tokenizer.save_pretrained(unfinished)
        unfinished.rename(self.model)
        version = folder_version(self.model)
        return {"model": (self.model, version), "model card": (self.model / "README.md", version)}

    def refresh_card(self) -> str:
        """Writes the model card with the evaluations that the store has by now; returns the model's version."""
        from workbench.policies.lm.local_models import folder_version

        version = folder_version(self.model)
        with Store(self.store, read_only=True) as opened:
            evaluations = model_card.evaluations_of(opened.con, self.run_id, version)
        text = model_card.card(self.run_id, self.resolved, self.lineage, self.code, self.packages, version, evaluations)
        (self.model / "README.md").write_text(text, "utf-8")
        return version


@contextmanager
def _quiet() -> Iterator[None]:
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
