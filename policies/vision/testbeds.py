"""Small image tasks on which a method's claim can show in seconds: scikit-learn's digits, and rendered shapes.

Tables have `image` [N, 1, H, W] in -1 to 1 and `label` [N].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.policies.digits import digits as all_digits

Table = dict[str, Tensor]
SHAPES = ("disc", "ring", "square", "frame", "triangle", "cross", "saltire", "bars")


class Split(NamedTuple):
    """`train` (as asked for), `pool`: all images of the training part with their true labels, `test`."""

    train: Table
    pool: Table
    test: Table


def digits(
    seed: int, *, num_train: int = 1200, num_labels: int | None = None, noise: float = 0.0, missing: int | None = None
) -> Split:
    """The 1,797 handwritten digits of 8x8 pixels, split by seed.

    Args:
        num_train: images of the training part; the others are the test.
        num_labels: so many of them are in `train`; None = all.
        noise: fraction of the labels in `train` that are replaced by another class, drawn evenly.
        missing: a class that is not in `train`.
    Raises: MissingExtra without scikit-learn.
    """
    if not 0 <= noise < 1:
        raise InputError(f"The fraction of wrong labels must be in [0, 1), not {noise}.")
    image, label = all_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(label), generator=generator)
    pool, test = ({"image": image[part], "label": label[part]} for part in (order[:num_train], order[num_train:]))
    kept = torch.arange(num_train)
    if missing is not None:
        kept = kept[pool["label"] != missing]
    kept = kept[:num_labels]
    train = {key: value[kept].clone() for key, value in pool.items()}
    wrong = torch.randperm(len(kept), generator=generator)[: round(noise * len(kept))]
    shift = torch.randint(1, 10, (len(wrong),), generator=generator)
    train["label"][wrong] = (train["label"][wrong] + shift) % 10
    return Split(train, pool, test)


def shapes(num: int, seed: int, size: int = 16) -> Table:
    """Eight kinds of shapes at a random place, size and brightness, with noise: [num, 1, size, size]."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(num, 1, 1, generator=generator) * (high - low) + low

    label = torch.randint(len(SHAPES), (num,), generator=generator)
    radius = uniform(0.35, 0.6)
    axis = torch.linspace(-1, 1, size)
    x, y = (axis.view(shape) - uniform(-0.35, 0.35) for shape in ((1, 1, -1), (1, -1, 1)))
    stroke = 2.5 / size
    box, distance = torch.maximum(x.abs(), y.abs()), (x.square() + y.square()).sqrt()
    inside = box < radius
    masks = torch.stack([
        distance < radius,
        (distance - radius * 0.85).abs() < stroke,
        inside,
        (box - radius * 0.85).abs() < stroke,
        (y > 2 * x.abs() - radius) & (y < radius),
        inside & (torch.minimum(x.abs(), y.abs()) < stroke),
        inside & (torch.minimum((x - y).abs(), (x + y).abs()) < 1.4 * stroke),
        inside & (torch.remainder((y / stroke / 2).floor(), 2) == 0),
    ])  # fmt: skip
    drawn = masks[label, torch.arange(num)].float()
    image = drawn * uniform(0.9, 1.8) - 1 + 0.25 * torch.randn(num, size, size, generator=generator)
    return {"image": image.clamp(-1, 1)[:, None], "label": label}


def fit(
    net: nn.Module, table: Mapping[str, Tensor], *, steps: int, seed: int, batch_size: int = 64,
    learning_rate: float = 3e-3,
) -> nn.Module:  # fmt: skip
    """Trains on labels with AdamW and a cosine schedule; returns the network frozen, as a teacher."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    net.train()
    for _ in range(steps):
        rows = torch.randint(len(table["label"]), (batch_size,), generator=generator)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(net(table["image"][rows]), table["label"][rows]).backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


class Measured(NamedTuple):
    """Accuracy (0 to 1) and mean negative log-likelihood (nats) on a table, and the probabilities [N, C]."""

    accuracy: float
    nll: float
    probs: Tensor


def measure(net: nn.Module, table: Mapping[str, Tensor]) -> Measured:
    """A network on a table, in evaluation mode; its mode is left as it was."""
    was_training = net.training
    net.eval()
    with torch.no_grad():
        logits = net(table["image"])
    net.train(was_training)
    accuracy = (logits.argmax(-1) == table["label"]).float().mean()
    return Measured(float(accuracy), float(F.cross_entropy(logits, table["label"])), logits.softmax(-1))
