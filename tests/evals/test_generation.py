"""Metrics of generative models: closed forms, scipy, invariances, input that cannot be meant."""

from __future__ import annotations

import math
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import linalg, stats

from workbench.errors import InputError
from workbench.evals import generation
from workbench.evals.generation import (
    density_coverage,
    energy_distance,
    frechet_distance,
    gaussian_frechet,
    kernel_distance,
    precision_recall,
    sliced_wasserstein,
)

Rows = NDArray[np.float64]


def small_kernel_distance(real: Any, generated: Any, **options: Any) -> float:
    return kernel_distance(real, generated, subset_size=12, num_subsets=1, **options).mean


#: One figure each, for samples of 12 or more.
METRICS: dict[str, Callable[..., float]] = {
    "frechet": frechet_distance,
    "kernel": small_kernel_distance,
    "precision": lambda *a, **o: precision_recall(*a, **o).precision,
    "recall": lambda *a, **o: precision_recall(*a, **o).recall,
    "density": lambda *a, **o: density_coverage(*a, **o).density,
    "coverage": lambda *a, **o: density_coverage(*a, **o).coverage,
    "sliced": sliced_wasserstein,
    "energy": energy_distance,
}
SYMMETRIC = ("frechet", "kernel", "sliced", "energy")


def two_clouds(seed: int, n: int = 12, m: int = 12, d: int = 3) -> tuple[Rows, Rows]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)), rng.standard_normal((m, d)) @ rng.standard_normal((d, d)) + rng.normal(0, 1, d)


def random_cov(rng: np.random.Generator, d: int, rank: int) -> Rows:
    root = rng.standard_normal((d, rank))
    return root @ root.T


# --- Fréchet ----------------------------------------------------------------------------------------------------------


def test_frechet_of_one_dimensional_and_diagonal_gaussians() -> None:
    assert gaussian_frechet([1.0], [[4.0]], [-2.0], [[9.0]]) == pytest.approx(3**2 + (2 - 3) ** 2)
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 0.0, 1.0])
    expected = 14 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert gaussian_frechet([1, 2, 3], np.diag(a), [0, 0, 0], np.diag(b)) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_frechet_equals_scipy_root_of_the_product(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = random_cov(rng, 6, 9), random_cov(rng, 6, 9)
    expected = np.trace(a + b) - 2 * np.trace(np.real(linalg.sqrtm(a @ b)))
    assert gaussian_frechet(np.zeros(6), a, np.zeros(6), b) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_singular_covariances() -> None:
    rng = np.random.default_rng(0)
    line = np.outer([3.0, 4.0], [3.0, 4.0])  # all variance, 25, on the direction (.6, .8)
    across = np.outer([-4.0, 3.0], [-4.0, 3.0])
    assert gaussian_frechet([0, 0], line, [0, 0], across) == pytest.approx(50)  # nothing overlaps
    assert gaussian_frechet([0, 0], line, [0, 0], line) == pytest.approx(0, abs=1e-12)
    few = rng.standard_normal((4, 40))  # fewer samples than features
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(few, few + 1) == pytest.approx(40)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 5), shift=st.floats(-4, 4))
def test_frechet_of_a_scaled_and_shifted_copy(seed: int, scale: float, shift: float) -> None:
    x, _ = two_clouds(seed, n=20)
    about_mean = x - x.mean(axis=0)
    expected = 3 * shift**2 + (scale - 1) ** 2 * about_mean.var(axis=0, ddof=1).sum()
    copy = x.mean(axis=0) + scale * about_mean + shift
    assert frechet_distance(x, copy) == pytest.approx(expected, rel=1e-7, abs=1e-10)


@pytest.mark.parametrize("cov", [[[1.0, 2.0], [0.0, 1.0]], [[1.0, 2.0], [2.0, 1.0]]])
def test_frechet_refuses_what_is_no_covariance(cov: list[list[float]]) -> None:
    with pytest.raises(InputError, match="not symmetric, or has the negative eigenvalue"):
        gaussian_frechet([0, 0], cov, [0, 0], np.eye(2))
    with pytest.raises(InputError, match=r"covariances \(2, 2\) and \(3, 3\)"):
        gaussian_frechet([0, 0], np.eye(2), [0, 0], np.eye(3))


# --- distances that are 0 on average for one distribution -------------------------------------------------------------


