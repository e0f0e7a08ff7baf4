"""Vectors read together with their neighbours: what a short turn is about often stands in the turns around it.

Verified by: tests/memory/test_windowed.py. Measured by benchmarks/recall_study.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def windowed(
    vectors: NDArray[np.float32], before: NDArray[np.integer], after: NDArray[np.integer], weight: float = 1.0
) -> NDArray[np.float32]:
    """Each vector plus `weight` times that of the document before and the one after it, scaled to length 1.

    Args:
        vectors: (n, dim), rows of length 1 or 0.
        before, after: (n,), rows of the neighbours in the thread; n where there is none.
        weight: >= 0; 0 gives the vectors themselves.

    Returns: (n, dim); rows that add up to 0 stay 0.
    """
    padded = np.concatenate([vectors, np.zeros((1, vectors.shape[1]), vectors.dtype)])
    total = vectors + np.float32(weight) * (padded[before] + padded[after])
    length = np.linalg.norm(total, axis=1, keepdims=True)
    return np.divide(total, length, out=np.zeros_like(total), where=length > 0)
