"""Terms that regress the student: on velocities and end points of pairs, on a guided teacher, on two legs of a guide.

Pairs (z, x0) lie on the straight line x_t = (1 - t) x0 + t z, whatever schedule a network has (`Predictor` translates).
torch is imported when a term is called, so that a method's phases can be listed without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from workbench.policies.diffusion.score_terms import squared_error

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.policies.diffusion.predict import Predictions
    from workbench.policies.loop.view import View


@dataclass(frozen=True, kw_only=True, slots=True)
class VelocityRegression:
    """Squared error of the student's velocity at a uniform time of the line: E|v(x_t, t) - (z - x0)|^2.

    Independent pairs: flow matching; pairs of a teacher: reflow (Liu et al. 2022, arXiv 2209.03003, eq. 1).
    """

    segment: str = "main"
    coefficient: float = 1.0

    def __call__(self, view: View) -> Tensor:
        """The share of the micro-batch."""
        from workbench.policies.diffusion.predict import Predictor
        from workbench.policies.diffusion.schedules import RectifiedFlow

        rows, t, line = view[self.segment], view.rand(), RectifiedFlow()
        x_t = line.add_noise(rows["x0"], rows["z"], t)
        velocity = Predictor(view.role("student"), line).flow(x_t, t, rows.get("c"))
        return view.mean(squared_error(velocity, rows["z"] - rows["x0"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointRegression:
    """Squared error of the student's one-step sample from z, its x0 at pure noise: E|x0(z, 1) - x0|^2."""

    segment: str = "main"
    coefficient: float = 1.0

    def __call__(self, view: View) -> Tensor:
        """The share of the micro-batch."""
        from workbench.policies.diffusion.predict import Predictor
        from workbench.policies.diffusion.schedules import RectifiedFlow

        rows = view[self.segment]
        z = rows["z"]
        made = Predictor(view.role("student"), RectifiedFlow()).x0(z, z.new_ones(len(z)), rows.get("c"))
        return view.mean(squared_error(made, rows["x0"]))


def two_legs(guide: Predictions, z: Tensor, first: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
    """Where z [B, *shape] ends after two Euler legs: with velocity `first` from 1 to t [B], then with the guide's to 0.

    Args: guide: on the rectified flow's line.
    """
    from workbench.policies.diffusion.schedules import expand

    x_t = z - expand(1 - t, z) * first
    return x_t - expand(t, z) * guide.flow(x_t, t, c)


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowGuidedRegression:
    """Squared error of the student's one-step sample from fresh noise to the end of two legs, without gradient.

    With the student's own first leg, the gradient by its velocity v_S is 2 t (v_S - v_T(x_t, t)), times 1 / elements:
    it is pulled to the guide's velocity at its own midpoint.

    Args:
        guide: role that gives the second leg; first_leg: who gives the first ("student" as in the released code,
            "guide" as in the text).
        earliest, latest: range of the uniform time between the legs; 1 is noise.
        segment: only its shape and c are read.
    Source: SlimFlow, arXiv 2407.12718, sec. 4.2 and the released losses.
    """

    guide: str = "teacher"
    first_leg: Literal["student", "guide"] = "student"
    earliest: float = 0.2
    latest: float = 0.8
    segment: str = "main"
    coefficient: float = 1.0

    def __call__(self, view: View) -> Tensor:
        """The share of the micro-batch."""
        import torch

        from workbench.policies.diffusion.predict import Predictor
        from workbench.policies.diffusion.schedules import RectifiedFlow

        rows = view[self.segment]
        z, c = view.randn_like(rows["x0"]), rows.get("c")
        start = z.new_ones(len(z))
        t = self.earliest + (self.latest - self.earliest) * view.rand()
        velocity = Predictor(view.role("student"), RectifiedFlow()).flow(z, start, c)
        with torch.no_grad():
            guide = Predictor(view.role(self.guide), RectifiedFlow())
            first = velocity.detach() if self.first_leg == "student" else guide.flow(z, start, c)
            target = two_legs(guide, z, first, t, c)
        return view.mean(squared_error(z - velocity, target))


@dataclass(frozen=True, kw_only=True, slots=True)
class GuidedRegression:
    """Squared error of the student to the guided teacher, in the student's own parameterisation, at noised data.

    Args: weight: of the guidance, null + weight (conditional - null); 1 = the plain conditional teacher.
    Source: Meng et al. 2023, arXiv 2210.03142, sec. 3.1, with one fixed weight.
    """

    weight: float
    teacher: str = "teacher"
    segment: str = "main"
    coefficient: float = 1.0

    def __call__(self, view: View) -> Tensor:
        """The share of the micro-batch."""
        import torch

        from workbench.policies.diffusion.predict import Guided, Predictor

        rows = view[self.segment]
        student = Predictor(view.role("student"))
        schedule, prediction, c = student.schedule, student.net.prediction, rows.get("c")
        eps = view.randn_like(rows["x0"])
        t = schedule.t_min + (schedule.t_max - schedule.t_min) * view.rand()
        x_t = schedule.add_noise(rows["x0"], eps, t)
        with torch.no_grad():
            teacher = Predictor(view.role(self.teacher), schedule)
            target = Guided(teacher, self.weight).predict(x_t, t, c, prediction)
        return view.mean(squared_error(student.predict(x_t, t, c, prediction), target))
