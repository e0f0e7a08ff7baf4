"""Trains a student as a recipe says: makes what the method needs and the store lacks, runs, and keeps the lineage.

    from workbench.recipes import read
    from workbench.train import train
    result = train(read("recipes/gkd.yaml"))

A run is known by the digest of its resolved recipe, its data, its models and the code. The same call on a run that is
done returns it; on one that was interrupted or killed it goes on from the last checkpoint.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from workbench import model_card, recipes, train_rows
from workbench.data.store import default_path
from workbench.errors import InputError, MissingExtra
from workbench.loop_recipes import LoopRecipe
from workbench.policies.versions import folder_version
from workbench.recipes import ModelSource, Recipe, ServedSource
from workbench.train_run import Run, RunResult, code_version, quiet

if TYPE_CHECKING:
    from workbench.policies.lm.local_models import LocalModel
    from workbench.policies.lm.remote_models import RemoteModel
    from workbench.train_data import Data


def train(
    recipe: Recipe | LoopRecipe, store: str | os.PathLike[str] | None = None, *,
    say: Callable[[str], None] = lambda _: None,
) -> RunResult:  # fmt: skip
    """Trains what the recipe describes, or returns the run if it is done.

    Args: store: path; None = $WORKBENCH_STORE or the default; say: told in one line what is going on.

    Raises: InputError, NotFound, TrainingError, MissingExtra, StoreError; `policies.running.Interrupted` after Ctrl-C:
        the run is saved, and the same call goes on.
    """
    started = time.monotonic()
    _check_one_process()
    path = Path(store) if store is not None else default_path()
    if isinstance(recipe, LoopRecipe):
        result = _loop_run(recipe, path, say).result()
    else:
        _check_has_trl()
        with quiet():
            result = _prepared(recipe, path, say).result()
    return replace(result, seconds=time.monotonic() - started)


def _loop_run(recipe: LoopRecipe, store: Path, say: Callable[[str], None]) -> Run:
    try:
        import accelerate  # noqa: F401
        import peft  # noqa: F401
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(f"Training needs the package {error.name!r}", "train") from error
    from workbench.loop_inputs import Gatherer
    from workbench.loop_run import LoopRun

    inputs = Gatherer(recipe, store, lambda other: _trained(other, store, say), say).gather()
    return LoopRun(recipe, store, inputs, code_version(), say)


def _trained(recipe: str, store: Path, say: Callable[[str], None]) -> str:
    """The folder of another recipe's model, which is trained if need be."""
    say(f"first {Path(recipe).name}")
    return str(train(recipes.read(recipe), store, say=say).model)


def _prepared(recipe: Recipe, store: Path, say: Callable[[str], None]) -> _LmRun:
    """The run with its models loaded, and what it reads in the store."""
    from workbench.policies.lm.engine import asked_roles
    from workbench.train_data import Gatherer, choose_judge, choose_tasks

    judge = choose_judge(recipe)
    student = _model(recipe.student, recipe, judge.environment, store, say)
    asked, models = asked_roles(recipe.config.phases()), {}
    with ExitStack() as connections:  # to servers, which are asked nothing after this
        for name, source in recipe.models.items():
            if source.served:
                models[name] = _served(source.served, student)
                connections.callback(models[name].endpoint.close)
                if name in asked:
                    _ = models[name].model  # says why that cannot be, before anything is written
            else:
                models[name] = _model(source, recipe, judge.environment, store, say)
        data = Gatherer(recipe, store, student, models, judge, say).gather(choose_tasks(recipe, judge, store))
    return _LmRun(recipe, store, student, models, judge.environment, data, say)


def _check_one_process() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "`workbench train` runs in one process, because one process writes the store. For several, call run_method "
            "of workbench.policies.lm.run or workbench.policies.loop.run in a script of your own under `accelerate "
            "launch`."
        )


def _check_has_trl() -> None:
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
    folder = _trained(source.recipe, store, say) if source.recipe else source.folder
    say(f"loading {folder}")
    # the student's own weights stay in float32 under bf16: updates of a small learning rate vanish in bfloat16
    is_student = source is recipe.student
    dtype = "bfloat16" if recipe.settings.bf16 and not is_student else "float32"
    return local_models.load(folder or "", dtype=dtype, device=device)


