"""What tests and benchmarks of trajectory methods share: flow maps in closed form, views, short runs, distances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from score_made import sliced
from torch import Tensor, nn

from workbench.policies.diffusion.oracle import GaussianMixture
from workbench.policies.diffusion.predict import Predictor
from workbench.policies.diffusion.samplers import prior
from workbench.policies.diffusion.schedules import Schedule, Trigonometric, expand
from workbench.policies.loop.engine import LoopTrainer
from workbench.policies.loop.settings import LoopSettings
from workbench.policies.loop.view import View
from workbench.policies.nouns import Phase


def one_gaussian(mean: float = 1.5, std: float = 0.3, schedule: Schedule | None = None) -> GaussianMixture:
    """N((mean, 0), std^2 I) in the plane: its trajectories have a closed form."""
    return GaussianMixture(torch.tensor([[mean, 0.0]]), torch.tensor([std]), torch.ones(1), None, schedule)


def transported(oracle: GaussianMixture, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The point at s of one Gaussian's ODE trajectory through x_t: the number of standard deviations stays."""
    mean, std, schedule = oracle.means[0].to(x_t.dtype), oracle.stds[0].to(x_t.dtype), oracle.schedule

    def scale(time: Tensor) -> Tensor:
        return expand(torch.hypot(schedule.alpha(time) * std, schedule.sigma(time)), x_t)

    off = (x_t - expand(schedule.alpha(t), x_t) * mean) / scale(t)
    return expand(schedule.alpha(s), x_t) * mean + scale(s) * off


class FlowMap(nn.Module):
    """One Gaussian's exact flow map to time 0 as a network with the prediction v, times a weight of 1."""

    prediction, num_classes, shape = "v", 0, (2,)

    def __init__(self, oracle: GaussianMixture) -> None:
        super().__init__()
        self.__dict__["oracle"] = oracle
        self.schedule = Trigonometric()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        end = transported(self.__dict__["oracle"], x, t, torch.zeros_like(t))
        sin = expand(t.sin(), x)
        v = (expand(t.cos(), x) * x - end) / torch.where(sin == 0, 1.0, sin)
        return self.scale * torch.where(sin == 0, torch.zeros_like(v), v)


class Rolled(nn.Module):
    """A network that answers for the row before, in the batch: the negative control of a teacher."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net, self.schedule, self.prediction = net, net.schedule, net.prediction
        self.num_classes = net.num_classes

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        return self.net(x, t, c).roll(1, 0)


def trainer_of(
    student: nn.Module | None, phase: Phase, tables: Mapping[str, Any], models: Mapping[str, nn.Module] | None = None,
    **settings: Any,
) -> LoopTrainer:  # fmt: skip
    """A trainer that has not begun."""
    wanted: dict[str, Any] = {"steps": 100, "batch_size": 128, "learning_rate": 2e-3, "schedule": "cosine", "cpu": True}
    return LoopTrainer(student, phase, tables, LoopSettings(**{**wanted, "log_every": 1, **settings}), models or {})


def trained(
    student: Any,
    phase: Phase,
    tables: Mapping[str, Any],
    models: Mapping[str, nn.Module] | None = None,
    **settings: Any,
) -> Any:
    """The student after the phase, which is trained in place."""
    trainer = trainer_of(student, phase, tables, models, **settings)
    trainer.train()
    return trainer.student


def view_of(trainer: LoopTrainer, trains: str = "student", step: int = 0) -> View:
    """What the terms of a role would see at a step, as one micro-batch."""
    for role, parameters in trainer.trained.items():
        for parameter in parameters.values():
            parameter.requires_grad_(role == trains)
    place = replace(trainer._places()[0], step=step)
    return View(
        place, trains, trainer.roles, trainer.modules, trainer.phase.sources, trainer.tables, trainer.phase.state,
        trainer.accelerator,
    )  # fmt: skip


def data_of(oracle: GaussianMixture, count: int = 4096, seed: int = 3) -> dict[str, dict[str, Tensor]]:
    """Tables: rows of an oracle's data, with labels where it has classes."""
    x0, c = oracle.sample(count, torch.Generator().manual_seed(seed))
    return {"data": {"x0": x0, "c": c} if oracle.num_classes else {"x0": x0}}


def one_step_distance(net: Any, oracle: GaussianMixture, schedule: Schedule | None = None, count: int = 3000) -> float:
    """Sliced Wasserstein distance of a network's one-step samples from the data."""
    g, predictor = torch.Generator().manual_seed(9), Predictor(net, schedule)
    z = prior(torch.randn(count, 2, generator=g), predictor.schedule)
    with torch.no_grad():
        made = predictor.x0(z, torch.full((count,), predictor.schedule.t_max))
    return sliced(made, oracle.sample(count, g)[0])
