"""From plain values (YAML, overrides) to checked dataclasses; every error names the place of what is wrong."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from workbench.errors import InputError, MissingExtra
from workbench.policies.catalog import method_module


def from_yaml(text: str, place: str) -> Any:
    """Plain values of a YAML text; raises MissingExtra without PyYAML."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise MissingExtra("Recipes need the package PyYAML", "train") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{place} is no YAML: {' '.join(str(error).split())}") from error


def set_value(given: dict[str, Any], override: str) -> None:
    """Changes one value, "settings.steps=10", at any depth."""
    key, equals, text = override.partition("=")
    *parents, last = key.split(".")
    if not equals or not all((*parents, last)):
        raise InputError(f"An override is KEY=VALUE, for example settings.steps=10, not {override!r}.")
    at = given
    for name in parents:
        if at.get(name) is None:
            at[name] = {}
        at = at[name]
        if not isinstance(at, dict):
            raise InputError(f"{override!r}: {name!r} is {at!r} in the recipe, which has nothing inside to change.")
    at[last] = from_yaml(text, override)


def check_keys(given: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    """Raises InputError, with the nearest name, for a key that is not among the known."""
    for key in given:
        if key not in known:
            near = get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}."
            raise InputError(f"Unknown key {f'{place}.{key}' if place else str(key)!r}; {hint}")


def build(cls: Any, given: Any, place: str) -> Any:
    """A dataclass from plain values, with the place in every error."""
    if not isinstance(given, Mapping):
        raise InputError(f"{place} must hold keys and values, not {given!r}.")
    check_keys(given, [f.name for f in fields(cls)], place)
    for f in fields(cls):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in given:
            raise InputError(f"{place}.{f.name} is missing.")
    hints = get_type_hints(cls)
    values = {key: checked(hints[key], value, f"{place}.{key}") for key, value in given.items()}
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def checked(hint: Any, value: Any, place: str) -> Any:
    """The value as its type; nothing is converted but what YAML cannot write."""
    inner = next((one for one in get_args(hint) if is_dataclass(one)), hint)
    if is_dataclass(inner):
        return None if value is None and inner is not hint else build(inner, value, place)
    if isinstance(value, str) and float in (hint, *get_args(hint)):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-4 as a text: it wants 1.0e-4
            value = float(value)
    try:
        # as JSON, because there a tuple can be written, and strict, so that "10" is no number and true is no 1
        return TypeAdapter(hint).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([place, *(str(part) for part in first["loc"] if isinstance(part, int))])
        raise InputError(f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}.") from error


def method_of(given: Mapping[str, Any]) -> str:
    """The name of the recipe's method; raises InputError without one."""
    _check_there(given, ("method",))
    return checked(str, given["method"], "method")


def shared_values(
    given: Mapping[str, Any], recipe: Any, settings: Any, read_model: Callable[[Any, str], Any]
) -> dict[str, Any]:
    """What recipes of all engines have: method, config, student, models, settings, output.

    Args: recipe, settings: the engine's dataclasses; read_model: (plain value, place) -> where a model comes from.
    """
    check_keys(given, [f.name for f in fields(recipe)], "")
    _check_there(given, [f.name for f in fields(recipe) if f.default is MISSING and f.name in ("student", "output")])
    method = method_of(given)
    models = given.get("models") or {}
    if not isinstance(models, Mapping):
        raise InputError(f"models must name a model for each role (models: {{teacher: FOLDER}}), not {models!r}.")
    values = {
        "method": method,
        "config": build(method_module(method).METHOD, given.get("config") or {}, "config"),
        "output": str(Path(checked(str, given["output"], "output")).expanduser().absolute()),
        "models": {str(name): read_model(one, f"models.{name}") for name, one in models.items()},
        "settings": build(settings, given.get("settings") or {}, "settings"),
    }
    return values if given.get("student") is None else values | {"student": read_model(given["student"], "student")}


def _check_there(given: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if name not in given:
            raise InputError(f"The recipe has no {name!r}. {'' if name != 'output' else 'Name a folder for its runs.'}")
