"""Divergences between a teacher's and a student's next-token distributions, from logits: the plain reference.

Every function here materialises tokens × vocabulary and is differentiated by autograd. `linear_divergence` computes the
same from hidden states without doing so, and is tested against this file.

Notation: T tokens, V words (or outcomes), K listed words; p teacher, q student, natural logarithms, nats per token.
Inputs may be logits or log-probabilities (any constant shift per row) and are computed in float32 or wider. The
teacher gets no gradient. A word whose logit is -inf is masked: probability zero, no gradient. A row whose
divergence is infinite (mass on a word that the other side masks) is +inf and passes no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from workbench.errors import InputError

Kind = Literal[
    "forward_kl", "reverse_kl", "jsd", "total_variation", "alpha", "skew_forward_kl", "skew_reverse_kl", "cross_entropy"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
#: Stands for -inf where a finite number keeps 0 * log 0 at 0; everything at or below the limit counts as masked.
MASKED = -1e30
MASK_LIMIT = -1e20
STD_EPSILON = 1e-7
IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True)
class Divergence:
    """One term: its kind, the kind's parameter and a factor.

    Args: parameter: beta of `jsd`, alpha of `alpha` (both 0 to 1, ends are the KLs), skew of `skew_forward_kl` and
    `skew_reverse_kl` (0 to below 1); None for the other kinds.
    Raises: InputError for an unknown kind or a parameter out of range.
    """

    kind: Kind
    parameter: float | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"divergence {self.kind!r} is unknown; there are {', '.join(KINDS)}")
        if self.kind in ("jsd", "alpha", "skew_forward_kl", "skew_reverse_kl"):
            closed = self.kind in ("jsd", "alpha")
            value = self.parameter
            if value is None or not (0 <= value < 1 or (closed and value == 1)):
                interval = "[0, 1]" if closed else "[0, 1)"
                raise InputError(f"divergence {self.kind!r} needs a parameter in {interval}, not {value}")
        elif self.parameter is not None:
            raise InputError(f"divergence {self.kind!r} takes no parameter, but {self.parameter} was given")

    def resolved(self) -> Divergence:
        """The same term with the limits spelt out: jsd(0) is the forward KL, jsd(1) the reverse KL, and so on."""
        match self.kind, self.parameter:
            case ("jsd", 0) | ("alpha", 1) | ("skew_forward_kl", 0):
                return Divergence("forward_kl", None, self.weight)
            case ("jsd", 1) | ("alpha", 0) | ("skew_reverse_kl", 0):
                return Divergence("reverse_kl", None, self.weight)
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class DivergenceSpec:
    """What is computed for each token: a sum of terms, on logits prepared in this order.

    Args:
        terms: their weighted sum is the divergence; each kind at most once.
        temperature: divides both sides' logits; the loss is not multiplied by its square (Hinton et al. 2015
            sec. 2: give the terms that weight to keep the gradient's scale).
        standardise: z-score each row of logits first, (z - mean) / (std + 1e-7), std with n - 1, over the words that
            are not masked (arXiv 2403.01427).
        interpolation: t of the target softmax((1 - t) z_student + t z_teacher), student detached; 1 is the teacher
            (arXiv 2501.16937). Its logged loss is the term `cross_entropy`.
        label_weight: factor of the cross-entropy with hard labels, taken on logits without temperature and
            standardisation.
    """

    terms: tuple[Divergence, ...]
    temperature: float = 1.0
    standardise: bool = False
    interpolation: float = 1.0
    label_weight: float = 0.0

    def __post_init__(self) -> None:
        kinds = [term.resolved().kind for term in self.terms]
        if len(set(kinds)) != len(kinds):
            raise InputError(f"each kind of divergence may stand once in a mixture, but it holds {', '.join(kinds)}")
        if not kinds and not self.label_weight:
            raise InputError("nothing to compute: give terms or a label_weight")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise InputError(f"temperature must be above 0, not {self.temperature}")
        if not 0 <= self.interpolation <= 1:
            raise InputError(f"interpolation must lie in [0, 1], not {self.interpolation}")


def as_spec(spec: DivergenceSpec | Divergence | Kind) -> DivergenceSpec:
    """A spec from a spec, a single term, or the name of a kind without parameter."""
    if isinstance(spec, DivergenceSpec):
        return spec
    return DivergenceSpec(terms=(spec if isinstance(spec, Divergence) else Divergence(spec),))


@dataclass(frozen=True, slots=True, eq=False)
class TopK:
    """A teacher of which only the likeliest words are known.

    Args:
        ids_TK: word ids, each at most once in a row; a negative id is padding.
        logprobs_TK: their log-probabilities at the temperature of the spec (they are not tempered again: that needs
            the whole row).
        tail_logprob_T: log of the mass of all other words; by default what is missing to 1.
        renormalise: drop the tail and renormalise both sides over the listed words; else all other words are one
            further outcome. Without either, a student lowers its reverse KL by draining the listed words.
    """

    ids_TK: Tensor
    logprobs_TK: Tensor
    tail_logprob_T: Tensor | None = None
    renormalise: bool = False

    def __post_init__(self) -> None:
        if self.ids_TK.ndim != 2 or self.ids_TK.shape != self.logprobs_TK.shape:
            shapes = f"{tuple(self.ids_TK.shape)} and {tuple(self.logprobs_TK.shape)}"
            raise InputError(f"top-k ids and logprobs must both be [tokens, k], not {shapes}")
        if self.tail_logprob_T is not None and self.renormalise:
            raise InputError("top-k targets have either a tail or are renormalised over the listed words, not both")
        if self.tail_logprob_T is not None and self.tail_logprob_T.shape != self.ids_TK.shape[:1]:
            raise InputError(f"tail_logprob_T must be [tokens], not {tuple(self.tail_logprob_T.shape)}")

    def rows(self, index: slice | Tensor) -> TopK:
        """The targets of some tokens."""
        tail = None if self.tail_logprob_T is None else self.tail_logprob_T[index]
        return TopK(self.ids_TK[index], self.logprobs_TK[index], tail, self.renormalise)

    def outcome_logprobs(self, num_words: int, dtype: torch.dtype) -> Tensor:
        """Log-probabilities of the K listed words and the tail, [T, K + 1], normalised; MASKED for padding."""
        listed = self.ids_TK >= 0
        logprobs = self.logprobs_TK.to(dtype).clamp(MASKED).masked_fill(~listed, MASKED)
        if self.renormalise:
            tail = torch.full_like(logprobs[:, 0], MASKED)
        elif self.tail_logprob_T is not None:
            tail = self.tail_logprob_T.to(dtype).clamp(MASKED)
        else:
            tail = torch.log1p(-logprobs.exp().sum(-1).clamp(max=1)).clamp(MASKED)
        # Rounding leaves a little mass for a tail that has no words.
        tail = tail.masked_fill(listed.sum(-1) >= num_words, MASKED)
        return log_probs(torch.cat([logprobs, tail[:, None]], -1))


def log_probs(logits: Tensor) -> Tensor:
    """log softmax over the last axis in float32 or wider, with MASKED and no gradient where the logit is -inf."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide.clamp(MASKED), -1).clamp(MASKED)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    a = log_a.exp()
    infinite = (a > 0) & (log_b <= MASK_LIMIT)
    terms = torch.where(infinite, 0.0, a * (log_a - log_b))
    return torch.where(infinite.any(-1), math.inf, terms.sum(-1))


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ p (ln p - ln q), mass covering; gradient q - p. Source: Hinton et al. 2015."""
    return _kl(log_probs(teacher).detach(), log_probs(student))


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(q ‖ p) = Σ q (ln q - ln p), mode seeking; gradient q (ln q/p - KL). Source: arXiv 2306.08543."""
    return _kl(log_probs(student), log_probs(teacher).detach())


def jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """β KL(p ‖ m) + (1 - β) KL(q ‖ m) with m = β p + (1 - β) q.

    At β = 0 and 1 it is by convention the forward and the reverse KL (TRL too); the value jumps there: JSD(β) / β tends
    to the forward KL, JSD(β) / (1 - β) to the reverse KL. Gradient (1 - β) q (ln q/m - KL(q ‖ m)).
    Source: arXiv 2306.13649, eq. 1.
    """
    if beta in (0, 1):
        return (reverse_kl if beta else forward_kl)(student, teacher)
    log_q, log_p = log_probs(student), log_probs(teacher).detach()
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    """½ Σ |p - q|, in 0 to 1; gradient ½ q (sign(q - p) - Σ q sign(q - p)). Source: arXiv 2307.15190, 2403.00858."""
    return 0.5 * (log_probs(student).exp() - log_probs(teacher).detach().exp()).abs().sum(-1)


def alpha_divergence(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """(1 - Σ p^α q^(1-α)) / (α (1 - α)): forward KL at α → 1, reverse KL at α → 0, 4(1 - Bhattacharyya) at ½.

    Summed as Σ (α p + (1 - α) q - p^α q^(1-α)), whose terms are all ≥ 0.
    Source: Cichocki and Amari 2010 (doi 10.3390/e12061532), sec. 3.
    """
    if alpha in (0, 1):
        return (forward_kl if alpha else reverse_kl)(student, teacher)
    log_q, log_p = log_probs(student), log_probs(teacher).detach()
    power = (alpha * log_p + (1 - alpha) * log_q).exp()
    return (alpha * log_p.exp() + (1 - alpha) * log_q.exp() - power).sum(-1) / (alpha * (1 - alpha))


def skew_forward_kl(student: Tensor, teacher: Tensor, skew: float) -> Tensor:
    """KL(p ‖ s p + (1 - s) q); the forward KL at s = 0. Source: arXiv 2402.03898, eq. 2."""
    if skew == 0:
        return forward_kl(student, teacher)
    log_q, log_p = log_probs(student), log_probs(teacher).detach()
    return _kl(log_p, torch.logaddexp(log_p + math.log(skew), log_q + math.log1p(-skew)))


def skew_reverse_kl(student: Tensor, teacher: Tensor, skew: float) -> Tensor:
    """KL(q ‖ s q + (1 - s) p); the reverse KL at s = 0. Source: arXiv 2402.03898, sec. 3.1."""
    if skew == 0:
        return reverse_kl(student, teacher)
    log_q, log_p = log_probs(student), log_probs(teacher).detach()
    return _kl(log_q, torch.logaddexp(log_q + math.log(skew), log_p + math.log1p(-skew)))


def cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """-Σ p ln q, the forward KL plus the target's entropy: same gradient where the target is fixed."""
    log_q, p = log_probs(student), log_probs(teacher).detach().exp()
    infinite = (p > 0) & (log_q <= MASK_LIMIT)
    return torch.where(infinite.any(-1), math.inf, -torch.where(infinite, 0.0, p * log_q).sum(-1))


def label_cross_entropy(student: Tensor, labels_T: Tensor) -> Tensor:
    """-ln q(label); 0 where the label is -100, +inf without gradient where it is a masked word."""
    ignored = labels_T == IGNORED_LABEL
    picked = log_probs(student).gather(-1, labels_T.masked_fill(ignored, 0)[:, None])[:, 0]
    return torch.where(ignored, 0.0, torch.where(picked <= MASK_LIMIT, math.inf, -picked))


def entropy(logits: Tensor) -> Tensor:
    """-Σ q ln q."""
    log_q = log_probs(logits)
    return -(log_q.exp() * log_q).sum(-1)


def term_function(term: Divergence) -> Callable[[Tensor, Tensor], Tensor]:
    """The reference function (student, teacher) -> [T] of a term, without its weight."""
    match term.kind:
        case "jsd":
            return partial(jsd, beta=term.parameter or 0.0)
        case "alpha":
            return partial(alpha_divergence, alpha=term.parameter or 0.0)
        case "skew_forward_kl":
            return partial(skew_forward_kl, skew=term.parameter or 0.0)
        case "skew_reverse_kl":
            return partial(skew_reverse_kl, skew=term.parameter or 0.0)
    plain = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "cross_entropy": cross_entropy}
    return plain.get(term.kind, total_variation)


