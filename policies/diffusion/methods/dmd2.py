"""DMD2: the student's law is matched to the teacher's by two scores, on two time scales, with a GAN on real data.

Paper: "Improved Distribution Matching Distillation for Fast Image Synthesis" (2405.14867, seed 51).
Equation: x = D_student at a step of its own chain; x_t = alpha x + sigma eps, t in [.02, .98] of the schedule;
    g = (D_F - D_T) / mean |x - D_T|, guidance on D_T only; L = mean (x - sg(x - g))^2 / 2 + lambda_g softplus(-l(x)).
    Critic: mean (eps_F - eps)^2, or what it predicts; + lambda_d (softplus(l(x)) + softplus(-l(x_real))), with l a head
    on the critic's features of the noised sample. The student has its turn at every k-th step.
    Several steps: one is drawn for the batch; those before it run without a graph (backward simulation).
Deviations: times are continuous; real and fake samples share times and noise; x of the critic's turn is made of the
    student's noise after its step; the head is an MLP on pooled features; no regression warm-up for one-step SDXL; a
    direction that is not a number stops the run instead of counting as 0.
Verified by: tests/policies/diffusion/test_dmd2.py, test_score_parts.py; benchmarks/bench_diffusion.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workbench.errors import InputError
from workbench.policies.catalog import Entry
from workbench.policies.diffusion.adversarial import Discriminator, Fool, TellApart
from workbench.policies.diffusion.generation import TABLE, Generated, UniformTime
from workbench.policies.diffusion.score_terms import Denoising, DistributionMatching
from workbench.policies.nouns import Phase, Role, Stored, Term


@dataclass(frozen=True, kw_only=True, slots=True)
class Dmd2:
    """Settings; the paper's for ImageNet-64, with a recipe's learning rate of 2e-6. The student begins as the teacher.

    Args:
        steps: of the student (SDXL: 4).
        every: steps of the critic for one of the student (SD1.5: 10).
        guidance: classifier-free scale of the teacher (SD1.5: 1.75, SDXL: 8); the critic has none.
        gan: coefficient of the student's side (SD1.5: 1e-3, SDXL: 5e-3); 0 = no GAN, and no data is read.
        critic_gan: coefficient of the discriminator's side.
        taps: module paths in the network whose features the discriminator reads; the bottleneck in the paper.
        features: whose network that is.
        conditions: table of the classes ("c") to train on; None = uniform.
    """

    steps: int = 1
    every: int = 5
    guidance: float = 1.0
    gan: float = 3e-3
    critic_gan: float = 1e-2
    taps: tuple[str, ...] = ("blocks.1",)
    features: Literal["critic", "teacher"] = "critic"
    conditions: str | None = None

    def __post_init__(self) -> None:
        if self.gan < 0 or self.gan > 0 >= self.critic_gan:
            raise InputError(
                f"A GAN needs coefficients above 0 on both sides, or gan = 0; got {self.gan} and {self.critic_gan}."
            )

    def discriminator(self) -> Discriminator:
        """A head that trains with the critic."""
        return Discriminator(role=self.features, taps=self.taps)

    def phases(self) -> list[Phase]:
        """One phase on two time scales."""
        head, law = self.discriminator(), UniformTime(low=0.02, high=0.98)
        mine: list[Term] = [DistributionMatching(times=law, guidance=self.guidance)]
        critics: list[Term] = [Denoising()]
        if self.gan:
            mine.append(Fool(discriminator=head, coefficient=self.gan))
            critics.append(TellApart(discriminator=head, coefficient=self.critic_gan))
        return [
            Phase(
                name="distil",
                sources={"main": Generated(steps=self.steps, conditions=self.conditions), "real": Stored(TABLE)},
                terms=mine,
                roles=[Role(name="teacher"), Role(name="critic", origin="copy")],
                role_terms={"critic": critics},
                every={"student": self.every},
                modules=head.modules if self.gan else None,
            )
        ]


METHOD = Dmd2
ENTRY = Entry(
    name="dmd2",
    seed=51,
    title="Improved Distribution Matching Distillation for Fast Image Synthesis",
    arxiv="2405.14867",
    backend="diffusion",
    family="diff-score",
    signal="score difference",
    access="weights",
    granularity="sample",
    degree="on-policy",
    needs="a teacher network; for the GAN (gan > 0) real data as the table 'data'",
    evidence="identities, the rule of two time scales in closed form, backward simulation. gauss8, 3 seeds, one step: "
    "sliced W2 .143 with the GAN, .148 without (teacher 1.38 at one step, .061 at 50): no gain of the GAN there. "
    "Of a teacher that is .3 off, a GAN of 2 leaves .197, none .231, the paper's 3e-3 .220; .5 off in the plane, "
    "it leaves .19-.23 of .50: benchmarks/results/diffusion_score.md",
    reading="objective, time scales and constants were read in the released code; what differs is listed in the module",
)
