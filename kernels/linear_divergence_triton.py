"""Row arithmetic of `linear_divergence` as one Triton kernel; the matrix products around it stay with the chunk loop.

One program takes one row. It reads the two projected rows for the normalisers (once; twice more for z-scores, once
more for interpolation), once for the value and the sum that the gradient needs, and once to write the gradient. Forward
KL and cross-entropy know that sum beforehand and write the gradient while they sum the value. All is float32.

Top-k targets are a softmax over the student and K + 1 numbers: they run in PyTorch (rows_torch) here too.
Notation as in linear_divergence_rows.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# (triton.jit types a device function as one that never returns.)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench.kernels.divergences import KINDS, TopK
from workbench.kernels.linear_divergence_rows import Rows, TargetRows, rows_torch

_MASKED: tl.constexpr = tl.constexpr(-1e30)
_MASK_LIMIT: tl.constexpr = tl.constexpr(-1e20)
_STD_EPSILON: tl.constexpr = tl.constexpr(1e-7)
#: Bit of each kind in TERMS, and the row of its weight and parameter. They stand left of "&": under the interpreter
#: TERMS is a plain number, which knows no operation with a constexpr.
_FORWARD: tl.constexpr = tl.constexpr(1 << KINDS.index("forward_kl"))
_REVERSE: tl.constexpr = tl.constexpr(1 << KINDS.index("reverse_kl"))
_JSD: tl.constexpr = tl.constexpr(1 << KINDS.index("jsd"))
_TV: tl.constexpr = tl.constexpr(1 << KINDS.index("total_variation"))
_ALPHA: tl.constexpr = tl.constexpr(1 << KINDS.index("alpha"))
_SKEW_FORWARD: tl.constexpr = tl.constexpr(1 << KINDS.index("skew_forward_kl"))
_SKEW_REVERSE: tl.constexpr = tl.constexpr(1 << KINDS.index("skew_reverse_kl"))
_CROSS: tl.constexpr = tl.constexpr(1 << KINDS.index("cross_entropy"))
_SUM_KNOWN = 1 << KINDS.index("forward_kl") | 1 << KINDS.index("cross_entropy")
MAX_BLOCK = 4096


@triton.jit
def _logits(raw, scale, softcap, SOFTCAP: tl.constexpr):
    """Raw projections to logits, _MASKED for -inf."""
    x = raw * scale
    if SOFTCAP:
        # tanh by the logistic function; beyond 20 it is 1 in float32.
        bounded = tl.minimum(tl.maximum(x / softcap, -20.0), 20.0)
        x = tl.where(x <= _MASK_LIMIT, _MASKED, softcap * (2 * tl.sigmoid(2 * bounded) - 1))
    return tl.maximum(x, _MASKED)


@triton.jit
def _log_add(a, b):
    return tl.maximum(a, b) + tl.log(1 + tl.exp(-tl.abs(a - b)))


@triton.jit
def _fold(highest, total, z, inside):
    """One step of the online sum of exponentials."""
    new = tl.maximum(highest, tl.max(tl.where(inside, z, -float("inf")), 0))
    return new, total * tl.exp(highest - new) + tl.sum(tl.where(inside, tl.exp(z - new), 0.0), 0)


@triton.jit
def _terms(log_q, log_p, terms_ptr, infinite_forward, infinite_reverse, TERMS: tl.constexpr):
    """Σ of the terms' φ and w by word; terms_ptr holds (weight, parameter) by kind."""
    q, p = tl.exp(log_q), tl.exp(log_p)
    value = tl.zeros_like(q)
    w = tl.zeros_like(q)
    if _FORWARD & TERMS:
        c = tl.load(terms_ptr + 2 * _FORWARD)
        value += c * tl.where(log_q <= _MASK_LIMIT, 0.0, p * (log_p - log_q))
        w -= tl.where(infinite_forward, 0.0, c * p)
    if _CROSS & TERMS:
        c = tl.load(terms_ptr + 2 * _CROSS)
        value -= c * tl.where(log_q <= _MASK_LIMIT, 0.0, p * log_q)
        w -= tl.where(infinite_forward, 0.0, c * p)
    if _REVERSE & TERMS:
        c = tl.load(terms_ptr + 2 * _REVERSE)
        part = c * tl.where(log_p <= _MASK_LIMIT, 0.0, q * (log_q - log_p))
        value += part
        w += tl.where(infinite_reverse, 0.0, part)
    if _TV & TERMS:
        c = 0.5 * tl.load(terms_ptr + 2 * _TV)
        value += c * tl.abs(q - p)
        w += c * q * tl.where(q > p, 1.0, tl.where(q < p, -1.0, 0.0))
    if _ALPHA & TERMS:
        c, a = tl.load(terms_ptr + 2 * _ALPHA), tl.load(terms_ptr + 2 * _ALPHA + 1)
        power = tl.exp(a * log_p + (1 - a) * log_q)
        value += c * (a * p + (1 - a) * q - power) / (a * (1 - a))
        w -= c * power / a
    if _JSD & TERMS:
        c, b = tl.load(terms_ptr + 2 * _JSD), tl.load(terms_ptr + 2 * _JSD + 1)
        log_m = _log_add(log_p + tl.log(b), log_q + tl.log(1 - b))
        student = c * (1 - b) * q * (log_q - log_m)
        value += student + c * b * p * (log_p - log_m)
        w += student
    if _SKEW_FORWARD & TERMS:
        c, s = tl.load(terms_ptr + 2 * _SKEW_FORWARD), tl.load(terms_ptr + 2 * _SKEW_FORWARD + 1)
        log_m = _log_add(log_p + tl.log(s), log_q + tl.log(1 - s))
        value += c * p * (log_p - log_m)
        w -= c * (1 - s) * tl.exp(log_p + log_q - log_m)
    if _SKEW_REVERSE & TERMS:
        c, s = tl.load(terms_ptr + 2 * _SKEW_REVERSE), tl.load(terms_ptr + 2 * _SKEW_REVERSE + 1)
        log_m = _log_add(log_q + tl.log(s), log_p + tl.log(1 - s))
        value += c * q * (log_q - log_m)
        w += c * q * (log_q - log_m - s * tl.exp(log_q - log_m))
    return value, w


