"""Students whose law is known, critics that are exact for them, and what tests of score methods measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from workbench.policies.diffusion.generation import simulate, step_times
from workbench.policies.diffusion.networks import MLP
from workbench.policies.diffusion.oracle import GaussianMixture
from workbench.policies.diffusion.predict import Predictor
from workbench.policies.diffusion.schedules import RectifiedFlow, Schedule
from workbench.policies.diffusion.testbeds import gauss8_data, toy_net, toy_teacher
from workbench.policies.loop.engine import LoopTrainer
from workbench.policies.loop.settings import LoopSettings
from workbench.policies.nouns import Method, Phase

RF = RectifiedFlow()
FAST: dict[str, Any] = {"schedule": "linear", "betas": (0.0, 0.99)}


class Affine(nn.Module):
    """x0 = mean[c] + std[c] x whatever t: of noise N(0, 1) it makes N(mean[c], std[c]^2)."""

    prediction = "x0"

    def __init__(self, mean: Sequence[float], std: Sequence[float], schedule: Schedule | None = None) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean)[:, None])
        self.std = nn.Parameter(torch.tensor(std)[:, None])
        self.shape, self.schedule = (1,), schedule or RectifiedFlow()
        self.num_classes = len(mean) if len(mean) > 1 else 0

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        c = torch.zeros(len(x), dtype=torch.long) if c is None else c
        return self.mean[c] + self.std[c] * x

    def law(self) -> GaussianMixture:
        """Of its samples, as an oracle."""
        labels = torch.arange(self.num_classes) if self.num_classes else None
        mean, std = self.mean.detach(), self.std.detach()[:, 0].abs()
        return GaussianMixture(mean, std, torch.ones(len(mean)), labels, self.schedule, "x0")


class ExactCritic(nn.Module):
    """What a critic would answer after learning an affine student's law perfectly, as the student is now."""

    prediction = "x0"

    def __init__(self, student: Affine) -> None:
        super().__init__()
        self.__dict__["student"] = student
        self.schedule, self.num_classes = student.schedule, student.num_classes

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        return self.__dict__["student"].law()(x, t, c)


def normal(mean: float, std: float, **options: Any) -> GaussianMixture:
    return GaussianMixture(torch.tensor([[mean]]), torch.tensor([std]), torch.ones(1), **options)


def tiny_teacher(**options: Any) -> MLP:
    return toy_net("gauss8", 16, 2, 1, **options).requires_grad_(False)


def settings(**changes: Any) -> LoopSettings:
    values: dict[str, Any] = {"steps": 100, "batch_size": 128, "learning_rate": 1e-3, "log_every": 1, "cpu": True}
    return LoopSettings(**values | changes)


def exact(phase: Phase) -> Phase:
    """The phase with a critic that is given, so that only the student trains."""
    roles = [replace(role, origin="given", rank=0) if role.name == "critic" else role for role in phase.roles]
    return replace(phase, roles=[*roles], role_terms={}, every={}, modules=None, terms=phase.terms[:1])


def train(
    student: Any, phase: Phase, how: LoopSettings, tables: Mapping[str, Any] | None = None, **models: nn.Module
) -> list[dict[str, float]]:
    """Trains the student in place; the metrics of each step."""
    found: list[dict[str, float]] = []
    trainer = LoopTrainer(student, phase, tables or {}, how, models)
    trainer.train(on_metrics=lambda name, step, metrics: found.append({**metrics}))
    return found


def samples(
    student: Any, count: int, steps: int = 1, start: float = 1.0, seed: int = 1, c: Tensor | None = None
) -> Tensor:
    """What a trained student makes in so many steps."""
    g = torch.Generator().manual_seed(seed)
    predictor = Predictor(student)
    times = step_times(predictor.schedule, steps, start, count)
    noise = [torch.randn(count, *student.shape, generator=g) for _ in range(steps)]
    with torch.no_grad():
        return simulate(predictor, noise[0], times, noise[1:], c)


def sliced(x: Tensor, y: Tensor, projections: int = 64) -> float:
    """Sliced Wasserstein-2 distance of equally many samples [N, D]."""
    directions = torch.randn(x.shape[1], projections, generator=torch.Generator().manual_seed(0))
    directions /= directions.norm(dim=0)
    a, b = ((z @ directions).sort(0).values for z in (x, y))
    return (a - b).square().mean().sqrt().item()


def only_phase(method: Method) -> Phase:
    [phase] = method.phases()
    return phase


@cache
def gauss8_teacher() -> nn.Module:
    """Trained once a process; its one-step samples are 1.37 from the data, its many-step ones 0.1."""
    return toy_teacher("gauss8", fast=True)


def gauss8_rows(count: int, seed: int = 5) -> Tensor:
    """Data."""
    return gauss8_data(count, torch.Generator().manual_seed(seed))[0]
