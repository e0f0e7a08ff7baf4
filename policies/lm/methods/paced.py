"""PACED: weight each problem by the student's pass rate, so that solved and hopeless ones contribute nothing.

Paper: "PACED: Distillation at the Frontier of Student Competence" (2603.11178, seed 24).
Equation: w(p) = p^α (1-p)^β with p from K rollouts; L = Σ_x w(p_x) · mean_t D_t / Σ_x w(p_x).
Deviations: the normalisation over the step's sequences is the public repository's; the paper leaves it open. K and how
    often pass rates are measured anew are not known: here once, before each phase (our reading).
Verified by: tests/policies/test_methods.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workbench.errors import InputError
from workbench.policies.catalog import Entry
from workbench.policies.nouns import Fresh, Phase, Role, Source, Stored
from workbench.policies.tasks import Task
from workbench.policies.terms import TokenDivergence

Stage = Literal["forward_kl", "reverse_kl"]


def beta_weight(pass_rate: float, alpha: float, beta: float) -> float:
    """p^alpha (1-p)^beta with 0^0 = 1."""
    return pass_rate**alpha * (1 - pass_rate) ** beta


@dataclass(frozen=True, kw_only=True, slots=True)
class Paced:
    """Settings.

    Args:
        alpha, beta: of the weight; 1, 1 in the paper's later version.
        stages: divergences in order; the paper's two stages are forward KL (coverage), then reverse KL (consolidation).
        policy: whose stored rollouts the forward stage reads; the reverse stage reads the student's own.
    """

    alpha: float = 1.0
    beta: float = 1.0
    stages: tuple[Stage, ...] = ("forward_kl", "reverse_kl")
    policy: str = "teacher"

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.beta < 0:
            raise InputError(f"PACED needs alpha, beta >= 0, not {self.alpha} and {self.beta}.")
        if not self.stages or set(self.stages) - {"forward_kl", "reverse_kl"}:
            raise InputError(f"PACED's stages are forward_kl and reverse_kl, not {self.stages}.")

    def weight(self, task: Task) -> float:
        """Of a task, by its pass rate; raises InputError where none was measured."""
        if task.pass_rate is None:
            raise InputError(f"PACED weights tasks by pass rate, and task {task.id!r} has none: measure them first.")
        return beta_weight(task.pass_rate, self.alpha, self.beta)

    def phases(self) -> list[Phase]:
        """One phase a stage, of equal length."""
        found = []
        for stage in self.stages:
            source: Source = Stored(self.policy) if stage == "forward_kl" else Fresh("student")
            found.append(
                Phase(
                    name=stage, sources={"main": source}, terms=[TokenDivergence(divergence=stage, by_sequence=True)],
                    roles=[Role(name="teacher")], task_weight=self.weight,
                    share=1 / len(self.stages),
                )
            )  # fmt: skip
        return found


METHOD = Paced
ENTRY = Entry(
    name="paced",
    seed=24,
    title="PACED: Distillation at the Frontier of Student Competence",
    arxiv="2603.11178",
    backend="lm",
    family="lm-onpolicy",
    signal="logits",
    access="logits",
    granularity="token, weighted by task",
    degree="off-policy, then on-policy",
    needs="a teacher model, teacher rollouts, pass rates of the student's rollouts",
    evidence="identities and weights; no gain of the weights on rooms (.444, uniform .460, 3 seeds): "
    "benchmarks/results/rooms.md",
    reading="normalisation, K and the cadence of measuring pass rates are our reading",
)
