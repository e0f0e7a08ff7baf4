"""Logit standardisation: the student copies the order and relative spacing of the teacher's logits, not their scale.

Paper: "Logit Standardization in Knowledge Distillation" (2403.01427, seed 54).
Equation: Z(z) = (z - mean_c z) / (std_c z + 1e-7), std with C - 1;
    L = w_ce CE(z_S, y) + w_kd τ² KL(softmax(Z(z_T)/τ) ‖ softmax(Z(z_S)/τ)). The gradient flows through the student's
    mean and std: it sums to 0 over classes and is orthogonal to z_S - mean, so to first order the scale stays.
Deviations: only in front of plain distillation; of the paper's DKD, MLKD and CTKD variants there is none.
Verified by: tests/policies/vision/test_vision_logit_standardization.py; benchmarks/bench_vision.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from workbench.errors import InputError
from workbench.policies.catalog import Entry
from workbench.policies.nouns import Phase, Role, Stored
from workbench.policies.vision.terms import TABLE, Distillation, Labels


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitStandardization:
    """Settings; defaults of the released code for CIFAR-100.

    Args:
        temperature: the base temperature τ; the paper takes 2, and 3 or 4 for some pairs.
        kd_weight: of the distillation; 6 to 18 in the paper, by pair.
        ce_weight: of the labels' cross-entropy, which takes the logits as they are; 0 = no labels are needed.
        standardise: False = plain distillation, the baseline.
    """

    temperature: float = 2.0
    kd_weight: float = 9.0
    ce_weight: float = 1.0
    standardise: bool = True

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"The temperature must be above 0, not {self.temperature}.")
        if min(self.kd_weight, self.ce_weight) < 0:
            raise InputError(f"Weights must be 0 or more, not {self.kd_weight} and {self.ce_weight}.")

    def phases(self) -> list[Phase]:
        """One phase; labels are read only if they count."""
        labels = [Labels(coefficient=self.ce_weight)] if self.ce_weight else []
        kd = Distillation(
            temperature=self.temperature, standardise=self.standardise, coefficient=self.kd_weight
        )  # fmt: skip
        return [
            Phase(name="distil", sources={"main": Stored(TABLE)}, terms=[*labels, kd], roles=[Role(name="teacher")])
        ]


METHOD = LogitStandardization
ENTRY = Entry(
    name="logit-standardization",
    seed=54,
    title="Logit Standardization in Knowledge Distillation",
    arxiv="2403.01427",
    backend="vision",
    family="vision-logit",
    signal="logits",
    access="logits",
    granularity="image",
    degree="off-policy",
    needs="a teacher model with the student's classes; images with labels (without, at ce_weight 0)",
    evidence="identities; digits, MLP of 8 units, 3 seeds, no labels: accuracy .931 and rank agreement .919 "
    "whatever the scale of the teacher's logits; plain distillation .901 to .844 and .911 to .720 from x "
    ".2 to x 5. Without the labels' term the student's scale is nobody's (ECE .78): "
    "benchmarks/results/vision.md",
    reading="of the released code the plain distillation only",
)
