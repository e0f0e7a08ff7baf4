"""How close generated samples are to real ones, in any feature space, and which modes or classes they miss.

Every metric takes `features`, a function from samples to one row of numbers a sample (default: the samples themselves,
flattened). A figure belongs to its features and to the numbers of samples on both sides: Fréchet distance and sliced
Wasserstein distance are above 0 even for two draws of one distribution and fall with more samples; the kernel distance
and the energy distance are unbiased and then lie around 0, below it too. Compare like with like, and name both.

    metric                 value for one and the same distribution, and source
    frechet_distance       > 0   Heusel et al. 2017 (arXiv 1706.08500) eq. 6, the formula of FID
    kernel_distance        ~ 0   Bińkowski et al. 2018 (arXiv 1801.01401), the formula of KID
    precision_recall       < 1   Kynkäänniemi et al. 2019 (arXiv 1904.06991) eq. 1 and 2
    density_coverage       ~ 1   Naeem et al. 2020 (arXiv 2002.09797) sec. 3
    sliced_wasserstein     > 0   Bonneel et al. 2015
    energy_distance        ~ 0   Székely and Rizzo 2013
    mode_coverage          1     high-quality share and modes found as in Lin et al. 2018 (PacGAN, arXiv 1712.04086)
    class_shares           1     the same by classes

All arithmetic is float64; pairs are compared in blocks, so that memory does not grow with the square of the samples.
Samples are numpy arrays, torch tensors or lists [N, ...]; nan, no or too few samples are an InputError everywhere.

Verified by: tests/evals/test_generation.py (closed forms, invariances, scipy), test_generation_parity.py (torchmetrics,
prdc, definitions pair by pair), test_generation_modes.py, test_generation_features.py (digits).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from workbench.errors import InputError

Rows = NDArray[np.float64]
#: From samples [N, ...] to rows [N, D]; it gets all samples at once and batches them itself where it has to.
Features = Callable[[Any], Any]

#: Numbers in a block, 8 MiB of float64; a few blocks are held at once.
_CELLS_AT_ONCE = 1 << 20
#: Squared distances are differences of squared norms; below this share of the largest norm they are rounding. As a
#: distance that is 1.2e-7 of the largest norm, the resolution of the float32 in which features are computed.
_ROUNDING = 64 * float(np.finfo(np.float64).eps)


def identity(samples: Any) -> Any:
    """The samples as their own features."""
    return samples


def as_rows(values: Any, name: str, *, at_least: int = 1) -> Rows:
    """Values [N, ...] as float64 rows [N, D]; a list of numbers becomes one column.

    Raises: InputError for anything but finite numbers and for fewer rows than `at_least`.
    """
    if hasattr(values, "detach"):  # a torch tensor, of any device and precision
        values = values.detach().cpu().double().numpy()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as e:
        raise InputError(f"{name} must be an array of numbers with one row a sample ({e}).") from e
    if array.ndim == 0 or len(array) < at_least:
        count = "a single number" if array.ndim == 0 else f"{len(array)} samples"
        raise InputError(f"{name} has {count}; this needs {at_least} or more.")
    rows = array.reshape(len(array), math.prod(array.shape[1:]))
    if not rows.shape[1]:
        raise InputError(f"{name} has shape {array.shape}: no number in a row.")
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise InputError(f"{name}: {len(bad)} of {len(rows)} rows are not finite, the first is row {bad[0]}.")
    return rows


def as_vector(values: Any, name: str) -> Rows:
    """Values [N] as float64; raises InputError as `as_rows` does, and for more than one number each."""
    column = as_rows(values, name)
    if column.shape[1] != 1:
        raise InputError(f"{name} must be a list of numbers, not {column.shape[1]} numbers for each of {len(column)}.")
    return column[:, 0]


def _in_features(samples: Any, features: Features, name: str, at_least: int) -> Rows:
    rows = as_rows(features(samples), f"The features of the {name} samples", at_least=at_least)
    if len(rows) != len(samples):
        raise InputError(f"The features of the {name} samples are {len(rows)} rows for {len(samples)} samples.")
    return rows


def _both(real: Any, generated: Any, features: Features, at_least: int) -> tuple[Rows, Rows]:
    """Features of both sides, in the same number."""
    r, g = _in_features(real, features, "real", at_least), _in_features(generated, features, "generated", at_least)
    if r.shape[1] != g.shape[1]:
        raise InputError(f"Real samples have {r.shape[1]} features, generated ones {g.shape[1]}.")
    return r, g


def _centred(real: Any, generated: Any, features: Features, at_least: int) -> tuple[Rows, Rows]:
    """The same, with the real mean as the origin, for what depends on distances only: less rounding in them."""
    r, g = _both(real, generated, features, at_least)
    origin = r.mean(axis=0)
    return r - origin, g - origin


# --- moments ----------------------------------------------------------------------------------------------------------


def frechet_distance(real: Any, generated: Any, *, features: Features = identity) -> float:
    """Squared Wasserstein-2 distance between the Gaussians that have the means and covariances (n - 1) of the features.

    It is FID only with the features of Inception-V3 and 50,000 samples; with fewer samples than features the
    covariances are singular and the figure says little.
    """
    rows = _both(real, generated, features, at_least=2)
    (mean_r, cov_r), (mean_g, cov_g) = ((r.mean(axis=0), np.atleast_2d(np.cov(r, rowvar=False))) for r in rows)
    return gaussian_frechet(mean_r, cov_r, mean_g, cov_g)


def gaussian_frechet(mean_a: ArrayLike, cov_a: ArrayLike, mean_b: ArrayLike, cov_b: ArrayLike) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of means [D] and covariances [D, D].

    Raises: InputError for shapes that do not fit and for a covariance that is not symmetric or not positive.
    Source: Dowson and Landau 1982. The trace of the root is the sum of the singular values of A^T B for any
        A A^T = C_a, B B^T = C_b: no root of an unsymmetric product, no complex part to drop.
    """
    a, b = (as_vector(mean, "A mean") for mean in (mean_a, mean_b))
    first, second = (as_rows(cov, "A covariance") for cov in (cov_a, cov_b))
    if not first.shape == second.shape == (len(a), len(a)) or len(a) != len(b):
        raise InputError(f"Means of {len(a)} and {len(b)} numbers with covariances {first.shape} and {second.shape}.")
    overlap = np.linalg.svd(_factor(first).T @ _factor(second), compute_uv=False).sum()
    return max(0.0, float(((a - b) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * overlap))


def _factor(cov: Rows) -> Rows:
    """A with A A^T = cov."""
    scale = float(np.abs(cov).max())
    values, vectors = np.linalg.eigh(cov)
    if not np.allclose(cov, cov.T, rtol=0, atol=1e-9 * scale) or values[0] < -1e-9 * scale * len(cov):
        raise InputError(f"A covariance is not symmetric, or has the negative eigenvalue {values[0]}.")
    return vectors * np.sqrt(np.maximum(values, 0))


# --- kernels ----------------------------------------------------------------------------------------------------------


class KernelDistance(NamedTuple):
    """Mean and standard deviation (n) over the subsets; the latter is 0 where a subset is all samples."""

    mean: float
    sd: float


def kernel_distance(
    real: Any,
    generated: Any,
    *,
    features: Features = identity,
    num_subsets: int = 100,
    subset_size: int = 1000,
    degree: int = 3,
    gamma: float | None = None,
    coef: float = 1.0,
    seed: int = 0,
) -> KernelDistance:
    """Unbiased squared maximum mean discrepancy under the kernel (gamma x.y + coef)^degree, over random subsets.

    Args: subset_size: samples of each side in a subset, drawn without replacement; gamma: None = 1 / features.
    """
    if num_subsets < 1 or subset_size < 2 or degree < 1:
        raise InputError(f"num_subsets {num_subsets}, subset_size {subset_size}, degree {degree}: from 1, 2 and 1 on.")
    a, b = _both(real, generated, features, at_least=subset_size)
    scale, rng = 1 / a.shape[1] if gamma is None else gamma, np.random.default_rng(seed)

    def kernel(x: Rows, y: Rows) -> Rows:
        base = scale * (x @ y.T) + coef
        power = base.copy()
        for _ in range(degree - 1):  # several times faster than numpy's general power
            power *= base
        return power

    def one_subset() -> float:
        x, y = (rows[rng.choice(len(rows), subset_size, replace=False)] for rows in (a, b))
        within = sum(float(k.sum() - k.trace()) for k in (kernel(x, x), kernel(y, y)))
        return within / (subset_size * (subset_size - 1)) - 2 * float(kernel(x, y).mean())

    values = [one_subset() for _ in range(1 if subset_size == len(a) == len(b) else num_subsets)]
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


# --- nearest neighbours -----------------------------------------------------------------------------------------------


class PrecisionRecall(NamedTuple):
    """Share of generated samples within the real manifold; share of real samples within the generated one."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Real balls around a generated sample / k, on average; share of real balls with a generated sample in them."""

    density: float
    coverage: float


def precision_recall(real: Any, generated: Any, *, features: Features = identity, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall: a manifold is the union of balls around its samples.

    Args: k: a ball reaches to the sample's k-th nearest neighbour of its own side, itself not counted. Balls are
        closed, as in the paper; the package prdc takes open ones, which differs only for equal distances.
    """
    r, g = _with_neighbours(real, generated, features, k)
    radii_r, radii_g = _squared_radii(r, k), _squared_radii(g, k)
    is_precise, is_recalled = np.zeros(len(g), bool), np.zeros(len(r), bool)
    for at, squared in _squared_distances(r, g):
        is_precise |= (squared <= radii_r[at, None]).any(axis=0)
        is_recalled[at] = (squared <= radii_g).any(axis=1)
    return PrecisionRecall(float(is_precise.mean()), float(is_recalled.mean()))


def density_coverage(real: Any, generated: Any, *, features: Features = identity, k: int = 5) -> DensityCoverage:
    """Density and coverage of the real samples' balls; both expect nothing of the generated samples' neighbourhoods.

    Args: k: as in `precision_recall`. For two draws of n samples from one distribution, density is 1 on average and
        coverage 1 - product over i = 1..k of (n - i) / (2 n - i), about 1 - 2^-k. Density can exceed 1.
    """
    r, g = _with_neighbours(real, generated, features, k)
    radii, inside, covered = _squared_radii(r, k), 0, 0
    for at, squared in _squared_distances(r, g):
        is_inside = squared <= radii[at, None]
        inside += int(np.count_nonzero(is_inside))
        covered += int(np.count_nonzero(is_inside.any(axis=1)))
    return DensityCoverage(inside / (k * len(g)), covered / len(r))


def _with_neighbours(real: Any, generated: Any, features: Features, k: int) -> tuple[Rows, Rows]:
    if k < 1:
        raise InputError(f"k must be 1 or more, not {k}.")
    return _centred(real, generated, features, at_least=k + 1)


def _squared_radii(rows: Rows, k: int) -> Rows:
    """Squared distance of each row to its k-th nearest other row, widened by the rounding so that ties are inside."""
    radii = np.empty(len(rows))
    for at, squared in _squared_distances(rows, rows):
        squared[np.arange(len(squared)), np.arange(at.start, at.stop)] = np.inf
        radii[at] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return radii + _ROUNDING * float(np.einsum("nd,nd->n", rows, rows).max())


def _squared_distances(a: Rows, b: Rows) -> Iterator[tuple[slice, Rows]]:
    """Squared Euclidean distances of a few rows of `a` at a time to all rows of `b`."""
    norms_a, norms_b = (np.einsum("nd,nd->n", rows, rows) for rows in (a, b))
    step = max(1, _CELLS_AT_ONCE // len(b))
    for start in range(0, len(a), step):
        at = slice(start, min(start + step, len(a)))
        squared = a[at] @ b.T
        squared *= -2
        squared += norms_a[at, None]
        squared += norms_b
        yield at, np.maximum(squared, 0, out=squared)


# --- transport and energy ---------------------------------------------------------------------------------------------


def sliced_wasserstein(
    real: Any, generated: Any, *, features: Features = identity, num_projections: int = 128, seed: int = 0
) -> float:
    """Root of the mean squared Wasserstein-2 distance of the projections on random directions, in the features' unit.

    Each projection is exact, for unequal numbers of samples too; in one dimension there is one direction.
    """
    a, b = _both(real, generated, features, at_least=1)
    if num_projections < 1:
        raise InputError(f"num_projections must be 1 or more, not {num_projections}.")
    directions = np.random.default_rng(seed).standard_normal((num_projections if a.shape[1] > 1 else 1, a.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    at_a, at_b, widths = _quantile_steps(len(a), len(b))
    step = max(1, _CELLS_AT_ONCE // len(widths))
    total = 0.0
    for start in range(0, len(directions), step):
        chosen = directions[start : start + step]
        sorted_a, sorted_b = (np.sort(chosen @ rows.T, axis=1) for rows in (a, b))
        total += float((((sorted_a[:, at_a] - sorted_b[:, at_b]) ** 2) @ widths).sum())
    return math.sqrt(total / len(directions))


def _quantile_steps(n: int, m: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Rows]:
    """Where both quantile functions are constant: index among n and among m sorted values, and the probability."""
    ends = np.union1d(np.arange(1, n + 1, dtype=np.int64) * m, np.arange(1, m + 1, dtype=np.int64) * n)  # in 1 / (n m)
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    return starts // m, starts // n, (ends - starts) / (n * m)


def energy_distance(real: Any, generated: Any, *, features: Features = identity, unbiased: bool = True) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| with Euclidean distances, in the features' unit; no root is taken.

    Args: unbiased: pairs of a sample with itself are left out, so that two draws of one distribution give 0 on average
        and often less than 0; otherwise they count as 0, the figure is >= 0, and its root is what
        scipy.stats.energy_distance returns in one dimension.
    """
    a, b = _centred(real, generated, features, at_least=2 if unbiased else 1)
    own_a, own_b = len(a) * (len(a) - unbiased), len(b) * (len(b) - unbiased)
    across = _sum_of_distances(a, b) / (len(a) * len(b))
    return 2 * across - _sum_of_distances(a, a) / own_a - _sum_of_distances(b, b) / own_b


def _sum_of_distances(a: Rows, b: Rows) -> float:
    total = 0.0
    for at, squared in _squared_distances(a, b):
        if a is b:
            squared[np.arange(len(squared)), np.arange(at.start, at.stop)] = 0
        total += float(np.sqrt(squared, out=squared).sum())
    return total


# --- modes and classes ------------------------------------------------------------------------------------------------


class ModeCoverage(NamedTuple):
    """Coverage of a mixture's modes.

    Args:
        hq_share: share of samples near a mode. The mixture itself has the chance that a chi-squared variable of D
            degrees of freedom is at most within^2: .989 for D = 2 and 3 standard deviations, .994 for 3.2.
        num_found: modes with at least `found_from` of their due share.
        shares: of the near samples, by mode; all 0 where there is none.
        smallest_share: the smallest of share / weight; 1 = every mode has its due share.
    """

    hq_share: float
    num_found: int
    shares: tuple[float, ...]
    smallest_share: float


class ClassShares(NamedTuple):
    """Share of the samples by class, and the smallest of share / expected share."""

    shares: tuple[float, ...]
    smallest_share: float


def mode_coverage(
    samples: Any,
    means: ArrayLike,
    sd: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    within: float = 3.0,
    found_from: float = 0.1,
) -> ModeCoverage:
    """Which modes of a mixture of isotropic Gaussians the samples reach.

    Args: samples: [N, D]; means: [M, D]; sd: one number or [M]; weights: [M], None = equal; within: a sample is near
        its nearest mode if it is at most so many standard deviations away; found_from: share / weight.
    """
    x, centres = as_rows(samples, "The samples"), as_rows(means, "The means of the modes")
    if x.shape[1] != centres.shape[1]:
        raise InputError(f"Samples have {x.shape[1]} numbers, the modes' means {centres.shape[1]}.")
    scale = np.asarray(sd, dtype=np.float64)
    if scale.shape not in ((), (len(centres),)) or not (np.isfinite(scale) & (scale > 0)).all():
        raise InputError(f"sd must be one number above 0, or one for each of the {len(centres)} modes: {sd}.")
    counts = np.zeros(len(centres))
    for _, squared in _squared_distances(x, centres):
        squared /= scale**2
        nearest = squared.argmin(axis=1)
        counts += np.bincount(nearest[squared.min(axis=1) <= within**2], minlength=len(centres))
    shares = counts / max(1.0, counts.sum())
    relative = shares / _expected(weights, len(centres))
    found = int(np.count_nonzero((relative >= found_from) & (counts > 0)))
    return ModeCoverage(float(counts.sum() / len(x)), found, tuple(shares.tolist()), float(relative.min()))


def class_shares(samples: Any, classify: Features, *, expected: ArrayLike | None = None) -> ClassShares:
    """How the samples spread over the classes of a classifier.

    Args: classify: from samples to scores [N, C], of which the highest decides; expected: shares [C], None = equal.
    """
    scores = _in_features(samples, classify, "generated", at_least=1)
    shares = np.bincount(scores.argmax(axis=1), minlength=scores.shape[1]) / len(scores)
    relative = shares / _expected(expected, len(shares))
    return ClassShares(tuple(shares.tolist()), float(relative.min()))


def _expected(weights: ArrayLike | None, num: int) -> Rows:
    if weights is None:
        return np.full(num, 1 / num)
    expected = as_vector(weights, "The weights")
    if len(expected) != num or not (expected > 0).all():
        raise InputError(f"There must be {num} weights above 0, not {len(expected)} from {expected.min()} on.")
    return expected / expected.sum()
