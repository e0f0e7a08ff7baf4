"""Row arithmetic of `linear_divergence` in PyTorch: from projections of some tokens to losses and gradients.

Every divergence here is Σ_v φ(p_v, q_v). With w = q ∂φ/∂q its gradient in the student's logits is w - q Σ w.

Notation: R rows (tokens of a chunk), V words, K listed words; p teacher, q student; a trailing underscore: in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from workbench.kernels.divergences import (
    IGNORED_LABEL,
    MASK_LIMIT,
    MASKED,
    STD_EPSILON,
    Divergence,
    DivergenceSpec,
    TopK,
    log_probs,
)

#: Elements that are taken at once, so that temporaries stay in a core's L2 cache or, on a GPU, are few.
BLOCK_ELEMENTS_PER_THREAD = 1 << 17
BLOCK_ELEMENTS_GPU = 1 << 26


@dataclass(frozen=True, slots=True, eq=False)
class TargetRows:
    """A teacher's raw projections [R, V], or (`final`) log-probabilities to which nothing is applied any more."""

    tile: Tensor
    scale: float | Tensor = 1.0
    softcap: float | None = None
    final: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What a row function works on; `tile` [R, V] (raw projections) becomes the gradient if that is wanted."""

    tile: Tensor
    scale: float | Tensor
    softcap: float | None
    spec: DivergenceSpec
    target: TargetRows | TopK | None
    weights_R: Tensor | None
    labels_R: Tensor | None
    want_gradient: bool

    def block(self, index: slice) -> Rows:
        """Some of the rows, as views."""
        target = self.target
        if isinstance(target, TopK):
            target = target.rows(index)
        elif target is not None:
            target = replace(target, tile=target.tile[index], scale=_take(target.scale, index))
        return replace(
            self, tile=self.tile[index], scale=_take(self.scale, index), target=target,
            weights_R=_take(self.weights_R, index), labels_R=_take(self.labels_R, index),
        )  # fmt: skip


#: Returns unweighted losses, student entropies and target entropies, [3, R].
RowFunction = Callable[[Rows], Tensor]


def _take(value: Any, index: slice | Tensor) -> Any:
    return value[index] if isinstance(value, Tensor) else value


def rows_torch(rows: Rows) -> Tensor:
    """The row function in PyTorch, a few rows at a time."""
    step = _block_rows(rows.tile)
    blocks = [_block(rows.block(slice(start, start + step))) for start in range(0, rows.tile.shape[0], step)]
    return torch.cat(blocks, 1)


def _block_rows(tile: Tensor) -> int:
    on_cpu = tile.device.type == "cpu"
    elements = BLOCK_ELEMENTS_PER_THREAD * torch.get_num_threads() if on_cpu else BLOCK_ELEMENTS_GPU
    return max(1, elements // tile.shape[1])


def mix_(mixture: Tensor, target: TargetRows, log_weights_R: Tensor, spec: DivergenceSpec) -> None:
    """Adds a teacher's weighted probabilities to a mixture's log-probabilities; begins it if both are one tile."""
    step = _block_rows(mixture)
    for start in range(0, mixture.shape[0], step):
        rows = slice(start, start + step)
        part = TargetRows(target.tile[rows], _take(target.scale, rows), target.softcap)
        log_p = target_log_probs(part, spec).add_(log_weights_R[rows, None]).clamp_(min=MASKED)
        mixture[rows] = log_p if mixture is target.tile else _log_mixture(mixture[rows], log_p)


def scale_and_cap_(raw: Tensor, scale: float | Tensor, softcap: float | None) -> Tensor:
    """Raw projections to logits, with MASKED for -inf."""
    if isinstance(scale, Tensor):
        raw.mul_(scale[:, None])
    elif scale != 1:
        raw.mul_(scale)
    if softcap is not None:
        masked = raw <= MASK_LIMIT
        raw.div_(softcap).tanh_().mul_(softcap).masked_fill_(masked, MASKED)
    return raw.clamp_(min=MASKED)


def _standardise(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centred logits (0 where masked), their standard deviation and their number less one, [R, 1]."""
    masked = logits <= MASK_LIMIT
    less_one = ((~masked).sum(-1, keepdim=True) - 1).clamp(min=1).to(logits.dtype)
    mean = logits.masked_fill(masked, 0.0).sum(-1, keepdim=True) / (~masked).sum(-1, keepdim=True).clamp(min=1)
    centred = (logits - mean).masked_fill_(masked, 0.0)
    std = (centred.square().sum(-1, keepdim=True) / less_one).clamp_(min=1e-30).sqrt_()
    return centred, std, less_one


