"""Divergence between two linear heads' distributions from hidden states, never holding tokens × vocabulary.

One function, three implementations: `chunked` (PyTorch, any device), `triton` (the same chunks, one kernel between the
matrix products), and `reference` (all logits at once; for tests and tiny inputs).

Notation: T tokens, V words, H hidden width (student's and teacher's may differ), K listed words, N teachers.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from workbench.errors import InputError, MissingExtra
from workbench.kernels import divergences
from workbench.kernels.divergences import Divergence, DivergenceSpec, Kind, TopK, as_spec
from workbench.kernels.linear_divergence_chunked import (
    Job,
    LinearLogits,
    chunked_loss,
    compute_dtype,
    default_chunk_tokens,
    rows_of,
)
from workbench.kernels.linear_divergence_rows import rows_torch

Implementation = Literal["auto", "reference", "chunked", "triton"]
Reduction = Literal["mean", "sum", "none"]


class LinearDivergence(NamedTuple):
    """The loss (a scalar, or [T] for reduction "none"), and entropies in nats, [T], without gradient.

    The student's entropy is over the whole vocabulary, its logits prepared as the spec says; the target's over what the
    loss compares with (listed words and tail for top-k; the interpolated target). 0 where the token's weight is 0.
    """

    loss: Tensor
    student_entropy_T: Tensor
    target_entropy_T: Tensor


def linear_divergence(
    student: LinearLogits,
    teacher: LinearLogits | Sequence[LinearLogits] | TopK | None,
    spec: DivergenceSpec | Divergence | Kind,
    *,
    token_weights_T: Tensor | None = None,
    labels_T: Tensor | None = None,
    teacher_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    implementation: Implementation = "auto",
    chunk_tokens: int | None = None,
) -> LinearDivergence:
    """Divergence of the student from the teacher, with gradients for the student's hidden states, head and bias.

    Args:
        teacher: logits over the same words, several of them (their probabilities are mixed), top-k targets, or None
            for hard labels only. Gets no gradient.
        token_weights_T: factor of each token; a token of weight 0 is left out, whatever it holds. No gradient.
        labels_T: word ids for the spec's label_weight, -100 = none.
        teacher_weights: [N] or [T, N], normalised to sum 1; equal if None.
        reduction: "mean" divides the weighted sum by the sum of the weights (0 where all are 0); to average over
            several calls, take "sum" and divide.
        chunk_tokens: tokens whose logits are held at once; None chooses by device.
    Returns: see LinearDivergence. With "sum" and "mean" the gradients are computed in the forward pass (a second
        backward pass computes them again); with "none" in the backward pass, at the price of a second projection.
        There is no second derivative.
    Raises: InputError for shapes, devices or options that cannot be meant; MissingExtra for "triton" without Triton.
    """
    spec = as_spec(spec)
    teachers = (teacher,) if isinstance(teacher, LinearLogits) else teacher
    teachers = tuple(teachers) if isinstance(teachers, Sequence) else teachers
    _check(student, teachers, spec, token_weights_T, labels_T, teacher_weights)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise InputError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
    chosen = _choose(implementation, student.hidden_TH)
    dtype = compute_dtype(student.hidden_TH)
    weights = None if token_weights_T is None else token_weights_T.to(dtype)
    summed = reduction != "none"
    if chosen == "reference":
        result = _reference(student, teachers, spec, weights, labels_T, teacher_weights, summed)
    else:
        row_function = rows_torch
        if chosen == "triton":
            from workbench.kernels.linear_divergence_triton import rows_triton as row_function
        chunk_tokens = chunk_tokens or default_chunk_tokens(student.hidden_TH.device)
        labels_T = labels_T if spec.label_weight else None
        job = Job(
            student, teachers if spec.terms else None, spec, labels_T, teacher_weights, row_function, chunk_tokens
        )
        result = LinearDivergence(*chunked_loss(job, weights, summed))
    if reduction != "mean":
        return result
    total = result.loss.new_tensor(student.hidden_TH.shape[0]) if weights is None else weights.sum()
    return result._replace(loss=result.loss / torch.where(total == 0, 1.0, total))


def _check(
    student: LinearLogits,
    teachers: tuple[LinearLogits, ...] | TopK | None,
    spec: DivergenceSpec,
    token_weights: Tensor | None,
    labels: Tensor | None,
    teacher_weights: Tensor | None,
) -> None:
    tokens, words = student.hidden_TH.shape[0], student.head_VH.shape[0]
    if spec.terms and not teachers:
        raise InputError("the spec compares with a teacher, but there is none; for labels only give terms=()")
    if spec.label_weight and labels is None:
        raise InputError(f"label_weight is {spec.label_weight}, but there are no labels_T")
    if isinstance(teachers, TopK):
        if teachers.ids_TK.shape[0] != tokens:
            raise InputError(f"top-k targets of {teachers.ids_TK.shape[0]} tokens for a student of {tokens}")
    else:
        for other in teachers or ():
            if other.head_VH.shape[0] != words:
                raise InputError(
                    f"student vocabulary {words} ≠ teacher vocabulary {other.head_VH.shape[0]}: where the first words "
                    "are the same, cut the longer head and bias to the shorter; else take a method for other tokenizers"
                )
            if other.hidden_TH.shape[0] != tokens:
                raise InputError(f"the teacher has {other.hidden_TH.shape[0]} tokens, the student {tokens}")
    for name, value in (("token_weights_T", token_weights), ("labels_T", labels)):
        if value is not None and tuple(value.shape) != (tokens,):
            raise InputError(f"{name} must be [tokens] = ({tokens},), not {tuple(value.shape)}")
    if token_weights is not None and token_weights.requires_grad:
        raise InputError(
            'token_weights_T gets no gradient here: take reduction="none" and multiply the losses yourself'
        )
    num_teachers = len(teachers) if isinstance(teachers, tuple) else 0
    if teacher_weights is not None and tuple(teacher_weights.shape) not in ((num_teachers,), (tokens, num_teachers)):
        raise InputError(
            f"teacher_weights must be [teachers] or [tokens, teachers] with {num_teachers} teachers and {tokens} "
            f"tokens, not {tuple(teacher_weights.shape)}"
        )


def _choose(implementation: Implementation, hidden: Tensor) -> Implementation:
    has_triton = importlib.util.find_spec("triton") is not None
    if implementation == "triton":
        if not has_triton:
            raise MissingExtra('implementation="triton" needs the package triton', "gpu")
        if hidden.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise InputError('implementation="triton" needs a GPU (or TRITON_INTERPRET=1, to test on a CPU)')
        if hidden.dtype == torch.float64:
            raise InputError('implementation="triton" computes in float32; for float64 take "chunked"')
    if implementation == "auto":
        on_gpu = hidden.device.type == "cuda" and hidden.dtype != torch.float64
        return "triton" if on_gpu and has_triton else "chunked"
    if implementation not in ("reference", "chunked", "triton"):
        raise InputError(f"implementation {implementation!r} is unknown; there are auto, reference, chunked, triton")
    return implementation


def _reference(
    student: LinearLogits,
    teachers: tuple[LinearLogits, ...] | TopK | None,
    spec: DivergenceSpec,
    weights: Tensor | None,
    labels: Tensor | None,
    teacher_weights: Tensor | None,
    summed: bool,
) -> LinearDivergence:
    """All logits at once. Tokens of weight 0 are removed before anything is computed."""
    tokens = student.hidden_TH.shape[0]
    kept = torch.arange(tokens, device=student.hidden_TH.device)
    if weights is not None:
        kept = weights.nonzero()[:, 0]
    student = rows_of(student, kept)
    student_logits = student.logits()
    target: TopK | list[Tensor] | None = None
    if isinstance(teachers, TopK):
        target = teachers.rows(kept)
    elif teachers:
        with torch.no_grad():
            target = [rows_of(other, kept).logits() for other in teachers]
    if teacher_weights is not None and teacher_weights.ndim == 2:
        teacher_weights = teacher_weights[kept]
    labels = None if labels is None else labels[kept]
    losses = divergences.divergence(student_logits, target, spec, labels_T=labels, teacher_weights=teacher_weights)
    with torch.no_grad():
        student_entropy, target_entropy = divergences.entropies(student_logits, target, spec, teacher_weights)
    if weights is not None:
        losses = losses * weights[kept]
    whole = [losses.new_zeros(tokens).index_copy(0, kept, x) for x in (losses, student_entropy, target_entropy)]
    return LinearDivergence(losses.sum() if summed else whole[0], whole[1], whole[2])
