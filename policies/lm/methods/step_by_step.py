"""Distilling step-by-step: one model learns two tasks, told apart by a prefix: the answer, and the teacher's rationale.

Paper: "Distilling Step-by-Step!" (2305.02301, seed 128).
Equation: L = α L_label + (1-α) L_rationale, each a mean over the tokens of its own batch.
Deviations: a decoder instead of T5's encoder and decoder; the prefix begins the prompt, as in the paper. The two means
    are taken apart (a trap: one mean over both would weight rationales by their length).
Verified by: tests/policies/test_methods.py; effect and control in benchmarks/bench_step_by_step.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from workbench.errors import InputError
from workbench.policies.catalog import Entry
from workbench.policies.nouns import Phase, Stored
from workbench.policies.terms import CrossEntropy


@dataclass(frozen=True, kw_only=True, slots=True)
class StepByStep:
    """Settings.

    Args:
        alpha: weight of the label's loss, in [0, 1]; 1 = plain fine-tuning on labels.
        labels: policy name under which the answers are stored (gold, or the teacher's).
        rationales: policy name of the rationales.
        label_context, rationale_context: the tasks' prompts with the prefix of each; only the first is needed at test
            time.
    """

    alpha: float = 0.5
    labels: str = "labels"
    rationales: str = "rationales"
    label_context: str = "prompt"
    rationale_context: str = "explain"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha is the share of the label's loss, in [0, 1], not {self.alpha}.")

    def phases(self) -> list[Phase]:
        """One phase with two segments."""
        label = CrossEntropy(segment="label", coefficient=self.alpha)
        rationale = CrossEntropy(segment="rationale", coefficient=1 - self.alpha)
        terms = [term for term in (label, rationale) if term.coefficient]
        sources = {term.segment: Stored(self.labels if term is label else self.rationales) for term in terms}
        contexts = {"label": self.label_context, "rationale": self.rationale_context}
        return [Phase(name="two-tasks", sources=sources, terms=terms, contexts=contexts)]


METHOD = StepByStep
ENTRY = Entry(
    name="step-by-step",
    seed=128,
    title="Distilling Step-by-Step! Outperforming Larger Language Models with Less Training Data and Smaller "
    "Model Sizes",
    arxiv="2305.02301",
    backend="lm",
    family="lm-sequence-data",
    signal="text",
    access="text",
    granularity="sequence",
    degree="off-policy",
    needs="labels and teacher rationales of the tasks",
    evidence="identities; digit sums modulo 3, 200 labels, equal steps, 3 seeds: .759 (two seeds .97, one at chance) "
    "against .337 with labels alone and .331 with shuffled rationales: benchmarks/results/step_by_step.md",
    reading="a decoder-only student; otherwise read in the released code",
)
