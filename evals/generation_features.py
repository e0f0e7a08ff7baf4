"""Features of handwritten digits: a small classifier, trained on scikit-learn's 8x8 digits when first asked for.

A Fréchet distance in these features is a regression gate for generators of digits; it is no FID.

Verified by: tests/evals/test_generation_features.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from workbench.errors import InputError, MissingExtra
from workbench.evals.generation import as_rows

if TYPE_CHECKING:
    import torch

Rows = NDArray[np.float64]
NUM_EPOCHS = 20
BATCH_SIZE = 64
NUM_HELD_OUT = 360
NUM_FEATURES = 64
_ROWS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True)
class DigitsNetwork:
    """A trained classifier of digits.

    Args:
        body, head: from images [B, 1, 8, 8] between 0 and 1 to features [B, 64], and from these to logits [B, 10].
        accuracy: on the 360 digits that were held out.
        value_range: what stands for an empty and for a full pixel in the samples.
    """

    body: torch.nn.Module
    head: torch.nn.Module
    accuracy: float
    value_range: tuple[float, float]

    def features(self, samples: Any) -> Rows:
        """Features [N, 64], all >= 0, of samples [N, 64], [N, 8, 8] or [N, 1, 8, 8]; InputError for other sizes."""
        return self._run(samples, self.body)

    def probabilities(self, samples: Any) -> Rows:
        """Probability of each digit [N, 10]; samples as for `features`."""
        return self._run(samples, lambda images: self.head(self.body(images)).softmax(dim=-1))

    def _run(self, samples: Any, compute: Callable[[torch.Tensor], torch.Tensor]) -> Rows:
        import torch

        rows = as_rows(samples, "The images of digits")
        if rows.shape[1] != 64:
            raise InputError(f"An image of a digit has 8 x 8 pixels; these samples have {rows.shape[1]} numbers.")
        low, high = self.value_range
        images = torch.from_numpy((rows - low) / (high - low)).float().view(-1, 1, 8, 8)
        with torch.no_grad():
            return torch.cat([compute(part) for part in images.split(_ROWS_AT_ONCE)]).double().numpy()


def digits_network(*, value_range: tuple[float, float] = (0.0, 1.0), seed: int = 0) -> DigitsNetwork:
    """The classifier of this seed; trained once a process, kept in memory only.

    Args: value_range: of the samples that it will see, e.g. (-1, 1) for a diffusion model.
    Raises: InputError for an empty range; MissingExtra without torch or scikit-learn.
    """
    if not value_range[0] < value_range[1]:
        raise InputError(f"value_range must go up, not from {value_range[0]} to {value_range[1]}.")
    return DigitsNetwork(*_trained(seed), value_range)


@cache
def _trained(seed: int) -> tuple[torch.nn.Module, torch.nn.Module, float]:
    try:
        import torch
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise MissingExtra("Features of digits need torch and scikit-learn", "train") from e
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums whatever the caller set; more threads only wait for each other here
    try:
        return _train(load_digits(), seed)
    finally:
        torch.set_num_threads(threads)


def _train(digits: Any, seed: int) -> tuple[torch.nn.Module, torch.nn.Module, float]:
    import torch
    from torch import nn

    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    with torch.random.fork_rng(devices=[]):  # neither taken from nor seen by the caller's random numbers
        torch.manual_seed(seed)
        order = torch.randperm(len(images))
        held_out, kept = order[:NUM_HELD_OUT], order[NUM_HELD_OUT:]
        body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(128, NUM_FEATURES), nn.ReLU(),
        )  # fmt: skip
        head = nn.Linear(NUM_FEATURES, 10)
        model = nn.Sequential(body, head)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(NUM_EPOCHS):
            for batch in kept[torch.randperm(len(kept))].split(BATCH_SIZE):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
    model.requires_grad_(False).eval()
    accuracy = (model(images[held_out]).argmax(dim=-1) == labels[held_out]).double().mean()
    return body, head, float(accuracy)
