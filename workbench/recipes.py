"""Recipes: YAML files that say what `workbench train` does. Reading and checking one imports no torch.

    method: gkd                     # a name of `workbench methods list`
    config: {divergence: forward_kl}
    student: runs/start             # a folder, {new: {hidden: 32}} or {recipe: other.yaml}
    models: {teacher: {recipe: rooms-teacher.yaml}}  # or {served: {url: http://127.0.0.1:8000/v1, model: NAME}}
    tasks: {split: train, limit: 60}                # or {set: of the store}, or {bench: gsm8k}
    environment: {name: rooms, seed: 0}
    settings: {steps: 200, batch_size: 32}
    rollouts: {per_task: 1}
    output: runs/rooms-gkd
    keep_rollouts: false

Methods on the loop engine (backends diffusion and vision) have recipes of their own: `workbench.loop_recipes`.

Folders are relative to the current folder, `recipe` to the recipe that names it. Keys that are left out have the
defaults of their dataclass; a key or value that cannot be meant is an InputError that names its place.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from importlib import import_module
from math import inf
from pathlib import Path
from typing import Any, get_type_hints

from workbench import loop_recipes
from workbench.errors import InputError
from workbench.loop_recipes import LoopRecipe
from workbench.policies.catalog import method_module
from workbench.policies.lm.settings import Settings
from workbench.policies.nouns import Phase, Stored, parts
from workbench.recipe_values import build, check_keys, checked, from_yaml, method_of, set_value, shared_values

#: Name -> (module, class) of an environment that brings its own tasks.
ENVIRONMENTS = {"rooms": ("workbench.evals.environments.rooms", "Rooms")}


@dataclass(frozen=True, kw_only=True, slots=True)
class NewModel:
    """A Llama with random weights over an environment's words."""

    hidden: int = 32
    layers: int = 2
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedSource:
    """A model behind a server that speaks OpenAI's API.

    Args:
        url: up to and with /v1; model: the server's name for it.
        tokenizer: folder of the model's tokenizer; None = its text alone is used, cut by the student's.
        api_key_env: name of the environment variable that holds the key.
        version: what its rollouts and scores are kept under; None = the name. Other weights need another.
    """

    url: str
    model: str
    tokenizer: str | None = None
    api_key_env: str | None = None
    version: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """Where a model comes from: exactly one of the four.

    Args: folder: of safetensors and a tokenizer; recipe: path of one whose result is taken (it is trained if need be).
    """

    folder: str | None = None
    new: NewModel | None = None
    recipe: str | None = None
    served: ServedSource | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.folder, self.new, self.recipe, self.served)) != 1:
            raise InputError(
                "A model is a folder, {new: {…}}, {recipe: FILE} or {served: {url: …, model: …}}: exactly one of them."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskChoice:
    """Which tasks are trained on: a set of the store, those of a bench, or else those of the environment.

    Args:
        set: of the store.
        bench: a name of workbench.evals.benches; it also says how completions are judged.
        split: train, test or all.
        limit: so many of them, chosen by a hash of their ids; None = all.
    """

    set: str | None = None
    bench: str | None = None
    split: str = "train"
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.set is not None and self.bench is not None:
            raise InputError(f"set ({self.set}) and bench ({self.bench}) are two sources of tasks: name one.")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit must be 1 or more, not {self.limit}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvironmentChoice:
    """An environment by name, with what its constructor takes."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        """The environment."""
        return _environment_class(self.name)(**self.options)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutSettings:
    """What is written before training where the store lacks it.

    Args:
        per_task: rollouts of every stored policy that the method reads, a task.
        temperature: of the models that write; 0 = greedy.
        context: the prompt that they read; None = the one of their role, else "prompt".
        any_version: also take stored rollouts of the policy's name that other weights or settings wrote.
        tries: rollouts of the student a task, for methods that weight tasks by pass rate.
        prior: added to the tries that were right and to those that were wrong, so that a rate of a few tries is
            never exactly 0 or 1 (0.5 = Jeffreys); 0 = the plain share.
        noise: share of random moves in an environment's worked answers: context, never a target.
        top_k: words of each token in a teacher's stored scores, for methods that read them (teacher_scores: stored).
    """

    per_task: int = 1
    temperature: float = 1.0
    context: str | None = None
    any_version: bool = False
    tries: int = 16
    prior: float = 0.5
    noise: float = 0.0
    top_k: int = 64

    def __post_init__(self) -> None:
        for name in ("per_task", "tries", "top_k"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, not {getattr(self, name)}.")
        if not (0 <= self.temperature < inf and 0 <= self.prior < inf and 0 <= self.noise <= 1):
            raise InputError("temperature and prior must be 0 or more, and noise in [0, 1].")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A recipe with every setting resolved.

    Args: config: the method's own dataclass; models: role or policy -> model; output: folder of its runs, absolute;
        keep_rollouts: store what is freshly written during training, as policy "<role>@<run id>".
    """

    method: str
    config: Any
    student: ModelSource
    output: str
    models: Mapping[str, ModelSource] = field(default_factory=dict)
    tasks: TaskChoice = field(default_factory=TaskChoice)
    environment: EnvironmentChoice | None = None
    settings: Settings = field(default_factory=Settings)
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)
    keep_rollouts: bool = False

    def as_json(self) -> dict[str, Any]:
        """Every setting by name."""
        return json.loads(json.dumps(asdict(self)))


