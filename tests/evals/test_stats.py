"""Statistics against scipy and statsmodels, by simulation, and the silent failures of evals.md section 3."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from workbench.errors import InputError
from workbench.evals import stats
from workbench.evals.student_t import t_quantile

FRACTIONS = st.lists(st.floats(0, 1), min_size=1, max_size=30)


def pair(seed: int, n: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = rng.normal(size=n)
    return a + shift, a + rng.normal(size=n)


# --- intervals


def test_bootstrap_equals_scipy_percentile_and_is_seeded() -> None:
    values = np.random.default_rng(1).exponential(size=200)
    ours = stats.bootstrap_mean(values, seed=3)
    reference = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(4)
    ).confidence_interval
    assert ours.estimate == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((reference.low, reference.high), abs=0.01)
    assert stats.bootstrap_mean(values, seed=3) == ours
    assert stats.bootstrap_mean(values, seed=4) != ours


def test_paired_bootstrap_is_the_bootstrap_of_the_differences() -> None:
    a, b = pair(2, 80, 0.3)
    paired = stats.paired_bootstrap(a, b, seed=5)
    plain = stats.bootstrap_mean(a - b, seed=5)
    assert (paired.low, paired.estimate, paired.high) == pytest.approx((plain.low, plain.estimate, plain.high))
    assert paired.low < paired.estimate < paired.high


def test_bootstrap_covers_the_mean_in_about_95_of_100() -> None:
    rng = np.random.default_rng(7)
    intervals = [stats.bootstrap_mean(rng.normal(size=80), seed=i) for i in range(200)]
    covered = sum(i.low <= 0 <= i.high for i in intervals)
    assert 180 <= covered <= 199  # 190 expected, standard deviation 3.1


def test_few_clusters_are_covered_as_well() -> None:
    """Plain percentiles of ten clusters cover 90 of 100, and 98.2 where 99.67 are meant: 23 of 100 tables of fifteen
    comparisons would hold a false one."""
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(10), 3).tolist()
    covered = {0.95: 0, 1 - 0.05 / 15: 0}
    for _ in range(400):
        values = rng.normal(size=10)[np.array(clusters)] + rng.normal(size=30)
        for level in covered:
            interval = stats.bootstrap_mean(values, clusters, level=level)
            covered[level] += interval.low <= 0 <= interval.high
    assert 367 <= covered[0.95] <= 393  # 380 expected, standard deviation 4.4
    assert covered[1 - 0.05 / 15] >= 396  # 398.7 expected, standard deviation 1.2


@given(st.integers(1, 400), st.floats(1e-4, 0.4))
def test_student_t_equals_scipy(df: int, tail: float) -> None:
    assert t_quantile(tail, df) == pytest.approx(scipy_stats.t.isf(tail, df), rel=1e-5)


def test_samples_of_one_question_are_not_independent() -> None:
    """Silent failure P12: 8 samples a question taken for independent make the interval too narrow."""
    rng = np.random.default_rng(11)
    covered, widths = {"plain": 0, "clustered": 0}, {"plain": 0.0, "clustered": 0.0}
    for repeat in range(60):
        question = np.repeat(np.arange(25), 8)
        values = rng.normal(size=25)[question] + rng.normal(scale=0.5, size=200)
        for name, clusters in (("plain", None), ("clustered", question.tolist())):
            interval = stats.bootstrap_mean(values, clusters, seed=repeat)
            covered[name] += interval.low <= 0 <= interval.high
            widths[name] += interval.high - interval.low
    assert covered["clustered"] >= 51  # 95 % of 60 = 57
    assert covered["plain"] <= 42
    assert widths["clustered"] > 2 * widths["plain"]


def test_cluster_bootstrap_weighs_clusters_by_their_size() -> None:
    interval = stats.bootstrap_mean([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"])
    assert (interval.estimate, interval.num_units) == (0.75, 2)
    assert (interval.low, interval.high) == (0.0, 1.0)
    with pytest.raises(InputError, match="4 values and 1 clusters"):
        stats.bootstrap_mean([1.0, 1.0, 1.0, 0.0], ["a"])


@settings(deadline=None)
@given(st.integers(1, 300), st.data())
def test_wilson_equals_statsmodels(n: int, data: st.DataObject) -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion", reason="statsmodels is the reference")
    successes = data.draw(st.integers(0, n))
    ours = stats.wilson(successes, n)
    assert (ours.low, ours.high) == pytest.approx(
        proportion.proportion_confint(successes, n, method="wilson"), abs=1e-12
    )


@pytest.mark.parametrize("successes", [0, 20])
def test_interval_of_a_proportion_has_a_width_at_0_and_1(successes: int) -> None:
    """Silent failure P11: the normal standard error is 0 there."""
    interval = stats.wilson(successes, 20)
    assert interval.high - interval.low > 0.1


# --- paired tests


@pytest.mark.parametrize("n", [5, 12, 30, 50, 51, 200])
@pytest.mark.parametrize("seed", range(3))
def test_wilcoxon_equals_scipy_without_ties(seed: int, n: int) -> None:
    a, b = pair(seed, n, 0.2)
    ours, reference = stats.wilcoxon(a, b), scipy_stats.wilcoxon(a, b, method="exact" if n <= 50 else "asymptotic")
    assert (ours.statistic, ours.p) == pytest.approx((reference.statistic, reference.pvalue), rel=1e-9)
    assert ours.method == ("wilcoxon exact" if n <= 50 else "wilcoxon normal")


def test_wilcoxon_equals_scipy_with_ties_and_zeros_above_50() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 5, 150) / 4, rng.integers(0, 5, 150) / 4
    ours = stats.wilcoxon(a, b)
    reference = scipy_stats.wilcoxon(a, b, zero_method="wilcox", method="asymptotic", correction=False)
    assert ours.num_zero == int((a == b).sum()) > 10
    assert (ours.statistic, ours.p) == pytest.approx((reference.statistic, reference.pvalue), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_exact_wilcoxon_with_ties_equals_all_sign_patterns(differences: list[int]) -> None:
    ours = stats.wilcoxon(differences, [0] * len(differences))
    nonzero = [d for d in differences if d]
    ranks = scipy_stats.rankdata(np.abs(nonzero)) if nonzero else np.empty(0)
    total = ranks.sum()

    def smaller(signs: Any) -> float:
        plus = ranks[np.array(signs) > 0].sum()
        return min(plus, total - plus)

    patterns = [smaller(signs) for signs in itertools.product((-1, 1), repeat=len(nonzero))] if nonzero else [0.0]
    observed = smaller(np.sign(nonzero)) if nonzero else 0.0
    assert ours.p == pytest.approx(np.mean([s <= observed + 1e-9 for s in patterns]))
    assert ours.num_zero == len(differences) - len(nonzero)


def test_wilcoxon_with_many_zeros_is_not_fooled() -> None:
    """Silent failure P9: "pratt" with the exact distribution gave p = 8.6e-11 on null data with 149 zeros of 201."""
    rng = np.random.default_rng(17)
    differences = np.concatenate([np.zeros(149), rng.normal(size=52)])
    result = stats.wilcoxon(differences, np.zeros(201))
    assert result.p == pytest.approx(scipy_stats.wilcoxon(differences[149:], method="asymptotic").pvalue, rel=1e-9)
    assert result.p > 0.05
    assert result.num_zero == 149


@pytest.mark.parametrize("test", [stats.wilcoxon, stats.paired_randomisation])
def test_all_pairs_equal_gives_p_1(test: Callable[..., stats.Test]) -> None:
    """Silent failure P9: nan with a warning."""
    result = test([0.1, 0.5, 1 / 3], [0.1, 0.5, 1 / 3])
    assert (result.p, result.num_zero, result.num_pairs, result.statistic) == (1.0, 3, 3, 0.0)


def test_rounding_makes_neither_ties_nor_differences() -> None:
    a, b = [0.3, 0.2, 0.1 + 0.2], [0.2, 0.1, 0.3]  # 0.3 - 0.2 < 0.2 - 0.1 in binary; 0.1 + 0.2 > 0.3
    result = stats.wilcoxon(a, b)
    assert (result.num_zero, result.p) == (1, 0.5)
    assert stats.cohens_d_z(a[:2], b[:2]) == math.inf


def test_randomisation_equals_scipy_and_enumeration() -> None:
    a, b = pair(4, 40, 0.25)
    reference = scipy_stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=50_000,
        rng=np.random.default_rng(1), vectorized=False,
    )  # fmt: skip
    ours = stats.paired_randomisation(a, b, num_resamples=50_000)
    assert ours.statistic == pytest.approx(reference.statistic)
    assert ours.p == pytest.approx(reference.pvalue, abs=4 * math.sqrt(ours.p / 50_000) + 1e-4)
    differences = np.array([0.5, 0.25, 0.25, -0.125])  # sums in many orders are equal: no pattern may be lost
    exact = np.mean([
        abs(np.dot(signs, differences)) >= differences.sum() for signs in itertools.product((-1, 1), repeat=4)
    ])  # fmt: skip
    assert stats.paired_randomisation(differences, np.zeros(4)).p == pytest.approx(exact, abs=0.02)


def test_p_values_do_not_change_between_calls_and_are_never_0() -> None:
    """Silent failure P10: ranx's Fisher test ignores its seed, and its p can be 0."""
    a, b = pair(8, 201, 0.1)
    assert len({stats.paired_randomisation(a, b, seed=42).p for _ in range(3)}) == 1
    assert stats.paired_randomisation(a, b, seed=1).p != stats.paired_randomisation(a, b, seed=42).p
    assert stats.paired_randomisation(a + 10, b).p == 1 / 10_001
    with pytest.raises(InputError, match="at least 10000, not 999"):
        stats.paired_randomisation(a, b, num_resamples=999)


