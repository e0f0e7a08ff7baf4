"""What a student said of each training image an epoch ago."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ProbabilityMemory(nn.Module):
    """Class probabilities of every image, of the last epoch and of the running one: buffers, saved with checkpoints.

    Two rows of C floats an image. A row that was written is read from the next epoch on, not before.
    """

    previous: Tensor
    latest: Tensor
    epoch: Tensor

    def __init__(self, num_images: int, num_classes: int) -> None:
        super().__init__()
        for name in ("previous", "latest"):
            self.register_buffer(name, torch.zeros(num_images, num_classes))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.long))

    def read(self, index_B: Tensor, epoch: int, otherwise_BC: Tensor) -> Tensor:
        """What was written before this epoch (they are read in order), [B, C]; `otherwise` for images not seen yet."""
        if epoch > self.epoch:
            self.previous.copy_(self.latest)
            self.epoch.fill_(epoch)
        rows = self.previous[index_B]
        return torch.where(rows.sum(-1, keepdim=True) > 0, rows, otherwise_BC)

    def write(self, index_B: Tensor, probs_BC: Tensor) -> None:
        """Keeps probabilities for the next epoch."""
        self.latest[index_B] = probs_BC.detach().to(self.latest.dtype)
