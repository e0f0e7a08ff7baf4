"""Small denoising networks by the contract of `predict`: conditioning shared by all, and a residual MLP."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.policies.diffusion.schedules import Prediction, RectifiedFlow, Schedule, expand

#: Of the time features; the highest frequency is bounded because forward-mode methods differentiate through it.
NUM_FREQUENCIES, LOWEST, HIGHEST = 32, 0.5, 32.0


class Conditioning(nn.Module):
    """(t, c, r) -> [B, width]. Times enter as the angle atan(sigma/alpha) in [0, pi/2], the same for all schedules.

    Args:
        width: of the result; schedule: whose times come in; num_classes: 0 = none; null label = num_classes.
        second_time: takes r, through a layer that starts at 0: before training, r changes nothing.
        logvar: has `log_variance`, a linear head on the features of t that starts at 0 (arXiv 2312.02696).
    """

    frequencies: Tensor

    def __init__(
        self, width: int, schedule: Schedule, num_classes: int = 0, second_time: bool = False, logvar: bool = False
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.num_classes = num_classes
        log_frequencies = torch.linspace(math.log(LOWEST), math.log(HIGHEST), NUM_FREQUENCIES, dtype=torch.float64)
        self.register_buffer("frequencies", log_frequencies.exp().float(), persistent=False)
        self.time = nn.Linear(2 * NUM_FREQUENCIES, width)
        self.classes = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.second_time = zeroed(nn.Linear(2 * NUM_FREQUENCIES, width)) if second_time else None
        self.logvar = zeroed(nn.Linear(2 * NUM_FREQUENCIES, 1)) if logvar else None

    def forward(self, t: Tensor, c: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        """[B, width] in the parameters' dtype; c None = null label. Raises InputError for an r that it cannot take."""
        found = self.time(self._features(t))
        if self.classes is not None:
            if c is None:
                c = torch.full(found.shape[:1], self.num_classes, device=found.device)
            found = found + self.classes(c)
        if self.second_time is not None:
            return found + self.second_time(self._features(t if r is None else r))
        if r is not None:
            raise InputError("This network takes no second time r: build it with second_time=True.")
        return found

    def log_variance(self, t: Tensor) -> Tensor:
        """[B]. Raises InputError without the head."""
        if self.logvar is None:
            raise InputError("This network has no log-variance head: build it with logvar=True.")
        return self.logvar(self._features(t))[:, 0]

    def _features(self, t: Tensor) -> Tensor:
        angle = torch.atan2(self.schedule.sigma(t), self.schedule.alpha(t)).to(self.time.weight.dtype)
        phases = angle[:, None] * self.frequencies.to(angle.dtype)
        return torch.cat([phases.cos(), phases.sin()], 1)


class Block(nn.Module):
    """x + out(silu(in(x + cond))): [B, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return x + self.outer(F.silu(self.inner(F.silu(x + cond))))


class MLP(nn.Module):
    """A residual network on flattened data; with the defaults 62,594 parameters. Smooth: fit for torch.func.jvp.

    Args: shape: of one datum; hidden, depth: width and number of blocks ("blocks.0" ... are their module paths);
        the rest as `Conditioning`; schedule: rectified flow by default.
    x enters divided by sqrt(alpha^2 + sigma^2), so that its scale does not depend on the schedule.
    """

    def __init__(
        self,
        shape: Sequence[int] = (2,),
        hidden: int = 96,
        depth: int = 3,
        schedule: Schedule | None = None,
        prediction: Prediction = "flow",
        num_classes: int = 0,
        second_time: bool = False,
        logvar: bool = False,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.schedule: Schedule = schedule or RectifiedFlow()
        self.prediction: Prediction = prediction
        self.num_classes = num_classes
        self.cond = Conditioning(hidden, self.schedule, num_classes, second_time, logvar)
        self.input = nn.Linear(math.prod(self.shape), hidden)
        self.blocks = nn.ModuleList([Block(hidden) for _ in range(depth)])
        self.output = nn.Linear(hidden, math.prod(self.shape))

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        """x [B, *shape], t [B], c [B] long, r [B] -> like x."""
        cond = self.cond(t, c, r)
        h = self.input(scaled(x, t, self.schedule).flatten(1))
        for block in self.blocks:
            h = block(h, cond)
        return self.output(F.silu(h)).reshape(x.shape)

    def log_variance(self, t: Tensor) -> Tensor:
        """Of the learned loss weight, [B]."""
        return self.cond.log_variance(t)


def scaled(x: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """x_t over sqrt(alpha^2 + sigma^2): unit variance at all times for data of unit variance."""
    return x / expand(torch.hypot(schedule.alpha(t), schedule.sigma(t)), x)


def zeroed(layer: nn.Linear) -> nn.Linear:
    """The layer, its weight and bias set to 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