@pytest.mark.parametrize("test", [stats.wilcoxon, stats.paired_randomisation])
def test_p_is_uniform_without_a_difference_and_small_with_one(test: Callable[..., stats.Test]) -> None:
    p = np.array([test(*pair(seed, 40)).p for seed in range(200)])
    assert scipy_stats.kstest(p, "uniform").pvalue > 0.001
    assert np.mean(p < 0.05) < 0.11
    # Shift 1 at sd 1: power is above 0.999.
    assert all(test(*pair(seed, 40, 1.0)).p < 0.05 for seed in range(20))


@settings(max_examples=60, deadline=None)
@given(FRACTIONS, st.data())
def test_tests_are_symmetric_and_bounded(a: list[float], data: st.DataObject) -> None:
    b = data.draw(st.lists(st.floats(0, 1), min_size=len(a), max_size=len(a)))
    one, other = stats.wilcoxon(a, b), stats.wilcoxon(b, a)
    assert (one.p, one.statistic) == pytest.approx((other.p, other.statistic))
    assert 0 < one.p <= 1
    assert stats.cliffs_delta(a, b) == pytest.approx(-stats.cliffs_delta(b, a))


# --- corrections


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_corrections_equal_statsmodels(p: list[float]) -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest", reason="statsmodels is the reference")
    for function, name in (
        (stats.holm, "holm"), (stats.bonferroni, "bonferroni"), (stats.benjamini_hochberg, "fdr_bh"),
    ):  # fmt: skip
        np.testing.assert_allclose(function(p), multitest.multipletests(p, method=name)[1], atol=1e-12)
    assert (stats.holm(p) <= stats.bonferroni(p) + 1e-12).all()


