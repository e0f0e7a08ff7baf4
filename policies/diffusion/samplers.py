"""Samplers: one-step solvers of the probability-flow ODE, whole trajectories, and few-step re-noising.

`predictor` is anything with the methods of `predict.Predictions`; x is [B, *shape]; c is [B] long or None. A time grid
is a 1-D tensor [K + 1] that falls from noise to data: K calls of the network (Heun: up to 2 K). Gradients flow: call
under torch.no_grad where none is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.policies.diffusion.options import Solver
from workbench.policies.diffusion.predict import Predictions
from workbench.policies.diffusion.schedules import Schedule, expand

Step = Callable[[Predictions, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def uniform_times(
    schedule: Schedule, steps: int, start: float | None = None, end: float | None = None, dtype=torch.float64
) -> Tensor:
    """[steps + 1] equidistant times from `start` (t_max) to `end` (t_min)."""
    start = schedule.t_max if start is None else start
    end = schedule.t_min if end is None else end
    return torch.linspace(start, end, steps + 1, dtype=dtype)


def karras_times(
    schedule: Schedule, steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """[steps + 1] times, sigma/alpha falling from sigma_max to sigma_min evenly in its 1/rho-th power, then 0; float64.

    Source: Karras et al. 2022, arXiv 2206.00364, eq. 5; carried to any schedule by equal SNR.
    """
    ramp = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps, dtype=torch.float64)
    ratio = torch.cat([ramp**rho, ramp.new_zeros(1)])
    return schedule.time_of(torch.ones_like(ratio), ratio)


def prior(noise: Tensor, schedule: Schedule, t: float | None = None) -> Tensor:
    """Where a trajectory starts: standard normal noise [B, *shape] scaled to sigma(t), t = t_max by default."""
    return schedule.sigma(torch.tensor(schedule.t_max if t is None else t, dtype=torch.float64)).item() * noise


def euler_step(predictor: Predictions, x: Tensor, t: Tensor, s: Tensor, c: Tensor | None = None) -> Tensor:
    """From t to s (both [B]) along the flow at t."""
    return x + expand(s - t, x) * predictor.flow(x, t, c)


def heun_step(predictor: Predictions, x: Tensor, t: Tensor, s: Tensor, c: Tensor | None = None) -> Tensor:
    """From t to s (both [B]) by the mean of the flows at both ends; Euler where s < t_min, where flow is singular.

    Source: Karras et al. 2022, arXiv 2206.00364, algorithm 1.
    """
    flow = predictor.flow(x, t, c)
    step = expand(s - t, x)
    reached = x + step * flow
    regular = s >= predictor.schedule.t_min
    if not regular.any():
        return reached
    ends = predictor.flow(reached, torch.where(regular, s, t), c)
    return torch.where(expand(regular, x).bool(), x + step * (flow + ends) / 2, reached)


def ddim_step(predictor: Predictions, x: Tensor, t: Tensor, s: Tensor, c: Tensor | None = None) -> Tensor:
    """From t to s (both [B]) with the predicted x0 and eps held (arXiv 2010.02502, eq. 12 with sigma = 0)."""
    x0, eps = predictor.pair(x, t, c)
    return predictor.schedule.add_noise(x0, eps, s)


def renoise_step(
    predictor: Predictions, x: Tensor, t: Tensor, s: Tensor, eps: Tensor, c: Tensor | None = None
) -> Tensor:
    """From t to s (both [B]) by the predicted x0 and fresh noise eps: one step of the multistep consistency sampler."""
    return predictor.schedule.add_noise(predictor.x0(x, t, c), eps, s)


STEPS: dict[Solver, Step] = {"euler": euler_step, "heun": heun_step, "ddim": ddim_step}


def ode(predictor: Predictions, x: Tensor, times: Tensor, c: Tensor | None = None, solver: Solver = "euler") -> Tensor:
    """The state at times[-1] of the probability-flow ODE from x at times[0] (pure noise: `prior`)."""
    for state in _ode(predictor, x, times, c, solver):
        x = state
    return x


def ode_path(
    predictor: Predictions, x: Tensor, times: Tensor, c: Tensor | None = None, solver: Solver = "euler"
) -> Tensor:
    """All states [K + 1, B, *shape] of the probability-flow ODE, x itself first."""
    return torch.stack(list(_ode(predictor, x, times, c, solver)))


def _ode(predictor: Predictions, x: Tensor, times: Tensor, c: Tensor | None, solver: Solver) -> Iterator[Tensor]:
    if solver not in STEPS:
        raise InputError(f"Solver {solver!r}: give one of {', '.join(STEPS)}.")
    grid = _grid(times, x)
    yield x
    for t, s in pairwise(grid):
        x = STEPS[solver](predictor, x, t, s, c)
        yield x


def sde(
    predictor: Predictions,
    x: Tensor,
    times: Tensor,
    noise: torch.Generator | Sequence[Tensor] | Tensor,
    c: Tensor | None = None,
) -> Tensor:
    """x0 after K rounds of predicting x0 and re-noising it: multistep sampling of consistency models and DMD2.

    Args: x: the state at times[0]; times: [K + 1]; the last one is the end, where nothing is added; noise: a generator,
        or K - 1 tensors like x (a tensor [K - 1, B, *shape]).
    Returns: the last x0 [B, *shape].
    Source: Song et al. 2023, arXiv 2303.01469, algorithm 1.
    """
    for state in _sde(predictor, x, times, noise, c):
        x = state
    return x


def sde_path(
    predictor: Predictions,
    x: Tensor,
    times: Tensor,
    noise: torch.Generator | Sequence[Tensor] | Tensor,
    c: Tensor | None = None,
) -> Tensor:
    """As `sde`: the noisy states at times[:-1], then the last x0, [K + 1, B, *shape]."""
    return torch.stack(list(_sde(predictor, x, times, noise, c)))


def _sde(
    predictor: Predictions,
    x: Tensor,
    times: Tensor,
    noise: torch.Generator | Sequence[Tensor] | Tensor,
    c: Tensor | None,
) -> Iterator[Tensor]:
    grid = _grid(times, x)
    rounds = len(grid) - 1
    if not isinstance(noise, torch.Generator) and len(noise) != rounds - 1:
        raise InputError(f"{rounds} rounds of sampling re-noise {rounds - 1} times: {len(noise)} noises were given.")
    yield x
    for i in range(rounds - 1):
        if isinstance(noise, torch.Generator):
            eps = torch.randn(x.shape, generator=noise, device=noise.device, dtype=x.dtype).to(x.device)
        else:
            eps = noise[i]
        x = renoise_step(predictor, x, grid[i], grid[i + 1], eps, c)
        yield x
    yield predictor.x0(x, grid[-2], c)


def _grid(times: Tensor, x: Tensor) -> Tensor:
    """[K + 1, B], in the dtype of `times`."""
    if times.ndim != 1 or len(times) < 2:
        raise InputError(f"A time grid is one-dimensional, with at least 2 times, not of shape {list(times.shape)}.")
    return times.to(x.device)[:, None].expand(-1, len(x))