@pytest.mark.parametrize("name", ["kernel", "energy"])
def test_unbiased_distances_average_to_zero_and_fall_below_it(name: str) -> None:
    rng = np.random.default_rng(1)
    draws = np.array([METRICS[name](*rng.standard_normal((2, 12, 2))) for _ in range(600)])
    assert abs(draws.mean()) < 3.5 * draws.std() / math.sqrt(len(draws))
    assert (draws < 0).mean() > 0.3


def test_kernel_distance_by_hand() -> None:
    # (x y + 1)^3 on {0, 1} and {0, 2}: pairs of different samples give 1 within both; across 1, 1, 1 and 27.
    assert kernel_distance([0.0, 1.0], [0.0, 2.0], subset_size=2) == pytest.approx((1 + 1 - 2 * 30 / 4, 0))
    linear = kernel_distance([0.0, 1.0], [0.0, 2.0], subset_size=2, degree=1, gamma=0.5, coef=0.0)
    assert linear.mean == pytest.approx(-2 * 1 / 4)


def test_kernel_distance_draws_subsets_of_both_sides() -> None:
    a, b = two_clouds(0, 60, 80)
    subsets = kernel_distance(a, b, subset_size=30, num_subsets=400)
    everything = kernel_distance(a[:60], b[:60], subset_size=60)
    assert subsets == kernel_distance(a, b, subset_size=30, num_subsets=400)
    assert subsets != kernel_distance(a, b, subset_size=30, num_subsets=400, seed=1)
    assert subsets.sd > 0
    assert everything.sd == 0
    first, both = (kernel_distance(a, b, subset_size=30, num_subsets=num) for num in (1, 2))
    assert both.sd == pytest.approx(abs(both.mean - first.mean))  # of two values, with n below the sum of squares
    whole = kernel_of_all(a, b)
    assert abs(subsets.mean - whole) < 4 * subsets.sd / math.sqrt(400)


def kernel_of_all(a: Rows, b: Rows) -> float:
    """Unbiased estimate from all samples, of unequal number."""
    kaa, kbb, kab = ((x @ y.T / 3 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    own = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kaa, kbb)]
    return float(sum(own) - 2 * kab.mean())


@settings(max_examples=40, deadline=None)
@given(
    a=st.lists(st.floats(-100, 100), min_size=2, max_size=12), b=st.lists(st.floats(-100, 100), min_size=2, max_size=12)
)
def test_energy_distance_in_one_dimension_is_the_square_of_scipys(a: list[float], b: list[float]) -> None:
    ours = energy_distance(a, b, unbiased=False)
    assert ours == pytest.approx(stats.energy_distance(a, b) ** 2, rel=1e-6, abs=1e-5)


def test_energy_distance_by_hand() -> None:
    a, b = [[0.0, 0.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 12.0]]
    across = (0 + 12 + 5 + math.hypot(3, 8)) / 4
    assert energy_distance(a, b, unbiased=False) == pytest.approx(2 * across - 5 / 2 - 12 / 2)
    assert energy_distance(a, b) == pytest.approx(2 * across - 5 - 12)


def test_energy_distance_of_shifted_gaussians() -> None:
    rng = np.random.default_rng(2)
    expected = 2 * stats.foldnorm(1 / math.sqrt(2), scale=math.sqrt(2)).mean() - 4 / math.sqrt(math.pi)
    draws = [energy_distance(rng.standard_normal(500), rng.standard_normal(500) + 1) for _ in range(20)]
    assert abs(np.mean(draws) - expected) < 3.5 * np.std(draws) / math.sqrt(len(draws))


# --- sliced Wasserstein -----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 9), m=st.integers(1, 9), seed=st.integers(0, 1000))
def test_one_dimension_is_the_exact_wasserstein_distance(n: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal(n), rng.standard_normal(m) + 1
    paired = np.repeat(np.sort(a), m) - np.repeat(np.sort(b), n)  # the optimal coupling, in parts of 1 / (n m)
    assert sliced_wasserstein(a, b) == pytest.approx(math.sqrt((paired**2).mean()))


def test_sliced_wasserstein_of_a_shift_and_of_a_scaled_copy() -> None:
    x = np.random.default_rng(3).standard_normal((400, 4))
    shift = np.array([3.0, 0.0, -4.0, 0.0])
    assert sliced_wasserstein(x, x + shift, num_projections=4000) == pytest.approx(5 / math.sqrt(4), rel=0.02)
    expected = math.sqrt((x**2).sum(axis=1).mean() / 4)
    assert sliced_wasserstein(x, 2 * x, num_projections=4000) == pytest.approx(expected, rel=0.02)
    assert sliced_wasserstein(x, x + shift, seed=1) != sliced_wasserstein(x, x + shift, seed=2)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), factor=st.floats(0.01, 100))
