"""TAID: distil towards a target between student and teacher that moves to the teacher as fast as the loss falls.

Paper: "TAID: Temporally Adaptive Interpolated Distillation" (2501.16937, seed 61).
Equation: p_t = sg softmax((1-t) z_S + t z_T); L = -(1/Σm) Σ m Σ_v p_t(v) log softmax(z_S)_v. After a step of loss l_n:
    δ = (l_{n-1} - l_n) / (l_{n-1} + 1e-15), μ = β μ + (1-β) δ, Δt = α σ(μ) (1-t),
    t = min(t_end, max(t_start + (t_end - t_start) n/N, t + Δt)). The first step only stores the loss.
Deviations: none with the live teacher. The logged loss is cross-entropy, as in the released code (the target's entropy
    is left out). With stored scores, z are log-probabilities of the teacher's k likeliest words and of all others.
Verified by: tests/policies/test_methods.py, test_stored_scores.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from workbench.errors import InputError
from workbench.policies.catalog import Entry
from workbench.policies.nouns import Phase, Role, Stored
from workbench.policies.terms import TeacherScores, TokenDivergence


@dataclass(frozen=True, kw_only=True, slots=True)
class Taid:
    """Settings; defaults of the paper for Phi-3-mini -> TinyLlama.

    Args:
        t_start, t_end: in [0, 1]; a smaller start for a larger gap.
        alpha: step size of the clock; beta: its momentum.
        adaptive: False = t is the straight line from start to end.
        policy: whose stored rollouts.
        teacher_scores: "live": the teacher runs at every step; "stored": its top-k is read from the store.
    """

    t_start: float = 0.4
    t_end: float = 1.0
    alpha: float = 5e-4
    beta: float = 0.99
    adaptive: bool = True
    policy: str = "teacher"
    teacher_scores: TeacherScores = "live"

    def __post_init__(self) -> None:
        if not 0 <= self.t_start <= self.t_end <= 1:
            raise InputError(f"TAID needs 0 <= t_start <= t_end <= 1, not {self.t_start} and {self.t_end}.")

    def phases(self) -> list[Phase]:
        """One phase whose clock runs with the loss."""
        is_stored = self.teacher_scores == "stored"
        teacher = "stored" if is_stored else "teacher"
        return [
            Phase(
                name="distil",
                sources={"main": Stored(self.policy, "teacher" if is_stored else None)},
                terms=[TokenDivergence(divergence="cross_entropy", interpolation="t", teacher=teacher)],
                roles=[Role(name="teacher")],
                state={"t": self.t_start, "momentum": 0.0, "previous_loss": -1.0},
                after_step=self.advance,
            )
        ]

    def advance(self, state: dict[str, float], loss: float, step: int, steps: int) -> None:
        """Moves the clock after a step; `previous_loss` < 0 says that there was none."""
        line = self.t_start + (self.t_end - self.t_start) * step / steps
        previous, state["previous_loss"] = state["previous_loss"], loss
        if not self.adaptive:
            state["t"] = line
            return
        if previous < 0:
            return
        change = (previous - loss) / (previous + 1e-15)
        state["momentum"] = self.beta * state["momentum"] + (1 - self.beta) * change
        gain = self.alpha * _sigmoid(state["momentum"]) * (1 - state["t"])
        state["t"] = min(self.t_end, max(line, state["t"] + gain))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


METHOD = Taid
ENTRY = Entry(
    name="taid",
    seed=61,
    title="TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language Models",
    arxiv="2501.16937",
    backend="lm",
    family="lm-offline",
    signal="logits",
    access="logits",
    granularity="token",
    degree="off-policy",
    needs="a teacher model with the student's vocabulary, teacher rollouts",
    evidence="identities, the clock, exact resume; no gain over forward KL on rooms (+.006, 3 seeds): "
    "benchmarks/results/rooms.md",
    reading="none: objective, clock and defaults were read in the released code",
)