@triton.jit
def _load(side, at, num_words, SOFTCAP: tl.constexpr):
    """A block of logits, and the same prepared, of a side (pointer, scale, softcap, mean, factor)."""
    raw = tl.load(side[0] + at, mask=at < num_words, other=-float("inf"))
    logits = _logits(raw, side[1], side[2], SOFTCAP)
    return logits, tl.where(logits <= _MASK_LIMIT, _MASKED, (logits - side[3]) * side[4])


@triton.jit
def _moments(ptr, num_words, scale, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """Mean, standard deviation and number less one of a row's logits that are not masked."""
    side = (ptr, scale, softcap, 0.0, 1.0)
    count, total = 0.0, 0.0
    for start in range(0, num_words, BLOCK):
        z, _ = _load(side, start + tl.arange(0, BLOCK), num_words, SOFTCAP)
        count += tl.sum((z > _MASK_LIMIT).to(tl.float32), 0)
        total += tl.sum(tl.where(z > _MASK_LIMIT, z, 0.0), 0)
    mean = total / tl.maximum(count, 1.0)
    squares = 0.0
    for start in range(0, num_words, BLOCK):
        z, _ = _load(side, start + tl.arange(0, BLOCK), num_words, SOFTCAP)
        centred = tl.where(z > _MASK_LIMIT, z - mean, 0.0)
        squares += tl.sum(centred * centred, 0)
    less_one = tl.maximum(count - 1, 1.0)
    return mean, tl.sqrt(tl.maximum(squares / less_one, 1e-30)), less_one


@triton.jit
def _normalisers(
    student, target, num_words, SOFTCAP: tl.constexpr, TARGET_SOFTCAP: tl.constexpr,
    TERMS: tl.constexpr, LABELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-sums of student, target and plain student, and whether either side has mass where the other is masked."""
    none = -float("inf")
    high_q, sum_q, high_p, sum_p, high_raw, sum_raw = none, 0.0, none, 0.0, none, 0.0
    p_unmatched, q_unmatched = none, none
    for start in range(0, num_words, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < num_words
        raw, z = _load(student, at, num_words, SOFTCAP)
        high_q, sum_q = _fold(high_q, sum_q, z, inside)
        if LABELS:
            high_raw, sum_raw = _fold(high_raw, sum_raw, raw, inside)
        if TERMS:
            _, z_p = _load(target, at, num_words, TARGET_SOFTCAP)
            high_p, sum_p = _fold(high_p, sum_p, z_p, inside)
            p_unmatched = tl.maximum(p_unmatched, tl.max(tl.where(z <= _MASK_LIMIT, z_p, none), 0))
            q_unmatched = tl.maximum(q_unmatched, tl.max(tl.where(z_p <= _MASK_LIMIT, z, none), 0))
    log_sum_q = high_q + tl.log(sum_q)
    log_sum_p, log_sum_raw = 0.0, 0.0
    if TERMS:
        log_sum_p = high_p + tl.log(sum_p)
    if LABELS:
        log_sum_raw = high_raw + tl.log(sum_raw)
    return log_sum_q, log_sum_p, log_sum_raw, tl.exp(p_unmatched - log_sum_p) > 0, tl.exp(q_unmatched - log_sum_q) > 0


@triton.jit
def _log_probs(
    student, target, at, sums, t, num_words, SOFTCAP: tl.constexpr, TARGET_SOFTCAP: tl.constexpr,
    TERMS: tl.constexpr, INTERPOLATE: tl.constexpr,
):  # fmt: skip
    """A block's logits, student and target log-probabilities; sums: of student, teacher and interpolated target."""
    inside = at < num_words
    raw, z = _load(student, at, num_words, SOFTCAP)
    log_q = tl.where(inside, z - sums[0], _MASKED)
    log_p = log_q
    if TERMS:
        _, z_p = _load(target, at, num_words, TARGET_SOFTCAP)
        log_p = z_p - sums[1]
        if INTERPOLATE:
            log_p = tl.maximum(t * log_p + (1 - t) * log_q, _MASKED) - sums[2]
        log_p = tl.where(inside, log_p, _MASKED)
    return raw, log_q, log_p


@triton.jit
def _mixed_normaliser(
    student, target, log_sum_q, log_sum_p, t, num_words, SOFTCAP: tl.constexpr, TARGET_SOFTCAP: tl.constexpr,
    TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-sum of the interpolated target."""
    high_u, sum_u = -float("inf"), 0.0
    sums = (log_sum_q, log_sum_p, log_sum_p * 0.0)
    for start in range(0, num_words, BLOCK):
        at = start + tl.arange(0, BLOCK)
        _raw, _log_q, u = _log_probs(student, target, at, sums, t, num_words, SOFTCAP, TARGET_SOFTCAP, TERMS, True)
        high_u, sum_u = _fold(high_u, sum_u, u, at < num_words)
    return high_u + tl.log(sum_u)


@triton.jit
def _passes(
    student, target, sums, infinite, label, log_sum_raw, std, less_one, row_factor, num_words, t, label_weight,
    known_sum, inverse_temperature, terms_ptr,
    TERMS: tl.constexpr, SOFTCAP: tl.constexpr, TARGET_SOFTCAP: tl.constexpr, STANDARDISE: tl.constexpr,
    INTERPOLATE: tl.constexpr, LABELS: tl.constexpr, GRADIENT: tl.constexpr, ONE_PASS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Value and entropies; and the gradient, written in the same pass where the sum of w is known, else in another."""
    sum_w = tl.where(infinite[0], 0.0, known_sum)
    value, entropy_q, entropy_p, sum_wc, sum_qc = 0.0, 0.0, 0.0, 0.0, 0.0
    for stage in tl.static_range(2 if GRADIENT and not ONE_PASS else 1):
        total_w = 0.0
        along = (sum_wc - sum_w * sum_qc) * student[4] * student[4] / (std * less_one * inverse_temperature)
        for start in range(0, num_words, BLOCK):
            at = start + tl.arange(0, BLOCK)
            raw, log_q, log_p = _log_probs(
                student, target, at, sums, t, num_words, SOFTCAP, TARGET_SOFTCAP, TERMS, INTERPOLATE
            )
            q = tl.exp(log_q)
            phi, w = tl.zeros_like(q), tl.zeros_like(q)
            if TERMS:
                phi, w = _terms(log_q, log_p, terms_ptr, infinite[0], infinite[1], TERMS)
            centred = tl.where(raw <= _MASK_LIMIT, 0.0, raw - student[3])
            if stage == 0:
                value += tl.sum(phi, 0)
                entropy_q -= tl.sum(q * log_q, 0)
                if TERMS:
                    entropy_p -= tl.sum(tl.exp(log_p) * log_p, 0)
                total_w += tl.sum(w, 0)
                if STANDARDISE:
                    sum_wc += tl.sum(w * centred, 0)
                    sum_qc += tl.sum(q * centred, 0)
            if GRADIENT and (ONE_PASS or stage == 1):
                gradient = (w - q * sum_w) * student[4]
                if STANDARDISE:
                    gradient -= centred * along
                if LABELS:
                    off = tl.exp(raw - log_sum_raw) - tl.where(at == label, 1.0, 0.0)
                    gradient += tl.where(label < 0, 0.0, label_weight * off)
                if SOFTCAP:
                    share = tl.minimum(tl.maximum(raw / student[2], -1.0), 1.0)
                    gradient *= 1 - share * share
                tl.store(student[0] + at, gradient * row_factor, mask=at < num_words)
        if not ONE_PASS:
            sum_w = total_w if stage == 0 else sum_w
    return value, entropy_q, entropy_p


@triton.jit
def _rows_kernel(
    student_ptr, target_ptr, out_ptr, scale_ptr, target_scale_ptr, weights_ptr, labels_ptr, terms_ptr,
    num_rows, num_words, softcap, target_softcap, inverse_temperature, t, label_weight, known_sum,
    TERMS: tl.constexpr, FINAL: tl.constexpr, SOFTCAP: tl.constexpr, TARGET_SOFTCAP: tl.constexpr,
    STANDARDISE: tl.constexpr, INTERPOLATE: tl.constexpr, LABELS: tl.constexpr, GRADIENT: tl.constexpr,
    ONE_PASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * num_words
    target_ptr += row * num_words
    scale, target_scale = tl.load(scale_ptr + row), tl.load(target_scale_ptr + row)
    mean, factor, target_mean, target_factor = 0.0, inverse_temperature, 0.0, inverse_temperature
    std, less_one = 1.0, 1.0
    if STANDARDISE:
        mean, std, less_one = _moments(student_ptr, num_words, scale, softcap, SOFTCAP, BLOCK)
        factor = inverse_temperature / (std + _STD_EPSILON)
        if TERMS and not FINAL:
            target_mean, target_std, _ = _moments(
                target_ptr, num_words, target_scale, target_softcap, TARGET_SOFTCAP, BLOCK
            )
            target_factor = inverse_temperature / (target_std + _STD_EPSILON)
    if FINAL:
        target_factor = 1.0
    student = (student_ptr, scale, softcap, mean, factor)
    target = (target_ptr, target_scale, target_softcap, target_mean, target_factor)
    log_sum_q, log_sum_p, log_sum_raw, infinite_forward, infinite_reverse = _normalisers(
        student, target, num_words, SOFTCAP, TARGET_SOFTCAP, TERMS, LABELS, BLOCK
    )
    log_sum_u = log_sum_p * 0.0
    if INTERPOLATE:
        # The interpolated target has no mass where the student is masked.
        infinite_forward = infinite_forward & False
        log_sum_u = _mixed_normaliser(
            student, target, log_sum_q, log_sum_p, t, num_words, SOFTCAP, TARGET_SOFTCAP, TERMS, BLOCK
        )
    loss, label = 0.0, -1
    if LABELS:
        label = tl.load(labels_ptr + row).to(tl.int32)
        picked = _logits(tl.load(student_ptr + tl.maximum(label, 0)), scale, softcap, SOFTCAP) - log_sum_raw
        loss = tl.where(label < 0, 0.0, tl.where(picked <= _MASK_LIMIT, float("inf"), -label_weight * picked))
        # A masked label passes no gradient, like no label.
        label = tl.where(picked <= _MASK_LIMIT, -1, label)
    value, entropy_q, entropy_p = _passes(
        student, target, (log_sum_q, log_sum_p, log_sum_u), (infinite_forward, infinite_reverse), label, log_sum_raw,
        std, less_one, scale * tl.load(weights_ptr + row), num_words, t, label_weight, known_sum, inverse_temperature,
        terms_ptr, TERMS, SOFTCAP, TARGET_SOFTCAP, STANDARDISE, INTERPOLATE, LABELS, GRADIENT, ONE_PASS, BLOCK,
    )  # fmt: skip
    if (_FORWARD & TERMS) or (_CROSS & TERMS):
        value = tl.where(infinite_forward, float("inf"), value)
    if _REVERSE & TERMS:
        value = tl.where(infinite_reverse, float("inf"), value)
    tl.store(out_ptr + row, value + loss)
    tl.store(out_ptr + num_rows + row, entropy_q)
    tl.store(out_ptr + 2 * num_rows + row, entropy_p)


def _per_row(value: float | Tensor, tile: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(tile.dtype).contiguous()
    return torch.full(tile.shape[:1], value, dtype=tile.dtype, device=tile.device)


def rows_triton(rows: Rows) -> Tensor:
    """The row function in Triton; tiles must be contiguous float32."""
    if isinstance(rows.target, TopK):
        return rows_torch(rows)
    tile, spec = rows.tile, rows.spec
    num_rows, num_words = tile.shape
    target = rows.target or TargetRows(tile, final=True)
    constants = torch.zeros(1 << len(KINDS), 2)
    mask = 0
    for term in (t.resolved() for t in spec.terms if rows.target is not None):
        bit = 1 << KINDS.index(term.kind)
        constants[bit] = torch.tensor([term.weight, term.parameter or 0.0])
        mask |= bit
    out = torch.empty(3, num_rows, dtype=tile.dtype, device=tile.device)
    one_pass = mask & ~_SUM_KNOWN == 0 and not spec.standardise
    labels = torch.zeros(1, dtype=torch.long, device=tile.device) if rows.labels_R is None else rows.labels_R
    weights = _per_row(1.0 if rows.weights_R is None else rows.weights_R, tile)
    flags: dict[str, Any] = {
        "TERMS": mask, "FINAL": target.final, "SOFTCAP": rows.softcap is not None,
        "TARGET_SOFTCAP": target.softcap is not None, "STANDARDISE": spec.standardise,
        "INTERPOLATE": mask != 0 and spec.interpolation < 1, "LABELS": rows.labels_R is not None,
        "GRADIENT": rows.want_gradient, "ONE_PASS": one_pass,
        "BLOCK": min(triton.next_power_of_2(num_words), MAX_BLOCK), "num_warps": 8,
    }  # fmt: skip
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(tile):
        _rows_kernel[(num_rows,)](
            tile, target.tile, out, _per_row(rows.scale, tile), _per_row(target.scale, tile), weights,
            labels.contiguous(), constants.to(tile.device), num_rows, num_words, float(rows.softcap or 1.0),
            float(target.softcap or 1.0), 1 / spec.temperature, float(spec.interpolation), float(spec.label_weight),
            -float(constants[:, 0].sum()) if one_pass else 0.0, **flags,
        )  # fmt: skip
    return out
