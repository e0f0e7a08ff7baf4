"""SlimFlow: a small one-step generator, by reflow whose coupling is annealed and a distillation that a flow guides.

Paper: "SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow" (2407.12718, seed 70).
Equation: on a teacher's pairs (z, x0), here with t = 1 at noise and v = dx_t/dt = z - x0 (the paper's time runs back):
    1. z_β = sqrt(1 - β²) z + β ε, β from 1 to 0; L = E_t |v_S((1-t) x0 + t z_β, t) - (z_β - x0)|².
    2. L = E |z - v_S(z, 1) - x0|² + E |z - v_S(z, 1) - sg y|², z fresh in the second, x_t = z - (1-t) v_S(z, 1),
       y = x_t - t v_T(x_t, t), t uniform in [.2, .8]. Its gradient by v_S is 2 t (v_S - v_T(x_t, t)).
Deviations: L2 in place of LPIPS in phase 2 (it needs downloaded weights); pairs from Heun's method, not RK45; times
    from all of [0, 1], not from 0.001; errors are means over elements.
Verified by: tests/policies/diffusion/test_slimflow.py; benchmarks/bench_diffusion.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workbench.errors import InputError
from workbench.policies.catalog import Entry
from workbench.policies.diffusion.pairs import PAIRS, AnnealedPairs
from workbench.policies.diffusion.regression import EndpointRegression, FlowGuidedRegression, VelocityRegression
from workbench.policies.nouns import Phase, Role, Stored, Term


@dataclass(frozen=True, kw_only=True, slots=True)
class SlimFlow:
    """Settings; defaults of the released scripts for CIFAR-10.

    Args:
        warmup: share of the reflow's steps in which β falls from 1 to 0 (300,000 of 1,300,000 updates); 0 = reflow.
        flip: mirror half of the reflow's batches; the scripts do (True), but it is right only for data that look alike
            mirrored, so that here it is asked for.
        guide: who guides phase 2: "own" = the small flow that phase 1 ended with, "teacher" = the given one.
        guidance: coefficient of the second term of phase 2; 0 = distillation on the pairs only.
        first_leg: "student" as in the released code, "guide" as in the text.
        reflow_share, distil_share: of the run's steps.
    """

    warmup: float = 0.23
    flip: bool = False
    guide: Literal["own", "teacher"] = "own"
    guidance: float = 1.0
    first_leg: Literal["student", "guide"] = "student"
    reflow_share: float = 1.0
    distil_share: float = 1.0

    def __post_init__(self) -> None:
        if self.guidance < 0:
            raise InputError(f"The coefficient `guidance` must be 0 or more, not {self.guidance}.")

    def phases(self) -> list[Phase]:
        """Annealed reflow, then distillation to one step."""
        origin = "snapshot" if self.guide == "own" else "given"
        distil: list[Term] = [EndpointRegression()]
        if self.guidance:
            distil.append(FlowGuidedRegression(first_leg=self.first_leg, coefficient=self.guidance))
        return [
            Phase(
                name="reflow",
                sources={"main": AnnealedPairs(warmup=self.warmup, flip=self.flip)},
                terms=[VelocityRegression()],
                share=self.reflow_share,
            ),
            Phase(
                name="distil",
                sources={"main": Stored(PAIRS)},
                terms=distil,
                roles=[Role(name="teacher", origin=origin)] if self.guidance else [],
                share=self.distil_share,
            ),
        ]


METHOD = SlimFlow
ENTRY = Entry(
    name="slimflow",
    seed=70,
    title="SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow",
    arxiv="2407.12718",
    backend="diffusion",
    family="diff-flow",
    signal="pairs, velocity",
    access="score",
    granularity="sample",
    degree="off-policy",
    needs="a pool of a teacher's (noise, sample) pairs; the teacher itself only with guide='teacher'",
    evidence="identities; gauss8, 3 seeds, student 32 wide: one-step sliced W2 .105 with 8,192 pairs (teacher "
    "1.4 at one step), control with unpaired rows > .8. With 16 pairs annealing lowers the error on "
    "fresh pairs from .54 to .35 (.41 to .37 unguided), the teacher's guidance from .37 to .10; its own"
    " guidance does not (.35 against .37), and with 8,192 pairs both cost a little (.105 against .080 "
    "without either); digits, half as wide: Frechet 6.7 (5.1 without either, teacher 64 at one step, "
    "1.8 at 50): benchmarks/results/diffusion_trajectory.md",
    reading="the share of the steps for the annealing (the scripts give updates); who guides phase 2",
)
