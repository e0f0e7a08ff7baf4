"""SANA-Sprint: continuous-time consistency on a flow-matching teacher read as TrigFlow, and an adversarial term.

Paper: "SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency Distillation" (2503.09641, seed 22).
Equation: x_t = cos t x0 + sin t ε in units of σ_d; F = dx_t/dt as the network predicts it, f = cos t x_t - sin t F.
    A rectified-flow net v(y, s) is read on it without training: s = sin t / (sin t + cos t), n = sqrt(s² + (1-s)²),
    y = n x_t, F = [(1 - 2s) y + (1 - 2s + 2s²) v] / n: what `Predictor` does by equal signal-to-noise ratio.
    g = σ_d [-cos² t (F⁻ - F_T) - r (cos t sin t x_t + F')], F' the derivative of F⁻ along cos t sin t (F_T, 1), r
    rising from 0 to 1; g ← g / (|g| + 0.1). L_sCM = E[mean (F - F⁻ - g)² e^-u / (σ_d tan t) + u], u(t) learned.
    L_adv: hinge heads on the frozen teacher's features at τ; the student's x0 is asked at t = π/2 with probability p.
    L = L_sCM + λ L_adv; t, τ = arctan(e^N(m, s²) / σ_d) with a law each.
Deviations: one fixed guidance scale, as the networks here take none as input; no misaligned pairs as further fakes and
    no gradient penalty; no fine-tuning to dense times and QK-norm (the small networks here read the angle as it is).
Verified by: tests/policies/diffusion/test_sana_sprint.py; benchmarks/bench_diffusion.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.errors import InputError
from workbench.policies.catalog import Entry
from workbench.policies.diffusion.adversarial import Discriminator, Fool, TellApart
from workbench.policies.diffusion.generation import TABLE
from workbench.policies.diffusion.options import Bound, Derivative
from workbench.policies.nouns import Maker, Phase, Role, Stored, Term

if TYPE_CHECKING:
    from torch import Tensor, nn

    from workbench.policies.diffusion.schedules import Schedule
    from workbench.policies.loop.view import View


@dataclass(frozen=True, kw_only=True, slots=True)
class SanaSprint:
    """Settings; defaults of the released trainers.

    Args:
        guidance: of the teacher's velocity (the paper draws 4, 4.5 or 5 and tells the student which); 1 = none.
        sigma_data: σ_d, of the teacher's latents; the tables hold x0 / σ_d.
        warmup: share of the steps in which r rises to 1 (4,000 of 30,000).
        time_mean, time_std: m and s of t; head_time_mean, head_time_std: of τ.
        adversarial: λ; 0 = without discriminator.
        max_time: p.
        taps: modules of the teacher whose outputs the heads read.
        derivative: "jvp", or "difference" for networks that cannot run in forward mode.
        bound: of the tangent: "norm", or "clamp" to [-1, 1].
    """

    guidance: float = 4.5
    sigma_data: float = 0.5
    warmup: float = 4 / 30
    time_mean: float = 0.2
    time_std: float = 1.6
    head_time_mean: float = -0.6
    head_time_std: float = 1.0
    adversarial: float = 0.5
    max_time: float = 0.5
    taps: tuple[str, ...] = ("blocks.0", "blocks.2")
    derivative: Derivative = "jvp"
    bound: Bound = "norm"

    def __post_init__(self) -> None:
        if not 0 <= self.max_time <= 1:
            raise InputError(f"max_time is a probability, in [0, 1], not {self.max_time}.")

    def phases(self) -> list[Phase]:
        """One phase; student and heads take turns."""
        sources: dict[str, Stored | Maker] = {"main": Stored(TABLE)}
        terms: list[Term] = [TangentConsistency(self)]
        if not self.adversarial:
            return [
                Phase(name="distil", sources=sources, terms=terms, roles=[Role(name="teacher")], modules=log_variance)
            ]
        heads = Discriminator(role="teacher", taps=self.taps, head="discriminator")
        law = LogNormalTime(self.head_time_mean, self.head_time_std, self.sigma_data)
        fool = Fool(discriminator=heads, loss="hinge", times=law, segment="samples", coefficient=self.adversarial)
        tell = TellApart(discriminator=heads, loss="hinge", times=law, segment="samples", real="main")
        return [
            Phase(
                name="distil",
                sources=sources | {"samples": DenoisedData(self)},
                terms=[*terms, fool],
                roles=[Role(name="teacher"), Role(name="discriminator", origin="new")],
                role_terms={"discriminator": [tell]},
                modules=lambda models: {**log_variance(models), **heads.modules(models)},
            )
        ]

    def ramp(self, step: int, steps: int) -> float:
        """r at a step, from 0."""
        warmup = self.warmup * steps
        return min(1.0, step / warmup) if warmup else 1.0


@dataclass(frozen=True, slots=True)
class LogNormalTime:
    """arctan(e^N(mean, std²) / sigma_data), carried to a schedule by equal signal-to-noise ratio."""

    mean: float
    std: float
    sigma_data: float

    def __call__(self, view: View, schedule: Schedule) -> Tensor:
        """[B]."""
        from workbench.policies.diffusion.schedules import Trigonometric, matched_time

        t = ((self.mean + self.std * view.randn()).exp() / self.sigma_data).atan()
        return matched_time(t, Trigonometric(), schedule)


@dataclass(frozen=True, slots=True)
class DenoisedData:
    """What the student makes of noised data in one step, "x", at pure noise with probability p; classes come along."""

    method: SanaSprint

    def __call__(self, view: View) -> Mapping[str, Tensor]:
        """The rows of the micro-batch; with a graph in the student's turn."""
        import torch

        from workbench.policies.diffusion.predict import Predictor
        from workbench.policies.diffusion.schedules import Trigonometric

        method, rows, trig = self.method, view["main"], Trigonometric()
        t = LogNormalTime(method.time_mean, method.time_std, method.sigma_data)(view, trig)
        t = torch.where(view.rand() < method.max_time, math.pi / 2, t)
        x_t = trig.add_noise(rows["x0"], view.randn_like(rows["x0"]), t)
        student = Predictor(view.role("student"), trig)

        def make() -> Tensor:
            with torch.set_grad_enabled(view.trains == "student"):
                return student.x0(x_t, t, rows.get("c"))

        made = {"x": view.shared("samples", make), "t": t}
        return made | {"c": rows["c"]} if "c" in rows else made


