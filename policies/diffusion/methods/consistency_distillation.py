"""Consistency distillation: the student maps neighbours on the teacher's trajectory to the same end.

Paper: "Consistency Models" (2303.01469), algorithm 2; the building block of the cards of the consistency family (17).
Equation: L = E d(f(x_t, t), sg f'(x_s, s)), t > s neighbours on a grid of N times, x_t noised data, x_s one step of the
    teacher's ODE solver from x_t; f' a moving average of the student (decay μ; μ = 0: the student itself); f is x_t at
    the smallest time. For the exact flow map and a perfect solver the loss is 0.
Deviations: d is l2 or pseudo-Huber, not LPIPS, which needs downloaded weights; any schedule and parameterisation, by
    equal signal-to-noise ratio (on EDM's with its x0 the formulas are the paper's).
Verified by: tests/policies/diffusion/test_consistency_distillation.py; benchmarks/bench_diffusion.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from workbench.errors import InputError
from workbench.policies.catalog import Entry
from workbench.policies.diffusion.generation import TABLE
from workbench.policies.diffusion.options import Distance, Solver
from workbench.policies.nouns import Phase, Role, Stored

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.policies.diffusion.schedules import Schedule
    from workbench.policies.loop.view import View

Grid = Literal["karras", "uniform"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsistencyDistillation:
    """Settings; defaults of the paper for CIFAR-10.

    Args:
        num_times: N of the grid; grid: "karras": sigma/alpha from sigma_min to sigma_max, dense at small ones;
            "uniform": equal steps of the schedule's time over all of its range.
        solver: of the teacher's step; guidance: its weight, 1 = none.
        target_decay: μ, at each step.
        distance: "l2" or "huber"; sigma_data: standard deviation of the data, in the boundary condition.
    """

    num_times: int = 18
    grid: Grid = "karras"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    solver: Solver = "heun"
    guidance: float = 1.0
    target_decay: float = 0.0
    distance: Distance = "l2"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if self.num_times < 2:
            raise InputError(f"num_times must be 2 or more, not {self.num_times}.")

    def phases(self) -> list[Phase]:
        """One phase on noised data."""
        average = Role(name="target", origin="ema", decay=self.target_decay)
        return [
            Phase(
                name="distil",
                sources={"main": Stored(TABLE)},
                terms=[TrajectoryConsistency(self)],
                roles=[Role(name="teacher"), average if self.target_decay else Role(name="target", origin="live")],
            )
        ]

    def times(self, schedule: Schedule) -> Tensor:
        """[num_times], falling from the noisiest; float64."""
        from workbench.policies.diffusion.samplers import karras_times, uniform_times

        if self.grid == "uniform":
            return uniform_times(schedule, self.num_times - 1)
        return karras_times(schedule, self.num_times, self.sigma_min, self.sigma_max)[:-1]


@dataclass(frozen=True, slots=True)
class TrajectoryConsistency:
    """The consistency loss at a random pair of neighbours of the grid."""

    method: ConsistencyDistillation
    coefficient: float = 1.0

    def __call__(self, view: View) -> Tensor:
        """The share of the micro-batch."""
        from workbench.policies.diffusion.consistency import consistency_target, distance, with_boundary
        from workbench.policies.diffusion.predict import Guided, Predictor

        method, rows = self.method, view["main"]
        x0, c = rows["x0"], rows.get("c")
        student, target = Predictor(view.role("student")), Predictor(view.role("target"))
        schedule = student.schedule
        times = method.times(schedule).to(x0)
        start = float(schedule.sigma(times[-1]) / schedule.alpha(times[-1]))
        if start == 0 and student.net.prediction == "x0":
            raise InputError("A network that predicts x0 needs a grid with a smallest noise level above 0: 'karras'.")
        later = view.randint(len(times) - 1)
        t, s = times[later], times[later + 1]
        x_t = schedule.add_noise(x0, view.randn_like(x0), t)

        def function(net: Predictor, x: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
            return with_boundary(net.x0(x, t, c), x, t, schedule, start, method.sigma_data)

        teacher = Guided(Predictor(view.role("teacher"), schedule), method.guidance)
        goal = consistency_target(
            lambda x, t, c: function(target, x, t, c), teacher, x_t, t, s, c, method.solver
        )  # fmt: skip
        return view.mean(distance(function(student, x_t, t, c), goal, method.distance))


METHOD = ConsistencyDistillation
ENTRY = Entry(
    name="consistency-distillation",
    seed=None,
    title="Consistency Models",
    arxiv="2303.01469",
    backend="diffusion",
    family="diff-consistency",
    signal="one step of the teacher's ODE",
    access="score",
    granularity="noise level",
    degree="off-policy",
    needs="a diffusion teacher, data",
    evidence="identities; gauss8, exact teacher, 800 updates, 3 seeds: one-step sliced W2 .091 (start 1.38, "
    "teacher .075 at 50 steps), with the paper's grid .105, with its decay of 0 still .23; .56 with a "
    "teacher that answers for other rows; digits: Frechet 1.8 (teacher 64 at one step, 1.8 at 50): "
    "benchmarks/results/diffusion_trajectory.md",
    reading="no card of its own: it is the block that card 17 and its family are built from; N, solver and "
    "decay for CIFAR-10 are from memory of the paper's table; l2 in place of LPIPS",
)
