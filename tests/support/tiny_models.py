"""Tiny models and tokenizers for tests: seeded, made on the spot, never downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before trl: it would send telemetry

WORDS = [f"w{i}" for i in range(26)]


def make_tokenizer(words: list[str] | None = None) -> Any:
    """One token a word; <pad>, <eos>, <unk> are 0, 1, 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *(words or WORDS)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_model(tokenizer: Any, seed: int = 0, hidden: int = 32, layers: int = 2, **options: Any) -> Any:
    """A Llama of some ten thousand parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "initializer_range": 0.2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**settings, **options}))


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
