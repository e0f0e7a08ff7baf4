"""Flow matching: the student learns from data to predict the flow, or whatever it predicts, at noised samples.

Paper: "Flow Matching for Generative Modeling" (2210.02747); for other predictions, denoising (2006.11239, 2011.13456).
Equation: L = E |f(x_t, t, c) - target|^2, x_t = alpha x0 + sigma eps, eps normal, t uniform in [t_min, t_max] of the
    network's schedule, target = alpha' x0 + sigma' eps for a network that predicts the flow (eq. 9 and 20-23: on the
    rectified schedule the optimal-transport path with sigma_min = 0). Classes are dropped for a share of the rows.
Deviations: no sigma_min; the mean over elements instead of their sum.
Verified by: tests/policies/diffusion/test_flow_matching.py, tests/workbench/test_train_loop.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.errors import InputError
from workbench.policies.catalog import Entry
from workbench.policies.diffusion.generation import TABLE
from workbench.policies.diffusion.score_terms import squared_error
from workbench.policies.nouns import Phase, Stored

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.policies.loop.view import View


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisedDataRegression:
    """Mean squared error of the student's own prediction at noised data. Args: drop: share of null labels."""

    drop: float = 0.1
    coefficient: float = 1.0

    def __call__(self, view: View) -> Tensor:
        """The share of the micro-batch."""
        import torch

        from workbench.policies.diffusion.schedules import combine

        net: Any = view.role("student")
        rows, schedule = view["main"], net.schedule
        x0, t = rows["x0"], schedule.t_min + (schedule.t_max - schedule.t_min) * view.rand()
        eps, dropped, c = view.randn_like(x0), view.rand() < self.drop, None
        if net.num_classes:
            c = torch.where(dropped, net.num_classes, rows["c"])
        predicted = net(schedule.add_noise(x0, eps, t), t, c)
        return view.mean(squared_error(predicted, combine(x0, eps, t, schedule, net.prediction)))


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowMatching:
    """Settings. Args: drop: share of the rows whose class is replaced by the null label, for guidance."""

    drop: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1:
            raise InputError(f"drop is a share of the rows, in [0, 1], not {self.drop}.")

    def phases(self) -> list[Phase]:
        """One phase; nobody but the student."""
        return [Phase(name="train", sources={"main": Stored(TABLE)}, terms=[NoisedDataRegression(drop=self.drop)])]


METHOD = FlowMatching
ENTRY = Entry(
    name="flow-matching",
    seed=None,
    title="Flow Matching for Generative Modeling",
    arxiv="2210.02747",
    backend="diffusion",
    family="diff-flow",
    signal="data",
    access="none",
    granularity="noise level",
    degree="off-policy",
    needs="data; no teacher: it makes the teachers of the other methods, and is no distillation system",
    evidence="identity: for every schedule and prediction, no other answer has a smaller loss than an exact mixture's; "
    "a trained network's samples at 50 steps are near the data",
    reading="times uniform in the schedule's own time, an unweighted error",
)
