"""Quantiles of Student's t, for intervals of few units; the light core has no scipy.

Verified by: tests/evals/test_stats.py (against scipy).
"""

from __future__ import annotations

import math
from statistics import NormalDist


def t_quantile(tail: float, df: int) -> float:
    """What a Student t of df degrees of freedom exceeds with this chance. Source: Abramowitz and Stegun 26.7.3 to 5."""
    if df > 200:
        z = -NormalDist().inv_cdf(tail)
        return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    low, high = 0.0, 1.0
    while _t_tail(high, df) > tail:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_tail(middle, df) > tail else (low, middle)
    return high


def _t_tail(t: float, df: int) -> float:
    angle = math.atan(t / math.sqrt(df))
    is_odd = df % 2
    term = math.cos(angle) if is_odd else 1.0
    total = 0.0
    for at in range(2 + is_odd, df + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (at - 1) / at
    within = math.sin(angle) * total
    return (1 - (2 / math.pi * (angle + within) if is_odd else within)) / 2
