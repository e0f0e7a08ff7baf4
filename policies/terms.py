"""Terms that several methods share. Each is a small dataclass that is called with a view of the micro-batch.

torch is imported when a term is called, so that a method's phases can be listed without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.policies.lm.view import View

Divergence = Literal[
    "forward_kl", "reverse_kl", "jsd", "total_variation", "alpha", "skew_forward_kl", "skew_reverse_kl", "cross_entropy"
]
#: Whether a frozen teacher runs at every step, or its top-k of stored rollouts is read from the store.
TeacherScores = Literal["live", "stored"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossEntropy:
    """Mean negative log-probability of the completion's tokens, in nats a token: hard labels."""

    segment: str = "main"
    coefficient: float = 1.0

    def __call__(self, view: View) -> Tensor:
        """The share of the micro-batch."""
        from workbench.kernels.divergences import DivergenceSpec

        return view.divergence(DivergenceSpec(terms=(), label_weight=1.0), None, self.segment)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenDivergence:
    """Mean divergence of the student from a teacher over the whole vocabulary, in nats a token: soft labels.

    Args:
        divergence: forward_kl = KL(teacher‖student), reverse_kl = KL(student‖teacher), jsd with beta as in GKD
            (beta -> 0 forward, beta -> 1 reverse), … (`workbench.kernels.divergences`).
        parameter: of jsd (beta), alpha (alpha), skew divergences (skew); None for the others.
        temperature: of both distributions.
        interpolation: the target lies between student (0) and teacher (1), in logits; the name of a number of the
            phase's state, or None = the teacher itself.
        teacher: a role, or "stored": the top-k scores that came with stored rollouts.
        by_sequence: every sequence counts alike, however long; else every token.
    """

    divergence: Divergence = "reverse_kl"
    parameter: float | None = None
    temperature: float = 1.0
    interpolation: str | None = None
    teacher: str = "teacher"
    segment: str = "main"
    by_sequence: bool = False
    coefficient: float = 1.0

    def __call__(self, view: View) -> Tensor:
        """The share of the micro-batch."""
        from workbench.kernels.divergences import Divergence as Kernel
        from workbench.kernels.divergences import DivergenceSpec

        spec = DivergenceSpec(
            terms=(Kernel(self.divergence, self.parameter),), temperature=self.temperature,
            interpolation=view.state[self.interpolation] if self.interpolation else 1.0,
        )  # fmt: skip
        weights = view.weights_by_sequence(self.segment) if self.by_sequence else None
        return view.divergence(spec, self.teacher, self.segment, weights)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """DPO between the segments "chosen" and "rejected" against a frozen reference (2305.18290, eq. 7)."""

    beta: float = 0.1
    reference: str = "reference"
    coefficient: float = 1.0

    def __call__(self, view: View) -> Tensor:
        """The share of the micro-batch."""
        from workbench.policies.estimators import preference_loss

        sums = [
            view.sequence_sum(view.logprobs(role, segment), segment)
            for role in ("student", self.reference)
            for segment in ("chosen", "rejected")
        ]
        chosen, rejected, chosen_reference, rejected_reference = sums
        margin = (chosen - chosen_reference) - (rejected - rejected_reference)
        view.log("preference/accuracy", (margin > 0).float().mean())
        losses = preference_loss(chosen, rejected, chosen_reference, rejected_reference, self.beta)
        return view.sequence_mean(losses, "chosen")
