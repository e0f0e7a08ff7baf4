"""Our attention as an implementation of transformers: `register()`, then `attn_implementation="workbench"`.

A mask reaches the attention of a layer in one of these forms, chosen by `_mask`:

| form | when | served by |
|---|---|---|
| None | causal, sliding or bidirectional, no padding, last query at last key | any path |
| int32 [B, L] | packed sequences (position ids start again): the number of each token's sequence | one at a time |
| bool [B, Lk] | padding, where flash-attn would serve | flash-attn, packed |
| bool [B, 1, Lq, Lk] | all else: padding elsewhere, static caches, chunked, custom patterns | SDPA, tiles |

The first three rest on the names of transformers' own mask functions: a pattern that is not recognised gets the dense
form, which is always right. Source: transformers 5.23, `masking_utils`, `integrations/sdpa_attention`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from workbench.errors import InputError
from workbench.kernels import attention_flash
from workbench.kernels.attention import attention

NAME = "workbench"
_CAUSAL, _BIDIRECTIONAL = "causal_mask_function", "bidirectional_mask_function"
_SLIDING = "sliding_window_overlay.<locals>.inner_mask"
_PACKED = "packed_sequence_mask_function.<locals>.inner_mask"
_REMAPPED = "remap_positions_for_packed_sequence.<locals>.inner_mask"
#: Where the sequences of a packed mask begin: asked once per mask, not once per layer.
_starts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def register() -> None:
    """Makes `attn_implementation="workbench"` known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The signature of transformers' attention functions; returns [B, Lq, Hq, Dv] and no weights."""
    _refuse(kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    shared = {"softcap": softcap, "scale": scaling, "dropout": dropout}
    if attention_mask is None and cu_seq_lens_q is not None:
        most = None if max_length_q is None or max_length_k is None else (int(max_length_q), int(max_length_k))
        window = _window(module, kwargs, key.shape[2])
        starts = (
            cu_seq_lens_q.to(torch.int32),
            (cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k).to(torch.int32),
        )
        out = _packed(query, key, value, starts, most, causal=causal, window=window, **shared)
    elif attention_mask is not None and attention_mask.ndim == 2 and attention_mask.dtype == torch.int32:
        starts, longest = _sequence_starts(attention_mask)
        window = _window(module, kwargs, key.shape[2])
        out = _packed(query, key, value, (starts, starts), (longest, longest), causal=causal, window=window, **shared)
    elif attention_mask is None or attention_mask.ndim == 2:
        padding = None if attention_mask is None else attention_mask.bool()
        window = _window(module, kwargs, key.shape[2])
        options = {"causal": causal, "window": window, "key_padding_mask": padding, "bias": position_bias}
        out = attention(query, key, value, **options, **shared)
    else:
        mask, bias = (attention_mask, None) if attention_mask.dtype == torch.bool else (None, attention_mask)
        if position_bias is not None:
            bias = position_bias if bias is None else bias + position_bias
        out = attention(query, key, value, mask=mask, bias=bias, **shared)
    return out.transpose(1, 2).contiguous(), None


def _refuse(kwargs: dict) -> None:
    for name, what in (("s_aux", "attention sinks"), ("cache", "paged caches"), ("output_attentions", "weights")):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise InputError(f"attn_implementation='{NAME}' has no {what} (`{name}`); use 'eager'")


def _window(module: torch.nn.Module, kwargs: dict, num_keys: int) -> int | None:
    """The layer's sliding window; refuses a model that has one and does not pass it, since no mask says it here."""
    if "sliding_window" in kwargs:
        return kwargs["sliding_window"]
    window = getattr(getattr(module, "config", None), "sliding_window", None)
    if isinstance(window, int) and num_keys > window:
        raise InputError(
            f"{type(module).__name__} does not pass its sliding window ({window}) to the attention function; "
            "use attn_implementation='sdpa'"
        )
    return None


def _packed(q: Tensor, k: Tensor, v: Tensor, starts: tuple[Tensor, Tensor], most, **options) -> Tensor:
    """Rows of packed sequences as one row [1, H, B * L, D], and back."""
    batch = q.shape[0]
    q, k, v = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in (q, k, v))
    out = attention(q, k, v, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], max_seqlens=most, **options)
    return out[0].transpose(0, 1).unflatten(0, (batch, -1)).transpose(1, 2)


def _sequence_starts(numbers: Tensor) -> tuple[Tensor, int]:
    """Where sequences begin in the rows laid end to end (int32 [N + 1]) and the longest length."""
    found = _starts.get(numbers)
    if found is None:
        first = torch.ones_like(numbers[:, :1], dtype=torch.bool)
        begins = torch.cat([first, numbers.diff(dim=1) != 0], dim=1).flatten().nonzero().squeeze(1)
        starts = torch.cat([begins, begins.new_tensor([numbers.numel()])]).to(torch.int32)
        found = _starts[numbers] = (starts, int(starts.diff().max()))
    return found


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    **kwargs,
) -> Tensor | None:
    """The signature of transformers' mask functions; returns one of the forms above."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    function = causal_mask_function if mask_function is None else mask_function
    parts = dict(_parts(function))
    aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if aligned and not use_vmap and not torch.compiler.is_compiling():
        whole = attention_mask is None or bool(attention_mask[:, kv_offset : kv_offset + kv_length].all())
        pattern = set(parts)
        if whole and pattern in ({_CAUSAL}, {_CAUSAL, _SLIDING}, {_BIDIRECTIONAL}):
            return None
        if whole and {_PACKED, _REMAPPED} <= pattern <= {_PACKED, _REMAPPED, _CAUSAL, _SLIDING}:
            return parts[_PACKED]["packed_sequence_mask"].to(torch.int32)
        covers = attention_mask is not None and attention_mask.shape[1] == kv_length and kv_offset == 0
        if covers and pattern in ({_CAUSAL}, {_BIDIRECTIONAL}) and attention_flash.ready(torch.device(device), dtype):
            return attention_mask
    for name in ("allow_is_causal_skip", "allow_is_bidirectional_skip"):
        kwargs.pop(name, None)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )


def _parts(function: Callable) -> Iterator[tuple[str, dict]]:
    """The elementary mask functions that one is made of, by qualified name, with what each closes over."""
    name = getattr(function, "__qualname__", repr(function))
    inner = dict(inspect.getclosurevars(function).nonlocals) if inspect.isfunction(function) else {}
    if name == "and_masks.<locals>.and_mask":
        for part in inner["mask_functions"]:
            yield from _parts(part)
        return
    yield name, inner
    if name == _REMAPPED:
        yield from _parts(inner["mask_function"])
