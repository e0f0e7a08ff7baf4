"""SODA: prefer the teacher's text over what the untrained student wrote, by DPO after a warm-up on the teacher's text.

Paper: "SODA: Semi On-Policy Black-Box Distillation for Large Language Models" (2604.03873, seed 156).
Equation: warm-up w = argmin -E log q(y+|x); then L = -E log σ(β[log q(y+)/q_w(y+)] - β[log q(y-)/q_w(y-)]), q_w frozen,
    y+ ~ teacher, y- ~ q_0: one sample of the student as it was before the warm-up; sums over completion tokens.
Deviations: none known; β, learning rate and epochs were not read (β 0.1 is DPO's).
Verified by: tests/policies/test_methods.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from workbench.errors import InputError
from workbench.policies.catalog import Entry
from workbench.policies.nouns import Phase, Role, Stored
from workbench.policies.terms import CrossEntropy, Preference


@dataclass(frozen=True, kw_only=True, slots=True)
class Soda:
    """Settings.

    Args:
        beta: of DPO, > 0. Small ones overshoot after a long warm-up: the optimum is q_w (p_T / q_0)^(1/beta).
        warm_up: share of the steps that go to the warm-up, in [0, 1).
        policy: whose rollouts are preferred.
        base_policy: under which name the base student's rollouts are stored; they are written once, before training.
        preference_learning_rate: factor on the recipe's, in the second phase.
    """

    beta: float = 0.1
    warm_up: float = 0.3
    policy: str = "teacher"
    base_policy: str = "student-base"
    preference_learning_rate: float = 0.1

    def __post_init__(self) -> None:
        if not self.beta > 0 or not 0 <= self.warm_up < 1:
            raise InputError(f"SODA needs beta > 0 and 0 <= warm_up < 1, not {self.beta} and {self.warm_up}.")

    def phases(self) -> list[Phase]:
        """Warm-up, then preferences against the warmed-up student."""
        pairs = {"chosen": Stored(self.policy), "rejected": Stored(self.base_policy)}
        preference = Phase(
            name="preference", sources=pairs, terms=[Preference(beta=self.beta)],
            roles=[Role(name="reference", origin="snapshot")], share=1 - self.warm_up,
            learning_rate=self.preference_learning_rate,
        )  # fmt: skip
        if not self.warm_up:
            return [preference]
        warm_up = Phase(
            name="warm-up", sources={"main": Stored(self.policy)}, terms=[CrossEntropy()], share=self.warm_up
        )
        return [warm_up, preference]


METHOD = Soda
ENTRY = Entry(
    name="soda",
    seed=156,
    title="SODA: Semi On-Policy Black-Box Distillation for Large Language Models",
    arxiv="2604.03873",
    backend="lm",
    family="lm-offline",
    signal="preference",
    access="text",
    granularity="sequence",
    degree="semi on-policy",
    needs="teacher rollouts; one rollout of the base student for each task",
    evidence="identities and the population optimum; on rooms it ends below sequence KD (.112 against .226, 3 seeds): "
    "benchmarks/results/rooms.md",
    reading="beta, learning rate and epochs were not read; they are DPO's customary ones",
)
