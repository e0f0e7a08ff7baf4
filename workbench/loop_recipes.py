"""Recipes of methods on the loop engine: diffusion generators and image classifiers. Reading one imports no torch.

    method: dmd2
    config: {gan: 0}
    student: {copy: teacher}        # or a folder, {recipe: other.yaml}, {new: {kind: mlp, hidden: 64}}
    models: {teacher: {recipe: teacher-digits.yaml}}    # or a folder, {new: …}, {oracle: gauss8}
    data: {name: digits}
    pools: {pairs: {teacher: teacher, num: 8192, steps: 50, guidance: 1.0}}     # diffusion, for methods that read pairs
    settings: {steps: 600, batch_size: 256}
    evaluation: {student_steps: [1, 2], teacher_steps: [1, 50]}                 # diffusion
    output: runs/digits-dmd2

A method whose student is an adapter on the teacher takes no `student`. Kinds of networks: `policies.loop.models.KINDS`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from workbench.errors import InputError
from workbench.policies.catalog import method_module
from workbench.policies.diffusion.options import Precision, Solver
from workbench.policies.loop.models import KINDS, Sizes
from workbench.policies.loop.settings import LoopSettings
from workbench.recipe_values import build, check_keys, checked, shared_values

BACKENDS = ("diffusion", "vision")

Oracle = Literal["gauss8", "checkerboard"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NewNetwork:
    """A network with random weights; the shape of an image and the number of classes are the data's."""

    kind: str
    sizes: Sizes
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSource:
    """Where a network comes from: exactly one of the five.

    Args: folder: of a saved network; recipe: path of one whose result is taken (it is trained if need be); copy: name
        of another model of the recipe, of the student only; oracle: an exact mixture, of a diffusion model only.
    """

    folder: str | None = None
    recipe: str | None = None
    new: NewNetwork | None = None
    copy: str | None = None
    oracle: Oracle | None = None

    def __post_init__(self) -> None:
        if sum(one is not None for one in (self.folder, self.recipe, self.new, self.copy, self.oracle)) != 1:
            raise InputError(
                "A network is a folder, {recipe: FILE}, {new: {kind: …}}, {copy: ROLE} or {oracle: NAME}: exactly one."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataChoice:
    """Which data.

    Args:
        name: diffusion: gauss8, checkerboard or digits; vision: digits or shapes; both: file.
        path: of a file, *.npz: for diffusion x0 [N, …] floats of about unit scale, with classes c [N] from 0; for
            vision image and test_image [N, channels, height, width], label and test_label [N].
        seed: of what is drawn, and of digits' split into training and test part (vision).
        num: rows: 16,384 of a toy in the plane, 4,096 shapes, 1,200 digits for vision; digits for diffusion: all, or
            the first so many.
        classes: of gauss8's modes; 0 = none.
        labels: so many of vision's digits, the others are left out; None = all.
        noise: share of the labels of vision's digits that are replaced by a wrong one.
    """

    name: str
    path: str | None = None
    seed: int = 0
    num: int | None = None
    classes: int = 0
    labels: int | None = None
    noise: float = 0.0


#: What each backend's data take beside name, seed and num.
DATA: dict[str, dict[str, tuple[str, ...]]] = {
    "diffusion": {"gauss8": ("classes",), "checkerboard": (), "digits": (), "file": ("path",)},
    "vision": {"digits": ("labels", "noise"), "shapes": (), "file": ("path",)},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolChoice:
    """Pairs of a teacher, made once and kept in the store.

    Args: teacher: name of a model of the recipe; num: pairs; steps: of the solver; guidance: its weight, 1 = none;
        seed: of noise and classes; precision: of what is stored.
    """

    teacher: str = "teacher"
    num: int = 16384
    steps: int = 50
    solver: Solver = "heun"
    guidance: float = 1.0
    seed: int = 0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if min(self.num, self.steps) < 1:
            raise InputError(f"num and steps must be 1 or more, not {self.num} and {self.steps}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationChoice:
    """What is measured when a generator is trained: distances of its samples to the data.

    Args:
        student_steps, teacher_steps: numbers of sampling steps.
        sampler: of the student: "renoise" (x0 is predicted and noised again: consistency models, DMD2, SiD) or "ode"
            (Euler along the flow). The teacher's is always "ode".
        start: of the student's first step, as a fraction of the schedule (SiD's t_init), the teacher's if there is one;
            below 1 with "renoise" only.
        guidance: of the teacher.
        num: samples.
    """

    student_steps: tuple[int, ...] = (1, 2, 4)
    teacher_steps: tuple[int, ...] = (1, 50)
    sampler: Literal["renoise", "ode"] = "renoise"
    start: float = 1.0
    guidance: float = 1.0
    num: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num < 2 or min((*self.student_steps, *self.teacher_steps), default=1) < 1:
            raise InputError("num must be 2 or more and numbers of steps 1 or more.")
        if not 0 < self.start <= 1 or (self.start < 1 and self.sampler == "ode"):
            raise InputError(f"start must be in (0, 1], and 1 for the sampler ode, not {self.start}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopRecipe:
    """A recipe with every setting resolved; args as in the module's example, `output` absolute."""

    method: str
    config: Any
    output: str
    data: DataChoice
    student: NetworkSource | None = None
    models: Mapping[str, NetworkSource] = field(default_factory=dict)
    pools: Mapping[str, PoolChoice] = field(default_factory=dict)
    settings: LoopSettings = field(default_factory=LoopSettings)
    evaluation: EvaluationChoice = field(default_factory=EvaluationChoice)

    @property
    def backend(self) -> str:
        """Of the method."""
        return method_module(self.method).ENTRY.backend

    def as_json(self) -> dict[str, Any]:
        """Every setting by name."""
        return json.loads(json.dumps(asdict(self)))


def parse(given: Mapping[str, Any], folder: Path) -> LoopRecipe:
    """A recipe from plain values; raises InputError with the place of what is wrong."""
    values = shared_values(given, LoopRecipe, LoopSettings, lambda one, place: _network(one, place, folder))
    backend = method_module(values["method"]).ENTRY.backend
    if given.get("data") is None:
        raise InputError(f"The recipe has no 'data'. Name one of {', '.join(DATA[backend])}: data: {{name: …}}.")
    values["data"] = build(DataChoice, given["data"], "data")
    _check_data(values["data"], given["data"], backend)
    for name in ("pools", "evaluation"):
        if backend != "diffusion" and given.get(name):
            raise InputError(f"{name} are of diffusion methods, and {values['method']} is of {backend}: leave it out.")
    pools = given.get("pools") or {}
    if not isinstance(pools, Mapping):
        raise InputError(f"pools must name tables of pairs (pairs: {{num: 8192}}), not {pools!r}.")
    values["pools"] = {str(name): build(PoolChoice, one or {}, f"pools.{name}") for name, one in pools.items()}
    values["evaluation"] = build(EvaluationChoice, given.get("evaluation") or {}, "evaluation")
    recipe = LoopRecipe(**values)
    _check_networks(recipe, backend)
    return recipe


def _check_data(chosen: DataChoice, given: Mapping[str, Any], backend: str) -> None:
    known = DATA[backend]
    if chosen.name not in known:
        raise InputError(f"data.name: there are {', '.join(known)} for {backend}, not {chosen.name!r}.")
    check_keys(given, ["name", "seed", "num", *known[chosen.name]], "data")
    if (chosen.name == "file") != (chosen.path is not None):
        raise InputError("data: a file has a path: {name: file, path: images.npz}.")
    for name in ("num", "labels"):
        if getattr(chosen, name) is not None and getattr(chosen, name) < 1:
            raise InputError(f"data.{name} must be 1 or more, not {getattr(chosen, name)}.")
    if not 0 <= chosen.noise < 1 or chosen.classes not in range(9):
        raise InputError(f"data: noise must be in [0, 1) and classes 0 to 8, not {chosen.noise}, {chosen.classes}.")


def _check_networks(recipe: LoopRecipe, backend: str) -> None:
    phases = recipe.config.phases()
    is_adapter = any(role.name == "student" for role in phases[0].roles)
    if is_adapter == (recipe.student is not None):
        if is_adapter:
            raise InputError(f"The student of {recipe.method} is an adapter on another model: leave out `student`.")
        raise InputError("The recipe has no 'student'.")
    sources = {f"models.{name}": one for name, one in recipe.models.items()}
    for place, source in (sources | ({"student": recipe.student} if recipe.student else {})).items():
        if source.new is not None and KINDS[source.new.kind].backend != backend:
            fitting = ", ".join(kind for kind, one in KINDS.items() if one.backend == backend)
            raise InputError(f"{place}.new.kind: {source.new.kind!r} is no network for {backend}; there are {fitting}.")
        if source.oracle is not None and (backend != "diffusion" or place == "student"):
            raise InputError(f"{place}: an oracle is a diffusion teacher; it has no weights to train.")
        if source.copy is not None and (place != "student" or source.copy not in recipe.models):
            there = ", ".join(recipe.models) or "none"
            raise InputError(f"{place}.copy: only the student copies, one of models ({there}), not {source.copy!r}.")
    for name, pool in recipe.pools.items():
        if pool.teacher not in recipe.models:
            raise InputError(f"pools.{name}.teacher: the recipe has no model {pool.teacher!r}. Add it to models.")


def _network(given: Any, place: str, folder: Path) -> NetworkSource:
    if isinstance(given, str):
        return NetworkSource(folder=given)
    if not isinstance(given, Mapping):
        raise InputError(f"{place} must hold keys and values, not {given!r}.")
    plain = {key: one for key, one in given.items() if key != "new"}
    if given.get("new") is not None:
        plain["new"] = _new(given["new"], f"{place}.new")
        check_keys(given, ("folder", "recipe", "new", "copy", "oracle"), place)
        return _made(plain, place)
    source = build(NetworkSource, plain, place)
    if source.recipe is None:
        return source
    return NetworkSource(recipe=str((folder / Path(source.recipe).expanduser()).absolute()))


def _made(plain: Mapping[str, Any], place: str) -> NetworkSource:
    try:
        return NetworkSource(**plain)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def _new(given: Any, place: str) -> NewNetwork:
    if not isinstance(given, Mapping) or "kind" not in given:
        raise InputError(f"{place} must name a kind of network ({', '.join(KINDS)}), not {given!r}.")
    kind = checked(str, given["kind"], f"{place}.kind")
    if kind not in KINDS:
        raise InputError(f"{place}.kind: there is no network {kind!r}; there are {', '.join(KINDS)}.")
    seed = checked(int, given.get("seed", 0), f"{place}.seed")
    sizes = {key: one for key, one in given.items() if key not in ("kind", "seed")}
    return NewNetwork(kind=kind, sizes=build(KINDS[kind].sizes, sizes, place), seed=seed)
