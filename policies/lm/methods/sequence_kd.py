"""Sequence-level distillation: fine-tune the student on what the teacher wrote, under the student's own prompt.

Paper: "Knowledge Distillation Using Frontier Open-source LLMs" (2410.18588, seed 160); the loss is Kim and Rush 2016.
Equation: L = -(1/Σm) Σ_t m_t log π(ŷ_t | P_S(x), ŷ_<t), ŷ ~ p_T(· | P_T(x)).
Deviations: none; the paper's evaluation protocol (several graders) is in `workbench.evals`.
Verified by: tests/policies/test_methods.py, test_effects.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from workbench.policies.catalog import Entry
from workbench.policies.nouns import Fresh, Phase, Role, Stored
from workbench.policies.terms import CrossEntropy


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceKd:
    """Settings.

    Args:
        policy: whose stored rollouts: "teacher", or "labels" for the tasks' own worked answers.
        fresh: let the teacher write anew for every batch; needs the teacher model.
        teacher_context: the prompt that a fresh teacher reads (the rich one); the student never sees it.
    """

    policy: str = "teacher"
    fresh: bool = False
    teacher_context: str = "prompt"

    def phases(self) -> list[Phase]:
        """One phase of cross-entropy."""
        if self.fresh:
            teacher = Role(name="teacher", context=self.teacher_context)
            return [Phase(name="sft", sources={"main": Fresh("teacher")}, terms=[CrossEntropy()], roles=[teacher])]
        return [Phase(name="sft", sources={"main": Stored(self.policy)}, terms=[CrossEntropy()])]


METHOD = SequenceKd
ENTRY = Entry(
    name="sequence-kd",
    seed=160,
    title="Knowledge Distillation Using Frontier Open-source LLMs: Generalizability and the Role of Synthetic Data",
    arxiv="2410.18588",
    backend="lm",
    family="lm-study",
    signal="text",
    access="text",
    granularity="sequence",
    degree="off-policy",
    needs="teacher rollouts",
    evidence="identities; on rooms no better than labels (.226 against .249, 3 seeds): benchmarks/results/rooms.md",
    reading="the loss is standard; hyper-parameters and the list of tasks were not read",
)