def read(path: str | Path, overrides: Sequence[str] = ()) -> Recipe | LoopRecipe:
    """Reads a recipe file; overrides are "settings.steps=10", their values YAML.

    Raises: InputError with the place of what is wrong; NotFound for an unknown method; MissingExtra without PyYAML.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise InputError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    given = from_yaml(text, str(path))
    if not isinstance(given, dict):
        raise InputError(f"{path} must hold keys and values (method: …), not {given!r:.80}.")
    given = copy.deepcopy(given)  # YAML anchors share what an override must not change twice
    for override in overrides:
        set_value(given, override)
    return parse(given, path.parent)


def parse(given: Mapping[str, Any], folder: str | Path = ".") -> Recipe | LoopRecipe:
    """A recipe from plain values; `recipe:` paths are relative to the folder. Raises as `read`."""
    if method_module(method_of(given)).ENTRY.backend in loop_recipes.BACKENDS:
        return loop_recipes.parse(given, Path(folder))
    values = shared_values(given, Recipe, Settings, lambda one, place: _model(one, place, Path(folder)))
    if given.get("environment") is not None:
        values["environment"] = _environment(given["environment"])
    for name, cls in (("tasks", TaskChoice), ("rollouts", RolloutSettings)):
        values[name] = build(cls, given.get(name) or {}, name)
    if "student" in values and values["student"].served:
        raise InputError("student: a model behind a server cannot be trained. Name a folder, or {new: {…}}.")
    values["keep_rollouts"] = checked(bool, given.get("keep_rollouts", False), "keep_rollouts")
    _check_tasks(values["tasks"], values.get("environment"))
    _check_models(values["models"], values["config"].phases())
    return Recipe(**values)


def _check_models(models: Mapping[str, Any], phases: Sequence[Phase]) -> None:
    """A name mistyped would leave the model out, and take whatever rollouts the store has under the right one."""
    sources = [part for phase in phases for source in phase.sources.values() for part in parts(source)]
    policies = {part.policy for part in sources if isinstance(part, Stored)}
    asked = sorted(policies | {role.name for phase in phases for role in phase.roles if role.origin == "given"})
    for name in models:
        near = get_close_matches(name, [one for one in asked if one not in models], 1, 0.8)
        if name not in asked and near:
            raise InputError(f"models.{name}: the method asks nobody of that name; did you mean {near[0]!r}?")


def _check_tasks(tasks: TaskChoice, environment: EnvironmentChoice | None) -> None:
    if tasks.bench is None and tasks.set is None and environment is None:
        raise InputError("The recipe names no tasks: give tasks.set (of the store), tasks.bench, or an environment.")
    if tasks.bench is None:
        return
    from workbench.evals.benches import BENCHES

    if tasks.bench not in BENCHES:
        near = get_close_matches(tasks.bench, BENCHES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(BENCHES)}."
        raise InputError(f"tasks.bench: there is no bench {tasks.bench!r}; {hint}")
    if environment is not None:
        raise InputError(
            f"The bench {tasks.bench!r} brings its own environment where it has one: leave out `environment`."
        )


def _model(given: Any, place: str, folder: Path) -> ModelSource:
    if isinstance(given, str):
        return ModelSource(folder=given)
    source = build(ModelSource, given, place)
    if source.recipe is None:
        return source
    return ModelSource(recipe=str((folder / Path(source.recipe).expanduser()).absolute()))


def _environment(given: Any) -> EnvironmentChoice:
    options = {"name": given} if isinstance(given, str) else given
    if not isinstance(options, Mapping) or "name" not in options:
        raise InputError(f"environment must have a name, for example {{name: rooms, seed: 0}}, not {given!r}.")
    name = checked(str, options["name"], "environment.name")
    cls = _environment_class(name)
    parameters = inspect.signature(cls).parameters
    hints = get_type_hints(cls.__init__)
    check_keys(options, ["name", *parameters], "environment")
    chosen = {key: checked(hints[key], value, f"environment.{key}") for key, value in options.items() if key != "name"}
    return EnvironmentChoice(name=name, options={key: p.default for key, p in parameters.items()} | chosen)


def _environment_class(name: str) -> Any:
    if name not in ENVIRONMENTS:
        raise InputError(f"environment.name: there is no environment {name!r}; there are {', '.join(ENVIRONMENTS)}.")
    module, cls = ENVIRONMENTS[name]
    return getattr(import_module(module), cls)