def _served(source: ServedSource, student: LocalModel) -> RemoteModel:
    from workbench.policies.lm.remote_models import remote

    return remote(
        source.url, source.model, student.tokenizer, tokenizer=source.tokenizer, api_key_env=source.api_key_env,
        version=source.version,
    )  # fmt: skip


class _LmRun(Run):
    """A run on TRL."""

    def __init__(
        self, recipe: Recipe, store: Path, student: LocalModel, models: Mapping[str, LocalModel | RemoteModel],
        environment: Any, data: Data, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.recipe, self.student, self.models, self.environment, self.data = recipe, student, models, environment, data
        supplies = {
            "rollouts": [supply.as_json() for supply in data.supplies],
            "scores": [scores.as_json() for scores in data.scores],
        }
        super().__init__(recipe, store, self._lineage(), supplies, code_version(), say)

    def _lineage(self) -> dict[str, Any]:
        def described(model: LocalModel | RemoteModel) -> dict[str, str]:
            return {"version": model.version, "vocabulary": model.tokens, "source": model.source}

        from workbench.train_data import set_name

        choice, tasks = self.recipe.tasks, self.data.tasks
        names = ("policy", "num", "tasks", "digest", "versions")
        scored = ("teacher", "policy", "version", "k", "context", "num")
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
            "scores": [{name: s.as_json()[name] for name in scored} for s in self.data.scores],
        }

    def tracker(self) -> train_rows.Tracker:
        """One that also keeps rollouts."""
        versions = {name: model.version for name, model in self.models.items()}
        writer = train_rows.Writer(self.student, versions, self.recipe.settings.temperature)
        return train_rows.Tracker(self.store, self.run_id, self.say, writer)

    def fit(self, rows: train_rows.Tracker) -> dict[str, tuple[Path, str]]:
        """Trains by TRL."""
        import torch

        from workbench.policies.lm.run import run_method

        torch.manual_seed(self.recipe.settings.seed)  # adapters begin with random weights
        trained = run_method(
            self.student.model, self.student.tokenizer, self.recipe.config, self.data.tasks, self.recipe.settings,
            self.folder, models=self._asked(), stored=self.data.stored, environment=self.environment,
            keep=rows.keep if self.recipe.keep_rollouts else None, on_metrics=rows.on_metrics,
        )  # fmt: skip
        return self._save(trained)

    def check(self) -> None:
        """A dry run of every phase."""
        from workbench.policies.lm import preflight

        self.say("checks before training")
        preflight.check(
            preflight.Job(
                self.student.model, self.student.tokenizer, self.recipe.config, self.data.tasks, self.recipe.settings,
                self._asked(), {name: model.tokenizer for name, model in self.models.items()}, self.data.stored,
                self.environment,
            )
        )  # fmt: skip

    def _asked(self) -> dict[str, Any]:
        """The models that the method's phases ask; the others are not even read."""
        from workbench.policies.lm.engine import asked_roles

        asked = asked_roles(self.recipe.config.phases())
        return {name: model.model for name, model in self.models.items() if name in asked}

    def _save(self, trained: Any) -> dict[str, tuple[Path, str]]:
        whole = trained.merge_and_unload() if hasattr(trained, "merge_and_unload") else trained
        unfinished = self.folder / "model.part"
        for folder in (unfinished, self.model):
            shutil.rmtree(folder, ignore_errors=True)
        whole.save_pretrained(unfinished)
        self.student.tokenizer.save_pretrained(unfinished)
        unfinished.rename(self.model)
        version = folder_version(self.model)
        return {"model": (self.model, version), "model card": (self.model / "README.md", version)}

    def card(self, version: str, con: duckdb.DuckDBPyConnection) -> str:
        """With the evaluations that the store has by now."""
        evaluations = model_card.evaluations_of(con, self.run_id, version)
        return model_card.card(
            self.run_id, self.resolved, self.lineage, self.code, self.packages, version, evaluations
        )  # fmt: skip