def test_without_a_correction_107_null_comparisons_find_something() -> None:
    p = np.array([stats.wilcoxon(*pair(seed, 60)).p for seed in range(107)])
    assert p.min() < 0.05 < stats.holm(p).min()


# --- effect sizes and power


def test_effect_sizes_by_hand_and_by_brute_force() -> None:
    a, b = np.array([3.0, 5.0, 9.0]), np.array([1.0, 4.0, 4.0])
    differences = a - b
    assert stats.cohens_d_z(a, b) == pytest.approx(differences.mean() / differences.std(ddof=1))
    assert stats.cohens_d_av(a, b) == pytest.approx(differences.mean() / ((a.std(ddof=1) + b.std(ddof=1)) / 2))
    assert stats.cohens_d_z(a, b) != pytest.approx(stats.cohens_d_av(a, b))
    assert stats.cliffs_delta(a, b) == pytest.approx(np.mean(np.sign(a[:, None] - b[None, :])))
    assert stats.cohens_d_z(a, a) == stats.cohens_d_av([2.0, 2.0], [2.0, 2.0]) == 0
    assert stats.cohens_d_z(a, a + 1) == -math.inf


@pytest.mark.parametrize("effect", [0.1, 0.2, 0.35, 0.5, 0.8])
@pytest.mark.parametrize(("power", "alpha"), [(0.8, 0.05), (0.9, 0.05), (0.8, 0.05 / 106)])
def test_queries_needed_equals_statsmodels(effect: float, power: float, alpha: float) -> None:
    statsmodels_power = pytest.importorskip("statsmodels.stats.power", reason="statsmodels is the reference")
    solver = statsmodels_power.TTestPower()
    reference = float(np.squeeze(solver.solve_power(effect_size=effect, power=power, alpha=alpha)))
    ours = stats.queries_needed(effect * 0.3, 0.3, power=power, alpha=alpha)
    assert abs(ours - reference) <= max(1.0, 0.02 * reference)
    assert stats.smallest_difference(ours, 0.3, power=power, alpha=alpha) <= effect * 0.3 + 1e-12
    assert stats.smallest_difference(ours - 1, 0.3, power=power, alpha=alpha) > effect * 0.3


