"""Pools of (noise, sample) pairs that a teacher's ODE joins, and a source that anneals towards that coupling.

A pool is a table with z [N, *shape], x0 [N, *shape] and, for teachers with classes, c [N]. torch is imported when
something runs, so that a method's phases can be listed without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.errors import InputError
from workbench.policies.diffusion.options import Solver

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.policies.diffusion.predict import Predictions
    from workbench.policies.loop.view import View

#: The table that holds a pool.
PAIRS = "pairs"


def make_pairs(
    teacher: Predictions,
    count: int,
    shape: Sequence[int],
    *,
    steps: int = 50,
    solver: Solver = "heun",
    batch_size: int = 1024,
    seed: int = 0,
    device: str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """A pool: standard normal z, x0 at the end of the teacher's probability-flow ODE from it, c uniform over classes.

    Args: shape: of one datum; steps: of the solver, equal in the schedule's time; device: of the teacher; the pool is
        on the CPU; on_progress: called with (pairs done, count) after each batch.
    The pool does not depend on `batch_size` beyond the rounding of batched arithmetic.
    Raises: InputError for a count, number of steps or batch size below 1.
    """
    import torch

    from workbench.policies.diffusion.samplers import ode, prior, uniform_times

    if min(count, steps, batch_size) < 1:
        raise InputError(f"A pool needs 1 or more of each: count {count}, steps {steps}, batch_size {batch_size}.")
    generator = torch.Generator().manual_seed(seed)
    pool = {"z": torch.randn(count, *shape, generator=generator)}
    if teacher.num_classes:
        pool["c"] = torch.randint(teacher.num_classes, (count,), generator=generator)
    grid = uniform_times(teacher.schedule, steps)
    made = []
    with torch.no_grad():
        for start in range(0, count, batch_size):
            rows = {key: column[start : start + batch_size].to(device) for key, column in pool.items()}
            made.append(ode(teacher, prior(rows["z"], teacher.schedule), grid, rows.get("c"), solver).cpu())
            if on_progress:
                on_progress(min(start + batch_size, count), count)
    return pool | {"x0": torch.cat(made)}


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnealedPairs:
    """Rows of a pool whose noise is at first independent of the sample and, after a warm-up, the teacher's.

    z_beta = sqrt(1 - beta^2) z + beta eps; beta falls in a straight line from 1, at the first step, to 0. z_beta is
    standard normal for every beta, and its correlation with z is sqrt(1 - beta^2).

    Args:
        warmup: share of the phase's steps until beta is 0; 0 = the pool as it is, to the bit.
        flip: half of the steps mirror the last dimension of z and x0, together.
        segment: the phase's name of this source.
    Source: SlimFlow, arXiv 2407.12718, sec. 4.1 and the released reflow.
    """

    warmup: float
    flip: bool = False
    table: str = PAIRS
    segment: str = "main"

    def __post_init__(self) -> None:
        if not 0 <= self.warmup <= 1:
            raise InputError(f"The warm-up of annealed pairs is a share of the steps, in [0, 1], not {self.warmup}.")

    def beta(self, step: int, steps: int) -> float:
        """At a step, from 0, of a phase."""
        warmup = self.warmup * steps
        return max(0.0, 1 - step / warmup) if warmup else 0.0

    def __call__(self, view: View) -> Mapping[str, Tensor]:
        """The rows of the micro-batch."""
        rows = view.stored(self.table, self.segment)
        eps, flips = view.randn_like(rows["z"]), view.uniform() < 0.5
        beta = self.beta(view.step, view.steps)
        view.log("annealed_pairs/beta", beta)
        if beta > 0:
            rows["z"] = (1 - beta**2) ** 0.5 * rows["z"] + beta * eps
        if self.flip and flips:
            rows["z"], rows["x0"] = rows["z"].flip(-1), rows["x0"].flip(-1)
        return rows
