"""A training run on the loop engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from workbench import loop_measures, model_card, png
from workbench.data.records import digest
from workbench.loop_recipes import LoopRecipe
from workbench.policies.loop import models
from workbench.train_rows import EVALUATION, Tracker
from workbench.train_run import Run

if TYPE_CHECKING:
    from workbench.loop_inputs import Inputs
    from workbench.policies.loop.models import LoopModel


class LoopRun(Run):
    """One run."""

    def __init__(
        self, recipe: LoopRecipe, store: Path, inputs: Inputs, code: str, say: Callable[[str], None]
    ) -> None:  # fmt: skip
        self.recipe, self.inputs = recipe, inputs
        super().__init__(recipe, store, self._lineage(), {"pools": inputs.supplies}, code, say)

    def _lineage(self) -> dict[str, Any]:
        def described(model: LoopModel) -> dict[str, str]:
            return {"version": model.version, "source": model.source}

        found = self.inputs
        return {
            "student": described(self._start()) if found.student else {
                **described(self._start()), "source": f"adapter on {self._base()}"
            },
            "models": {name: described(model) for name, model in sorted(found.models.items())},
            "data": {"name": self.recipe.data.name, **found.data.as_json()},
            "pools": found.pools,
        }  # fmt: skip

    def _base(self) -> str:
        """The role that an adapter student is trained on."""
        roles = {role.name: role for role in self.recipe.config.phases()[0].roles}
        return roles["student"].of

    def _start(self) -> LoopModel:
        """What the student begins as."""
        return self.inputs.student or self.inputs.models[self._base()]

    def check(self) -> None:
        """The engine itself refuses what cannot be trained, before its first step."""

    def fit(self, rows: Tracker) -> dict[str, tuple[Path, str]]:
        """Trains by the loop engine, saves, measures."""
        from workbench.policies.loop.roles import Adapted
        from workbench.policies.loop.run import run_method

        found = self.inputs
        trained: Any = run_method(
            found.student.net if found.student else None, self.recipe.config, found.tables, self.recipe.settings,
            self.folder, models={name: model.net for name, model in found.models.items()}, on_metrics=rows.on_metrics,
        )  # fmt: skip
        net = models.merged(trained) if isinstance(trained, Adapted) else trained
        net = net.cpu().eval()
        config = self._start().config
        version = models.save(net, config, self.model)
        artifacts = {"model": (self.model, version), "model card": (self.model / "README.md", version)}
        if config["kind"] in ("unet2d", "dit2d"):
            artifacts["diffusers"] = self._exported(net)
        self.say("measuring")
        measured, picture = self._measured(net)
        rows.on_metrics(EVALUATION, self.recipe.settings.steps, measured)
        if picture is not None:
            path = self.folder / "samples.png"
            png.write(path, picture)
            artifacts["samples"] = (path, digest("picture", path.read_bytes()))
        return artifacts

    def _exported(self, net: Any) -> tuple[Path, str]:
        """A folder that stock diffusers loads, with the scheduler that samples as the evaluation does."""
        from workbench.policies.diffusion.diffusers_bridge import export

        folder = self.folder / "diffusers"
        export(net, folder, "ode" if net.process == "edm" else self.recipe.evaluation.sampler)
        return folder, digest("folder", *(one.read_bytes() for one in sorted(folder.rglob("*")) if one.is_file()))

    def _measured(self, net: Any) -> tuple[Mapping[str, float], png.Grey | None]:
        found = self.inputs
        others = {name: model.net.cpu().eval() for name, model in found.models.items()}
        if self.recipe.backend == "vision":
            return loop_measures.accuracies({"student": net, **others}, found.data.test), None
        nets = {name: one for name, one in others.items() if name == "teacher"} | {"student": net}
        samples = loop_measures.generator_samples(nets, self.recipe.evaluation, found.data)
        picture = loop_measures.picture(samples) if samples else None
        return loop_measures.distances(samples, found.data.test["x0"]), picture

    def card(self, version: str, con: duckdb.DuckDBPyConnection) -> str:
        """With what was measured at the end."""
        rows = con.execute(
            "SELECT name, value FROM metrics WHERE run_id = ? AND phase = ?", [self.run_id, EVALUATION]
        ).fetchall()  # fmt: skip
        return model_card.loop_card(
            self.run_id, self.resolved, self.lineage, self.code, self.packages, version, dict(rows)
        )  # fmt: skip
