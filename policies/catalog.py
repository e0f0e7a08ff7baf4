"""The catalog of distillation methods: one row each, read without importing torch or a trainer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal

from workbench.errors import NotFound

Access = Literal["none", "text", "top-k", "logits", "score", "weights", "logits (self)", "text (self)"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A row of the catalog.

    Args:
        seed: number of the method card; None = there is none: a baseline, or a part that several systems share.
        family: the card's.
        signal: what the teacher gives (text, logits, preferences, …).
        access: how much of the teacher must be open.
        granularity: token, sequence, step, exchange …
        degree: off-policy, semi on-policy, on-policy: who wrote the tokens.
        needs: what a user must bring.
        evidence: what was shown here, and what was not.
        reading: what is our reading rather than the paper's.
    """

    name: str
    seed: int | None
    title: str
    arxiv: str
    backend: str
    family: str
    signal: str
    access: str
    granularity: str
    degree: str
    needs: str
    evidence: str
    reading: str

    def as_json(self) -> dict[str, object]:
        """All fields by name."""
        return asdict(self)


#: Name -> module with METHOD (the config dataclass) and ENTRY. Third parties add theirs as entry points.
METHODS = {
    "sequence-kd": "workbench.policies.lm.methods.sequence_kd",
    "gkd": "workbench.policies.lm.methods.gkd",
    "taid": "workbench.policies.lm.methods.taid",
    "paced": "workbench.policies.lm.methods.paced",
    "soda": "workbench.policies.lm.methods.soda",
    "step-by-step": "workbench.policies.lm.methods.step_by_step",
    "flow-matching": "workbench.policies.diffusion.methods.flow_matching",
    "consistency-distillation": "workbench.policies.diffusion.methods.consistency_distillation",
    "swiftbrush": "workbench.policies.diffusion.methods.swiftbrush",
    "sana-sprint": "workbench.policies.diffusion.methods.sana_sprint",
    "lora-guidance": "workbench.policies.diffusion.methods.lora_guidance",
    "sid": "workbench.policies.diffusion.methods.sid",
    "dmd2": "workbench.policies.diffusion.methods.dmd2",
    "slimflow": "workbench.policies.diffusion.methods.slimflow",
    "f-distill": "workbench.policies.diffusion.methods.f_distill",
    "supervised": "workbench.policies.vision.methods.supervised",
    "meal-v2": "workbench.policies.vision.methods.meal_v2",
    "logit-standardization": "workbench.policies.vision.methods.logit_standardization",
    "ps-kd": "workbench.policies.vision.methods.ps_kd",
    "ofa-kd": "workbench.policies.vision.methods.ofa_kd",
}
GROUP = "workbench.methods"


@cache
def _modules() -> dict[str, Any]:
    """Name -> how to load the method's module."""
    found: dict[str, Any] = {name: lambda path=path: import_module(path) for name, path in METHODS.items()}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, point.load)
    return found


def method_module(name: str) -> Any:
    """The module of a method; raises NotFound, with the nearest names, if there is none."""
    modules = _modules()
    if name not in modules:
        near = get_close_matches(name, modules, 3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(sorted(modules))}."
        raise NotFound(f"There is no method {name!r}; {hint}")
    return modules[name]()


def entries() -> list[Entry]:
    """Every row, in the order of the cards."""
    return in_order(method_module(name).ENTRY for name in _modules())


def in_order(rows: Iterable[Entry]) -> list[Entry]:
    """By card; those without one at the end."""
    return sorted(rows, key=lambda entry: (entry.seed is None, entry.seed, entry.name))