def test_smallest_difference_is_the_table_of_the_notes() -> None:
    """evals.md section 5: points seen by 50, 200, 500 and 1,319 queries where 20 % are answered differently."""
    points = [100 * stats.smallest_difference(n, math.sqrt(0.2)) for n in (50, 200, 500, 1319)]
    assert points == pytest.approx([17.7, 8.9, 5.6, 3.4], rel=0.03)


def test_power_holds_in_simulation() -> None:
    n = stats.queries_needed(0.3, 1.0)
    rng = np.random.default_rng(3)
    seen = sum(stats.wilcoxon(rng.normal(0.3, 1.0, n), np.zeros(n)).p < 0.05 for _ in range(300))
    assert 0.70 <= seen / 300 <= 0.88  # Wilcoxon needs 5 % more than the t test on normal data


# --- repeated samples


def test_pass_at_k_is_unbiased() -> None:
    """Silent failure P13: 1 - (1 - c/n)**k says .832 where the unbiased value is .917."""
    assert stats.pass_at_k(10, 3, 5) == pytest.approx(0.9167, abs=1e-4)
    plug_in = 1 - (1 - 3 / 10) ** 5
    assert plug_in == pytest.approx(0.832, abs=1e-3)
    rng = np.random.default_rng(2)
    chance = 0.2
    correct = rng.binomial(10, chance, 20_000)
    at_5 = np.mean([stats.pass_at_k(10, int(c), 5) for c in correct])
    hat_3 = np.mean([stats.pass_hat_k(10, int(c), 3) for c in correct])
    assert at_5 == pytest.approx(1 - (1 - chance) ** 5, abs=0.01)
    assert hat_3 == pytest.approx(chance**3, abs=0.002)


def test_pass_at_k_equals_all_subsets() -> None:
    for n, c, k in itertools.product(range(1, 6), range(6), range(1, 6)):
        if c > n or k > n:
            with pytest.raises(InputError, match="k <= samples"):
                stats.pass_at_k(n, c, k)
            continue
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert stats.pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]))
        assert stats.pass_hat_k(n, c, k) == pytest.approx(np.mean([all(s) for s in subsets]))


# --- mistakes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.wilcoxon([1.0, 2.0], [1.0]), "2 and 1"),
        (lambda: stats.paired_randomisation([1.0, math.nan], [1.0, 2.0]), r"a\[1\] is nan"),
        (lambda: stats.bootstrap_mean([]), "at least one number"),
        (lambda: stats.bootstrap_mean([1.0]), "at least 2 units"),
        (lambda: stats.bootstrap_mean([1.0, 2.0], level=95), "level"),
        (lambda: stats.bootstrap_mean([1.0, 2.0], num_resamples=100), "10000"),
        (lambda: stats.wilson(3, 2), "3 successes of 2"),
        (lambda: stats.wilson(0, 0), "0 trials"),
        (lambda: stats.holm([0.5, 1.5]), "1.5"),
        (lambda: stats.queries_needed(0.0, 1.0), "above 0"),
        (lambda: stats.smallest_difference(2, 1.0), "too few"),
        (lambda: stats.queries_needed(0.1, 1.0, power=1.0), "power"),
        (lambda: stats.cohens_d_z([1.0], [0.0]), "at least 2 values"),
    ],
)
def test_mistakes_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_an_interval_of_scores_holds_their_mean_and_has_a_width_at_0_and_1() -> None:
    """Silent failure P11; and Wilson's of pure clusters of unlike sizes was the interval of another mean."""
    assert stats.score_interval([1.0] * 5) == stats.wilson(5, 5)
    assert stats.score_interval([0.0] * 6, ["a", "a", "b", "b", "b", "c"]) == stats.wilson(0, 3)
    assert stats.score_interval([1.0, 0.0, 1.0, 1.0]) == stats.wilson(3, 4)
    assert stats.score_interval([1, 1, 0, 0], list("aabb")) == stats.wilson(1, 2)
    uneven = stats.score_interval([1.0] * 10 + [0.0], ["a"] * 10 + ["b"])
    assert uneven == stats.bootstrap_mean([1.0] * 10 + [0.0], ["a"] * 10 + ["b"])
    assert uneven.low <= 10 / 11 <= uneven.high
    assert stats.score_interval([0.5, 1.0, 0.0]) == stats.bootstrap_mean([0.5, 1.0, 0.0])
