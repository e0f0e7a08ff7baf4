"""Consistency functions: boundary condition, the discrete target, and the tangent of continuous time with its bounds.

t is [B], x [B, *shape] everywhere. Pure functions of tensors; `Predictions` are networks or oracles on a schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.policies.diffusion.options import Bound, Derivative, Distance, Solver
from workbench.policies.diffusion.predict import Predictions
from workbench.policies.diffusion.samplers import STEPS
from workbench.policies.diffusion.schedules import Schedule, expand
from workbench.policies.diffusion.score_terms import squared_error


def with_boundary(
    x0: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule, start: float = 0.0, sigma_data: float = 0.5
) -> Tensor:
    """The consistency function of a denoiser: its x0 at x_t, changed so that it is x_t / alpha at the start.

    With rho = sigma/alpha, the raw network F of EDM's preconditioning (x0 = skip x + out F) enters f = c_skip x_t/alpha
    + c_out F with c_skip = sd^2 / ((rho - start)^2 + sd^2), c_out = sd (rho - start) / sqrt(rho^2 + sd^2). Solved for
    x0, this is (1 - start/rho) x0 + a share of x_t, whatever the network predicts; for start = 0 it is x0 itself.

    Args: x0: prediction at x_t, t >= start; start: the ratio rho where the trajectories end; sigma_data: sd.
    Source: Song et al. 2023, arXiv 2303.01469, eq. 5 and appendix C.
    """
    if start == 0:
        return x0
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    beyond = sigma - start * alpha  # alpha (rho - start)
    gain = beyond / sigma
    power = (sigma_data * alpha).square()
    share = sigma_data**2 * alpha * (1 / (beyond.square() + power) - gain / (sigma.square() + power))
    return expand(share, x_t) * x_t + expand(gain, x_t) * x0


def consistency_target(
    target: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    teacher: Predictions,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    c: Tensor | None = None,
    solver: Solver = "heun",
) -> Tensor:
    """What `target`, a consistency function, makes of the point at s < t on the teacher's trajectory through x_t.

    One step of the solver; no gradient. Source: Song et al. 2023, arXiv 2303.01469, eq. 6 and 7.
    """
    with torch.no_grad():
        return target(STEPS[solver](teacher, x_t, t, s, c), s, c)


def distance(a: Tensor, b: Tensor, kind: Distance, huber: float = 0.00054) -> Tensor:
    """[B, *shape] twice -> [B]: mean square ("l2"), or the root of the summed square, smoothed below a small c.

    Args: huber: c / sqrt(elements) of sqrt(|a - b|^2 + c^2) - c (Song and Dhariwal 2023, arXiv 2310.14189, sec. 3.3).
    """
    if kind == "l2":
        return squared_error(a, b)
    difference = (a - b).flatten(1)
    c = huber * difference.shape[1] ** 0.5
    return (difference.square().sum(1) + c**2).sqrt() - c


def total_derivative(
    function: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    dx: Tensor,
    dt: Tensor,
    kind: Derivative = "jvp",
    step: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """function(x, t) and its derivative along (dx, dt), both without gradient.

    Args: kind: "jvp" is exact, in one forward-mode pass; "difference" is for networks that cannot run in forward mode:
        a central difference of +- step, two more passes, its error of order step^2 and round-off / step.
    Raises: InputError, with what to do, where an operation of the function has no forward mode.
    """
    with torch.no_grad():
        if kind == "difference":
            with torch.autocast(x.device.type, enabled=False):  # bfloat16's round-off / step is no derivative
                ahead = function(x + step * dx, t + step * dt)
                behind = function(x - step * dx, t - step * dt)
            return function(x, t), (ahead - behind) / (2 * step)
        try:
            found: Any = torch.func.jvp(function, (x, t), (dx, dt))
        except (NotImplementedError, RuntimeError) as error:
            raise InputError(
                f"This network cannot run in forward mode ({error}). Take derivative='difference'."
            ) from error
    value, change = found
    return value.detach(), change.detach()


def consistency_tangent(
    x_t: Tensor, t: Tensor, value: Tensor, change: Tensor, velocity: Tensor, ramp: float = 1.0
) -> Tensor:
    """-cos^2 t (F - dx/dt) - ramp (cos t sin t x_t + dF): cos t times the derivative of f = cos t x_t - sin t F.

    Args: on the trigonometric schedule with unit data: value: F; velocity: the teacher's dx/dt; change: dF, the
        derivative of F along cos t sin t (dx/dt, 1); ramp: in [0, 1], 0 = distil the velocity only.
    Source: Lu and Song 2024, arXiv 2410.11081, eq. 6 and sec. 4.1 (there with cos t sin t inside the derivative).
    """
    cos, sin = expand(t.cos(), x_t), expand(t.sin(), x_t)
    return -cos.square() * (value - velocity) - ramp * (cos * sin * x_t + change)


def bounded(g: Tensor, kind: Bound = "norm", constant: float = 0.1) -> Tensor:
    """A tangent that cannot outgrow the loss; a row that is not finite becomes 0.

    Args: kind: "norm": g / (|g| + constant), |g| over all elements of a row; "clamp": each element in [-1, 1].
    Source: Lu and Song 2024, arXiv 2410.11081, sec. 4.2.
    """
    finite = g.flatten(1).isfinite().all(1).reshape(-1, *[1] * (g.ndim - 1))
    g = torch.where(finite, g, torch.zeros_like(g))
    return g.clamp(-1, 1) if kind == "clamp" else g / (expand(g.flatten(1).norm(dim=1), g) + constant)


def tangent_loss(value: Tensor, target: Tensor, t: Tensor, log_variance: Tensor, sigma_data: float = 0.5) -> Tensor:
    """exp(-u) mean (F - target)^2 / (sigma_data tan t) + u, [B].

    Args: target: F + tangent, without gradient; log_variance: u [B], learned; t in (0, pi/2].
    Source: SANA-Sprint, arXiv 2503.09641, eq. 7; the released code has the mean over elements.
    """
    # abs: float32 rounds pi/2 up, where the tangent is negative
    error = squared_error(value, target)
    return (-log_variance).exp() * error / (sigma_data * t.tan().abs()) + log_variance