def scale_and_cap(logits: Tensor, scale: float | Tensor = 1.0, softcap: float | None = None) -> Tensor:
    """cap · tanh(scale · z / cap), or scale · z without a cap; -inf stays -inf. Source: arXiv 2408.00118, sec. 2."""
    scaled = logits * (scale[:, None] if isinstance(scale, Tensor) else scale)
    if softcap is None:
        return scaled
    return torch.where(scaled == -math.inf, -math.inf, softcap * torch.tanh(scaled / softcap))


def standardise(logits_TV: Tensor) -> Tensor:
    """(z - mean) / (std + 1e-7) per row, std with n - 1, over words that are not masked. Source: arXiv 2403.01427."""
    masked = logits_TV <= MASK_LIMIT
    num = (~masked).sum(-1, keepdim=True)
    mean = logits_TV.masked_fill(masked, 0.0).sum(-1, keepdim=True) / num.clamp(min=1)
    centred = (logits_TV - mean).masked_fill(masked, 0.0)
    variance = centred.square().sum(-1, keepdim=True) / (num - 1).clamp(min=1)
    # The square root of a constant row's variance would have an infinite derivative.
    std = variance.clamp(min=1e-30).sqrt()
    return (centred / (std + STD_EPSILON)).masked_fill(masked, -math.inf)