def _tempered(logits: Tensor, spec: DivergenceSpec) -> Tensor:
    """Logits standardised and divided by the temperature, as the spec says; may be the argument itself."""
    if spec.standardise:
        centred, std, _ = _standardise(logits)
        return centred.div_((std + STD_EPSILON) * spec.temperature).masked_fill_(logits <= MASK_LIMIT, MASKED)
    return logits if spec.temperature == 1 else logits / spec.temperature


def target_log_probs(target: TargetRows, spec: DivergenceSpec) -> Tensor:
    """A teacher's log-probabilities, [R, V]; its tile is changed."""
    if target.final:
        return target.tile
    return torch.log_softmax(_tempered(scale_and_cap_(target.tile, target.scale, target.softcap), spec), -1)


def _log_mixture(a: Tensor, b: Tensor) -> Tensor:
    """ln(eᵃ + eᵇ); `a` is changed. torch.logaddexp takes ten times as long on a CPU."""
    smaller = (a - b).abs_().neg_().exp_()
    return torch.maximum(a, b, out=a).add_(smaller.add_(1).log_())


def _kl_rows(mass: Tensor, log_mass: Tensor, log_other: Tensor) -> tuple[Tensor, Tensor | None]:
    """Σ mass (ln mass - ln other) by row, and which rows are infinite (None: none is)."""
    terms = (log_mass - log_other).mul_(mass)
    if log_other.device.type == "cpu" and log_other.amin() > MASK_LIMIT:
        return terms.sum(-1), None
    infinite = (log_other <= MASK_LIMIT) & (mass > 0)
    rows = infinite.any(-1)
    return terms.masked_fill_(infinite, 0.0).sum(-1).masked_fill_(rows, torch.inf), rows


