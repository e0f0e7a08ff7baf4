"""How well stated confidences fit what came true: ECE, Brier score with its parts, negative log likelihood.

The expected calibration error of a perfectly calibrated model is not 0: with 15 bins it is about .16 for 50 answers and
.03 for 1,000 (evals.md P14). So a result always holds the number of answers, a bootstrap interval, and the ECE that the
same confidences would have if they were right. Brier score and likelihood rank models better.

Source: Naeini et al. 2015 (equal width), Nguyen and O'Connor 2015 (equal mass), Murphy 1973 (parts of the Brier score).
Verified by: tests/evals/test_calibration_error.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from workbench.errors import InputError

Binning = Literal["width", "mass"]
Values = NDArray[np.float64]
MIN_RESAMPLES = 1000
#: A confidence of 0 or 1 that was wrong has an infinite likelihood; it is counted as this far from it.
CLIP = 1e-12


@dataclass(frozen=True, slots=True)
class Bin:
    """Answers of similar confidence: how many, the mean confidence, and the share that was right."""

    num: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class CalibrationError:
    """Calibration of `num` answers.

    Args:
        ece, low, high: expected calibration error with its bootstrap interval.
        ece_if_calibrated, ece_if_calibrated_high: mean and 95th percentile of the ECE that these confidences would have
            if each were the true chance; an ECE below the latter is no sign of bad calibration.
        brier: mean squared error; = reliability - resolution + uncertainty + within_bins, over the same bins.
        nll: mean negative log likelihood, in nats; num_clipped: answers whose likelihood was 0.
        bins: the reliability diagram, empty bins left out.
    """

    num: int
    binning: Binning
    num_bins: int
    ece: float
    low: float
    high: float
    level: float
    ece_if_calibrated: float
    ece_if_calibrated_high: float
    brier: float
    reliability: float
    resolution: float
    uncertainty: float
    within_bins: float
    nll: float
    num_clipped: int
    bins: tuple[Bin, ...]

    def as_json(self) -> dict[str, Any]:
        """All fields by name."""
        return asdict(self)


def calibration_error(
    confidences: ArrayLike,
    correct: ArrayLike,
    *,
    num_bins: int = 15,
    binning: Binning = "width",
    level: float = 0.95,
    num_resamples: int = MIN_RESAMPLES,
    seed: int = 0,
) -> CalibrationError:
    """Measures calibration.

    Args:
        confidences: of each answer, 0 to 1; correct: whether it was right, 0 or 1.
        binning: bins of equal width, or of equal numbers of answers (equal confidences stay together).
        num_resamples: of the bootstrap and of the simulated calibrated model, >= 1,000.
    Raises: InputError for values out of range, lists of different length, fewer than two answers.
    """
    p, y = _checked(confidences, correct)
    if num_bins < 1 or binning not in ("width", "mass") or not 0 < level < 1 or num_resamples < MIN_RESAMPLES:
        raise InputError(
            f"num_bins ({num_bins}) must be 1 or more, binning ({binning!r}) width or mass, level ({level}) between 0 "
            f"and 1, num_resamples ({num_resamples}) {MIN_RESAMPLES} or more."
        )
    rng = np.random.default_rng(seed)
    at = _bins(p, num_bins, binning)
    counts = np.bincount(at, minlength=num_bins)
    filled = counts > 0
    n = counts[filled]
    confidence, accuracy = (np.bincount(at, values, num_bins)[filled] / n for values in (p, y))

    def resampled() -> float:
        chosen = rng.integers(0, len(p), len(p))
        return _ece(p[chosen], y[chosen], _bins(p[chosen], num_bins, binning), num_bins)

    def calibrated() -> float:
        return _ece(p, (rng.random(len(p)) < p).astype(float), at, num_bins)

    draws, null = (np.array([draw() for _ in range(num_resamples)]) for draw in (resampled, calibrated))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    weight = n / len(p)
    likelihood = np.where(y == 1, p, 1 - p)
    within = p - confidence[np.cumsum(filled)[at] - 1]
    # Murphy's parts are exact for forecasts that are equal within a bin; these two terms make up for the spread.
    spread = float(np.mean(within**2) - 2 * np.mean(within * y))
    return CalibrationError(
        num=len(p), binning=binning, num_bins=num_bins, ece=_ece(p, y, at, num_bins), low=float(low), high=float(high),
        level=level, ece_if_calibrated=float(null.mean()), ece_if_calibrated_high=float(np.quantile(null, 0.95)),
        brier=float(np.mean((p - y) ** 2)),
        reliability=float(weight @ (confidence - accuracy) ** 2),
        resolution=float(weight @ (accuracy - y.mean()) ** 2),
        uncertainty=float(y.mean() * (1 - y.mean())),
        within_bins=spread,
        nll=float(-np.log(np.clip(likelihood, CLIP, 1)).mean()), num_clipped=int(np.count_nonzero(likelihood < CLIP)),
        bins=tuple(Bin(int(k), float(c), float(a)) for k, c, a in zip(n, confidence, accuracy, strict=True)),
    )  # fmt: skip


def _ece(p: Values, y: Values, at: NDArray[np.intp], num_bins: int) -> float:
    return float(np.abs(np.bincount(at, p - y, num_bins)).sum() / len(p))


def _bins(p: Values, num_bins: int, binning: Binning) -> NDArray[np.intp]:
    """The bin of each confidence; of equal width: (0, 1/m], …, 0 belongs to the first."""
    if binning == "width":
        return np.maximum(np.ceil(p * num_bins).astype(np.intp) - 1, 0)
    values, inverse, counts = np.unique(p, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - counts / 2  # equal confidences share a bin: that of their middle
    of_value = np.minimum((middle * num_bins / len(p)).astype(np.intp), num_bins - 1)
    return of_value[inverse.reshape(-1)] if len(values) else inverse


def _checked(confidences: ArrayLike, correct: ArrayLike) -> tuple[Values, Values]:
    try:
        p, y = (np.asarray(values, dtype=np.float64) for values in (confidences, correct))
    except (TypeError, ValueError) as e:
        raise InputError(f"Confidences and correctness must be numbers ({e}).") from e
    if p.ndim != 1 or p.shape != y.shape or len(p) < 2:
        raise InputError(f"Give as many confidences as answers, two or more, not shapes {p.shape} and {y.shape}.")
    tests: tuple[tuple[str, Values, Callable[[Values], Any]], ...] = (
        ("confidence", p, lambda v: (v >= 0) & (v <= 1)),
        ("correct", y, lambda v: (v == 0) | (v == 1)),
    )
    for name, values, is_good in tests:
        bad = np.flatnonzero(~is_good(values))
        if len(bad):
            raise InputError(f"{name} number {bad[0]} is {values[bad[0]]}; {'0 to 1' if values is p else '0 or 1'}.")
    return p, y
