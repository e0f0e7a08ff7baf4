"""Noise schedules x_t = alpha(t) x0 + sigma(t) eps: four families, conversions of predictions, translation by SNR.

| prediction | of (x0, eps) |
|---|---|
| x0, eps | themselves |
| v | alpha eps - sigma x0 (Salimans and Ho 2022, arXiv 2202.00512) |
| flow | dx_t/dt = alpha' x0 + sigma' eps |
| score | -eps / sigma, the gradient of log p_t at x_t if eps is the posterior mean |

Everywhere t is [B] (or a scalar) in the schedule's own time, any floating dtype; coefficients are computed in t's dtype
and then cast to the data's. eps is standard normal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from workbench.errors import InputError

Prediction = Literal["x0", "eps", "v", "flow", "score"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)

#: What alpha or sigma is held above where it divides and the result only has to be finite (and large).
_TINY = 1e-12


class Schedule:
    """A family: levels, their derivatives, and the time of a given noise-to-signal ratio; the rest follows.

    t_min, t_max: the times that a network of this schedule is asked at; t_min = 0 only where `flow` is regular at 0.
    """

    t_min: float
    t_max: float

    def alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def d_alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def d_sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The time at which sigma/alpha has the ratio of these levels (any schedule's); finite, may exceed t_max."""
        raise NotImplementedError

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio (alpha / sigma)^2; infinite at the pure-data end."""
        return (self.alpha(t) / self.sigma(t)).square()

    def from_snr(self, snr: Tensor) -> Tensor:
        """The time of a signal-to-noise ratio in [0, inf], both ends included."""
        return self.time_of((1 + 1 / snr).rsqrt(), (1 + snr).rsqrt())

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) eps."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * eps

    def renoise(self, x_s: Tensor, eps: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """From the noisier-or-equal time t >= s on: x_t distributed as x_t given x_s, eps fresh standard normal.

        x_t = (alpha_t/alpha_s) x_s + sqrt(sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2) eps. Where x_s is pure noise
        (alpha_s = 0), only t = s is meant, and x_s comes back.
        """
        alpha_s, alpha_t = self.alpha(s), self.alpha(t)
        pure = alpha_s == 0
        ratio = torch.where(pure, torch.ones_like(alpha_s), alpha_t / torch.where(pure, torch.ones_like(s), alpha_s))
        added = (self.sigma(t).square() - (ratio * self.sigma(s)).square()).clamp_min(0).sqrt()
        return expand(ratio, x_s) * x_s + expand(added, x_s) * eps


@dataclass(frozen=True, slots=True)
class RectifiedFlow(Schedule):
    """alpha = 1 - t, sigma = t, t in [0, 1]; flow = eps - x0, regular at both ends (Liu et al. 2022, 2209.03003)."""

    t_min: float = 0.0
    t_max: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma / (alpha + sigma)


@dataclass(frozen=True, slots=True)
class VariancePreserving(Schedule):
    """alpha^2 + sigma^2 = 1 with beta rising linearly in t in (0, 1], DDPM's continuous form.

    log alpha = -t^2 (beta_max - beta_min)/4 - t beta_min/2 (Song et al. 2021, arXiv 2011.13456, appendix C). sigma'
    grows as t^-1/2 towards 0, hence t_min; alpha(1) = 0.0066: t_max is not quite pure noise.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5
    t_max: float = 1.0

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -t.square() * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * (t * (self.beta_max - self.beta_min) + self.beta_min) / 2

    def d_sigma(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.d_alpha(t) / self.sigma(t).clamp_min(_TINY)

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        loss = torch.log1p((sigma / alpha.clamp_min(_TINY)).square())  # -2 log alpha(t)
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * loss).sqrt()
        return 2 * loss / (self.beta_min + root)  # the root of the quadratic without cancellation


@dataclass(frozen=True, slots=True)
class Edm(Schedule):
    """alpha = 1, sigma = t: time is the noise level, t_min = sigma_min, t_max = sigma_max (arXiv 2206.00364)."""

    t_min: float = 0.002
    t_max: float = 80.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma / alpha.clamp_min(_TINY)


