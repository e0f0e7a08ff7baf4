"""Diffusion GANs: heads on the features that a role's network has of noised samples, and both sides' losses.

Real and fake samples are noised at the same times with the same noise, so that a trained head's logit is the log ratio
of the two laws at x_t. torch is imported when a term is called, so that a method's phases can be listed without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from workbench.errors import InputError
from workbench.policies.diffusion.generation import TimeLaw, UniformTime, schedule_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from workbench.policies.diffusion.schedules import Schedule
    from workbench.policies.loop.view import View

GanLoss = Literal["softplus", "hinge"]


def generator_loss(fake_logits: Tensor, loss: GanLoss = "softplus") -> Tensor:
    """What the student minimises, [B], of logits [B, heads] of its samples: softplus(-l), or -l for hinge."""
    import torch.nn.functional as F

    return (F.softplus(-fake_logits) if loss == "softplus" else -fake_logits).mean(1)


def discriminator_loss(fake_logits: Tensor, real_logits: Tensor, loss: GanLoss = "softplus") -> Tensor:
    """What the heads minimise, [B], of logits [B, heads]; the mean over heads.

    softplus(l_fake) + softplus(-l_real) (its minimum over l: exp(l) = p_real / p_fake), or for hinge
    (relu(1 + l_fake) + relu(1 - l_real)) / 2.
    """
    import torch.nn.functional as F

    if loss == "softplus":
        return (F.softplus(fake_logits) + F.softplus(-real_logits)).mean(1)
    return (F.relu(1 + fake_logits) + F.relu(1 - real_logits)).mean(1) / 2


def pooled(features: Tensor) -> Tensor:
    """[B, D] of vectors [B, D], tokens [B, L, D] or maps [B, D, height, width]: means over positions."""
    if features.ndim == 3:
        return features.mean(1)
    return features.flatten(2).mean(2) if features.ndim == 4 else features


def make_heads(widths: Mapping[str, int], hidden: int = 64) -> nn.ModuleDict:
    """A small network for each tap: pooled features [B, width] -> logit [B, 1]."""
    from torch import nn

    return nn.ModuleDict(
        {
            path.replace(".", "/"): nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1))
            for path, width in widths.items()
        }
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Discriminator:
    """Which features judge a sample.

    Args:
        role: whose network sees it; taps: module paths in that network.
        head: name of the module of heads: "critic.head" trains with the role critic; a name without a dot is a role of
            its own (origin "new"), with a turn of its own.
    `modules` makes the heads; give it to the phase.
    Raises: InputError without taps.
    """

    role: str = "critic"
    taps: tuple[str, ...] = ("blocks.1",)
    head: str = "critic.head"

    def __post_init__(self) -> None:
        if not self.taps:
            raise InputError("A discriminator needs the path of one module or more whose output it reads.")

    def modules(self, models: Mapping[str, Any]) -> dict[str, nn.Module]:
        """The heads, as wide as the features that a first pass of the network has."""
        import torch

        net = models[self.role]
        like = next(net.parameters())
        x = torch.zeros(2, *net.shape, device=like.device, dtype=like.dtype)
        with torch.no_grad():
            features = self._features(net, x, net.schedule.t_min + x.new_ones(2) / 2, None, net.schedule)
        return {self.head: make_heads({path: pooled(value).shape[1] for path, value in features.items()})}

    def logits(self, view: View, x_t: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
        """[B, heads] at x_t [B, *shape], t [B] of the teacher's schedule."""
        import torch

        heads: Any = view.module(self.head) if "." in self.head else view.role(self.head)
        features = self._features(view.role(self.role), x_t, t, c, schedule_of(view))
        return torch.cat([heads[path.replace(".", "/")](pooled(value)) for path, value in features.items()], 1)

    def _features(self, net: Any, x_t: Tensor, t: Tensor, c: Tensor | None, schedule: Schedule) -> dict[str, Tensor]:
        from workbench.policies.diffusion.predict import Predictor
        from workbench.policies.taps import Taps

        with Taps(net, self.taps) as taps:
            Predictor(net, schedule).pair(x_t, t, c)
            return taps.outputs()


@dataclass(frozen=True, kw_only=True, slots=True)
class Fool:
    """The student's side: its noised samples shall look real to the heads."""

    discriminator: Discriminator
    loss: GanLoss = "softplus"
    times: TimeLaw = field(default_factory=UniformTime)
    segment: str = "main"
    coefficient: float = 1.0

    def __call__(self, view: View) -> Tensor:
        """The share of the micro-batch."""
        rows, schedule = view[self.segment], schedule_of(view)
        t = self.times(view, schedule)
        x_t = schedule.add_noise(rows["x"], view.randn_like(rows["x"]), t)
        return view.mean(generator_loss(self.discriminator.logits(view, x_t, t, rows.get("c")), self.loss))


@dataclass(frozen=True, kw_only=True, slots=True)
class TellApart:
    """The heads' side, and that of the network they read where it trains: real rows `x0` from the student's samples.

    Args: segment, real: names of the two segments, each with its own classes.
    """

    discriminator: Discriminator
    loss: GanLoss = "softplus"
    times: TimeLaw = field(default_factory=UniformTime)
    segment: str = "main"
    real: str = "real"
    coefficient: float = 1.0

    def __call__(self, view: View) -> Tensor:
        """The share of the micro-batch."""
        fake, real, schedule = view[self.segment], view[self.real], schedule_of(view)
        t, eps = self.times(view, schedule), view.randn_like(fake["x"])
        fake_t = schedule.add_noise(fake["x"].detach(), eps, t)
        real_t = schedule.add_noise(real["x0"], eps, t)
        fake_logits = self.discriminator.logits(view, fake_t, t, fake.get("c"))
        real_logits = self.discriminator.logits(view, real_t, t, real.get("c"))
        view.log("discriminator/right", float(((fake_logits < 0).float() + (real_logits > 0).float()).mean() / 2))
        return view.mean(discriminator_loss(fake_logits, real_logits, self.loss))
