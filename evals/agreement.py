"""Agreement between raters: raw, Cohen's kappa, Krippendorff's alpha.

Verified by: tests/evals/test_agreement.py (against statsmodels and Krippendorff's published table).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np

from workbench.errors import InputError

Level = Literal["nominal", "ordinal", "interval"]


def raw_agreement(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """Share of items on which two raters agree; items without a rating (None) of either are left out."""
    pairs = _both(a, b)
    return sum(x == y for x, y in pairs) / len(pairs)


def cohens_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """Agreement of two raters beyond chance; nan where both always use the same one label. Source: Cohen 1960."""
    pairs = _both(a, b)
    labels, n = {x for pair in pairs for x in pair}, len(pairs)
    chance = sum(sum(x == label for x, _ in pairs) * sum(y == label for _, y in pairs) for label in labels) / n**2
    return math.nan if len(labels) == 1 else (raw_agreement(a, b) - chance) / (1 - chance)


def _both(a: Sequence[Hashable], b: Sequence[Hashable]) -> list[tuple[Hashable, Hashable]]:
    if len(a) != len(b):
        raise InputError(f"Two raters must rate the same items: {len(a)} and {len(b)} ratings. Use None for a gap.")
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if not pairs:
        raise InputError("There is no item that both raters have rated.")
    return pairs


def krippendorff_alpha(ratings: Sequence[Sequence[float | None]], level: Level = "nominal") -> float:
    """Agreement of any number of raters beyond chance, with gaps.

    Args: ratings: one row a rater, one column an item, None for a gap; level: how far apart two values are (nominal:
        equal or not; ordinal: by the items ranked between them; interval: squared difference).
    Returns: 1 = perfect, 0 = chance; nan where there is only one value. Source: Krippendorff 2011.
    """
    if len({len(row) for row in ratings}) != 1 or level not in ("nominal", "ordinal", "interval"):
        raise InputError(f"Raters must rate the same items, at level nominal, ordinal or interval, not {level!r}.")
    items = [[v for v in column if v is not None] for column in zip(*ratings, strict=True)]
    items = [item for item in items if len(item) > 1]
    values = sorted({v for item in items for v in item})
    if not items:
        raise InputError("There is no item that two raters have rated.")
    coincidences = np.zeros((len(values), len(values)))
    for item in items:
        counts = np.array([item.count(v) for v in values], float)
        coincidences += (np.outer(counts, counts) - np.diag(counts)) / (len(item) - 1)
    margin = coincidences.sum(axis=1)
    if level == "nominal":
        distance = 1 - np.eye(len(values))
    else:
        position = np.cumsum(margin) - margin / 2 if level == "ordinal" else np.array(values, float)
        distance = (position[:, None] - position[None, :]) ** 2
    expected = float((np.outer(margin, margin) * distance).sum())
    observed = float((coincidences * distance).sum())
    return 1 - (margin.sum() - 1) * observed / expected if expected else math.nan
