"""Gaussian mixtures as diffusion networks: exact predictions, densities and samples, to test every objective against.

For x_t = alpha x0 + sigma eps and component k of mean m, standard deviation s: x_t ~ N(alpha m, V), V = alpha^2 s^2 +
sigma^2, and given k the posterior means are

    x0 = m + alpha s^2 / V (x_t - alpha m)      eps = sigma / V (x_t - alpha m)      score = -(x_t - alpha m) / V

all regular at both ends; the mixture's are their means under the posterior of k.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.policies.diffusion.predict import Predictions
from workbench.policies.diffusion.schedules import Prediction, RectifiedFlow, Schedule, combine, expand


class GaussianMixture(nn.Module, Predictions):
    """A mixture of isotropic Gaussians by the network contract and, exact at the end points, the Predictor's methods.

    Args:
        means: [K, *shape]; stds: [K] > 0; weights: [K] > 0, normalised here.
        labels: class of each component, 0 .. num_classes - 1 (every class at least once), or None = unconditional.
        schedule, prediction: what `forward` is asked on and answers.
    Has no parameter. Differentiable in x and t, also in forward mode. Kept in float64, answers in x's dtype.
    Raises: InputError for shapes that do not fit, stds or weights that are not positive, classes without component.
    """

    means: Tensor
    stds: Tensor
    log_weights: Tensor
    labels: Tensor

    def __init__(
        self,
        means: Tensor,
        stds: Tensor,
        weights: Tensor,
        labels: Tensor | None = None,
        schedule: Schedule | None = None,
        prediction: Prediction = "flow",
    ) -> None:
        super().__init__()
        if not len(means) == len(stds) == len(weights) or not ((stds > 0).all() and (weights > 0).all()):
            raise InputError(
                f"Each of the {len(means)} means of a mixture needs a positive std and weight: {stds}, {weights}."
            )
        classes = [] if labels is None else sorted(set(labels.tolist()))
        if classes != list(range(len(classes))):
            raise InputError(f"Labels of components must be 0 .. C - 1, each at least once, not {classes}.")
        self.schedule: Schedule = schedule or RectifiedFlow()
        self.prediction: Prediction = prediction
        self.num_classes = len(classes)
        self.register_buffer("means", means.double())
        self.register_buffer("stds", stds.double())
        self.register_buffer("log_weights", (weights.double() / weights.double().sum()).log())
        self.register_buffer("labels", torch.zeros(len(means), dtype=torch.long) if labels is None else labels.long())

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        """`prediction` at x [B, *shape], t [B]; r is taken and ignored: the answer is the instantaneous one."""
        return self.predict(x, t, c, self.prediction)

    def predict(self, x: Tensor, t: Tensor, c: Tensor | None, target: Prediction, r: Tensor | None = None) -> Tensor:
        x0, score = self._posterior(x, t, c)
        if target == "score":
            return score
        return combine(x0, -expand(self.schedule.sigma(t), x) * score, t, self.schedule, target)

    def pair(self, x: Tensor, t: Tensor, c: Tensor | None = None, r: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x0 and eps."""
        x0, score = self._posterior(x, t, c)
        return x0, -expand(self.schedule.sigma(t), x) * score

    def log_prob(self, x: Tensor, t: Tensor | None = None, c: Tensor | None = None) -> Tensor:
        """log density [B] in nats at x [B, *shape]: of the noised mixture at times t [B], of the data without t."""
        if t is None:
            return self._joint(x, x.new_ones(len(x)), x.new_zeros(len(x)), c)[0].logsumexp(1)
        return self._joint(x, self.schedule.alpha(t), self.schedule.sigma(t), c)[0].logsumexp(1)

    def sample(
        self, count: int, generator: torch.Generator | None = None, c: Tensor | None = None, dtype=torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Data [count, *shape] and their labels [count] (0 without classes); c [count] decides the classes."""
        device = self.means.device
        if c is None and self.num_classes:
            c = torch.full((count,), self.num_classes, device=device)
        weights = self._log_weights(c).exp().expand(count, -1)
        k = torch.multinomial(weights, 1, generator=generator)[:, 0]
        noise = torch.randn((count, *self.means.shape[1:]), generator=generator, device=device, dtype=torch.float64)
        x0 = self.means[k] + expand(self.stds[k], noise) * noise
        return x0.to(dtype), self.labels[k]

    def _log_weights(self, c: Tensor | None) -> Tensor:
        """[1 or B, K], normalised within the class; the null label is all."""
        if c is None or not self.num_classes:
            return self.log_weights[None]
        others = (self.labels != c[:, None]) & (c != self.num_classes)[:, None]
        return self.log_weights.masked_fill(others, -torch.inf).log_softmax(1)

    def _joint(self, x: Tensor, alpha: Tensor, sigma: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """log p(x, k) [B, K], x - alpha m [B, K, D], V [B, K]."""
        means, stds = self.means.flatten(1).to(x.dtype), self.stds.to(x.dtype)
        alpha, sigma = alpha.to(x.dtype).expand(len(x)), sigma.to(x.dtype).expand(len(x))
        off = x.flatten(1)[:, None] - alpha[:, None, None] * means
        variance = (alpha[:, None] * stds).square() + sigma.square()[:, None]
        log_normal = -off.square().sum(-1) / (2 * variance) - means.shape[1] / 2 * (2 * math.pi * variance).log()
        return self._log_weights(c).to(x.dtype) + log_normal, off, variance

    def _posterior(self, x: Tensor, t: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Posterior mean of x0, and the score, like x."""
        alpha = self.schedule.alpha(t)
        joint, off, variance = self._joint(x, alpha, self.schedule.sigma(t), c)
        share = joint.softmax(1)
        gain = alpha.to(x.dtype).expand(len(x))[:, None] * self.stds.to(x.dtype).square() / variance
        x0 = (share[..., None] * (self.means.flatten(1).to(x.dtype) + gain[..., None] * off)).sum(1)
        score = -((share / variance)[..., None] * off).sum(1)
        return x0.reshape(x.shape), score.reshape(x.shape)


def gauss8(
    num_classes: int = 0, std: float = 0.08, radius: float = 2.0, schedule: Schedule | None = None
) -> GaussianMixture:
    """Eight equal modes on a circle in the plane; with classes, mode i is of class i modulo num_classes."""
    angles = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    means = radius * torch.stack([angles.cos(), angles.sin()], 1)
    labels = torch.arange(8) % num_classes if num_classes else None
    return GaussianMixture(means, torch.full((8,), std), torch.ones(8), labels, schedule)


def checkerboard(side: int = 4, schedule: Schedule | None = None) -> GaussianMixture:
    """The eight dark fields of a 4 x 4 board on [-2, 2]^2, each a grid of side x side narrow modes (std = half a cell).

    A smooth stand-in for the uniform board of `testbeds.checkerboard_data`, whose density has edges.
    """
    cell = 1 / side
    inside = (torch.arange(side, dtype=torch.float64) + 0.5) * cell
    fields = [(i - 2.0, j - 2.0) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
    grid = torch.cartesian_prod(inside, inside)
    means = torch.cat([grid + torch.tensor(corner, dtype=torch.float64) for corner in fields])
    return GaussianMixture(means, torch.full((len(means),), cell / 2), torch.ones(len(means)), None, schedule)


def two_gaussians(distance: float = 3.0, std: float = 0.5, schedule: Schedule | None = None) -> GaussianMixture:
    """Two classes in the plane, one Gaussian each, on the first axis: guidance has a simple closed form."""
    means = torch.tensor([[-distance / 2, 0.0], [distance / 2, 0.0]])
    return GaussianMixture(means, torch.full((2,), std), torch.ones(2), torch.tensor([0, 1]), schedule)
