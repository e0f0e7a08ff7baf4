"""How the loop engine trains, whatever the method. Imports no torch: a recipe is read and checked without it."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

from workbench.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopSettings:
    """How a student is trained.

    Args:
        steps: of a phase whose share is 1.
        batch_size: rows of one process and micro-batch; a step has batch_size x accumulation x processes.
        learning_rate: at its height, after `warmup_steps` of linear rise; then `schedule`. Roles have factors on it.
        betas: of adamw; momentum: of sgd (Nesterov's).
        max_grad_norm: each role's gradient is scaled down to it; 0 = never.
        ema_decay: weight of the old moving average at each of the student's steps; the returned student is the
            average. 0 = no average.
        save_every, log_every: in steps.
        bf16: forward passes in bfloat16 (autocast); weights stay in float32.
        cpu: stay on the CPU even where there is a GPU.
        seed: of the order of rows and of every draw.
    """

    steps: int = 1000
    batch_size: int = 128
    accumulation: int = 1
    learning_rate: float = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    save_every: int = 500
    log_every: int = 50
    bf16: bool = False
    cpu: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"The setting {name} must be 1 or more, not {getattr(self, name)}.")
        for name in ("warmup_steps", "momentum", "weight_decay", "max_grad_norm", "seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise InputError(f"The setting {name} must be 0 or more, not {getattr(self, name)}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must be in [0, 1), not {list(self.betas)}.")
        if not 0 < self.learning_rate < inf:
            raise InputError(f"The learning rate must be above 0, not {self.learning_rate}.")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay must be in [0, 1), not {self.ema_decay}.")
