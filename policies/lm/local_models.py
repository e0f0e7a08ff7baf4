"""Models of this machine: loaded from folders of safetensors without a network, or made; known by their contents."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.data.records import digest
from workbench.errors import InputError
from workbench.policies.lm.tiny import make_model, make_tokenizer


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model with its tokenizer.

    Args: version: digest of its weights; tokens: digest of its vocabulary; source: what people call it.
    """

    model: Any
    tokenizer: Any
    version: str
    tokens: str
    source: str


def stay_offline() -> None:
    """Nothing is downloaded or reported. Before transformers and trl are imported: both look only once."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")


def load(folder: str | Path, *, dtype: str = "float32", device: str = "cpu") -> LocalModel:
    """Loads a causal language model and its tokenizer; code that a folder brings is never run.

    Args: dtype: a name of torch's, of the weights in memory.

    Raises: InputError if the folder lacks the configuration, the safetensors or the tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no model folder: it has no config.json. Models are never downloaded here.")
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder} has no *.safetensors. Other formats can run code when they are read: convert the model with "
            "save_pretrained() where it is trusted."
        )
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **options)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"The model in {folder} cannot be loaded: {' '.join(str(error).split())[:400]}") from error
    return LocalModel(model.to(device), tokenizer, folder_version(folder), vocabulary_version(tokenizer), str(folder))


def make(words: Sequence[str], *, hidden: int, layers: int, seed: int, device: str = "cpu") -> LocalModel:
    """A tiny Llama with random weights over a closed list of words."""
    tokenizer = make_tokenizer(words)
    model = make_model(tokenizer, seed, hidden, layers)
    source = f"new (hidden {hidden}, layers {layers}, seed {seed})"
    return LocalModel(model.to(device), tokenizer, weights_version(model), vocabulary_version(tokenizer), source)


def folder_version(folder: Path) -> str:
    """Digest of a model folder's configuration and weights."""
    hashes = []
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        with path.open("rb") as file:
            hashes += [path.name, hashlib.file_digest(file, "sha256").digest()]
    return digest("model", *hashes)


def weights_version(model: Any) -> str:
    """Digest of a model's weights in memory."""
    import torch

    parts: list[str | bytes] = []
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        parts += [name, str(tensor.dtype), hashlib.sha256(data).digest()]
    return digest("weights", *parts)


def vocabulary_version(tokenizer: Any) -> str:
    """Digest of a tokenizer's vocabulary: token strings and their ids."""
    return digest("vocabulary", json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False))
