"""The forward pass of `attention_jvp` as one Triton kernel: output, tangent and row statistics.

One program holds a tile of queries of one head, its tangents and both accumulators, and walks over the keys: six matrix
products per tile where plain attention has two. The backward pass is `attention_tiles`', from the same statistics.

Serves float16 and bfloat16 at widths up to 256, float32 up to 128, causal or not, grouped queries, any lengths. Tiles
are the largest that ptxas fits into registers for Hopper without spilling (a few hundred bytes in float32 and at width
256); they have not been tuned on a device. Triton's interpreter (TRITON_INTERPRET=1) runs the kernel on a CPU, but its
dot products are wrong in bfloat16.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workbench.kernels.attention_tiles import TileOptions

_LARGEST_WIDTH = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}
#: Bytes of shared memory a block that the larger tiles need: Hopper and Blackwell have 227 KiB, Ampere 163 KiB or less.
_LARGE_SHARED_BYTES = 205_000


class Launch(NamedTuple):
    """Tile sizes and how a program runs."""

    queries: int
    keys: int
    warps: int
    stages: int


def launch(dtype: torch.dtype, width: int, shared_bytes: int) -> Launch | None:
    """The tiles for heads of this padded width on a device with this much shared memory a block, if any."""
    if dtype not in _LARGEST_WIDTH or width > _LARGEST_WIDTH[dtype]:
        return None
    if shared_bytes < _LARGE_SHARED_BYTES:
        return Launch(64, 32, 8, 1) if dtype != torch.float32 and width <= 128 else None
    if dtype == torch.float32:
        return Launch(64, 32, 4, 2) if width <= 64 else Launch(64, 32, 8, 1)
    return Launch(128, 64, 8, 2) if width <= 128 else Launch(64, 32, 8, 2)


def supports(q: Tensor, v: Tensor, options: TileOptions) -> bool:
    """Whether the kernel serves this call; windows, soft-capping and masks go to the PyTorch tiles."""
    if options.window is not None or options.softcap is not None or not _installed():
        return False
    return launch(q.dtype, max(_padded(q.shape[3]), _padded(v.shape[3])), _shared_bytes(q)) is not None


@functools.cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _shared_bytes(q: Tensor) -> int:
    """Shared memory a block can have; as on Hopper under the interpreter, which has none."""
    if not q.is_cuda:
        return _LARGE_SHARED_BYTES
    return torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin


def _padded(width: int) -> int:
    """The power of two, at least 16, that a width is padded to."""
    return max(16, 1 << (width - 1).bit_length())


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `attention_tiles.forward_tiles` with at least one tangent: output, tangent, log-sum-exp, mean score tangent.

    Args: q [B, Hq, Lq, D]; k [B, Hkv, Lk, D]; v [B, Hkv, Lk, Dv]; tangents in the same shapes or None.
    Returns: [B, Hq, Lq, Dv] twice in q's dtype, float32 [B, Hq, Lq] twice; rows that see no key: 0, 0, +inf, 0.
    """
    from workbench.kernels.attention_jvp_kernel import attention_jvp_kernel

    batch, query_heads, num_queries, width = q.shape
    key_heads, num_keys, value_width = k.shape[1], k.shape[2], v.shape[3]
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    # A tangent that is not there is never read: any pointer does.
    tangents = [x if t is None else t.contiguous() for t, x in ((tq, q), (tk, k), (tv, v))]
    out = q.new_empty(batch, query_heads, num_queries, value_width)
    tangent = torch.empty_like(out)
    lse = q.new_empty(batch, query_heads, num_queries, dtype=torch.float32)
    mean = torch.empty_like(lse)
    block_d, block_dv = _padded(width), _padded(value_width)
    tiles = launch(q.dtype, max(block_d, block_dv), _shared_bytes(q))
    assert tiles is not None, "asked without `supports`"
    grid = ((num_queries + tiles.queries - 1) // tiles.queries, batch * query_heads)
    kernel: Any = attention_jvp_kernel[grid]
    kernel(
        q, k, v, *tangents, out, tangent, lse, mean,
        scale, num_queries, num_keys, query_heads, key_heads, width, value_width,
        HAS_TQ=tq is not None, HAS_TK=tk is not None, HAS_TV=tv is not None, CAUSAL=causal,
        FLOAT32=q.dtype == torch.float32,
        BLOCK_M=tiles.queries, BLOCK_N=tiles.keys, BLOCK_D=block_d, BLOCK_DV=block_dv,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out, tangent, lse, mean
