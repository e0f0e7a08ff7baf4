"""One attention for all backends: flash-attn 4, 3 or 2, else PyTorch's SDPA, else our tiles, else the reference.

| path | serves | memory beside inputs and output |
|---|---|---|
| flash_4, flash_3, flash_2 | CUDA, float16 and bfloat16, package installed; no dense mask, no bias | linear |
| sdpa | everything but soft-capping and forward mode | linear without masks (a sliding window costs length x
  window); with a padding or dense mask one bool per query and key |
| tiled | soft-capping; forward mode (torch.func.jvp); no bias, no dropout | linear |
| reference | bias or dropout together with soft-capping or forward mode | queries x keys; a warning in the log |

Each combination is logged once (logger `workbench.kernels.attention`) with the path taken and why those before it were
not; `explain` returns the same. Letters: B batch, Hq query heads, Hkv key heads, Lq queries, Lk keys, D width, Dv value
width.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention.bias import causal_lower_right

from workbench.errors import InputError
from workbench.kernels import attention_flash
from workbench.kernels.attention_jvp import attention_with_tangent, tiled_attention
from workbench.kernels.attention_reference import reference_attention
from workbench.kernels.attention_request import Options, Request, duals, request

__all__ = ["IMPLEMENTATIONS", "Route", "attention", "explain"]

IMPLEMENTATIONS = (*(f"flash_{version}" for version in attention_flash.VERSIONS), "sdpa", "tiled", "reference")
_LOG = logging.getLogger(__name__)
#: Queries of one step along a sliding window, at least.
_BAND = 128


class Route(NamedTuple):
    """The path that a call takes, and why none before it did."""

    implementation: str
    reason: str


_routes: dict[Request, Route] = {}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    key_padding_mask: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlens: tuple[int, int] | None = None,
    implementation: str = "auto",
) -> Tensor:
    """softmax(scale * q k^T) v over visible keys, by the fastest implementation that can; rows that see no key are 0.

    Args:
        q: [B, Hq, Lq, D]; k: [B, Hkv, Lk, D]; v: [B, Hkv, Lk, Dv]; Hkv divides Hq.
        causal: query i stands at key position i + Lk - Lq and sees no later key (the last query sees the last key).
        window: a query at position p sees p - window < key <= p if causal, else |key - p| < window.
        softcap: scores become softcap * tanh(score / softcap).
        scale: 1 / sqrt(D) by default.
        dropout: probability of dropping a weight.
        key_padding_mask: bool [B, Lk], True = a real key. Where Lq = Lk, rows of padded queries mean nothing: they are
            finite, and 0 on flash-attn.
        mask: bool, broadcastable to [B, Hq, Lq, Lk], True = visible; combined with the above.
        bias: float, the same, added to the scores.
        cu_seqlens_q: int32 [N + 1], where packed sequences begin (0 first, the total last); B = 1; each sequence
            attends to itself only, causal and window counted inside it.
        cu_seqlens_k: for the keys, by default the same.
        max_seqlens: the longest (queries, keys), which spares flash-attn a wait for the GPU.
        implementation: "auto" or one of `IMPLEMENTATIONS`.
    Returns: [B, Hq, Lq, Dv] in q's dtype. Under torch.func.jvp with exact tangents (`attention_jvp`).
    Raises: InputError if shapes or options contradict each other or the implementation asked for cannot serve them.
    """
    options = Options(
        causal=causal,
        window=window,
        softcap=softcap,
        scale=scale,
        dropout=dropout,
        key_padding_mask=key_padding_mask,
        mask=mask,
        bias=bias,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlens=max_seqlens,
    )
    chosen = _route(request(q, k, v, options, implementation)).implementation
    if chosen.startswith("flash_"):
        return attention_flash.run(int(chosen[-1]), q, k, v, options)
    if cu_seqlens_q is not None:
        return _packed(chosen, q, k, v, options)
    return _run(chosen, q, k, v, options)


def explain(q: Tensor, k: Tensor, v: Tensor, *, implementation: str = "auto", **options) -> Route:
    """The route that `attention` takes with these arguments, without running it."""
    return _route(request(q, k, v, Options(**options), implementation))


def _route(asked: Request) -> Route:
    if torch.compiler.is_compiling():
        return _choose(asked)  # tracing happens once, and cannot log
    route = _routes.get(asked)
    if route is None:
        route = _routes[asked] = _choose(asked)
        level = logging.WARNING if route.implementation == "reference" != asked.implementation else logging.INFO
        _LOG.log(level, "attention: %s, because %s (%s)", *route, asked)
    return route


def _choose(asked: Request) -> Route:
    if asked.implementation == "auto":
        passed_over = []
        for name in IMPLEMENTATIONS:
            why = _why_not(name, asked)
            if why is None:
                return Route(name, "; ".join(passed_over) or "it is the first choice")
            passed_over.append(f"{name} {why}")
    if asked.implementation not in IMPLEMENTATIONS:
        raise InputError(f"attention: implementation={asked.implementation!r}; give auto or one of {IMPLEMENTATIONS}")
    if why := _why_not(asked.implementation, asked):
        raise InputError(
            f"attention: implementation={asked.implementation!r} {why}; implementation='auto' finds one that can"
        )
    return Route(asked.implementation, "it was asked for")


def _why_not(name: str, asked: Request) -> str | None:
    if name.startswith("flash_"):
        return attention_flash.why_not(int(name[-1]), asked)
    if name == "sdpa" and asked.softcap:
        return "has no soft-capping"
    if name == "sdpa" and asked.forward_mode:
        return "has no forward-mode derivative"
    if name == "tiled" and asked.bias:
        return "takes no bias"
    if name == "tiled" and asked.dropout:
        return "has no dropout"
    return None


def _packed(chosen: str, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """One sequence after the other: no mask, and no work on pairs of different sequences."""
    assert options.cu_seqlens_q is not None
    ends_q = options.cu_seqlens_q.tolist()
    ends_k = ends_q if options.cu_seqlens_k is None else options.cu_seqlens_k.tolist()
    for ends, total in ((ends_q, q.shape[2]), (ends_k, k.shape[2])):
        if ends[0] != 0 or ends[-1] != total or any(a > b for a, b in pairwise(ends)):
            raise InputError(f"attention: cu_seqlens must rise from 0 to {total}: {ends[:4]} ... {ends[-1]}")
    single = Options(
        causal=options.causal,
        window=options.window,
        softcap=options.softcap,
        scale=options.scale,
        dropout=options.dropout,
    )
    spans = [(a, b, c, d) for (a, b), (c, d) in zip(pairwise(ends_q), pairwise(ends_k), strict=True) if b > a]
    pieces = [_run(chosen, q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], single) for a, b, c, d in spans]
    return torch.cat(pieces, dim=2) if pieces else q.new_zeros(*q.shape[:3], v.shape[3])


def _run(chosen: str, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    if q.shape[2] == 0 or k.shape[2] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    if chosen == "sdpa":
        return _sdpa(q, k, v, options)
    if chosen == "tiled":
        return _tiled(q, k, v, options)
    return reference_attention(
        q,
        k,
        v,
        visible=options.visibility(q, k).dense(q.device),
        bias=options.bias,
        softcap=options.softcap,
        scale=options.scale,
        dropout=options.dropout,
    )


def _tiled(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    shared: dict[str, Any] = {
        "causal": options.causal,
        "window": options.window,
        "softcap": options.softcap,
        "scale": options.scale,
    }
    masks: dict[str, Any] = {"key_padding_mask": options.key_padding_mask, "mask": options.mask}
    found = duals(q, k, v)
    if found is None or all(tangent is None for _, tangent in found):
        return tiled_attention(q, k, v, **shared, **masks)
    (q, tq), (k, tk), (v, tv) = found
    return forward_ad.make_dual(*attention_with_tangent(q, k, v, tq, tk, tv, **shared, **masks))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    num_queries, num_keys = q.shape[2], k.shape[2]
    by_position = options.key_padding_mask is None and options.mask is None and options.bias is None
    window_bites = options.window is not None and max(num_queries, num_keys) > options.window
    if by_position and not window_bites:
        if not options.causal or num_queries == 1:
            return _call_sdpa(q, k, v, None, options)
        if num_queries == num_keys:
            return _call_sdpa(q, k, v, None, options, is_causal=True)
        if num_queries < num_keys:
            return _call_sdpa(q, k, v, causal_lower_right(num_queries, num_keys), options)
    seen = options.visibility(q, k)
    if options.window is not None and options.bias is None and num_keys > 2 * max(options.window, _BAND):
        pieces = []
        step = max(options.window, _BAND)
        for q0 in range(0, num_queries, step):
            q1 = min(q0 + step, num_queries)
            k0, k1 = seen.key_range(q0, q1)
            tile = seen.tile(q0, q1, k0, k1, q.device)
            pieces.append(_masked_sdpa(q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], tile, options))
        return torch.cat(pieces, dim=2)
    return _masked_sdpa(q, k, v, seen.dense(q.device), options)


def _masked_sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, options: Options) -> Tensor:
    bias = None if options.bias is None else options.bias.to(q.dtype)
    if k.shape[2] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    if seen is None:
        return _call_sdpa(q, k, v, bias, options)
    # Rows that see nothing are let see everything and then set to 0: not every SDPA kernel survives them.
    sees = seen.any(-1, keepdim=True)
    seen = seen | ~sees
    mask = seen if bias is None else bias.masked_fill(~seen, -torch.inf)
    return _call_sdpa(q, k, v, mask, options).masked_fill(~sees, 0.0)


def _call_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options, is_causal: bool = False
) -> Tensor:
    kwargs = {"dropout_p": options.dropout, "scale": options.scale, "is_causal": is_causal}
    groups = q.shape[1] // k.shape[1]
    if groups == 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **kwargs)
    if q.shape[2] == 1 and (mask is None or mask.shape[1] == 1):
        # One query: the query heads of a key head become its queries, and nothing is copied.
        rows = q.view(k.shape[0], k.shape[1], groups, q.shape[3])
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, **kwargs)
        return out.reshape(*q.shape[:3], v.shape[3])
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **kwargs)
    # With a mask, SDPA serves grouped queries on CUDA by its slowest kernel only.
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **kwargs)
