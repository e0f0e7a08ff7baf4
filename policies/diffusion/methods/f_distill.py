"""f-distill: DMD2 with a weight h(r) on each sample, which turns reverse KL into any f-divergence.

Paper: "One-step Diffusion Models with f-Divergence Distribution Matching" (2502.15681, seed 113).
Equation: D_f(p || q) = E_q f(p/q) of teacher p and student q; its gradient is E h(r) (score_q - score_p) dx_t, with
    h(r) = f''(r) r^2 and r = p_t/q_t at x_t = exp(l) of DMD2's discriminator. r is clipped to [.1, 20], divided by its
    mean in a bin of times (that mean is 1 for an exact discriminator), and h by its mean.
Deviations: those of DMD2. The paper's head reads the frozen teacher, which is `features` here; it trains in the
    critic's turn. Means of r and h are over a micro-batch of all processes, so accumulation is not one large batch.
Verified by: tests/policies/diffusion/test_f_distill.py, test_score_parts.py; benchmarks/bench_diffusion.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from workbench.errors import InputError
from workbench.policies.catalog import Entry
from workbench.policies.diffusion.adversarial import Discriminator
from workbench.policies.diffusion.generation import schedule_of
from workbench.policies.diffusion.methods.dmd2 import Dmd2
from workbench.policies.diffusion.score_terms import DistributionMatching
from workbench.policies.nouns import Phase

if TYPE_CHECKING:
    from torch import Tensor, nn

    from workbench.policies.loop.view import View

Divergence = Literal["reverse_kl", "forward_kl", "js", "softened_reverse_kl", "neyman", "hellinger", "jeffreys"]


def ratio_weight(r: Tensor, divergence: Divergence) -> Tensor:
    """h(r) = f''(r) r^2 up to a constant factor, like r = p/q > 0 (f-distill, table of divergences)."""
    return {
        "reverse_kl": lambda: r.new_ones(r.shape),
        "forward_kl": lambda: r,
        "js": lambda: r / (1 + r),
        "softened_reverse_kl": lambda: 1 / (1 + r),
        "neyman": lambda: 1 / r,
        "hellinger": lambda: r.sqrt(),
        "jeffreys": lambda: 1 + r,
    }[divergence]()


def density_ratio(logits: Tensor) -> Tensor:
    """r [B] of logits [B, heads] (their mean), in [.1, 20]; a logit that is not a number says 1."""
    return logits.detach().mean(1).nan_to_num(0.0).clamp(-10, 10).exp().clamp(0.1, 20)


def update_bins(means: Tensor, r: Tensor, bins: Tensor, decay: float) -> None:
    """Moves the mean ratio [num] of each bin that has samples: r [B], bins [B] long."""
    counts = bins.bincount(minlength=len(means))
    sums = r.new_zeros(len(means)).index_add_(0, bins, r)
    latest = decay * means + (1 - decay) * sums / counts.clamp_min(1)
    means.copy_(latest.where(counts > 0, means))


@dataclass(frozen=True, kw_only=True, slots=True)
class RatioWeight:
    """h of each sample [B], of mean 1. Args: bins: of time, 0 = r as it is; decay: of the bins' means."""

    discriminator: Discriminator
    divergence: Divergence
    bins: int
    decay: float

    def __call__(self, view: View, x_t: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
        """Logs how far the bins' mean ratios are from the 1 of an exact discriminator."""
        r = density_ratio(self.discriminator.logits(view, x_t, t, c)).to(x_t.dtype)
        if self.bins:
            schedule, memory = schedule_of(view), view.module("ratios")
            share = (t - schedule.t_min) / (schedule.t_max - schedule.t_min)
            number = (share * self.bins).long().clamp(0, self.bins - 1)
            means: Any = memory.means
            update_bins(means, view.gather(r), view.gather(number), self.decay)
            view.log("ratio/off_one", float((means - 1).abs().max()))
            r = r / means[number]
        weight = ratio_weight(r, self.divergence)
        return weight / view.average(weight.mean())


@dataclass(frozen=True, kw_only=True, slots=True)
class FDistill(Dmd2):
    """Settings of `Dmd2`, and the weight.

    Args:
        divergence: "reverse_kl" is DMD2.
        bins, bin_decay: equal parts of the schedule with a mean ratio each, and its decay; 0 bins = r as it is.
    """

    features: Literal["critic", "teacher"] = "teacher"
    divergence: Divergence = "js"
    bins: int = 10
    bin_decay: float = 0.5

    def __post_init__(self) -> None:
        Dmd2.__post_init__(self)
        if not self.gan:
            raise InputError("f-distill reads the ratio off DMD2's discriminator: `gan` must be above 0.")
        if self.divergence not in get_args(Divergence):
            raise InputError(f"Divergence {self.divergence!r}: give one of {', '.join(get_args(Divergence))}.")

    def phases(self) -> list[Phase]:
        """DMD2's phase with a weight."""
        [phase] = Dmd2.phases(self)
        weight = RatioWeight(
            discriminator=self.discriminator(), divergence=self.divergence, bins=self.bins, decay=self.bin_decay
        )
        matching, *others = phase.terms
        assert isinstance(matching, DistributionMatching)
        return [replace(phase, terms=[replace(matching, weight=weight), *others], modules=self.modules)]

    def modules(self, models: Mapping[str, Any]) -> dict[str, nn.Module]:
        """DMD2's head, and a memory of the bins' mean ratios."""
        import torch
        from torch import nn

        memory = nn.Module()
        memory.register_buffer("means", torch.ones(self.bins))
        return {**self.discriminator().modules(models), "ratios": memory}


METHOD = FDistill
ENTRY = Entry(
    name="f-distill",
    seed=113,
    title="One-step Diffusion Models with f-Divergence Distribution Matching",
    arxiv="2502.15681",
    backend="diffusion",
    family="diff-score",
    signal="score difference, density ratio",
    access="weights",
    granularity="sample",
    degree="on-policy",
    needs="a teacher network, real data as the table 'data'",
    evidence="gradients of seven divergences and fixed points of three by quadrature; reverse KL is DMD2 to the bit. "
    "gauss8 from a student of one mode, 3 seeds: share of the smallest mode (x 8) .48 for reverse KL, .71 JS, .66 "
    "forward KL: benchmarks/results/diffusion_score.md. A Gaussian student of two modes: a learnt ratio at low times "
    "moves its mean from .22-.26 to -.29 to -.35 (6 seeds; exact forward KL -.07: the ratio is not exact), shuffled "
    "ratios leave it at .23-.31; at the paper's times no gain is shown",
    reading="weights are used up to a constant factor, as in the released code; equal bins over the schedule's time",
)