def test_sliced_wasserstein_is_a_metric_with_a_unit(seed: int, factor: float) -> None:
    a, b = two_clouds(seed, 7, 11)
    c, _ = two_clouds(seed + 1, 5)
    assert sliced_wasserstein(factor * a, factor * b) == pytest.approx(factor * sliced_wasserstein(a, b))
    assert sliced_wasserstein(a, b) <= sliced_wasserstein(a, c) + sliced_wasserstein(c, b) + 1e-12
    assert sliced_wasserstein(a, a[::-1]) == 0


# --- neighbours -------------------------------------------------------------------------------------------------------


def test_a_copy_and_a_stranger() -> None:
    x, _ = two_clouds(4, 50)
    assert precision_recall(x, x.copy()) == (1, 1)
    assert density_coverage(x, x.copy(), k=5) == pytest.approx((1 + 1 / 5, 1))  # closed balls: + the k-th neighbour
    assert precision_recall(x, x + 1000) == (0, 0)
    assert density_coverage(x, x + 1000) == (0, 0)


def test_precision_recall_on_a_line() -> None:
    real, generated = [0.0, 1.0, 2.0, 10.0], [0.5, 11.0, 30.0]
    # k = 1: real radii 1, 1, 1, 8; generated radii 10.5, 10.5, 19, so that the last one ends at 11, above 10.
    assert precision_recall(real, generated, k=1) == pytest.approx((2 / 3, 1))
    assert precision_recall(generated, real, k=1) == pytest.approx((1, 2 / 3))
    # 0.5 lies in the balls of 0 and 1, 11 in that of 10; the ball of 2 reaches down to 1 only.
    assert density_coverage(real, generated, k=1) == pytest.approx((3 / 3, 3 / 4))


def test_dropping_a_mode_costs_recall_and_coverage_a_bad_mode_precision_and_density() -> None:
    rng = np.random.default_rng(5)
    both = np.concatenate([rng.standard_normal((100, 2)), rng.standard_normal((100, 2)) + 50])
    one, other = rng.standard_normal((200, 2)), rng.standard_normal((100, 2)) - 50
    dropped = (*precision_recall(both, one), *density_coverage(both, one))
    assert dropped[1] <= 0.5
    assert dropped[3] <= 0.5
    assert dropped[0] > 0.8
    assert dropped[2] > 0.8
    invented = np.concatenate([both[:100], other])
    assert precision_recall(both, invented).precision == 0.5
    assert density_coverage(both, invented).density == pytest.approx((1 + 1 / 5) / 2)


def test_density_and_coverage_of_one_distribution() -> None:
    rng = np.random.default_rng(6)
    draws = np.array([density_coverage(*rng.standard_normal((2, 20, 2)), k=3) for _ in range(500)])
    expected = 1 - math.prod((20 - i) / (40 - i) for i in (1, 2, 3))
    for values, mean in zip(draws.T, (1.0, expected), strict=True):
        assert abs(values.mean() - mean) < 3.5 * values.std() / math.sqrt(len(values))


def test_repeated_samples_have_balls_of_radius_zero() -> None:
    point = np.full((6, 3), 1e6)
    assert precision_recall(point, point, k=3) == (1, 1)
    assert precision_recall(point, point + 10, k=3) == (0, 0)