@dataclass(frozen=True, slots=True)
class TangentConsistency:
    """The sCM loss: the student's velocity is moved by the bounded tangent of its consistency function."""

    method: SanaSprint
    coefficient: float = 1.0

    def __call__(self, view: View) -> Tensor:
        """The share of the micro-batch."""
        import torch

        from workbench.policies.diffusion.consistency import (
            bounded,
            consistency_tangent,
            tangent_loss,
            total_derivative,
        )
        from workbench.policies.diffusion.predict import Guided, Predictor
        from workbench.policies.diffusion.schedules import Trigonometric, expand

        method, rows, trig = self.method, view["main"], Trigonometric()
        x0, c, sigma_data = rows["x0"], rows.get("c"), method.sigma_data
        student = Predictor(view.role("student"), trig)
        t = LogNormalTime(method.time_mean, method.time_std, sigma_data)(view, trig)
        x_t = trig.add_noise(x0, view.randn_like(x0), t)
        ramp = method.ramp(view.step, view.steps)
        with torch.no_grad():
            velocity = Guided(Predictor(view.role("teacher"), trig), method.guidance).flow(x_t, t, c)
            along = t.cos() * t.sin()
            old, change = total_derivative(
                lambda x, s: student.flow(x, s, c), x_t, t, expand(along, x_t) * velocity, along, method.derivative
            )
            tangent = sigma_data * consistency_tangent(x_t, t, old, change, velocity, ramp)
            view.log("tangent/norm", float(tangent.flatten(1).norm(dim=1).mean()))
            goal = old + bounded(tangent, method.bound)
        logvar: Any = view.module("logvar")
        return view.mean(tangent_loss(student.flow(x_t, t, c), goal, t, logvar.log_variance(t), sigma_data))


def log_variance(models: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The learned u(t), 0 at the start; it trains with the student."""
    from workbench.policies.diffusion.networks import Conditioning
    from workbench.policies.diffusion.schedules import Trigonometric

    return {"logvar": Conditioning(1, Trigonometric(), logvar=True)}


METHOD = SanaSprint
ENTRY = Entry(
    name="sana-sprint",
    seed=22,
    title="SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency Distillation",
    arxiv="2503.09641",
    backend="diffusion",
    family="diff-consistency",
    signal="velocity, features",
    access="weights",
    granularity="noise level",
    degree="off-policy",
    needs="a flow-matching teacher whose blocks can be tapped, data",
    evidence="identities; gauss8 with modes of std .4, 400 updates, 3 seeds: one-step sliced W2 .43 +- .04 "
    "(start 1.45), sCM alone .35 +- .18, adversarial alone .67 +- .35, no max-time .32 +- .11, control "
    ".55: the heads' and the max-time gain do not show there; with an under-trained teacher the heads "
    "do help (.27 against .39, 3 of 3 seeds, in the tests). On digits, 400 updates, they do harm: "
    "Frechet 50 +- 13, sCM alone 8.2, teacher 64 at one step: "
    "benchmarks/results/diffusion_trajectory.md",
    reading="objective and times from the released trainers (in one, the discriminator's largest time is a bug that is "
    "not copied); the warm-up as a share of the steps; which blocks are tapped in a small network",
)
