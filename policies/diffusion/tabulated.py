"""The schedule of a discrete process (DDPM's table of alphas), continued between its steps."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.policies.diffusion.schedules import Schedule


class Tabulated(Schedule):
    """A discrete process: alpha(i)^2 = alphas_cumprod[i], alpha^2 + sigma^2 = 1, t = -1 pure data.

    Between its nodes the angle atan(sigma/alpha) is linear in t, so that every time and derivative exists; at a node
    the derivative is that of the interval below, where samplers go. Computed in float64.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        squared = alphas_cumprod.detach().double().cpu()
        angles = torch.atan2((1 - squared).sqrt(), squared.sqrt())
        self.angles = torch.cat([angles.new_zeros(1), angles])
        self.t_min, self.t_max = 0.0, float(len(squared) - 1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tabulated) and torch.equal(self.angles, other.angles)

    def __hash__(self) -> int:
        return hash((len(self.angles), self.angles.sum().item()))

    def _angle(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The angle and its derivative by t, float64."""
        nodes = self.angles.to(t.device)
        place = t.double() + 1
        below = (place.ceil().long() - 1).clamp(0, len(nodes) - 2)
        slope = nodes[below + 1] - nodes[below]
        return nodes[below] + slope * (place - below), slope

    def alpha(self, t: Tensor) -> Tensor:
        return self._angle(t)[0].cos().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return self._angle(t)[0].sin().to(t.dtype)

    def d_alpha(self, t: Tensor) -> Tensor:
        angle, slope = self._angle(t)
        return (-slope * angle.sin()).to(t.dtype)

    def d_sigma(self, t: Tensor) -> Tensor:
        angle, slope = self._angle(t)
        return (slope * angle.cos()).to(t.dtype)

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        nodes = self.angles.to(alpha.device)
        angle = torch.atan2(sigma.double(), alpha.double())
        above = torch.searchsorted(nodes, angle.detach()).clamp(1, len(nodes) - 1)
        share = (angle - nodes[above - 1]) / (nodes[above] - nodes[above - 1])
        return (above + share - 2).to(alpha.dtype)
