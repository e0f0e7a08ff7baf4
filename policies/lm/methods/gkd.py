"""The GKD family: match the teacher's distribution on rollouts of the teacher, of the student, or of both in turn.

Paper: "A Survey of On-Policy Distillation" (2604.00626, seed 151), whose members differ in divergence and policy
    degree; the mixture is GKD's (2306.13649).
Equation: min E_{y ~ λ π_θ + (1-λ) stored} (1/Σm) Σ_t m_t D(p_T(·|y_<t) ‖ π_θ(·|y_<t)), no gradient through sampling.
Deviations: GKD divides the sum by the batch size in tokens of each process; here by all tokens of the step. With stored
    scores the outcomes are the teacher's k likeliest words and, as one more, all others.
Verified by: tests/policies/test_methods.py, test_stored_scores.py, test_effects.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workbench.errors import InputError
from workbench.policies.catalog import Entry
from workbench.policies.nouns import Fresh, Mixed, Origin, Phase, Role, Source, Stored
from workbench.policies.terms import Divergence, TeacherScores, TokenDivergence


@dataclass(frozen=True, kw_only=True, slots=True)
class Gkd:
    """Settings.

    Args:
        divergence, parameter, temperature: as in `TokenDivergence` (parameter is beta of jsd).
        on_policy: λ, the share of batches that the student writes itself, in [0, 1].
        off_policy_source: what the other batches are: "stored" rollouts of `policy`, or "teacher": written anew.
        policy: whose stored rollouts.
        teacher_context: the prompt that the teacher reads ("privileged" for context distillation).
        teacher_origin: "given", or "ema", "snapshot", "live": the student itself as teacher (self-distillation).
        decay: of an "ema" teacher.
        teacher_scores: "live": the teacher runs at every step; "stored": its k likeliest words of every stored token
            are read from the store, where they are made once. Off-policy, temperature 1, a given teacher.
    """

    divergence: Divergence = "reverse_kl"
    parameter: float | None = None
    temperature: float = 1.0
    on_policy: float = 1.0
    off_policy_source: Literal["stored", "teacher"] = "stored"
    policy: str = "teacher"
    teacher_context: str = "prompt"
    teacher_origin: Origin = "given"
    decay: float = 0.0
    teacher_scores: TeacherScores = "live"

    def __post_init__(self) -> None:
        rollouts_stay = self.on_policy == 0 and self.off_policy_source == "stored"
        if self.teacher_scores == "stored" and not (
            rollouts_stay and self.temperature == 1 and self.teacher_origin == "given"
        ):
            raise InputError(
                "Stored scores of the teacher are of stored rollouts, at temperature 1, and of a given teacher: they "
                "need on_policy 0, off_policy_source stored, temperature 1 and teacher_origin given, not "
                f"{self.on_policy:g}, {self.off_policy_source}, {self.temperature:g} and {self.teacher_origin}."
            )

    def phases(self) -> list[Phase]:
        """One phase."""
        teacher = Role(name="teacher", origin=self.teacher_origin, context=self.teacher_context, decay=self.decay)
        with_scores = teacher.name if self.teacher_scores == "stored" else None
        other: Source = Stored(self.policy, with_scores) if self.off_policy_source == "stored" else Fresh("teacher")
        source: Source = Mixed(Fresh("student"), other, self.on_policy)
        if self.on_policy in (0.0, 1.0):
            source = Fresh("student") if self.on_policy else other
        term = TokenDivergence(
            divergence=self.divergence, parameter=self.parameter, temperature=self.temperature,
            teacher="stored" if with_scores else teacher.name,
        )  # fmt: skip
        return [Phase(name="distil", sources={"main": source}, terms=[term], roles=[teacher])]


METHOD = Gkd
ENTRY = Entry(
    name="gkd",
    seed=151,
    title="A Survey of On-Policy Distillation for Large Language Models",
    arxiv="2604.00626",
    backend="lm",
    family="lm-study",
    signal="logits",
    access="logits",
    granularity="token",
    degree="off-policy to on-policy",
    needs="a teacher model with the student's vocabulary",
    evidence="identities; on rooms labels .249 < off-policy .295 < fresh teacher .438 < on-policy .687 (3 seeds): "
    "benchmarks/results/rooms.md",
    reading="the survey has no experiments; the defaults are our reading of its recommendations",
)
