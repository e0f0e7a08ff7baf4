"""LoRA-enhanced distillation: adapters on the teacher's own weights learn its guided prediction in one pass.

Paper: "LoRA-Enhanced Distillation on Guided Diffusion Models" (2312.06899, seed 31).
Equation: L = E |e_{W + BA}(x_t, t, c) - sg(e_∅ + w (e_c - e_∅))|², e the teacher's own parameterisation (ε for Stable
    Diffusion), e_∅ and e_c with the adapters off, x_t noised data. At the start B = 0, the student is e_c, and the loss
    is (w - 1)² E |e_c - e_∅|²; for w = 1 it is 0.
Deviations: one fixed w; adapters on all linear and convolutional layers, not on attention's only; the optional second
    stage (fewer steps) is another method, run with this student as its teacher. Errors are means over elements.
Verified by: tests/policies/diffusion/test_lora_guidance.py; benchmarks/bench_diffusion.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from workbench.policies.catalog import Entry
from workbench.policies.diffusion.generation import TABLE
from workbench.policies.diffusion.regression import GuidedRegression
from workbench.policies.nouns import Phase, Role, Stored


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraGuidance:
    """Settings; the paper's text that could be read gives none, these are common ones.

    Args: weight: of the guidance, null + weight (conditional - null); rank: of the adapters.
    """

    weight: float = 7.5
    rank: int = 16

    def phases(self) -> list[Phase]:
        """One phase; its student is an adapter of the teacher, so that none is given to the run."""
        return [
            Phase(
                name="distil",
                sources={"main": Stored(TABLE)},
                terms=[GuidedRegression(weight=self.weight)],
                roles=[Role(name="teacher"), Role(name="student", origin="adapter", of="teacher", rank=self.rank)],
            )
        ]


METHOD = LoraGuidance
ENTRY = Entry(
    name="lora-guidance",
    seed=31,
    title="LoRA-Enhanced Distillation on Guided Diffusion Models",
    arxiv="2312.06899",
    backend="diffusion",
    family="diff-guidance",
    signal="guided prediction",
    access="weights",
    granularity="noise level",
    degree="off-policy",
    needs="a class-conditional diffusion teacher, data with labels",
    evidence="identities; two classes on gauss8, w = 3, 3 seeds: the error to the guided teacher falls from .644"
    " to .100, .051, .022 with rank 1, 4, 16 (.010 with all weights), samples of one pass from .101 to "
    ".035 (rank 16) of those of two; towards w = -1 it moves away: "
    "benchmarks/results/diffusion_trajectory.md",
    reading="the objective, from the guided-distillation literature that the abstract cites; rank and weight",
)
