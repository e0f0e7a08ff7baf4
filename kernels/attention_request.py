"""What one call of attention asks for, checked; and the part of it that decides which implementation serves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from workbench.errors import InputError
from workbench.kernels.attention_mask import Visibility


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of `workbench.kernels.attention.attention`, which documents them."""

    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    dropout: float = 0.0
    key_padding_mask: Tensor | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlens: tuple[int, int] | None = None

    def visibility(self, q: Tensor, k: Tensor) -> Visibility:
        return Visibility(q.shape[2], k.shape[2], self.causal, self.window, self.key_padding_mask, self.mask)


class Request(NamedTuple):
    """What the choice of an implementation depends on: one entry of the table of choices."""

    implementation: str
    device: torch.device
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    lengths: str  # "equal", "one query", "fewer queries" or "more queries" than keys
    causal: bool
    window: bool
    softcap: bool
    dropout: bool
    padding: bool
    mask: bool
    bias: bool
    packed: bool
    forward_mode: bool


def request(q: Tensor, k: Tensor, v: Tensor, options: Options, implementation: str) -> Request:
    """The request of one call; raises InputError where the arguments contradict each other."""
    check(q, k, v, options)
    found = duals(q, k, v)
    num_queries, num_keys = q.shape[2], k.shape[2]
    if num_queries == num_keys:
        lengths = "equal"
    elif num_queries > num_keys:
        lengths = "more queries"
    else:
        lengths = "one query" if num_queries == 1 else "fewer queries"
    return Request(
        implementation,
        q.device,
        q.dtype,
        q.shape[3],
        v.shape[3],
        lengths,
        options.causal,
        options.window is not None,
        options.softcap is not None,
        options.dropout > 0.0,
        options.key_padding_mask is not None,
        options.mask is not None,
        options.bias is not None,
        options.cu_seqlens_q is not None,
        found is None or any(tangent is not None for _, tangent in found),
    )


def duals(*tensors: Tensor) -> list[tuple[Tensor, Tensor | None]] | None:
    """Each tensor and its forward-mode tangent; None under vmap inside forward mode, where PyTorch cannot tell."""
    try:
        return [(dual.primal, dual.tangent) for dual in map(forward_ad.unpack_dual, tensors)]
    except RuntimeError:
        return None


def check(q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
    """Raises InputError for shapes, dtypes or options that cannot be meant."""
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise InputError(f"attention: q, k, v must be [batch, heads, length, width]: {_shapes(q, k, v)}")
    batch, query_heads, num_queries, width = q.shape
    if k.shape[:3] != v.shape[:3] or k.shape[0] != batch or k.shape[3] != width:
        raise InputError(
            f"attention: k and v differ in length or heads, or q and k in batch or width: {_shapes(q, k, v)}"
        )
    if query_heads % k.shape[1]:
        raise InputError(f"attention: {k.shape[1]} key heads do not divide {query_heads} query heads")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        found = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise InputError(f"attention: q, k, v differ in dtype or device: {found}; cast them first")
    if not q.dtype.is_floating_point:
        raise InputError(f"attention: q, k, v are {q.dtype}; give a floating-point dtype")
    if options.window is not None and options.window < 1:
        raise InputError(f"attention: window={options.window}; give at least 1 (the query's own position), or None")
    if options.softcap is not None and options.softcap <= 0.0:
        raise InputError(f"attention: softcap={options.softcap}; give a positive number, or None")
    if not 0.0 <= options.dropout < 1.0:
        raise InputError(f"attention: dropout={options.dropout}; give a probability below 1")
    _check_masks(options, (batch, query_heads, num_queries, k.shape[2]))


def _check_masks(options: Options, shape: tuple[int, int, int, int]) -> None:
    padding = options.key_padding_mask
    if padding is not None and (padding.shape != (shape[0], shape[3]) or padding.dtype != torch.bool):
        found = f"{padding.dtype} {list(padding.shape)}"
        raise InputError(f"attention: key_padding_mask must be bool {[shape[0], shape[3]]}, True = real: {found}")
    for name, x in (("mask", options.mask), ("bias", options.bias)):
        if x is not None and not _broadcasts(x, shape):
            raise InputError(f"attention: {name} {list(x.shape)} does not broadcast to {list(shape)} (4 dimensions)")
    if options.mask is not None and options.mask.dtype != torch.bool:
        raise InputError(f"attention: mask is {options.mask.dtype}; give bool (True = visible), or add it as bias")
    packed = options.cu_seqlens_q
    if packed is None:
        if options.cu_seqlens_k is not None:
            raise InputError("attention: cu_seqlens_k without cu_seqlens_q")
        return
    if shape[0] != 1:
        raise InputError(f"attention: packed sequences stand in one row (batch 1), not in {shape[0]}")
    if padding is not None or options.mask is not None or options.bias is not None:
        raise InputError("attention: packed sequences (cu_seqlens) take no key_padding_mask, mask or bias")
    for cu in (packed, options.cu_seqlens_k):
        if cu is not None and (cu.ndim != 1 or cu.dtype != torch.int32 or cu.shape != packed.shape or len(cu) < 2):
            raise InputError(
                f"attention: cu_seqlens must be int32 [sequences + 1], both alike: {cu.dtype} {list(cu.shape)}"
            )


def _broadcasts(x: Tensor, shape: tuple[int, ...]) -> bool:
    return x.ndim == 4 and all(a in (1, b) for a, b in zip(x.shape, shape, strict=True))


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return ", ".join(f"{name} {list(x.shape)}" for name, x in zip("qkv", (q, k, v), strict=True))