def _term(term: Divergence, log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """A term's value by row and its w = q ∂φ/∂q (up to a multiple of q, which the gradient drops); 0 if infinite."""
    infinite = None
    s = term.parameter or 0.0
    if term.kind == "forward_kl":
        value, infinite = _kl_rows(p, log_p, log_q)
        w = -p
    elif term.kind == "cross_entropy":
        value, infinite = _kl_rows(p, torch.zeros_like(p), log_q)
        w = -p
    elif term.kind == "reverse_kl":
        value, infinite = _kl_rows(q, log_q, log_p)
        w = (log_q - log_p).mul_(q)
    elif term.kind == "total_variation":
        gap = q - p
        value = gap.abs().sum(-1).mul_(0.5)
        w = gap.sign_().mul_(q).mul_(0.5)
    elif term.kind == "alpha":
        power = (s * log_p).add_(log_q, alpha=1 - s).exp_()
        value = (s * p).add_(q, alpha=1 - s).sub_(power).sum(-1).div_(s * (1 - s))
        w = power.div_(-s)
    elif term.kind == "jsd":
        log_m = _log_mixture(log_p + math.log(s), log_q + math.log1p(-s))
        kl_student, _ = _kl_rows(q, log_q, log_m)
        value = s * _kl_rows(p, log_p, log_m)[0] + (1 - s) * kl_student
        w = (log_q - log_m).mul_(q).mul_(1 - s)
    elif term.kind == "skew_forward_kl":
        log_m = _log_mixture(log_p + math.log(s), log_q + math.log1p(-s))
        value, _ = _kl_rows(p, log_p, log_m)
        w = (log_p + log_q).sub_(log_m).exp_().mul_(s - 1)
    else:
        log_m = _log_mixture(log_q + math.log(s), log_p + math.log1p(-s))
        value, infinite = _kl_rows(q, log_q, log_m)
        w = (log_q - log_m).exp_().mul_(-s).add_(log_q).sub_(log_m).mul_(q)
    if infinite is not None:
        w.masked_fill_(infinite[:, None], 0.0)
    return value, w


def _terms(spec: DivergenceSpec, log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the spec's terms by row, and the gradient in the student's log-probabilities' logits."""
    value, w = log_q.new_zeros(log_q.shape[0]), None
    for term in spec.terms:
        resolved = term.resolved()
        term_value, term_w = _term(resolved, log_q, q, log_p, p)
        value.add_(term_value, alpha=term.weight)
        term_w = term_w if term.weight == 1 else term_w.mul_(term.weight)
        w = term_w if w is None else w.add_(term_w)
    assert w is not None
    return value, w.addcmul_(q, w.sum(-1, keepdim=True), value=-1)


def _interpolated(log_q: Tensor, log_p: Tensor, t: float) -> Tensor:
    return log_p if t == 1 else torch.log_softmax((log_p * t).add_(log_q, alpha=1 - t).clamp_(min=MASKED), -1)


def _entropy(log_p: Tensor, p: Tensor) -> Tensor:
    return (log_p * p).sum(-1).neg_()


def _full_terms(spec: DivergenceSpec, target: TargetRows, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient in the prepared logits and target entropy, against a target over all words."""
    log_p = _interpolated(log_q, target_log_probs(target, spec), spec.interpolation)
    p = log_p.exp()
    value, gradient = _terms(spec, log_q, q, log_p, p)
    return value, gradient, _entropy(log_p, p)


def _top_k_terms(spec: DivergenceSpec, targets: TopK, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same against listed words and a tail. In the tail the gradient is the tail's own softmax times one number."""
    listed, ids = targets.ids_TK >= 0, targets.ids_TK.clamp(0)
    hit = torch.zeros_like(log_q).scatter_reduce_(-1, ids, listed.to(log_q.dtype), "amax") > 0
    within_tail = log_q.masked_fill(hit, MASKED)
    log_tail = torch.logsumexp(within_tail, -1, keepdim=True)
    at_ids = log_q.gather(-1, ids).masked_fill_(~listed, MASKED)
    last = torch.full_like(log_tail, MASKED) if targets.renormalise else log_tail
    log_q_outcomes = log_probs(torch.cat([at_ids, last], -1))
    log_p = targets.outcome_logprobs(log_q.shape[-1], log_q.dtype)
    log_p = _interpolated(log_q_outcomes, log_p, spec.interpolation)
    p = log_p.exp()
    value, gradient = _terms(spec, log_q_outcomes, log_q_outcomes.exp(), log_p, p)
    whole = within_tail.sub_(log_tail).exp_().mul_(gradient[:, -1:]).masked_fill_(hit, 0.0)
    whole.scatter_add_(-1, ids, gradient[:, :-1].masked_fill(~listed, 0.0))
    return value, whole, _entropy(log_p, p)


def _block(rows: Rows) -> Tensor:
    """Losses and entropies of some rows; their tile becomes the gradient."""
    spec = rows.spec
    logits = scale_and_cap_(rows.tile, rows.scale, rows.softcap)
    log_q = torch.log_softmax(_tempered(logits, spec), -1)
    q = log_q.exp()
    student_entropy = _entropy(log_q, q)
    if isinstance(rows.target, TopK):
        value, gradient, target_entropy = _top_k_terms(spec, rows.target, log_q)
    elif rows.target is not None:
        value, gradient, target_entropy = _full_terms(spec, rows.target, log_q, q)
    else:
        value, gradient, target_entropy = torch.zeros_like(student_entropy), None, torch.zeros_like(student_entropy)
    if gradient is not None and rows.want_gradient:
        gradient = _untempered_gradient(gradient, logits, spec)
    if rows.labels_R is not None:
        plain = spec.temperature == 1 and not spec.standardise
        log_q = log_q if plain else torch.log_softmax(logits, -1)
        value = value + spec.label_weight * _label_loss_(log_q, rows.labels_R)
        if rows.want_gradient:
            # log_q now holds the labels' gradient.
            gradient = (
                log_q.mul_(spec.label_weight) if gradient is None else gradient.add_(log_q, alpha=spec.label_weight)
            )
    if rows.want_gradient and gradient is not None:
        if rows.softcap is not None:
            gradient.mul_((logits / rows.softcap).clamp_(-1, 1).square_().neg_().add_(1))
        factor = rows.scale[:, None] if isinstance(rows.scale, Tensor) else rows.scale
        factor = factor if rows.weights_R is None else factor * rows.weights_R[:, None]
        torch.mul(gradient, factor, out=rows.tile)
    return torch.stack([value, student_entropy, target_entropy])


def _untempered_gradient(gradient: Tensor, logits: Tensor, spec: DivergenceSpec) -> Tensor:
    """From prepared logits back to the logits. The gradient's sum over a row is 0, so the mean's share is nil."""
    if spec.temperature != 1:
        gradient.div_(spec.temperature)
    if spec.standardise:
        centred, std, less_one = _standardise(logits)
        divisor = std + STD_EPSILON
        along = (gradient * centred).sum(-1, keepdim=True) / (divisor.square() * std * less_one)
        gradient.div_(divisor).sub_(centred.mul_(along))
    return gradient


def _label_loss_(log_q: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with labels by row; log_q becomes its gradient, zero where there is no label or it is masked."""
    ids = labels.masked_fill(labels == IGNORED_LABEL, 0)[:, None]
    picked = log_q.gather(-1, ids)
    infinite = picked <= MASK_LIMIT
    log_q.exp_().scatter_add_(-1, ids, torch.full_like(picked, -1.0))
    log_q.masked_fill_(infinite | (labels == IGNORED_LABEL)[:, None], 0.0)
    loss = (-picked).masked_fill_(infinite, torch.inf)[:, 0]
    return loss.masked_fill_(labels == IGNORED_LABEL, 0.0)
