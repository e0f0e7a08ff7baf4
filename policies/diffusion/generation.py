"""Sources of methods that train a student on what it makes of noise, and the times at which they look at it.

Times are written as fractions of the teacher's schedule, 1 = pure noise, and everything happens on that schedule.
torch is imported when a source or a law is called, so that a method's phases can be listed without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.policies.diffusion.predict import Predictions
    from workbench.policies.diffusion.schedules import Schedule
    from workbench.policies.loop.view import View

#: The table of real data handed to a run: x0 [N, *shape] and, with classes, c [N] long.
TABLE = "data"
#: Times [B] of a micro-batch on a schedule.
TimeLaw = Callable[["View", "Schedule"], "Tensor"]


def time_at(fraction: Tensor, schedule: Schedule) -> Tensor:
    """Times of the fractions [B] in [0, 1] of a schedule, as its teachers count their steps.

    Linear in t; for EDM, Karras's levels with rho = 7 (arXiv 2206.00364, eq. 5).
    """
    from workbench.policies.diffusion.schedules import Edm

    if not isinstance(schedule, Edm):
        return schedule.t_min + fraction * (schedule.t_max - schedule.t_min)
    low, high = schedule.t_min ** (1 / 7), schedule.t_max ** (1 / 7)
    return (low + fraction * (high - low)) ** 7


@dataclass(frozen=True, kw_only=True, slots=True)
class UniformTime:
    """Fractions uniform in [low, high]; the default leaves out what lies below the first of 1,000 steps."""

    low: float = 0.001
    high: float = 1.0

    def __call__(self, view: View, schedule: Schedule) -> Tensor:
        """[B]."""
        return time_at(self.low + (self.high - self.low) * view.rand(), schedule)


def schedule_of(view: View) -> Schedule:
    """The teacher's, on which samples are noised."""
    teacher: Any = view.role("teacher")
    return teacher.schedule


def simulate(
    predictor: Predictions, z: Tensor, times: Sequence[Tensor], noises: Sequence[Tensor], c: Tensor | None = None
) -> Tensor:
    """x0 [B, *shape] of the last of `len(noises)` + 1 steps; the steps before it are made without a graph.

    A step predicts x0, which is noised to the next time ("sde" of DMD2, multistep consistency sampling); with as many
    noises as there are times, less one, this is the sampler of the trained student.

    Args: z [B, *shape] standard normal, scaled to sigma at the first time; times: falling, each [B]; noises: like z.
    """
    import torch

    from workbench.policies.diffusion.samplers import renoise_step
    from workbench.policies.diffusion.schedules import expand

    x_t = expand(predictor.schedule.sigma(times[0]), z) * z
    with torch.no_grad():
        for step, eps in enumerate(noises):
            x_t = renoise_step(predictor, x_t, times[step], times[step + 1], eps, c)
    return predictor.x0(x_t, times[len(noises)], c).to(z.dtype)  # half precision would meet 1/alpha in the losses


def step_times(schedule: Schedule, steps: int, start: float, size: int, device: Any = None) -> list[Tensor]:
    """The times of a student's steps, each [size]: fractions start (1 - k/steps), k = 0 .. steps - 1."""
    import torch

    return [time_at(torch.full((size,), start * (1 - k / steps), device=device), schedule) for k in range(steps)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """Samples "x" [B, *shape] that the student makes of noise "z", with their classes "c" [B] if the teacher has any.

    With several steps, one is drawn for the whole optimiser step, on all processes; those before it run without a graph
    (backward simulation, arXiv 2405.14867). In the turn of another role there is no graph at all.

    Args:
        steps, start: as in `step_times`.
        conditions: table whose "c" are asked for; None = classes uniformly.
        segment: the phase's name of this source, if it has several.
    Raises: InputError for a number of steps or a start that cannot be.
    """

    steps: int = 1
    start: float = 1.0
    conditions: str | None = None
    segment: str = "main"

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.start <= 1:
            raise InputError(
                f"A student takes 1 step or more from a fraction in (0, 1]; got {self.steps}, {self.start}."
            )

    def __call__(self, view: View) -> Mapping[str, Tensor]:
        import torch

        from workbench.policies.diffusion.predict import Predictor

        schedule, net = schedule_of(view), view.role("student")
        student = Predictor(net, schedule)
        c = self._classes(view, student.num_classes)
        times = step_times(schedule, self.steps, self.start, view.size, view.device)
        shape: Any = net.shape
        z = view.randn(*shape)
        noises = [view.randn(*shape) for _ in range(int(view.uniform() * self.steps))]

        def make() -> Tensor:
            with torch.set_grad_enabled(view.trains == "student"):
                return simulate(student, z, times, noises, c)

        rows = {"x": view.shared(f"samples/{self.segment}", make), "z": z}
        return rows if c is None else rows | {"c": c}

    def _classes(self, view: View, count: int) -> Tensor | None:
        if self.conditions is not None:
            return view.stored(self.conditions, self.segment)["c"]
        return view.randint(count) if count else None