# --- what holds for all -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_order_and_rotation_change_nothing(name: str, seed: int) -> None:
    a, b = two_clouds(seed)
    rng = np.random.default_rng(seed)
    value = METRICS[name](a, b)
    assert METRICS[name](rng.permutation(a), rng.permutation(b)) == pytest.approx(value, rel=1e-6, abs=1e-9)
    if name in SYMMETRIC:
        assert METRICS[name](b, a) == pytest.approx(value, rel=1e-6, abs=1e-9)
    if name != "sliced":  # its directions are a random sample, which a rotation moves
        turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
        assert METRICS[name](a @ turn, b @ turn) == pytest.approx(value, rel=1e-6, abs=1e-9)
    if name != "kernel":  # its kernel has an origin
        assert METRICS[name](a + 7, b + 7) == pytest.approx(value, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", METRICS)
def test_blocks_tensors_and_feature_functions_give_the_same_figure(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="the train extra is not installed")
    a, b = (np.round(rows, 1) for rows in two_clouds(7, 30, 40, 8))
    metric: Any = METRICS[name]
    value = metric(a, b)
    tensors = [torch.tensor(rows, dtype=torch.float64, requires_grad=True).reshape(-1, 2, 4) for rows in (a, b)]
    assert metric(*tensors) == pytest.approx(value)
    assert metric(a.tolist(), b.tolist()) == pytest.approx(value)
    doubled = metric(a, b, features=lambda rows: torch.tensor(rows)[:, None] * 2)
    assert doubled == pytest.approx(metric(2 * a, 2 * b))
    coarse = [torch.tensor(rows).bfloat16() for rows in (a, b)]
    assert metric(*coarse) == pytest.approx(metric(*(t.double().numpy() for t in coarse)))
    monkeypatch.setattr(generation, "_CELLS_AT_ONCE", 100)  # blocks of 2 or 3 rows
    assert metric(a, b) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("name", ["precision", "recall", "density", "coverage", "energy"])
def test_distances_are_exact_far_from_the_origin(name: str) -> None:
    a, b = (np.round(rows, 3) for rows in two_clouds(12, 40, 40))
    assert METRICS[name](a + 1e7, b + 1e7) == pytest.approx(METRICS[name](a, b), abs=1e-6)


def test_pairs_are_never_held_all_at_once() -> None:
    a, b = two_clouds(8, 3000, 3000, 2)
    tracemalloc.start()
    try:
        precision_recall(a, b)
        energy_distance(a, b)
        sliced_wasserstein(a, b, num_projections=500)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60e6  # 3,000 x 3,000 distances are 72e6 bytes


@pytest.mark.parametrize("name", METRICS)
def test_input_that_cannot_be_meant(name: str) -> None:
    metric: Any = METRICS[name]
    a, b = two_clouds(9)
    holed = b.copy()
    holed[3, 1] = math.nan
    with pytest.raises(InputError, match=r"generated samples: 1 of 12 rows are not finite, the first is row 3"):
        metric(a, holed)
    with pytest.raises(InputError, match="Real samples have 3 features, generated ones 2"):
        metric(a, b[:, :2])
    with pytest.raises(InputError, match="real samples has 0 samples; this needs"):
        metric(a[:0], b)
    with pytest.raises(InputError, match=r"generated samples are 6 rows for 12 samples|has 6 samples; this needs 12"):
        metric(a, b, features=lambda rows: rows if rows is a else rows[::2])
    with pytest.raises(InputError, match="must be an array of numbers"):
        metric([["one"], ["two"]], b)
    with pytest.raises(InputError, match="no number in a row"):
        metric(a[:, :0], b)


@pytest.mark.parametrize(
    ("name", "needed"), [("frechet", 2), ("kernel", 12), ("precision", 4), ("density", 6), ("energy", 2)]
)
def test_too_few_samples(name: str, needed: int) -> None:
    a, b = two_clouds(10)
    METRICS[name](a[:needed], b[:needed])
    with pytest.raises(InputError, match=f"real samples has {needed - 1} samples; this needs {needed}"):
        METRICS[name](a[: needed - 1], b)
    with pytest.raises(InputError, match=f"generated samples has {needed - 1} samples; this needs {needed}"):
        METRICS[name](a, b[: needed - 1])


@pytest.mark.parametrize(
    ("metric", "options"),
    [
        (kernel_distance, {"num_subsets": 0}), (kernel_distance, {"subset_size": 1}), (kernel_distance, {"degree": 0}),
        (precision_recall, {"k": 0}), (density_coverage, {"k": 0}), (sliced_wasserstein, {"num_projections": 0}),
    ],
)  # fmt: skip
def test_options_out_of_range(metric: Callable[..., Any], options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=rf"{next(iter(options))}.*{next(iter(options.values()))}"):
        metric(*two_clouds(11), **options)


def test_importing_the_metrics_is_light() -> None:
    code = (
        "import sys, workbench.evals.generation, workbench.evals.generation_features, workbench.evals.student_quality\n"
        "print([m for m in ('torch', 'scipy', 'sklearn', 'torchmetrics', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
