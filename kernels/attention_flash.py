"""The flash-attn packages, versions 4, 3 and 2: what each can do, and how it is called.

Their layout is [batch, length, heads, width]; causal masks are aligned at the end since 2.1. Facts: the packages' own
interfaces (github.com/Dao-AILab/flash-attention: `flash_attn`, `hopper/flash_attn_interface`, `flash_attn.cute`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.kernels.attention_request import Options, Request

VERSIONS = (4, 3, 2)
_MODULES = {4: "flash_attn.cute", 3: "flash_attn_interface", 2: "flash_attn"}
#: Smallest compute capability: Ampere for 2; 3 and 4 are written for Hopper and later.
_CAPABILITY = {4: 9, 3: 9, 2: 8}
#: Version 4 has no kernel for wider heads in all directions.
_LARGEST_WIDTH = {4: 128, 3: 256, 2: 256}


class Package(NamedTuple):
    """The two functions of an installed version."""

    dense: Callable
    packed: Callable


@functools.cache
def package(version: int) -> Package | None:
    """The package of this version, or None if it cannot be imported."""
    try:
        module = import_module(_MODULES[version])
        return Package(module.flash_attn_func, module.flash_attn_varlen_func)
    except (ImportError, AttributeError):
        return None


def _hardware(version: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this version does not run on this device or in this dtype; None if it does."""
    if device.type != "cuda":
        return f"runs on CUDA only, not on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {dtype}"
    if (capability := torch.cuda.get_device_capability(device)[0]) < _CAPABILITY[version]:
        return f"needs compute capability {_CAPABILITY[version]}, not {capability}"
    return None


def why_not(version: int, request: Request) -> str | None:
    """Why this version cannot serve the request; None if it can."""
    if refusal := _hardware(version, request.device, request.dtype):
        return refusal
    found = package(version)
    if found is None:
        return "is not installed"
    if request.forward_mode:
        return "has no forward-mode derivative"
    if request.mask or request.bias:
        return "takes no dense mask or bias"
    if request.head_dim != request.value_dim or request.head_dim > _LARGEST_WIDTH[version] or request.head_dim % 8:
        return f"takes equal widths up to {_LARGEST_WIDTH[version]}, multiples of 8"
    if request.dropout and version != 2:
        return "has no dropout"
    if request.softcap and (version == 4 or "softcap" not in inspect.signature(found.dense).parameters):
        return "has no soft-capping with gradients"
    if request.causal and request.lengths == "more queries":
        return "does not promise zeros for rows without visible keys"
    if request.padding and request.window:
        return "counts a window without the padding"
    if request.padding and request.causal and request.lengths == "fewer queries":
        return "aligns causal masks without the padding"
    return None


def ready(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether some version serves plain attention of a usual width on this device in this dtype."""
    plain = Request("auto", device, dtype, 64, 64, "equal", True, *[False] * 8)
    return any(why_not(version, plain) is None for version in VERSIONS)


def run(version: int, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """Calls the package; with `key_padding_mask` the rows of padded queries are 0 where q and k are equally long."""
    found = package(version)
    assert found is not None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if options.cu_seqlens_q is not None:
        cu_k = options.cu_seqlens_q if options.cu_seqlens_k is None else options.cu_seqlens_k
        most = options.max_seqlens or (_longest(options.cu_seqlens_q), _longest(cu_k))
        out = _packed(found, version, q[0], k[0], v[0], options.cu_seqlens_q, cu_k, most, options)[None]
    elif options.key_padding_mask is not None:
        out = _padded(found, version, q, k, v, options.key_padding_mask, options)
    else:
        out = _first(found.dense(q, k, v, **_arguments(version, options)))
    return out.transpose(1, 2)


def _padded(found: Package, version: int, q: Tensor, k: Tensor, v: Tensor, real: Tensor, options: Options) -> Tensor:
    """Drops the padded keys, and the padded queries where they are the same positions; then packed sequences."""
    batch, num_queries = q.shape[:2]
    where = real.flatten().nonzero().squeeze(1)
    lengths = real.sum(1, dtype=torch.int32)
    cu_k = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    keys, values = (x.flatten(0, 1).index_select(0, where) for x in (k, v))
    rows = q.flatten(0, 1)
    if num_queries == k.shape[1]:
        longest = int(lengths.max())
        packed = rows.index_select(0, where)
        out = _packed(found, version, packed, keys, values, cu_k, cu_k, (longest, longest), options)
        return torch.zeros_like(rows).index_copy(0, where, out).view(batch, num_queries, *out.shape[1:])
    cu_q = torch.arange(0, batch * num_queries + 1, num_queries, dtype=torch.int32, device=q.device)
    most = (num_queries, int(lengths.max()))
    return _packed(found, version, rows, keys, values, cu_q, cu_k, most, options).unflatten(0, (batch, num_queries))


def _packed(found, version, q, k, v, cu_q, cu_k, most, options: Options) -> Tensor:
    names = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": most[0], "max_seqlen_k": most[1]}
    return _first(found.packed(q, k, v, **names, **_arguments(version, options)))


def _arguments(version: int, options: Options) -> dict[str, object]:
    arguments: dict[str, object] = {"causal": options.causal, "softmax_scale": options.scale}
    if options.window is not None:
        arguments["window_size"] = (options.window - 1, 0 if options.causal else options.window - 1)
    if options.softcap is not None:
        arguments["softcap"] = options.softcap
    if options.dropout:
        arguments["dropout_p"] = options.dropout
    return arguments


def _longest(cu: Tensor) -> int:
    return int(cu.diff().max())


def _first(result) -> Tensor:
    """Some versions return the log-sum-exp as well."""
    return result[0] if isinstance(result, tuple) else result
