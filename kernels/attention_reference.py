"""Attention written out in float32 or float64: what every other path is compared with.

Holds queries x keys scores. Ordinary differentiable operations only, so that it serves reverse and forward mode alike.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(softcap(scale * q k^T) + bias) v over the visible keys; a row without visible keys is 0.

    Args: q [B, Hq, Lq, D]; k [B, Hkv, Lk, D]; v [B, Hkv, Lk, Dv], Hkv divides Hq; visible: bool, broadcastable to
    [B, Hq, Lq, Lk]; bias: float, the same; softcap: scores become softcap * tanh(score / softcap); scale: by default
    1 / sqrt(D); dropout: probability of dropping a weight.
    Returns: [B, Hq, Lq, Dv] in q's dtype; the sums are taken in float64 for float64 input, otherwise in float32.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), eq. 1; soft-capping: Gemma 2 (arXiv 2408.00118), sec. 2.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.to(wide).repeat_interleave(groups, dim=1) for x in (k, v))
    with torch.autocast(q.device.type, enabled=False):
        scores = q.to(wide) @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(wide)
    if visible is None:
        weights = scores.softmax(-1)
    else:
        # A finite score in rows that see nothing keeps their softmax, and its gradient, free of NaN.
        sees = visible.any(-1, keepdim=True)
        weights = scores.masked_fill(~visible & sees, -torch.inf).softmax(-1).masked_fill(~(visible & sees), 0.0)
    if dropout > 0.0:
        weights = torch.nn.functional.dropout(weights, dropout)
    with torch.autocast(q.device.type, enabled=False):
        return (weights @ values).to(q.dtype)
