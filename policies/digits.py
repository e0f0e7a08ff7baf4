"""scikit-learn's handwritten digits, the data of the backends' testbeds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.errors import MissingExtra


def digits() -> tuple[Tensor, Tensor]:
    """All 1,797: images [N, 1, 8, 8] float32 in [-1, 1], labels [N] long.

    Raises: MissingExtra without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("The digits come with scikit-learn, which is not installed", "train") from error
    found: Any = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(found.target, dtype=torch.long)
