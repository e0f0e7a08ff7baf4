"""Coverage of modes and classes: hand-made cases, the share that a mixture itself reaches, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from workbench.errors import InputError
from workbench.evals.generation import class_shares, mode_coverage


def test_modes_by_hand() -> None:
    means = [[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]
    samples = [[0, 0], [0.1, 0], [0, 0.29], [10, 0.2], [5, 5], [0, 10.4]]
    found = mode_coverage(samples, means, 0.1)
    assert (found.hq_share, found.num_found) == (4 / 6, 2)
    assert found.shares == pytest.approx((3 / 4, 1 / 4, 0))
    assert found.smallest_share == 0
    wider = mode_coverage(samples, means, [0.1, 0.1, 0.2])
    assert (wider.hq_share, wider.num_found) == (5 / 6, 3)
    assert wider.smallest_share == pytest.approx(3 / 5)
    assert mode_coverage(samples, means, [0.1, 0.1, 0.2], found_from=0.7).num_found == 1
    weighted = mode_coverage(samples, means, [0.1, 0.1, 0.2], weights=[3, 1, 1])
    assert weighted.smallest_share == pytest.approx(1)
    assert mode_coverage(samples, means, 0.1, within=4.1).hq_share == 5 / 6
    nowhere = mode_coverage([[5.0, 5.0]], means, 0.1, found_from=0)
    assert nowhere == (0, 0, (0, 0, 0), 0)


@pytest.mark.parametrize(("d", "within", "chance"), [(2, 3.0, 0.989), (3, 3.0, 0.971), (2, 3.2, 0.994)])
def test_hq_share_of_the_mixture_itself(d: int, within: float, chance: float) -> None:
    rng, means = np.random.default_rng(12), 100.0 * np.array([[0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0]])[:, :d]
    samples = means[rng.integers(0, 4, 20_000)] + 0.5 * rng.standard_normal((20_000, d))
    coverage = mode_coverage(samples, means, 0.5, within=within)
    assert stats.chi2(d).cdf(within**2) == pytest.approx(chance, abs=5e-4)
    assert coverage.hq_share == pytest.approx(chance, abs=0.004)
    assert coverage.num_found == 4
    assert coverage.smallest_share > 0.95


def test_modes_refuse() -> None:
    means = [[0.0, 0.0], [1.0, 0.0]]
    with pytest.raises(InputError, match="Samples have 3 numbers, the modes' means 2"):
        mode_coverage([[0.0, 0.0, 0.0]], means, 1)
    for sd in (0.0, -1.0, math.nan, [1.0, 1.0, 1.0]):
        with pytest.raises(InputError, match="sd must be one number above 0, or one for each of the 2 modes"):
            mode_coverage([[0.0, 0.0]], means, sd)
    with pytest.raises(InputError, match="There must be 2 weights above 0"):
        mode_coverage([[0.0, 0.0]], means, 1, weights=[1.0, 0.0])
    with pytest.raises(InputError, match="The weights must be a list of numbers"):
        mode_coverage([[0.0, 0.0]], means, 1, weights=means)


def test_class_shares_by_hand() -> None:
    scores = np.array([[2.0, 1.0, 0.0]] * 3 + [[0.0, 5.0, 1.0]])
    shares = class_shares(scores, lambda rows: rows)
    assert shares == ((0.75, 0.25, 0), 0)
    expected = class_shares(scores, lambda rows: rows[:, :2], expected=[1, 1])
    assert expected == ((0.75, 0.25), 0.5)
    assert class_shares(scores, lambda rows: rows[:, :2], expected=[3, 1]).smallest_share == 1
    with pytest.raises(InputError, match="There must be 3 weights"):
        class_shares(scores, lambda rows: rows, expected=[1, 1])
