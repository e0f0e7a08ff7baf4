"""Recipes: what is wrong is named with its place, what is right is complete, and nothing heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml", reason="the train extra is not installed")

from workbench.errors import InputError, NotFound
from workbench.policies.catalog import METHODS
from workbench.policies.lm.settings import Settings
from workbench.recipes import ModelSource, NewModel, Recipe, parse, read

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
GIVEN: dict[str, Any] = {"method": "gkd", "student": {"new": {}}, "output": "out", "tasks": {"set": "gsm8k"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"setings": {}}, r"Unknown key 'setings'; did you mean 'settings'\?"),
        ({"settings": {"step": 1}}, r"Unknown key 'settings\.step'; did you mean 'steps'\?"),
        ({"config": {"divergance": "jsd"}}, r"Unknown key 'config\.divergance'; did you mean 'divergence'\?"),
        ({"student": {"new": {"hiden": 8}}}, r"Unknown key 'student\.new\.hiden'; did you mean 'hidden'\?"),
        ({"environment": {"name": "rooms", "sizes": 3}}, r"Unknown key 'environment\.sizes'; did you mean 'size'\?"),
        ({"settings": {"zzz": 1}}, r"Unknown key 'settings\.zzz'; there are steps, batch_size"),
        ({"settings": {"steps": "ten"}}, r"settings\.steps: input should be a valid integer, not 'ten'"),
        ({"settings": {"steps": True}}, r"settings\.steps: input should be a valid integer, not True"),
        ({"settings": {"steps": 0}}, r"settings: The setting steps must be 1 or more, not 0"),
        ({"settings": {"learning_rate": -1e-3}}, r"settings: The learning rate must be above 0, not -0\.001"),
        ({"settings": {"learning_rate": float("nan")}}, r"settings: The learning rate must be above 0, not nan"),
        ({"settings": {"schedule": "cosinus"}}, r"settings\.schedule: input should be 'constant', .* not 'cosinus'"),
        ({"settings": {"warmup_steps": -1}}, r"settings: The setting warmup_steps must be 0 or more, not -1"),
        ({"settings": {"seed": -1}}, r"settings: The setting seed must be 0 or more, not -1"),
        ({"settings": {"lora_rank": -1}}, r"settings: The setting lora_rank must be 0 or more, not -1"),
        ({"rollouts": {"temperature": float("inf")}}, r"rollouts: temperature and prior must be 0 or more"),
        ({"settings": [1]}, r"settings must hold keys and values, not \[1\]"),
        ({"config": {"divergence": "kl"}}, r"config\.divergence: input should be 'forward_kl', .* not 'kl'"),
        ({"method": "paced", "config": {"stages": ["reverse_kl", "x"]}}, r"config\.stages\.1: input should be"),
        ({"method": "soda", "config": {"beta": 0}}, r"config: SODA needs beta > 0"),
        ({"tasks": {"set": "gsm8k", "limit": 0}}, r"tasks: limit must be 1 or more"),
        ({"rollouts": {"noise": 2.0}}, r"rollouts: .*noise in \[0, 1\]"),
        ({"student": {"new": {}, "folder": "x"}}, r"student: A model is a folder, .*exactly one"),
        ({"models": ["x"]}, r"models must name a model for each role"),
        ({"models": {"teacher": 3}}, r"models\.teacher must hold keys and values, not 3"),
        ({"models": {"techer": "x"}}, r"models\.techer: the method asks nobody of that name; did you mean 'teacher'\?"),
        ({"environment": {"size": 3}}, r"environment must have a name"),
        ({"environment": "chess"}, r"there is no environment 'chess'; there are rooms"),
        ({"environment": {"name": "rooms", "size": "big"}}, r"environment\.size: input should be a valid integer"),
        ({"keep_rollouts": "yes"}, r"keep_rollouts: input should be a valid boolean, not 'yes'"),
        ({"tasks": {}}, r"names no tasks"),
        ({"tasks": {"bench": "gsm8"}}, r"tasks\.bench: there is no bench 'gsm8'; did you mean 'gsm8k'\?"),
        ({"tasks": {"bench": "rooms", "set": "x"}}, r"tasks: set \(x\) and bench \(rooms\)"),
        ({"tasks": {"bench": "rooms"}, "environment": "rooms"}, r"leave out `environment`"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse({**GIVEN, **change})


@pytest.mark.parametrize("name", ["method", "student", "output"])
def test_what_is_missing_is_named(name: str) -> None:
    with pytest.raises(InputError, match=f"The recipe has no '{name}'"):
        parse({key: value for key, value in GIVEN.items() if key != name})


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(NotFound, match="did you mean 'taid'"):
        parse({**GIVEN, "method": "tiad"})


def test_what_is_left_out_has_the_defaults_and_the_resolved_recipe_is_complete() -> None:
    recipe = parse(GIVEN)
    assert recipe.settings == Settings()
    assert recipe.student == ModelSource(new=NewModel())
    resolved = recipe.as_json()
    assert resolved["config"]["divergence"] == "reverse_kl"
    assert set(resolved) == set(Recipe.__slots__)
    assert resolved["output"] == str(Path("out").absolute())
    rooms = parse({**GIVEN, "environment": "rooms"}).as_json()["environment"]
    assert rooms == {"name": "rooms", "options": {"size": 6, "seed": 0, "max_turns": 12}}


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001"])
def test_numbers_mean_what_people_mean(tmp_path: Path, text: str) -> None:
    """YAML 1.1 takes 1e-4 for a text."""
    (tmp_path / "r.yaml").write_text("{method: taid, student: x, output: o, tasks: {set: s}}\n")
    assert read(tmp_path / "r.yaml", [f"settings.learning_rate={text}"]).settings.learning_rate == 1e-4


def test_overrides_reach_any_depth_and_are_checked_like_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("{method: paced, student: {new: {seed: 1}}, models: {teacher: t}, output: o, tasks: {set: s}}\n")
    recipe = read(
        path, ["student.new.seed=7", "config.stages=[reverse_kl]", "tasks.limit=5", "models.teacher={new: {}}"]
    )
    assert recipe.student.new == NewModel(seed=7)
    assert recipe.config.stages == ("reverse_kl",)
    assert recipe.tasks.limit == 5
    assert recipe.models["teacher"].new == NewModel()
    for override, message in {
        "settings.stepz=1": r"did you mean 'steps'",
        "settings.steps=x": r"settings\.steps: input should be a valid integer",
        "settings.steps": r"An override is KEY=VALUE",
        "=3": r"An override is KEY=VALUE",
        "models.teacher.folder=x": r"'teacher' is 't' in the recipe",
        "settings.steps=[": r"is no YAML",
    }.items():
        with pytest.raises(InputError, match=message):
            read(path, [override])


def test_files_that_are_no_recipes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read(path)
    for text, message in {"[1, 2]": "must hold keys and values", "a: [": "is no YAML", "": "must hold keys"}.items():
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read(path)


def test_yaml_never_makes_objects(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("method: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(InputError, match="is no YAML"):
        read(path)


def test_recipes_are_found_beside_the_one_that_names_them(tmp_path: Path) -> None:
    recipe = parse({**GIVEN, "models": {"teacher": {"recipe": "t.yaml"}}}, tmp_path)
    assert recipe.models["teacher"].recipe == str(tmp_path / "t.yaml")


def test_every_method_has_a_recipe_and_every_recipe_is_valid() -> None:
    found = {path: read(path) for path in RECIPES}
    assert {recipe.method for recipe in found.values()} == set(METHODS)
    for recipe in found.values():
        for source in filter(None, (recipe.student, *recipe.models.values())):
            assert source.recipe is None or Path(source.recipe).is_file()


def test_reading_a_recipe_imports_no_torch() -> None:
    code = f"""
import sys
from workbench.recipes import parse
parse({GIVEN!r})
print([name for name in ("torch", "transformers", "trl", "datasets") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
