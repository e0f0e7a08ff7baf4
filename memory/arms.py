"""The arms of recall over one store: made on demand, cold for a single query or warm for a long-lived process."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from workbench.data.store import Store
from workbench.memory.bm25 import Bm25Options, ColdBm25, WarmBm25
from workbench.memory.fusion import Arm
from workbench.memory.postings import find_layer

NOTHING: Arm = (np.empty(0, np.int64), np.empty(0))


class Arms:
    """Keyword and vector search over the layers of a store.

    Args: warm: keep postings in memory between calls; `attach` then gives each call's open store.
    """

    def __init__(self, store: Store, warm: bool = False) -> None:
        self.store, self.warm = store, warm
        self._bm25: dict[str, ColdBm25 | WarmBm25] = {}

    def attach(self, store: Store) -> None:
        """Uses this open store from now on; what is in memory is refreshed by the next search."""
        self.store = store
        for searcher in self._bm25.values():
            searcher.attach(store.con)

    def keyword(self, layer: str, text: str, n: int, allowed: NDArray[np.int64] | None, window: bool = False) -> Arm:
        """BM25 of a layer; nothing where the layer has no documents yet."""
        if layer not in self._bm25:
            if find_layer(self.store.con, layer) is None:
                return NOTHING
            self._bm25[layer] = (WarmBm25 if self.warm else ColdBm25)(self.store.con, layer)
        return self._bm25[layer].search(text, n, allowed=allowed, options=Bm25Options(window=window))

    def vector(self, layer: str, text: str, n: int, allowed: NDArray[np.int64] | None) -> Arm:
        """Dense search of a layer; nothing where it has no vectors yet."""
        return NOTHING
