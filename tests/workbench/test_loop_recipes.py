"""Recipes of the loop engine: what is wrong is named with its place, and reading them imports no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml", reason="the train extra is not installed")

from loop_recipes_made import FLOW, LABELS, PAIRS

from workbench.errors import InputError
from workbench.loop_recipes import LoopRecipe, NewNetwork
from workbench.policies.loop.models import MlpSizes
from workbench.policies.loop.settings import LoopSettings
from workbench.recipes import parse, read

OUT = {"output": "out"}


@pytest.mark.parametrize(
    ("given", "change", "message"),
    [
        (FLOW, {"setings": {}}, r"Unknown key 'setings'; did you mean 'settings'\?"),
        (FLOW, {"tasks": {}}, r"Unknown key 'tasks'; there are method, config, "),
        (FLOW, {"settings": {"step": 1}}, r"Unknown key 'settings\.step'; did you mean 'steps'\?"),
        (FLOW, {"settings": {"max_completion_tokens": 1}}, r"Unknown key 'settings\.max_completion_tokens'"),
        (FLOW, {"settings": {"optimizer": "lion"}}, r"settings\.optimizer: input should be 'adamw' or 'sgd'"),
        (FLOW, {"config": {"drops": 0.1}}, r"Unknown key 'config\.drops'; did you mean 'drop'\?"),
        (FLOW, {"config": {"drop": 2.0}}, r"config: drop is a share of the rows"),
        (FLOW, {"student": None}, r"The recipe has no 'student'\."),
        (FLOW, {"student": {"new": {"hidden": 8}}}, r"student\.new must name a kind of network \(mlp, dit, unet2d"),
        (FLOW, {"student": {"new": {"kind": "unet"}}}, r"student\.new\.kind: there is no network 'unet'"),
        (FLOW, {"student": {"new": {"kind": "vit"}}}, r"student\.new\.kind: 'vit' is no network for diffusion; .*dit"),
        (FLOW, {"student": {"new": {"kind": "mlp", "hiden": 8}}}, r"Unknown key 'student\.new\.hiden'; .*'hidden'"),
        (FLOW, {"student": {"new": {"kind": "mlp", "hidden": 0}}}, r"student\.new: hidden must be 1 or more, not 0"),
        (FLOW, {"settings": {"betas": [0.9, 1.0]}}, r"settings: betas must be in \[0, 1\), not \[0\.9, 1\.0\]"),
        (FLOW, {"settings": {"weight_decay": -1}}, r"settings: The setting weight_decay must be 0 or more, not -1"),
        (FLOW, {"student": {"new": {"kind": "mlp", "schedule": "vp"}}}, r"student\.new\.schedule: input should be"),
        (FLOW, {"student": {"new": {"kind": "mlp"}, "folder": "x"}}, r"student: A network is .*exactly one"),
        (FLOW, {"student": {"fodler": "x"}}, r"Unknown key 'student\.fodler'; did you mean 'folder'\?"),
        (FLOW, {"student": {"copy": "teacher"}}, r"student\.copy: only the student copies, one of models \(none\)"),
        (FLOW, {"student": {"oracle": "gauss8"}}, r"student: an oracle is a diffusion teacher"),
        (FLOW, {"data": None}, r"The recipe has no 'data'\. Name one of gauss8, checkerboard, digits"),
        (FLOW, {"data": {"name": "cifar"}}, r"data\.name: there are gauss8, checkerboard, digits, file for diffusion"),
        (FLOW, {"data": {"name": "digits", "labels": 3}}, r"Unknown key 'data\.labels'; there are name, seed, num"),
        (FLOW, {"data": {"name": "gauss8", "clases": 2}}, r"Unknown key 'data\.clases'; did you mean 'classes'\?"),
        (FLOW, {"data": {"name": "gauss8", "num": 0}}, r"data\.num must be 1 or more"),
        (FLOW, {"data": {"name": "gauss8", "classes": 9}}, r"classes 0 to 8, not 0\.0, 9"),
        (FLOW, {"evaluation": {"start": 0.5, "sampler": "ode"}}, r"evaluation: start must be in"),
        (FLOW, {"evaluation": {"student_steps": [0]}}, r"evaluation: .*numbers of steps 1 or more"),
        (PAIRS, {"pools": {"pairs": {"steps": 0}}}, r"pools\.pairs: num and steps must be 1 or more"),
        (PAIRS, {"pools": {"pairs": {"solver": "rk4"}}}, r"pools\.pairs\.solver: input should be 'euler'"),
        (PAIRS, {"pools": {"pairs": {"teacher": "t"}}}, r"pools\.pairs\.teacher: the recipe has no model 't'"),
        (PAIRS, {"pools": 3}, r"pools must name tables of pairs"),
        (PAIRS, {"models": {"teacher": {"copy": "student"}}}, r"models\.teacher\.copy: only the student copies"),
        (LABELS, {"pools": {"pairs": {}}}, r"pools are of diffusion methods, and supervised is of vision"),
        (LABELS, {"evaluation": {"num": 3}}, r"evaluation are of diffusion methods"),
        (LABELS, {"data": {"name": "gauss8"}}, r"data\.name: there are digits, shapes, file for vision"),
        (LABELS, {"data": {"name": "digits", "noise": 1.0}}, r"data: noise must be in \[0, 1\)"),
        (LABELS, {"student": {"new": {"kind": "mlp"}}}, r"'mlp' is no network for vision; there are resnet, vit"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(given: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse({**OUT, **given, **change})


def test_a_student_that_is_an_adapter_is_not_given() -> None:
    teacher = {"models": {"teacher": "t"}, "data": {"name": "digits"}, "method": "lora-guidance", **OUT}
    assert parse(teacher).student is None
    with pytest.raises(InputError, match="is an adapter on another model: leave out `student`"):
        parse({**teacher, "student": "x"})


def test_what_is_left_out_has_the_defaults_and_the_resolved_recipe_is_complete() -> None:
    recipe = parse({**OUT, **FLOW, "settings": {}})
    assert isinstance(recipe, LoopRecipe)
    assert recipe.settings == LoopSettings()
    assert recipe.student is not None
    assert recipe.student.new == NewNetwork(kind="mlp", sizes=MlpSizes(hidden=16, depth=2), seed=3)
    resolved = recipe.as_json()
    assert set(resolved) == set(LoopRecipe.__slots__)
    assert resolved["student"]["new"]["sizes"]["prediction"] == "flow"
    assert resolved["config"] == {"drop": 0.1}
    assert resolved["output"] == str(Path("out").absolute())


def test_overrides_reach_any_depth(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "{method: slimflow, student: {copy: teacher}, models: {teacher: {recipe: t.yaml}}, data: {name: gauss8}, "
        "output: o}\n"
    )
    recipe = read(tmp_path / "r.yaml", ["settings.steps=3", "data.num=7", "pools.pairs.num=5", "config.warmup=0"])
    assert isinstance(recipe, LoopRecipe)
    assert (recipe.settings.steps, recipe.data.num, recipe.pools["pairs"].num, recipe.config.warmup) == (3, 7, 5, 0)
    assert recipe.models["teacher"].recipe == str(tmp_path / "t.yaml")
    with pytest.raises(InputError, match="did you mean 'num'"):
        read(tmp_path / "r.yaml", ["data.nun=7"])


def test_reading_a_recipe_imports_no_torch() -> None:
    code = f"""
import sys
from workbench.recipes import parse
for given in {[{**OUT, **one} for one in (FLOW, PAIRS, LABELS)]!r}:
    parse(given)
print([name for name in ("torch", "transformers", "accelerate") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
