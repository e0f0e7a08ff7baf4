"""A small generator, critic and data for tests of the loop engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.policies.loop.settings import LoopSettings
from workbench.policies.nouns import Phase, Role, Stored

TABLES = {
    "data": {"x": torch.randn(40, 3, generator=torch.Generator().manual_seed(1)), "y": torch.arange(40.0)},
}


def net(seed: int, width: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, width))


@dataclass(frozen=True)
class Samples:
    """What the student makes of noise."""

    def __call__(self, view: Any) -> Mapping[str, Tensor]:
        z = view.randn(3)
        return {"z": z, "x": view.shared("sample", lambda: view.role("student")(z))}


@dataclass(frozen=True)
class Towards:
    """Half the squared distance between a role's answers to a segment's rows and another role's, or the rows."""

    role: str = "student"
    to: str | None = None
    segment: str = "main"
    coefficient: float = 1.0
    noise: float = 0.1

    def __call__(self, view: Any) -> Tensor:
        x = view[self.segment]["x"]
        x = x if view.trains == "student" else x.detach()
        noisy = x + self.noise * view.randn_like(x)
        with torch.no_grad():
            target = view.role(self.to)(noisy) if self.to else x.detach()
        view.log(f"noise/{self.role}", float(noisy.detach().mean()))
        return view.mean((view.role(self.role)(noisy) - target).square().sum(1) / 2)


@dataclass(frozen=True)
class Push:
    """The student's samples are pushed to where the critic and the teacher differ."""

    coefficient: float = 1.0

    def __call__(self, view: Any) -> Tensor:
        x = view["main"]["x"]
        gap = (view.role("critic")(x) - view.role("teacher")(x)).detach()
        return view.mean((x * gap).sum(1)) + view.state["weight"] * view.mean(view.module("scale")(x).squeeze(1))


def grow(state: dict[str, float], loss: float, step: int, steps: int) -> None:
    state["weight"] += 0.01 * loss


def phase() -> Phase:
    """Everything the engine has: a critic, an average, a new role, modules of both, state, stored rows, samples."""

    def modules(models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        return {"scale": nn.Linear(3, 1), "critic.shift": nn.Linear(3, 3), "judge": nn.Linear(3, 3)}

    return Phase(
        name="p", sources={"main": Samples(), "data": Stored("data")},
        roles=[
            Role(name="teacher"), Role(name="critic", origin="copy", learning_rate=2.0),
            Role(name="average", origin="ema", decay=0.9), Role(name="judge", origin="new"),
            Role(name="adapted", origin="adapter", rank=2),
        ],
        terms=[Push(), Towards(to="average", segment="data"), Towards(to="judge", segment="data", coefficient=0.5)],
        role_terms={
            "critic": [Towards("critic"), Towards("critic", segment="data")],
            "judge": [Towards("judge", segment="data")], "adapted": [Towards("adapted")],
        },
        modules=modules, every={"student": 2}, state={"weight": 0.5}, after_step=grow,
    )  # fmt: skip


def settings(**changes: Any) -> LoopSettings:
    values: dict[str, Any] = {"steps": 6, "batch_size": 8, "learning_rate": 0.01, "log_every": 1, "cpu": True}
    return LoopSettings(**values | changes)
