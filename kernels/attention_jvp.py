"""Attention with its forward-mode derivative: output and tangent in one pass, memory linear in length.

With P = softmax(S), S = scale q k^T and dotted tangents, dS = scale (dq k^T + q dk^T) and mu = sum_j P dS per row:

    o  = P v
    do = (P * dS) v - mu o + P dv

All of it is a sum over keys, so that tiles of keys are folded in one after the other with a running maximum (Milakov
and Gimelshein 2018, arXiv 1805.02867; FlashAttention, arXiv 2205.14135) that also carries sum P dS and the two outputs.

The backward pass recomputes P tile by tile. For gradients g of o and h of do, with a = dS - mu, e = h v^T - (h . o) and
f = g v^T + h dv^T, what reaches the scores and their tangents is

    P * (f + e * a - (g . o + h . do))    and    P * e

(row sums by products of the outputs, as in FlashAttention's backward). Where the tangent is detached (sCM, arXiv
2410.11081; rCM, arXiv 2510.08431), h = 0 and this is the ordinary backward.

Supported: one forward-mode level (torch.func.jvp, jacfwd, torch.autograd.forward_ad), vmap around or inside it, and one
reverse-mode level around all. Refused: second derivatives in reverse mode; forward mode over reverse or forward mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from workbench.errors import InputError
from workbench.kernels.attention_tiles import TileOptions, backward_tiles, forward_tiles

#: Measured on a CPU (benchmarks/README.md): smaller tiles lose to overhead, larger ones to the cache.
TILE_QUERIES, TILE_KEYS = 256, 256


def attention_with_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    *,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its directional derivative along (tq, tk, tv); reverse mode works through both.

    Args: as `workbench.kernels.attention.attention`; tq, tk, tv: tangents in the shapes of q, k, v, None = zero.
    Returns: output and tangent, [B, Hq, Lq, Dv] in q's dtype; sums are taken in float32, in float64 for float64 input.
    """
    out, tangent = _run(q, k, v, tq, tk, tv, causal, window, softcap, scale, key_padding_mask, mask)
    return out, torch.zeros_like(out) if tq is tk is tv is None else tangent


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention in memory linear in length, by PyTorch operations; for what no library kernel offers (soft-capping)."""
    return _run(q, k, v, None, None, None, causal, window, softcap, scale, key_padding_mask, mask)[0]


def _run(q, k, v, tq, tk, tv, causal, window, softcap, scale, key_padding_mask, mask) -> tuple[Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = TileOptions(scale, causal, window, softcap, TILE_QUERIES, TILE_KEYS)
    if mask is not None:
        mask = mask.expand(q.shape[0], -1, q.shape[2], k.shape[2])
    out, tangent, _, _ = _Attention.apply(q, k, v, tq, tk, tv, key_padding_mask, mask, options)  # type: ignore[misc]
    return out, tangent


class _Attention(Function):
    """Output, tangent (empty without tangents), log-sum-exp and mean score tangent [B, Hq, Lq]."""

    @staticmethod
    def forward(q, k, v, tq, tk, tv, key_padding, mask, options):  # type: ignore[override]
        if q.is_cuda and key_padding is None and mask is None and not (tq is tk is tv is None):
            from workbench.kernels import attention_jvp_triton

            if attention_jvp_triton.supports(q, v, options):
                return attention_jvp_triton.forward(q, k, v, tq, tk, tv, options.scale, options.causal)
        with _no_autocast(q):
            return forward_tiles(q, k, v, tq, tk, tv, key_padding, mask, options)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        *tensors, options = inputs
        ctx.options = options
        ctx.has_tangent = any(t is not None for t in tensors[3:6])
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors)
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads):
        grad, grad_tangent = grads[:2]
        saved = ctx.saved_tensors
        if not ctx.has_tangent:
            grad_tangent = None
        if grad is None and grad_tangent is None:
            return (None,) * 9
        if grad is None:
            grad = torch.zeros_like(saved[8])
        found = _Backward.apply(grad, grad_tangent, *saved, ctx.options)
        reached = 3 if grad_tangent is None else 6
        wanted = [i < reached and x is not None for i, x in enumerate(saved[:6])]
        return (*(g if w else None for g, w in zip(found, wanted, strict=True)), None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents):  # type: ignore[override]
        """For vmap inside forward mode only, where `attention` cannot see the tangents: computes the output twice."""
        q, k, v, tq, tk, tv, key_padding, mask = ctx.saved_tensors
        if not (tq is tk is tv is None):
            raise InputError("attention: jvp of jvp is not supported on the tiled path; use implementation='reference'")
        found = _Attention.apply(q, k, v, *tangents[:3], key_padding, mask, ctx.options)  # type: ignore[misc]
        # The empty tangent of the output counts as differentiable; the statistics do not.
        return found[1], q.new_zeros(q.shape[0], 0), None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):  # type: ignore[override]
        return _fold_vmap(_Attention, info, in_dims, inputs)


class _Backward(Function):
    """Gradients of q, k, v, tq, tk, tv; a function of its own, so that second derivatives are refused, not wrong."""

    @staticmethod
    def forward(grad, grad_tangent, q, k, v, tq, tk, tv, key_padding, mask, out, tangent, lse, mean, options):  # type: ignore[override]
        inputs, results = (q, k, v, tq, tk, tv), (out, tangent, lse, mean)
        with _no_autocast(q):
            return backward_tiles(grad, grad_tangent, inputs, key_padding, mask, results, options)

    @staticmethod
    def setup_context(ctx: Any, inputs, output) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads):
        raise InputError(
            "attention: second derivatives in reverse mode are not supported on the tiled path; "
            "use implementation='reference'"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents):  # type: ignore[override]
        raise InputError(
            "attention: forward mode over reverse mode is not supported on the tiled path; "
            "use implementation='reference'"
        )

    @staticmethod
    def vmap(info, in_dims, *inputs):  # type: ignore[override]
        return _fold_vmap(_Backward, info, in_dims, inputs)


def _no_autocast(x: Tensor) -> torch.autocast:
    """Autocast would take some of the tiles' products in 16 bits, and add them up with others in 32, which fails."""
    return torch.autocast(x.device.type, enabled=False)


def _fold_vmap(function: type[Function], info, in_dims, inputs):
    """vmap by folding the mapped dimension into the batch."""
    size = info.batch_size

    def fold(x, dim):
        if not isinstance(x, Tensor):
            return x
        x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.reshape(size * x.shape[1], *x.shape[2:])

    folded = [fold(x, dim) for x, dim in zip(inputs, in_dims, strict=True)]
    outputs = tuple(x.unflatten(0, (size, -1)) for x in function.apply(*folded))  # type: ignore[misc]
    return outputs, (0,) * len(outputs)
