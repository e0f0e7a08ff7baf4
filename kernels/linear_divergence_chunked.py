"""The chunk loop of `linear_divergence` and its place in autograd.

Tokens are taken in chunks. For each chunk both heads are projected once into two reused tiles [R, V]; a row function
turns the student's tile into the gradient of the loss with respect to the student's projection, in place; two matrix
products take that to the gradients of hidden states and head. With a teacher of the student's width that is four
products of T·V·H multiply-adds, the fewest that a loss with a gradient for the head can do. A frozen head saves one.

Notation: T tokens, R rows (tokens of a chunk), V words, H width, N teachers; a trailing underscore: in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels.divergences import DivergenceSpec, TopK, scale_and_cap
from workbench.kernels.linear_divergence_rows import RowFunction, Rows, TargetRows, mix_

#: A head in another dtype than the arithmetic's is converted this many words at a time.
HEAD_WORDS = 8192
CHUNK_TOKENS = {"cpu": 128, "cuda": 2048}


@dataclass(frozen=True, slots=True, eq=False)
class LinearLogits:
    """Logits that are not computed yet: softcap · tanh(scale · (hidden · headᵀ + bias) / softcap).

    Args: hidden_TH, head_VH, bias_V: floating point, any mixture of dtypes; a bias of -inf masks a word; scale: a
    factor, or one for each token [T] (a per-token inverse temperature), without gradient.
    """

    hidden_TH: Tensor
    head_VH: Tensor
    bias_V: Tensor | None = None
    scale: float | Tensor = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        hidden, head = tuple(self.hidden_TH.shape), tuple(self.head_VH.shape)
        if len(hidden) != 2 or len(head) != 2 or hidden[1] != head[1]:
            raise InputError(
                f"hidden states must be [tokens, width] and the head [words, width], not {hidden} and {head}"
            )
        if self.bias_V is not None and tuple(self.bias_V.shape) != head[:1]:
            raise InputError(f"the bias must be [words] = {head[:1]}, not {tuple(self.bias_V.shape)}")
        if isinstance(self.scale, Tensor) and (tuple(self.scale.shape) != hidden[:1] or self.scale.requires_grad):
            raise InputError(f"scale must be a float or [tokens] = {hidden[:1]} without gradient")
        if self.softcap is not None and self.softcap <= 0:
            raise InputError(f"softcap must be above 0 or None, not {self.softcap}")

    def logits(self) -> Tensor:
        """The logits [T, V], in float32 or wider."""
        dtype = compute_dtype(self.hidden_TH)
        bias = None if self.bias_V is None else self.bias_V.to(dtype)
        raw = torch.nn.functional.linear(self.hidden_TH.to(dtype), self.head_VH.to(dtype), bias)
        return scale_and_cap(raw, self.scale, self.softcap)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def rows_of(side: LinearLogits, index: slice | Tensor) -> LinearLogits:
    """The logits of some tokens."""
    scale = side.scale[index] if isinstance(side.scale, Tensor) else side.scale
    return LinearLogits(side.hidden_TH[index], side.head_VH, side.bias_V, scale, side.softcap)


def default_chunk_tokens(device: torch.device) -> int:
    """Tokens a chunk: enough for nearly full speed of the matrix products (benchmarks/README.md)."""
    return CHUNK_TOKENS.get(device.type, CHUNK_TOKENS["cuda"])


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """All that a loss is computed from, but the token weights."""

    student: LinearLogits
    teachers: tuple[LinearLogits, ...] | TopK | None
    spec: DivergenceSpec
    labels_T: Tensor | None
    teacher_weights: Tensor | None
    row_function: RowFunction
    chunk_tokens: int


@dataclass(slots=True, eq=False)
class Gradients:
    """Sums over tokens in the arithmetic's dtype; None where not wanted."""

    hidden_TH: Tensor | None
    head_VH: Tensor | None
    bias_V: Tensor | None


