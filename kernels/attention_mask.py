"""Which keys a query may see: causal, sliding window, padding and dense masks, as a whole or tile by tile.

Letters: B batch, H query heads, Q queries, K keys. Query i stands at key position i + K - Q: the last query sees the
last key, as in flash-attn and transformers; PyTorch's `is_causal` aligns at the start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Visibility:
    """The keys that each query sees.

    Args:
        num_queries, num_keys: lengths.
        causal: no key after the query's position.
        window: at most this many keys, the query's own included: position p sees p - window < key (and, where it is not
            causal, key < p + window).
        key_padding_BK: bool, True = a real key.
        mask_BHQK: bool, True = visible; each dimension may be 1, for all.
    """

    num_queries: int
    num_keys: int
    causal: bool
    window: int | None
    key_padding_BK: Tensor | None
    mask_BHQK: Tensor | None

    @property
    def offset(self) -> int:
        """Key position of query 0."""
        return self.num_keys - self.num_queries

    def key_range(self, first_query: int, end_query: int) -> tuple[int, int]:
        """The keys [first, end) outside of which none of these queries sees anything, by position alone."""
        first, end = 0, self.num_keys
        if self.causal:
            end = min(end, end_query + self.offset)
        if self.window is not None:
            first = max(first, first_query + self.offset - self.window + 1)
            end = min(end, end_query - 1 + self.offset + self.window)
        return min(first, max(end, 0)), max(end, 0)

    def tile(
        self, first_query: int, end_query: int, first_key: int, end_key: int, device: torch.device
    ) -> Tensor | None:
        """Bool, broadcastable to [B, H, queries, keys] of this tile; None if all of it is visible."""
        seen = self._positions(first_query, end_query, first_key, end_key, device)
        if self.key_padding_BK is not None:
            padding = self.key_padding_BK[:, None, None, first_key:end_key]
            seen = padding if seen is None else seen & padding
        if (mask := self.mask_BHQK) is not None:
            # A dimension of 1 stands for all queries or keys: there is nothing to cut from it.
            mask = mask if mask.shape[2] == 1 else mask[:, :, first_query:end_query]
            mask = mask if mask.shape[3] == 1 else mask[..., first_key:end_key]
            seen = mask if seen is None else seen & mask
        return seen

    def dense(self, device: torch.device) -> Tensor | None:
        """The tile that covers everything."""
        return self.tile(0, self.num_queries, 0, self.num_keys, device)

    def _positions(self, q0: int, q1: int, k0: int, k1: int, device: torch.device) -> Tensor | None:
        first, last = q0 + self.offset, q1 - 1 + self.offset
        window = self.window
        ahead = self.causal and k1 - 1 > first
        too_old = window is not None and k0 <= last - window
        too_new = window is not None and not self.causal and k1 - 1 >= first + window
        if not (ahead or too_old or too_new):
            return None
        at = torch.arange(first, last + 1, device=device)[:, None]
        keys = torch.arange(k0, k1, device=device)
        if window is None:
            return (keys <= at)[None, None]
        newest = at if self.causal else at + (window - 1)
        seen = (keys <= newest) & (keys > at - window)
        return seen[None, None]
