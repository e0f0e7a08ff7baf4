"""Terms that match the law of a student's samples to the teacher's: critics' denoising, VSD/DMD directions, SiD.

A critic denoises the student's samples, so that teacher and critic differ where the two laws do:
    score_critic - score_teacher = (alpha / sigma^2) (D_critic - D_teacher),    D = prediction of x0 at x_t.
Every batch has `x` [B, *shape] and, with classes, `c` [B] (`generation.Generated`). Roles: "teacher", "critic".
torch is imported when a term is called, so that a method's phases can be listed without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.policies.diffusion.generation import TimeLaw, UniformTime, schedule_of

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.policies.diffusion.predict import Predictions
    from workbench.policies.diffusion.schedules import Prediction, Schedule
    from workbench.policies.loop.view import View

#: A weight [B] >= 0 of the samples of a micro-batch: (view, x_t, t, c) -> h, used without gradient.
SampleWeight = Callable[["View", "Tensor", "Tensor", "Tensor | None"], "Tensor"]

#: What |x - D_teacher| is held above where it divides.
SMALLEST_SCALE = 1e-5


def per_sample(values: Tensor) -> Tensor:
    """[B, *shape] -> [B]: the mean over all but the batch."""
    return values.flatten(1).mean(1)


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """[B, *shape] twice -> [B], the mean over the elements of a row."""
    return per_sample((a - b).square())


def scale_of(x: Tensor, teacher_x0: Tensor) -> Tensor:
    """mean |x - D_teacher| of each sample, [B], without gradient (DMD, arXiv 2311.18828)."""
    return per_sample((x - teacher_x0).detach().abs()).clamp_min(SMALLEST_SCALE)


def normalised_direction(x: Tensor, teacher_x0: Tensor, critic_x0: Tensor) -> Tensor:
    """(D_critic - D_teacher) / mean |x - D_teacher|, like x (DMD, arXiv 2311.18828)."""
    gap = critic_x0 - teacher_x0
    return gap / scale_of(x, teacher_x0).reshape(-1, *[1] * (gap.ndim - 1))


def plain_direction(teacher_x0: Tensor, critic_x0: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """sigma^2 (eps_teacher - eps_critic) = alpha sigma (D_critic - D_teacher), like x (arXiv 2312.05239)."""
    from workbench.policies.diffusion.schedules import expand

    return expand(schedule.alpha(t) * schedule.sigma(t), teacher_x0) * (critic_x0 - teacher_x0)


def surrogate(x: Tensor, direction: Tensor) -> Tensor:
    """[B] with the gradient `direction` / numel in x: mean (x - sg(x - direction))^2 / 2."""
    return squared_error(x, (x - direction).detach()) / 2


def identity_loss(x: Tensor, teacher_x0: Tensor, critic_x0: Tensor, alpha: float) -> Tensor:
    """SiD's loss [B]: sum gap ((D_teacher - x) - alpha gap) / mean |x - D_teacher|, gap = D_teacher - D_critic.

    Its value is no measure of convergence: with an exact critic it is (1 - alpha) |gap|^2 on average, 0 for alpha = 1.
    Source: SiD, arXiv 2404.04057; its released code.
    """
    gap = teacher_x0 - critic_x0
    return (gap * ((teacher_x0 - x) - alpha * gap)).flatten(1).sum(1) / scale_of(x, teacher_x0)


def guided(view: View, role: str, weight: float) -> Predictions:
    """A role's predictions on the teacher's schedule with classifier-free guidance; 1 = plain, 0 = without class."""
    from workbench.policies.diffusion.predict import Guided, Predictor

    return Guided(Predictor(view.role(role), schedule_of(view)), weight)


def critic_flag(view: View, role: str, t: Tensor) -> Tensor | None:
    """The second time [B] that a critic is asked with: none, or for the student, which then is its own critic, the end.

    A generator is asked with r = t or none, so that r = t_max at smaller t tells the two uses of one network apart
    (TwinFlow, arXiv 2512.05150, and APEX mark them by the sign of t or a shifted class). The network needs
    `second_time`.
    """
    return t.new_full(t.shape, schedule_of(view).t_max) if role == "student" else None


def alpha_squared(t: Tensor, schedule: Schedule) -> Tensor:
    """SwiftBrush's weight of a critic's loss: silences the noisiest times."""
    return schedule.alpha(t).square()


@dataclass(frozen=True, kw_only=True, slots=True)
class Denoising:
    """Mean squared error of a role's prediction on noised samples of the student, which are detached.

    Args:
        role: who learns; "student": it is its own critic (`critic_flag`); times: law of t.
        kind: what is compared; None = what the network predicts itself, and for one that predicts x0 with EDM's
            weight SNR + 1 / sigma_data^2 (arXiv 2206.00364).
        weight: further weight (t, schedule) -> [B].
        guidance: scale inside the loss (SiD-LSG's kappa_1, arXiv 2406.01561).
        drop: probability that the whole batch of the step is shown without its classes.
    """

    role: str = "critic"
    times: TimeLaw = field(default_factory=UniformTime)
    kind: Prediction | None = None
    weight: Callable[[Tensor, Schedule], Tensor] | None = None
    guidance: float = 1.0
    drop: float = 0.0
    sigma_data: float = 0.5
    segment: str = "main"
    coefficient: float = 1.0

    def __call__(self, view: View) -> Tensor:
        """The share of the micro-batch."""
        from workbench.policies.diffusion.schedules import combine

        net: Any = view.role(self.role)
        rows, schedule = view[self.segment], schedule_of(view)
        x, t = rows["x"].detach(), self.times(view, schedule)
        eps = view.randn_like(x)
        c = None if self.drop and view.uniform() < self.drop else rows.get("c")
        kind = self.kind or net.prediction
        x_t = schedule.add_noise(x, eps, t)
        predicted = guided(view, self.role, self.guidance).predict(x_t, t, c, kind, critic_flag(view, self.role, t))
        loss = squared_error(predicted, combine(x, eps, t, schedule, kind))
        if kind == "x0":
            loss = (schedule.snr(t) + self.sigma_data**-2).to(loss.dtype) * loss
        if self.weight is not None:
            loss = self.weight(t, schedule).to(loss.dtype) * loss
        return view.mean(loss)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributionMatching:
    """Moves the student's samples along the difference of critic and teacher, towards smaller reverse KL (VSD, DMD).

    Its value is half the mean squared direction; the gradient in x is the direction over numel.

    Args:
        times: law of t; guidance, critic_guidance: of the two.
        normalised: `normalised_direction`, else `plain_direction`.
        weight: of samples (f-distill's h); None = 1.
        critic: a role; "student": it is its own critic (`critic_flag`), and `Denoising(role="student")` one of its
            terms.
    """

    times: TimeLaw = field(default_factory=lambda: UniformTime(low=0.02, high=0.98))
    guidance: float = 1.0
    critic_guidance: float = 1.0
    normalised: bool = True
    weight: SampleWeight | None = None
    critic: str = "critic"
    segment: str = "main"
    coefficient: float = 1.0

    def __call__(self, view: View) -> Tensor:
        """The share of the micro-batch."""
        import torch

        from workbench.policies.diffusion.schedules import expand

        rows, schedule = view[self.segment], schedule_of(view)
        x, c = rows["x"], rows.get("c")
        with torch.no_grad():
            t = self.times(view, schedule)
            x_t = schedule.add_noise(x, view.randn_like(x), t)
            teacher = guided(view, "teacher", self.guidance).x0(x_t, t, c)
            flag = critic_flag(view, self.critic, t)
            critic = guided(view, self.critic, self.critic_guidance).x0(x_t, t, c, flag)
            if self.normalised:
                direction = normalised_direction(x, teacher, critic)
            else:
                direction = plain_direction(teacher, critic, t, schedule)
            if self.weight is not None:
                direction = expand(self.weight(view, x_t, t, c), direction) * direction
        return view.mean(surrogate(x, direction))


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreIdentity:
    """SiD: Fisher divergence by the score identity; the gradient also runs through both denoisers' inputs.

    Args: times: law of t; alpha: of the corrected loss; guidance, critic_guidance: kappa_4 and kappa_2 = kappa_3.
    """

    times: TimeLaw = field(default_factory=lambda: UniformTime(low=0.02, high=0.98))
    alpha: float = 1.0
    guidance: float = 1.0
    critic_guidance: float = 1.0
    segment: str = "main"
    coefficient: float = 1.0

    def __call__(self, view: View) -> Tensor:
        """The share of the micro-batch."""
        rows, schedule = view[self.segment], schedule_of(view)
        x, c = rows["x"], rows.get("c")
        t = self.times(view, schedule)
        x_t = schedule.add_noise(x, view.randn_like(x), t)
        teacher = guided(view, "teacher", self.guidance).x0(x_t, t, c)
        critic = guided(view, "critic", self.critic_guidance).x0(x_t, t, c)
        return view.mean(identity_loss(x, teacher, critic, self.alpha))
