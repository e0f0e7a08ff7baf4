"""Small recipes for the tests of `workbench train` on the loop engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workbench.loop_recipes import LoopRecipe
from workbench.recipes import parse

#: A teacher's own training.
FLOW: dict[str, Any] = {
    "method": "flow-matching",
    "student": {"new": {"kind": "mlp", "hidden": 16, "depth": 2, "seed": 3}},
    "data": {"name": "gauss8", "num": 256},
    "settings": {"steps": 4, "batch_size": 32, "log_every": 1, "cpu": True},
    "evaluation": {"num": 64, "student_steps": [1], "sampler": "ode"},
}
#: Two phases on a pool of pairs.
PAIRS: dict[str, Any] = {
    **FLOW,
    "method": "slimflow",
    "config": {"guidance": 0.0},
    "models": {"teacher": {"new": {"kind": "mlp", "hidden": 16, "depth": 2, "seed": 4}}},
    "pools": {"pairs": {"num": 100, "steps": 2, "solver": "euler"}},
    "evaluation": {"num": 64, "student_steps": [1, 2], "teacher_steps": [1, 2]},
}
LABELS: dict[str, Any] = {
    "method": "supervised",
    "student": {"new": {"kind": "mlp-classifier", "width": 32}},
    "data": {"name": "digits"},
    "settings": {"steps": 60, "batch_size": 64, "learning_rate": 3e-3, "cpu": True},
}


def loop_recipe(folder: Path, given: dict[str, Any], **changes: Any) -> LoopRecipe:
    settings = {**given["settings"], **changes.pop("settings", {})}
    made = parse({"output": str(folder / "out"), **given, **changes, "settings": settings}, folder)
    assert isinstance(made, LoopRecipe)
    return made