@dataclass(frozen=True, slots=True)
class Trigonometric(Schedule):
    """TrigFlow: alpha = cos t, sigma = sigma_data sin t, t in [0, pi/2]; regular at both ends (arXiv 2410.11081).

    sigma_data: standard deviation of the data, which also scales the noise (the paper's z is sigma_data eps); 1 for
    normalised data: then v and flow are the same.
    """

    sigma_data: float = 1.0
    t_min: float = 0.0
    t_max: float = math.pi / 2

    def alpha(self, t: Tensor) -> Tensor:
        return t.cos()

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * t.sin()

    def d_alpha(self, t: Tensor) -> Tensor:
        return -t.sin()

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * t.cos()

    def time_of(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.atan2(sigma / self.sigma_data, alpha)


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """[B] (or a scalar) made to multiply `like` [B, *shape], in its dtype."""
    return coefficient.to(like.dtype).reshape(coefficient.shape + (1,) * (like.ndim - coefficient.ndim))


def convert(
    value: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule, source: Prediction, target: Prediction
) -> Tensor:
    """What a prediction of `source` at x_t says of `target`: value, x_t [B, *shape], t [B] -> [B, *shape].

    The two equations x_t = alpha x0 + sigma eps and value = p x0 + q eps are solved for target = P x0 + Q eps:

        det target = (P q - Q p) x_t + (alpha Q - sigma P) value,    det = alpha q - sigma p

    v and flow determine everything at both ends. Where nothing is left to determine it from, the result is inf or NaN,
    not a made-up number: whatever needs x0, from eps or score at pure noise (alpha = 0); whatever needs eps, from x0 at
    pure data (sigma = 0); score at pure data. (x0 from eps at pure data, eps from x0 at pure noise are regular.)

    Raises: InputError for an unknown prediction.
    """
    if source == target:
        return value
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if source == "score":
        return convert(-expand(sigma, x_t) * value, x_t, t, schedule, "eps", target)
    if target == "score":
        return convert(value, x_t, t, schedule, source, "eps") / -expand(sigma, x_t)
    p, q = _parts(source, t, schedule)
    wanted_p, wanted_q = _parts(target, t, schedule)
    det = alpha * q - sigma * p
    of_x = (wanted_p * q - wanted_q * p) / det
    of_value = (alpha * wanted_q - sigma * wanted_p) / det
    return expand(of_x, x_t) * x_t + expand(of_value, x_t) * value


def combine(x0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule, target: Prediction) -> Tensor:
    """The prediction `target` made of x0 and eps [B, *shape] at times t [B]; score is infinite at sigma = 0."""
    if target == "score":
        return eps / -expand(schedule.sigma(t), eps)
    p, q = _parts(target, t, schedule)
    return expand(p, x0) * x0 + expand(q, x0) * eps


def _parts(kind: Prediction, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """(p, q) of the prediction p x0 + q eps, each like t."""
    if kind == "x0":
        return torch.ones_like(t), torch.zeros_like(t)
    if kind == "eps":
        return torch.zeros_like(t), torch.ones_like(t)
    if kind == "v":
        return -schedule.sigma(t), schedule.alpha(t)
    if kind == "flow":
        return schedule.d_alpha(t), schedule.d_sigma(t)
    raise InputError(f"Prediction {kind!r}: give one of {', '.join(PREDICTIONS)}.")


def matched_time(t: Tensor, source: Schedule, target: Schedule) -> Tensor:
    """The target schedule's time of equal signal-to-noise ratio, clamped to its [t_min, t_max]."""
    if source == target:
        return t
    return target.time_of(source.alpha(t), source.sigma(t)).clamp(target.t_min, target.t_max)


def translate(x_t: Tensor, t: Tensor, source: Schedule, target: Schedule) -> tuple[Tensor, Tensor]:
    """The same sample on another schedule: x rescaled and the time of equal SNR; x0 and eps stay what they are.

    Args: x_t [B, *shape], t [B] on `source`. Returns: (x, t) on `target`. Where the target never reaches an SNR of the
    source (t clamped to its range), x is scaled to the target's total power alpha^2 + sigma^2 all the same.
    Source: Lu and Song 2024 (2410.11081, appendix B); regular at both ends and differentiable in t there.
    """
    if source == target:
        return x_t, t
    matched = matched_time(t, source, target)
    return expand(_power(matched, target) / _power(t, source), x_t) * x_t, matched


def _power(t: Tensor, schedule: Schedule) -> Tensor:
    return torch.hypot(schedule.alpha(t), schedule.sigma(t))


def time_of_index(index: Tensor, alphas_cumprod: Tensor, schedule: Schedule) -> Tensor:
    """Times [B] of integer steps [B] of a discrete process (alphas_cumprod [N] = its alpha^2), by equal SNR."""
    alpha_squared = alphas_cumprod[index]
    return schedule.time_of(alpha_squared.sqrt(), (1 - alpha_squared).sqrt())


def index_of_time(t: Tensor, alphas_cumprod: Tensor, schedule: Schedule) -> Tensor:
    """The step [B] long of a discrete process whose angle atan(sigma/alpha) is nearest to that of the times t [B]."""
    angles = torch.atan2((1 - alphas_cumprod).sqrt(), alphas_cumprod.sqrt())
    wanted = torch.atan2(schedule.sigma(t), schedule.alpha(t)).to(angles.dtype)
    return (wanted[:, None] - angles).abs().argmin(1)
