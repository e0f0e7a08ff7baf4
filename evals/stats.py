"""Statistics of evaluations: intervals, paired tests, corrections, effect sizes, power, pass@k.

The unit is the query (or conversation, or user): average repeated samples of one question before a paired test, or
name the cluster (evals.md R12). Everything random takes a seed and gives the same figures for the same seed.

Verified by: tests/evals/test_stats.py (against scipy and statsmodels, and by simulation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from workbench.errors import InputError
from workbench.evals.student_t import t_quantile

Values = NDArray[np.float64]
MIN_RESAMPLES = 10_000
_NORMAL = NormalDist()
#: Up to so many differences that are not 0, the Wilcoxon p is exact.
_EXACT_UP_TO = 50
_CELLS_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval; `num_units` is what was resampled or counted."""

    estimate: float
    low: float
    high: float
    level: float
    num_units: int
    method: str


@dataclass(frozen=True, slots=True)
class Test:
    """A two-sided paired test; `num_zero` pairs are equal."""

    method: str
    p: float
    statistic: float
    num_pairs: int
    num_zero: int

    __test__ = False  # pytest takes a class of this name for tests


# --- intervals --------------------------------------------------------------------------------------------------------


def bootstrap_mean(
    values: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    num_resamples: int = MIN_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a mean, widened for few units.

    Both ends are moved away from the mean by what a t interval of n units is wider than a normal one. Without that,
    95 % intervals of ten clusters hold the truth 90 times of 100, and of fifteen Bonferroni-corrected ones at least one
    misses it 23 times of 100 (simulated). No end leaves the range of the values. Source: Hesterberg 2015, who widens by
    other percentiles, which a corrected level would put beyond any number of resamples.

    Args: clusters: of each value (question, conversation, user); whole clusters are resampled and the mean is over
        values, so that large clusters weigh more. None: each value is its own. num_resamples: >= 10,000.
    Raises: InputError for fewer than two clusters, for nan, and for fewer resamples.
    """
    sample = _checked(values, "values")
    _check_fraction("level", level)
    sums, counts = sample, np.ones(len(sample))
    if clusters is not None:
        if len(clusters) != len(sample):
            raise InputError(f"There are {len(sample)} values and {len(clusters)} clusters; give one for each value.")
        number: dict[Hashable, int] = {}
        at = [number.setdefault(cluster, len(number)) for cluster in clusters]
        sums, counts = np.bincount(at, sample), np.bincount(at).astype(float)
    if len(sums) < 2:
        raise InputError(f"An interval needs at least 2 units to resample, not {len(sums)}.")
    width = len(sums)
    draws = _draws(lambda rng, rows: rng.integers(0, width, (rows, width)), width, num_resamples, seed)
    means = np.concatenate([sums[draw].sum(axis=1) / counts[draw].sum(axis=1) for draw in draws])
    estimate, wider = math.fsum(sample.tolist()) / len(sample), _small_sample_factor(width, level)
    low, high = (estimate + wider * (np.quantile(means, [(1 - level) / 2, (1 + level) / 2]) - estimate)).tolist()
    low, high = max(low, float(sample.min())), min(high, float(sample.max()))
    method = "percentile bootstrap" if clusters is None else "percentile cluster bootstrap"
    return Interval(estimate, low, high, level, width, method)


def _small_sample_factor(num_units: int, level: float) -> float:
    """What a t interval of n units is wider than a normal one whose standard error divides by n."""
    tail = (1 - level) / 2
    ratio = t_quantile(tail, num_units - 1) / -_NORMAL.inv_cdf(tail)
    return ratio * math.sqrt(num_units / (num_units - 1))


def score_interval(
    values: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    num_resamples: int = MIN_RESAMPLES,
) -> Interval:
    """Interval of a mean score: Wilson's where each unit is all 0 or all 1, else the bootstrap.

    The bootstrap has no width where all are 0, or all 1. Wilson's counts units, so it is for units of one size, and for
    those extremes; else it would be the interval of another mean than ours, which is over values.

    Args and errors: as of `bootstrap_mean`.
    """
    sample = _checked(values, "values").tolist()
    units: dict[Hashable, list[float]] = {}
    for value, unit in zip(sample, clusters or range(len(sample)), strict=True):
        units.setdefault(unit, []).append(value)
    is_pure = all(set(unit) in ({0.0}, {1.0}) for unit in units.values())
    if is_pure and (len(set(map(len, units.values()))) == 1 or len(set(sample)) == 1):
        return wilson(sum(unit[0] == 1 for unit in units.values()), len(units), level=level)
    return bootstrap_mean(sample, clusters, level=level, num_resamples=num_resamples)


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    num_resamples: int = MIN_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of mean(a - b) over pairs; arguments and errors as of `bootstrap_mean`."""
    differences = _differences(a, b)
    return bootstrap_mean(differences, clusters, level=level, num_resamples=num_resamples, seed=seed)


def wilson(num_successes: int, num_trials: int, *, level: float = 0.95) -> Interval:
    """Wilson score interval of a proportion; not of width 0 at 0 and 1. Source: Wilson 1927."""
    _check_fraction("level", level)
    if not 0 <= num_successes <= num_trials or num_trials < 1:
        raise InputError(f"{num_successes} successes of {num_trials} trials are no proportion.")
    z, share = _NORMAL.inv_cdf((1 + level) / 2), num_successes / num_trials
    scale = 1 + z * z / num_trials
    centre = (share + z * z / (2 * num_trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / num_trials + z * z / (4 * num_trials**2))
    low = 0.0 if num_successes == 0 else centre - half
    high = 1.0 if num_successes == num_trials else centre + half
    return Interval(share, low, high, level, num_trials, "wilson")


# --- paired tests -----------------------------------------------------------------------------------------------------


def wilcoxon(a: ArrayLike, b: ArrayLike) -> Test:
    """Wilcoxon signed-rank test: differences of 0 are dropped, equal ones share their mean rank.

    Up to 50 differences p is exact, ties included (the distribution over all signs given these ranks); above, normal
    with the variance corrected for ties and no continuity correction. p = 1 where all pairs are equal.
    Returns: statistic = the smaller of the two rank sums.
    Source: Wilcoxon 1945; zero_method "wilcox", because "pratt" with the exact distribution is wrong (evals.md P9).
    """
    differences = _differences(a, b)
    nonzero = differences[differences != 0]
    num_zero = len(differences) - len(nonzero)
    if not len(nonzero):
        return Test("wilcoxon", 1.0, 0.0, len(differences), num_zero)
    ranks = _mean_ranks(np.abs(nonzero))
    total, plus = float(ranks.sum()), float(ranks[nonzero > 0].sum())
    smaller = min(plus, total - plus)
    if len(nonzero) <= _EXACT_UP_TO:
        method, p = "wilcoxon exact", _signed_rank_exact(ranks, smaller)
    else:
        # The sum of the squared mean ranks is the variance with its correction for ties.
        z = (smaller - total / 2) / math.sqrt(float((ranks**2).sum()) / 4)
        method, p = "wilcoxon normal", math.erfc(-z / math.sqrt(2))
    return Test(method, min(1.0, p), smaller, len(differences), num_zero)


def _signed_rank_exact(ranks: Values, smaller: float) -> float:
    doubled = np.rint(2 * ranks).astype(int).tolist()  # mean ranks are multiples of 1/2
    share = np.zeros(sum(doubled) + 1)  # of the 2**n sign patterns that have this rank sum
    share[0], reach = 1.0, 0
    for rank in doubled:
        new = share / 2
        new[rank : reach + rank + 1] += share[: reach + 1] / 2
        share, reach = new, reach + rank
    return 2 * float(share[: round(2 * smaller) + 1].sum())


def _mean_ranks(values: Values) -> Values:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def paired_randomisation(a: ArrayLike, b: ArrayLike, *, num_resamples: int = MIN_RESAMPLES, seed: int = 0) -> Test:
    """Sign-flip test of the mean difference: p = (c + 1) / (B + 1), never 0, the same for the same seed.

    Args: num_resamples: B, >= 10,000 sign patterns; c of them have a mean at least as far from 0.
    Returns: statistic = mean(a - b). p = 1 where all pairs are equal.
    Source: Fisher 1935; Phipson and Smyth 2010 for the + 1.
    """
    differences = _differences(a, b)
    nonzero = differences[differences != 0]
    total = math.fsum(nonzero.tolist())
    at_least = abs(total) - 1e-12 * float(np.abs(nonzero).sum())  # sums in another order differ by rounding
    extreme = 0
    width = max(1, len(nonzero))
    for bits in _draws(lambda rng, rows: rng.integers(0, 2, (rows, width), np.int8), width, num_resamples, seed):
        sums = bits[:, : len(nonzero)] @ (2 * nonzero) - nonzero.sum()
        extreme += int(np.count_nonzero(np.abs(sums) >= at_least))
    p = (extreme + 1) / (num_resamples + 1)
    zeros = len(differences) - len(nonzero)
    return Test("paired randomisation", p, total / len(differences), len(differences), zeros)


# --- many comparisons -------------------------------------------------------------------------------------------------


def bonferroni(p_values: ArrayLike) -> Values:
    """p values times their number, at most 1."""
    p = _p_values(p_values)
    return np.minimum(1.0, p * len(p))


def holm(p_values: ArrayLike) -> Values:
    """Holm's step-down adjustment, in the order of the input; never above Bonferroni's. Source: Holm 1979."""
    p = _p_values(p_values)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def benjamini_hochberg(p_values: ArrayLike) -> Values:
    """False-discovery-rate adjustment, for screens. Source: Benjamini and Hochberg 1995."""
    p = _p_values(p_values)
    order = np.argsort(p, kind="stable")[::-1]
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.minimum.accumulate(p[order] * len(p) / np.arange(len(p), 0, -1)))
    return adjusted


# --- effect sizes -----------------------------------------------------------------------------------------------------


def cohens_d_z(a: ArrayLike, b: ArrayLike) -> float:
    """Mean difference / standard deviation of the differences (n - 1); 0 without any, ±inf where all are the same."""
    differences = _differences(a, b)
    return _ratio(float(differences.mean()), _sd(differences))


def cohens_d_av(a: ArrayLike, b: ArrayLike) -> float:
    """Mean difference / mean of the two standard deviations (n - 1). Source: Lakens 2013, d_av."""
    differences = _differences(a, b)
    return _ratio(float(differences.mean()), (_sd(_checked(a, "a")) + _sd(_checked(b, "b"))) / 2)


def cliffs_delta(a: ArrayLike, b: ArrayLike) -> float:
    """P(a > b) - P(a < b) over all pairs of one value of each, not paired by query. Source: Cliff 1993."""
    first, second = _checked(a, "a"), np.sort(_checked(b, "b"))
    below, not_above = np.searchsorted(second, first, "left"), np.searchsorted(second, first, "right")
    return float((below.sum() + not_above.sum() - len(first) * len(second)) / (len(first) * len(second)))


# --- power ------------------------------------------------------------------------------------------------------------


def queries_needed(difference: float, sd: float, *, power: float = 0.8, alpha: float = 0.05) -> int:
    """How many queries a two-sided paired test needs to see a mean difference.

    Args: difference: > 0, in the metric's unit; sd: standard deviation of the per-query differences, for 0/1 metrics
        sqrt(share of queries on which the two disagree); alpha: divide it by the number of comparisons.
    Source: normal approximation with Guenther's (1981) correction for the t test.
    """
    z_alpha, z_power = _quantiles(power, alpha)
    if not (difference > 0 and sd > 0):
        raise InputError(f"difference ({difference}) and sd ({sd}) must be above 0.")
    return math.ceil(((z_alpha + z_power) * sd / difference) ** 2 + z_alpha**2 / 2)


def smallest_difference(num_queries: int, sd: float, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest mean difference that so many queries show; the inverse of `queries_needed`.

    With the defaults about 2.8 * sd / sqrt(num_queries).
    """
    z_alpha, z_power = _quantiles(power, alpha)
    if not sd > 0:
        raise InputError(f"sd must be above 0, not {sd}.")
    if num_queries <= z_alpha**2 / 2 + 1:
        raise InputError(f"{num_queries} queries are too few for any statement at alpha {alpha}.")
    return (z_alpha + z_power) * sd / math.sqrt(num_queries - z_alpha**2 / 2)


def _quantiles(power: float, alpha: float) -> tuple[float, float]:
    _check_fraction("power", power)
    _check_fraction("alpha", alpha)
    return _NORMAL.inv_cdf(1 - alpha / 2), _NORMAL.inv_cdf(power)


# --- repeated samples -------------------------------------------------------------------------------------------------


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that at least one of k samples is correct, unbiased from n >= k samples. Source: Chen et al. 2021."""
    return 1 - _all_of(num_samples, num_samples - num_correct, k)


def pass_hat_k(num_samples: int, num_correct: int, k: int) -> float:
    """pass^k: chance that all of k samples are correct, unbiased from n >= k samples. Source: tau-bench 2024."""
    return _all_of(num_samples, num_correct, k)


def _all_of(num_samples: int, num_of_kind: int, k: int) -> float:
    if not (0 <= num_of_kind <= num_samples and 1 <= k <= num_samples):
        raise InputError(
            f"Needs 1 <= k <= samples and 0 <= correct <= samples, not k = {k} of {num_samples} samples."
            " Draw more samples or lower k."
        )
    return math.comb(num_of_kind, k) / math.comb(num_samples, k)


# --- shared -----------------------------------------------------------------------------------------------------------


def _draws(
    draw: Callable[[np.random.Generator, int], NDArray], width: int, num_resamples: int, seed: int
) -> Iterator[NDArray]:
    if num_resamples < MIN_RESAMPLES:
        raise InputError(f"num_resamples must be at least {MIN_RESAMPLES}, not {num_resamples}: p would jump.")
    rng, rows = np.random.default_rng(seed), max(1, _CELLS_AT_ONCE // width)
    for done in range(0, num_resamples, rows):
        yield draw(rng, min(rows, num_resamples - done))


def _checked(values: ArrayLike, name: str) -> Values:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise InputError(f"{name} must be a list of at least one number, not of shape {array.shape}.")
    if not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0])
        raise InputError(
            f"{name}[{at}] is {array[at]}. Leave failed items out of both sides, or score them; never nan."
        )
    return array


def _differences(a: ArrayLike, b: ArrayLike) -> Values:
    # Rounded to 12 digits of the largest value: 0.3 - 0.2 and 0.2 - 0.1 are meant to be tied.
    first, second = _checked(a, "a"), _checked(b, "b")
    if len(first) != len(second):
        raise InputError(f"A paired comparison needs the same queries on both sides: {len(first)} and {len(second)}.")
    scale = float(max(np.abs(first).max(), np.abs(second).max())) or 1.0
    return np.round((first - second) / scale, 12) * scale


def _p_values(p_values: ArrayLike) -> Values:
    p = _checked(p_values, "p_values")
    if p.min() < 0 or p.max() > 1:
        raise InputError(f"p values lie between 0 and 1; these reach from {p.min()} to {p.max()}.")
    return p


def _check_fraction(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise InputError(f"{name} must lie between 0 and 1, not {value}.")


def _sd(values: Values) -> float:
    if len(values) < 2:
        raise InputError("A standard deviation needs at least 2 values.")
    return float(values.std(ddof=1)) if np.ptp(values) else 0.0


def _ratio(difference: float, sd: float) -> float:
    if sd:
        return difference / sd
    return math.copysign(math.inf, difference) if difference else 0.0
