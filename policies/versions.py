"""Models are known by their contents: digests of weights in memory, and of folders of safetensors."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from workbench.data.records import digest


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
