"""Runs of vision methods on small tasks, as tests and benchmarks make them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from workbench.policies.loop.engine import LoopTrainer
from workbench.policies.loop.settings import LoopSettings
from workbench.policies.nouns import Phase
from workbench.policies.vision.networks import MLP


def made(network: Any, seed: int, **sizes: Any) -> Any:
    """A network of ten classes on 8x8 images with the weights of a seed."""
    torch.manual_seed(seed)
    return network(**{"num_classes": 10, **sizes})


def trained(
    student: nn.Module, phase: Phase, table: Mapping[str, torch.Tensor],
    models: Mapping[str, nn.Module] | None = None, **settings: Any,
) -> LoopTrainer:  # fmt: skip
    """The trainer after the phase; its student is the one given."""
    wanted = {
        "batch_size": 50,
        "learning_rate": 3e-3,
        "log_every": 10**6,
        "cpu": True,
        "schedule": "cosine",
        **settings,
    }
    trainer = LoopTrainer(student.train(), phase, {"train": table}, LoopSettings(**wanted), models or {})
    trainer.train()
    return trainer


def step_of(
    phase: Phase, table: Mapping[str, torch.Tensor], models: Mapping[str, nn.Module], student: Any = None
) -> Any:
    """(trainer, losses by name) after one step of plain gradient descent with rate 1 on the whole table, unclipped."""
    seen: dict[str, float] = {}
    student = made(MLP, 1) if student is None else student
    settings = LoopSettings(
        steps=1, batch_size=len(table["image"]), learning_rate=1.0, optimizer="sgd", momentum=0.0, max_grad_norm=0.0,
        log_every=1, cpu=True,
    )  # fmt: skip
    trainer = LoopTrainer(student, phase, {"train": table}, settings, models)
    trainer.train(on_metrics=lambda name, step, values: seen.update(values))
    return trainer, seen


class Rolled(nn.Module):
    """A network that answers for the image before, in the batch: the negative control of a teacher."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits [B, C]."""
        return self.net(image).roll(1, 0)


class Scaled(nn.Module):
    """A network whose logits are multiplied by a factor."""

    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits [B, C]."""
        return self.factor * self.net(image)


def rank_agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean Spearman correlation of the rows of two tables without ties, [B, C] each."""
    ranks = [z.argsort(-1).argsort(-1).float() - (z.shape[-1] - 1) / 2 for z in (a, b)]
    return float(((ranks[0] * ranks[1]).sum(-1) / ranks[0].square().sum(-1)).mean())
