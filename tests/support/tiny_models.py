"""Tiny models and settings for tests: seeded, made on the spot, never downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before trl: it would send telemetry

from workbench.policies.lm import tiny

WORDS = [f"w{i}" for i in range(26)]


def make_tokenizer(words: list[str] | None = None) -> Any:
    """Over 26 words, if none are given."""
    return tiny.make_tokenizer(words or WORDS)


def make_model(tokenizer: Any, seed: int = 0, hidden: int = 32, layers: int = 2, **options: Any) -> Any:
    """Large weights, so that what it predicts without training is far from uniform."""
    return tiny.make_model(tokenizer, seed, hidden, layers, **{"initializer_range": 0.2, **options})


def make_args(folder: Path, **options: Any) -> Any:
    """TRL's settings for a run of a few steps on the CPU."""
    from trl import DistillationConfig

    defaults: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "max_completion_length": 8, "use_cpu": True, "bf16": False,
        "activation_checkpointing": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True, "seed": 0,
    }  # fmt: skip
    return DistillationConfig(**{**defaults, **options})
