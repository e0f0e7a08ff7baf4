"""What a network predicts, asked for in any parameterisation and on any schedule; classifier-free guidance.

A network is `net(x [B, *shape], t [B], c=None [B] long, r=None [B]) -> like x` with the attributes `schedule`,
`prediction` (one of `schedules.PREDICTIONS`) and `num_classes` (0 = unconditional; num_classes is the null label).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from workbench.policies.diffusion.schedules import (
    Prediction,
    Schedule,
    combine,
    convert,
    expand,
    matched_time,
    translate,
)


class Predictions:
    """The five predictions at x [B, *shape], t [B] of `schedule`, c [B] long or None (null), r [B] second time or None.

    A subclass gives `predict`; `pair` where one call of the network can give both.
    """

    schedule: Schedule
    num_classes: int

    def predict(self, x: Tensor, t: Tensor, c: Tensor | None, target: Prediction, r: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def pair(self, x: Tensor, t: Tensor, c: Tensor | None = None, r: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x0 and eps."""
        return self.predict(x, t, c, "x0", r), self.predict(x, t, c, "eps", r)

    def x0(self, x: Tensor, t: Tensor, c: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        return self.predict(x, t, c, "x0", r)

    def eps(self, x: Tensor, t: Tensor, c: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        return self.predict(x, t, c, "eps", r)

    def v(self, x: Tensor, t: Tensor, c: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        return self.predict(x, t, c, "v", r)

    def flow(self, x: Tensor, t: Tensor, c: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        return self.predict(x, t, c, "flow", r)

    def score(self, x: Tensor, t: Tensor, c: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        return self.predict(x, t, c, "score", r)


class Predictor(Predictions):
    """A network's predictions, on its own schedule or (by equal SNR) on another.

    Args: net: a network by the contract above; schedule: the one that x and t of the calls live on, None = the net's.
    End points: as `schedules.convert`.
    """

    def __init__(self, net: nn.Module, schedule: Schedule | None = None) -> None:
        self.net: Any = net
        self.schedule = schedule or self.net.schedule
        self.num_classes = int(self.net.num_classes)

    def predict(self, x: Tensor, t: Tensor, c: Tensor | None, target: Prediction, r: Tensor | None = None) -> Tensor:
        value, x_net, t_net = self._ask(x, t, c, r)
        if self.schedule == self.net.schedule:
            return convert(value, x, t, self.schedule, self.net.prediction, target)
        if target in ("x0", "eps"):
            return convert(value, x_net, t_net, self.net.schedule, self.net.prediction, target)
        return combine(*self._split(value, x_net, t_net), t, self.schedule, target)

    def pair(self, x: Tensor, t: Tensor, c: Tensor | None = None, r: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x0 and eps of one call of the network."""
        return self._split(*self._ask(x, t, c, r))

    def _ask(self, x: Tensor, t: Tensor, c: Tensor | None, r: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The network's own prediction, and x and t on its schedule."""
        x_net, t_net = translate(x, t, self.schedule, self.net.schedule)
        if c is None and self.num_classes:
            c = torch.full((len(x),), self.num_classes, device=x.device)
        if r is None:
            return self.net(x_net, t_net, c), x_net, t_net
        return self.net(x_net, t_net, c, matched_time(r, self.schedule, self.net.schedule)), x_net, t_net

    def _split(self, value: Tensor, x_net: Tensor, t_net: Tensor) -> tuple[Tensor, Tensor]:
        schedule, prediction = self.net.schedule, self.net.prediction
        x0 = convert(value, x_net, t_net, schedule, prediction, "x0")
        return x0, convert(value, x_net, t_net, schedule, prediction, "eps")


class Guided(Predictions):
    """Classifier-free guidance: null + weight (conditional - null), the same in every parameterisation.

    Args: predictor: of a network with classes (a Predictor or an oracle); weight: a number or [B]; 0 = null, 1 =
        conditional, as in Imagen (the original paper's w is weight - 1). Without c, and for networks without classes,
        the prediction is the null one.
    One call of the network on the doubled batch; on the plain one where the weight is the number 0 or 1.
    Source: Ho and Salimans 2022, arXiv 2207.12598, eq. 6.
    """

    def __init__(self, predictor: Predictions, weight: float | Tensor) -> None:
        self.predictor = predictor
        self.schedule = predictor.schedule
        self.num_classes = predictor.num_classes
        self.weight = weight

    def predict(self, x: Tensor, t: Tensor, c: Tensor | None, target: Prediction, r: Tensor | None = None) -> Tensor:
        if self._single(c):
            return self.predictor.predict(x, t, c if self.weight == 1 else None, target, r)
        return self._mix(self.predictor.predict(*self._doubled(x, t, c), target, self._twice(r)))

    def pair(self, x: Tensor, t: Tensor, c: Tensor | None = None, r: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x0 and eps of one call of the network."""
        if self._single(c):
            return self.predictor.pair(x, t, c if self.weight == 1 else None, r)
        x0, eps = self.predictor.pair(*self._doubled(x, t, c), self._twice(r))
        return self._mix(x0), self._mix(eps)

    def _single(self, c: Tensor | None) -> bool:
        if c is None or not self.num_classes:
            return True
        return not isinstance(self.weight, Tensor) and self.weight in (0, 1)

    def _doubled(self, x: Tensor, t: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        assert c is not None
        return torch.cat([x, x]), torch.cat([t, t]), torch.cat([c, torch.full_like(c, self.num_classes)])

    def _twice(self, r: Tensor | None) -> Tensor | None:
        return None if r is None else torch.cat([r, r])

    def _mix(self, both: Tensor) -> Tensor:
        conditional, null = both.chunk(2)
        weight = expand(self.weight, null) if isinstance(self.weight, Tensor) else self.weight
        return null + weight * (conditional - null)