def mix_teachers(logits: Sequence[Tensor], weights: Tensor) -> Tensor:
    """ln Σ_n w_n p_n, [T, V], for teachers' logits and their weights [N] or [T, N], normalised to sum 1."""
    log_weights = (weights / weights.sum(-1, keepdim=True)).log()
    mixed = torch.stack([log_probs(z) + log_weights[..., n, None] for n, z in enumerate(logits)])
    return torch.logsumexp(mixed.clamp(MASKED), 0)


def interpolate(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    """ln softmax((1 - t) z_student + t z_teacher), student detached. Source: arXiv 2501.16937, eq. 3."""
    log_q, log_p = log_probs(student).detach(), log_probs(teacher)
    return log_p if t == 1 else log_probs((1 - t) * log_q + t * log_p)


def top_k_outcomes(student: Tensor, targets: TopK) -> tuple[Tensor, Tensor]:
    """Student's and teacher's log-probabilities of the listed words and of the rest, [T, K + 1] each."""
    log_q = log_probs(student)
    listed = targets.ids_TK >= 0
    at_ids = log_q.gather(-1, targets.ids_TK.clamp(0)).masked_fill(~listed, MASKED)
    hit = torch.zeros_like(log_q).scatter_reduce(-1, targets.ids_TK.clamp(0), listed.to(log_q.dtype), "amax") > 0
    tail = torch.logsumexp(log_q.masked_fill(hit, MASKED), -1, keepdim=True)
    outcomes = torch.cat([at_ids, torch.full_like(tail, MASKED) if targets.renormalise else tail], -1)
    return log_probs(outcomes), targets.outcome_logprobs(student.shape[-1], log_q.dtype)


class Prepared(NamedTuple):
    """The student over the whole vocabulary, then student and target over the outcomes that are compared."""

    student_TV: Tensor
    student: Tensor
    target: Tensor | None


def _prepare(
    student_TV: Tensor,
    teacher: Tensor | Sequence[Tensor] | TopK | None,
    spec: DivergenceSpec,
    teacher_weights: Tensor | None,
) -> Prepared:
    def prepare(logits: Tensor) -> Tensor:
        wide = logits.to(student_TV.dtype)
        return (standardise(wide) if spec.standardise else wide) / spec.temperature

    student = prepare(student_TV)
    if not spec.terms:
        return Prepared(student, student, None)
    outcomes = student
    if isinstance(teacher, TopK):
        outcomes, target = top_k_outcomes(student, teacher)
    elif isinstance(teacher, Tensor):
        target = prepare(teacher)
    else:
        logits = [prepare(z) for z in teacher or ()]
        equal = student.new_ones(len(logits))
        target = mix_teachers(logits, equal if teacher_weights is None else teacher_weights.to(student.dtype))
    return Prepared(student, outcomes, interpolate(outcomes, target, spec.interpolation).detach())


def divergence(
    student_TV: Tensor,
    teacher: Tensor | Sequence[Tensor] | TopK | None,
    spec: DivergenceSpec | Divergence | Kind,
    *,
    labels_T: Tensor | None = None,
    teacher_weights: Tensor | None = None,
) -> Tensor:
    """Loss of each token, [T], as the spec says, from logits.

    Args: student_TV: logits after scale and soft cap; teacher: logits [T, V], several of them with teacher_weights
    ([N] or [T, N]; equal if None), top-k targets, or None where the spec has no terms; labels_T: word ids, -100 = none.
    """
    spec = as_spec(spec)
    wide = student_TV if student_TV.dtype == torch.float64 else student_TV.float()
    loss = wide.new_zeros(wide.shape[0])
    prepared = _prepare(wide, teacher, spec, teacher_weights)
    if prepared.target is not None:
        for term in spec.terms:
            loss = loss + term.weight * term_function(term)(prepared.student, prepared.target)
    if spec.label_weight and labels_T is not None:
        loss = loss + spec.label_weight * label_cross_entropy(wide, labels_T)
    return loss


def entropies(
    student_TV: Tensor,
    teacher: Tensor | Sequence[Tensor] | TopK | None,
    spec: DivergenceSpec,
    teacher_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Entropy of the student over the vocabulary and of the target (0 without one), [T] each."""
    prepared = _prepare(student_TV, teacher, spec, teacher_weights)
    student = entropy(prepared.student_TV)
    return student, torch.zeros_like(student) if prepared.target is None else entropy(prepared.target)
