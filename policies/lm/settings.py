"""How a student is trained, whatever the method. Imports no torch: a recipe is read and checked without it."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

from workbench.errors import InputError

#: transformers' schedules that need nothing but the number of steps.
Schedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a student is trained, whatever the method.

    Args:
        steps: optimiser steps of a phase whose share is 1.
        batch_size: sequences of one process and micro-batch; a step has batch_size x accumulation x processes.
        learning_rate: at its height; `warmup_steps` of linear rise, then `schedule` (transformers' names).
        max_completion_tokens, temperature: of fresh rollouts.
        save_every, log_every: in steps.
        bf16: train in bfloat16 (GPU).
        cpu: stay on the CPU even where there is a GPU.
        lora_rank: 0 trains all weights.
        seed: of the order of tasks, dropout and sampling.
    """

    steps: int = 200
    batch_size: int = 32
    accumulation: int = 1
    learning_rate: float = 1e-4
    schedule: Schedule = "constant_with_warmup"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_completion_tokens: int = 256
    temperature: float = 1.0
    save_every: int = 100
    log_every: int = 10
    bf16: bool = False
    cpu: bool = False
    activation_checkpointing: bool = False
    lora_rank: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "max_completion_tokens", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"The setting {name} must be 1 or more, not {getattr(self, name)}.")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "lora_rank", "seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise InputError(f"The setting {name} must be 0 or more, not {getattr(self, name)}.")
        if not 0 < self.learning_rate < inf:
            raise InputError(f"The learning rate must be above 0, not {self.learning_rate}.")
        if not 0 < self.temperature < inf:
            raise InputError(f"The temperature of rollouts must be above 0, not {self.temperature}.")