def chunked_loss(job: Job, weights_T: Tensor | None, summed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted losses (their sum, or one by one) and both entropies by token, differentiable in the student."""
    student = job.student
    device = student.hidden_TH.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    bias = None if student.bias_V is None else student.bias_V.detach()
    detached = LinearLogits(student.hidden_TH.detach(), student.head_VH.detach(), bias, student.scale, student.softcap)
    context = (replace(job, student=detached), weights_T, summed, autocast, torch.is_grad_enabled())
    return _ChunkedLoss.apply(student.hidden_TH, student.head_VH, student.bias_V, context)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, context: tuple) -> tuple[Tensor, ...]:
        job, weights, summed, autocast, grad_enabled = context
        wanted = tuple(ctx.needs_input_grad[:3]) if grad_enabled and summed else (False,) * 3
        losses, student_entropy, target_entropy, gradients = run_chunks(job, weights, autocast, wanted)
        ctx.gradients = gradients if any(wanted) else None
        ctx.context = context
        # Used only to compute again; asking for them then reports a head that was changed in between.
        ctx.save_for_backward(hidden, head, bias)
        ctx.mark_non_differentiable(student_entropy, target_entropy)
        ctx.set_materialize_grads(False)
        return losses.sum() if summed else losses, student_entropy, target_entropy

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor | None, *_entropies: Any
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise InputError("linear_divergence has no second derivative: backward without create_graph=True")
        if upstream is None:
            return None, None, None, None
        job, weights, _, autocast, _ = ctx.context
        student = job.student
        gradients, ctx.gradients = ctx.gradients, None
        factor = upstream
        if gradients is None:
            assert ctx.saved_tensors
            tokens = student.hidden_TH.shape[0]
            row_weights = upstream.to(compute_dtype(student.hidden_TH)).expand(tokens)
            row_weights = row_weights if weights is None else row_weights * weights
            *_, gradients = run_chunks(job, row_weights, autocast, tuple(ctx.needs_input_grad[:3]))
            factor = None
        parameters = (student.hidden_TH, student.head_VH, student.bias_V)
        sums = (gradients.hidden_TH, gradients.head_VH, gradients.bias_V)
        # In place: these buffers belong to nobody else, and the head's is the largest tensor of all.
        scaled = [g if g is None or factor is None else g.mul_(factor) for g in sums]
        cast = [None if g is None or x is None else g.to(x.dtype) for g, x in zip(scaled, parameters, strict=True)]
        return *cast, None


def run_chunks(
    job: Job, weights_T: Tensor | None, autocast: torch.dtype | None, wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """Weighted losses [T], entropies [T] and the gradients of the losses' sum for (hidden, head, bias) where wanted."""
    student = job.student
    hidden, words = student.hidden_TH, student.head_VH.shape[0]
    dtype = compute_dtype(hidden)
    tokens = hidden.shape[0]
    kept = None if weights_T is None else weights_T.nonzero()[:, 0]
    kept = None if kept is not None and len(kept) == tokens else kept
    num_kept = tokens if kept is None else len(kept)
    results = torch.zeros(3, tokens, dtype=dtype, device=hidden.device)
    gradients = Gradients(*(
        torch.zeros_like(x, dtype=dtype) if want and x is not None else None
        for x, want in zip((hidden, student.head_VH, student.bias_V), wanted, strict=True)
    ))  # fmt: skip
    num_teachers = len(job.teachers) if isinstance(job.teachers, tuple) else 0
    size = (1 + min(num_teachers, 2), min(job.chunk_tokens, num_kept), words)
    with torch.autocast(hidden.device.type, enabled=False), torch.no_grad():
        tiles = torch.empty(size, dtype=dtype, device=hidden.device)
        for start in range(0, num_kept, job.chunk_tokens):
            end = min(start + job.chunk_tokens, num_kept)
            index = slice(start, end) if kept is None else kept[start:end]
            _chunk(job, index, tiles[:, : end - start], weights_T, autocast, results, gradients)
    return results[0], results[1], results[2], gradients


def _chunk(
    job: Job, index: slice | Tensor, tiles: Tensor, weights_T: Tensor | None, autocast: torch.dtype | None,
    results: Tensor, gradients: Gradients,
) -> None:  # fmt: skip
    side = rows_of(job.student, index)
    weights = None if weights_T is None else weights_T[index]
    want = any(g is not None for g in (gradients.hidden_TH, gradients.head_VH, gradients.bias_V))
    _project_(tiles[0], side, autocast)
    rows = Rows(
        tiles[0], side.scale, side.softcap, job.spec, _target(job, index, tiles, autocast), weights,
        None if job.labels_T is None else job.labels_T[index], want,
    )  # fmt: skip
    found = job.row_function(rows)
    if weights is not None:
        found[0] *= weights
    results[:, index] = found
    if want:
        _back_project_(tiles[0], side, index, autocast, gradients)


def _target(job: Job, index: slice | Tensor, tiles: Tensor, autocast: torch.dtype | None) -> TargetRows | TopK | None:
    """What the student is compared with in these rows; several teachers become one distribution in tiles[1]."""
    if not isinstance(job.teachers, tuple):
        return None if job.teachers is None else job.teachers.rows(index)
    sides = [rows_of(teacher, index) for teacher in job.teachers]
    if len(sides) == 1:
        _project_(tiles[1], sides[0], autocast)
        return TargetRows(tiles[1], sides[0].scale, sides[0].softcap)
    weights = job.teacher_weights
    weights = torch.ones(len(sides), device=tiles.device) if weights is None else weights
    weights = weights[index] if weights.ndim == 2 else weights.expand(tiles.shape[1], -1)
    log_weights = (weights / weights.sum(-1, keepdim=True)).to(tiles.dtype).log()
    mixture = tiles[1]
    for n, side in enumerate(sides):
        tile = tiles[2] if n else mixture
        _project_(tile, side, autocast)
        mix_(mixture, TargetRows(tile, side.scale, side.softcap), log_weights[:, n], job.spec)
    return TargetRows(mixture, final=True)


def _operand_dtype(side: LinearLogits, autocast: torch.dtype | None) -> torch.dtype:
    """What hidden states and head are rounded to before they are multiplied."""
    dtypes = {side.hidden_TH.dtype, side.head_VH.dtype}
    if torch.float64 in dtypes or (autocast is None and len(dtypes) > 1):
        return compute_dtype(side.hidden_TH)
    return autocast or dtypes.pop()


def _head_parts(head: Tensor, operand: torch.dtype, arithmetic: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head in the arithmetic's dtype: as it is, or converted part by part so that no whole copy is ever held."""
    if head.dtype == operand == arithmetic:
        yield slice(None), head
        return
    for start in range(0, head.shape[0], HEAD_WORDS):
        part = slice(start, start + HEAD_WORDS)
        yield part, head[part].to(operand).to(arithmetic)


def _multiplies_halves(device: torch.device, operand: torch.dtype) -> bool:
    """Whether the device multiplies 16-bit operands with float32 sums and results."""
    return device.type == "cuda" and operand in (torch.bfloat16, torch.float16)


def _project_(tile: Tensor, side: LinearLogits, autocast: torch.dtype | None) -> None:
    """tile = hidden · headᵀ + bias."""
    operand = _operand_dtype(side, autocast)
    hidden = side.hidden_TH.to(operand)
    if _multiplies_halves(tile.device, operand):
        torch.mm(hidden, side.head_VH.to(operand).t(), out_dtype=tile.dtype, out=tile)
    else:
        hidden = hidden.to(tile.dtype)
        for part, head in _head_parts(side.head_VH, operand, tile.dtype):
            torch.mm(hidden, head.t(), out=tile[:, part])
    if side.bias_V is not None:
        tile.add_(side.bias_V)


def _back_project_(
    tile: Tensor, side: LinearLogits, index: slice | Tensor, autocast: torch.dtype | None, gradients: Gradients
) -> None:
    """Adds a chunk's gradients, given that of its projections."""
    operand = _operand_dtype(side, autocast)
    hidden = side.hidden_TH.to(operand)
    into_hidden, into_head = gradients.hidden_TH, gradients.head_VH
    if gradients.bias_V is not None:
        gradients.bias_V.add_(tile.sum(0))
    if _multiplies_halves(tile.device, operand):
        rounded = tile.to(operand)
        if into_hidden is not None:
            into_hidden[index] = torch.mm(rounded, side.head_VH.to(operand), out_dtype=tile.dtype)
        if into_head is not None:
            torch.addmm(into_head, rounded.t(), hidden, out_dtype=tile.dtype, out=into_head)
        return
    hidden = hidden.to(tile.dtype)
    if into_hidden is not None:
        of_rows = torch.zeros_like(hidden)
        for part, head in _head_parts(side.head_VH, operand, tile.dtype):
            of_rows.addmm_(tile[:, part], head)
        into_hidden[index] = of_rows
    if into_head is not None:
        into_head.addmm_(tile.t(), hidden)
