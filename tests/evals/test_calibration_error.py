"""Calibration error: closed forms, known values under perfect calibration, and parts that add up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.evals.calibration_error import calibration_error


def by_hand(p: list[float], y: list[int], num_bins: int) -> float:
    """ECE with bins of equal width, from its definition."""
    total = 0.0
    for b in range(num_bins):
        inside = [i for i, v in enumerate(p) if b / num_bins < v <= (b + 1) / num_bins or (b == 0 and v == 0)]
        if inside:
            gap = sum(p[i] for i in inside) / len(inside) - sum(y[i] for i in inside) / len(inside)
            total += len(inside) / len(p) * abs(gap)
    return total


def test_closed_forms() -> None:
    sure = calibration_error([1.0] * 10, [1] * 7 + [0] * 3)
    assert sure.ece == pytest.approx(0.3)  # 1 - accuracy
    assert sure.brier == pytest.approx(0.3)
    assert (sure.num, sure.num_clipped, len(sure.bins)) == (10, 3, 1)
    assert sure.nll == pytest.approx(0.3 * -np.log(1e-12))
    assert (sure.ece_if_calibrated, sure.ece_if_calibrated_high) == (0, 0)
    base = calibration_error([0.7] * 10, [1] * 7 + [0] * 3)
    assert base.ece == pytest.approx(0, abs=1e-12)
    assert base.nll == pytest.approx(-(0.7 * np.log(0.7) + 0.3 * np.log(0.3)))
    assert (base.brier, base.uncertainty, base.resolution) == pytest.approx((0.21, 0.21, 0.0))
    assert calibration_error([0.0, 1.0], [0, 1]).nll == pytest.approx(0, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 64).map(lambda k: k / 64), st.integers(0, 1)), min_size=2, max_size=40),
    st.sampled_from([1, 4, 8]),
    st.sampled_from(["width", "mass"]),
)
def test_it_equals_its_definition_and_the_parts_add_up(rows: list[tuple[float, int]], bins: int, binning: str) -> None:
    p, y = [a for a, _ in rows], [b for _, b in rows]
    found = calibration_error(p, y, num_bins=bins, binning=binning)  # type: ignore[arg-type]
    if binning == "width":
        assert found.ece == pytest.approx(by_hand(p, y, bins))
    assert found.ece == pytest.approx(sum(b.num * abs(b.confidence - b.accuracy) for b in found.bins) / len(p))
    parts = found.reliability - found.resolution + found.uncertainty + found.within_bins
    assert parts == pytest.approx(found.brier, abs=1e-12)
    assert sum(b.num for b in found.bins) == found.num == len(rows)
    assert 0 <= found.low <= found.high <= 1


@pytest.mark.parametrize(("num", "expected"), [(50, 0.158), (200, 0.078), (1000, 0.035)])
def test_a_calibrated_model_has_the_ece_of_the_notes_and_is_not_called_badly_calibrated(
    num: int, expected: float
) -> None:
    """Silent failure P14: .158, .078 and .035 with 15 bins for 50, 200 and 1,000 answers."""
    rng = np.random.default_rng(num)
    values, inside = [], 0
    for seed in range(20):
        p = rng.random(num)
        found = calibration_error(p, rng.random(num) < p, seed=seed)
        values.append(found.ece)
        inside += found.ece <= found.ece_if_calibrated_high
        assert found.ece_if_calibrated == pytest.approx(expected, rel=0.2)
    assert np.mean(values) == pytest.approx(expected, rel=0.2)
    assert inside >= 17  # 19 expected


def test_a_badly_calibrated_model_is_seen() -> None:
    rng = np.random.default_rng(1)
    p = 0.5 + rng.random(500) / 2
    found = calibration_error(p, rng.random(500) < p - 0.3)
    assert found.low <= found.ece <= found.high
    assert found.ece == pytest.approx(0.3, abs=0.06)
    assert found.ece > 3 * found.ece_if_calibrated_high


def test_bins_of_equal_mass_hold_equal_numbers_and_keep_equal_confidences_together() -> None:
    rng = np.random.default_rng(2)
    p = rng.random(100) ** 4  # crowded near 0
    mass = calibration_error(p, p > 0.5, num_bins=10, binning="mass")
    assert [b.num for b in mass.bins] == [10] * 10
    width = calibration_error(p, p > 0.5, num_bins=10)
    assert max(b.num for b in width.bins) > 40
    tied = calibration_error([0.9] * 50 + [0.1] * 50, [1] * 45 + [0] * 5 + [0] * 45 + [1] * 5, binning="mass")
    assert [b.num for b in tied.bins] == [50, 50]
    assert tied.ece == pytest.approx(0, abs=1e-12)


def test_the_same_seed_gives_the_same_result_and_no_order_matters() -> None:
    rng = np.random.default_rng(3)
    p = rng.random(60)
    y = (rng.random(60) < p).astype(int)
    assert calibration_error(p, y) == calibration_error(p, y)
    turned = calibration_error(p[::-1], y[::-1])
    once = calibration_error(p, y)
    assert (turned.ece, turned.brier, turned.nll) == pytest.approx((once.ece, once.brier, once.nll))
    assert calibration_error(p, y, seed=1).low != once.low
    assert once.as_json()["bins"][0]["num"] == once.bins[0].num


@pytest.mark.parametrize(
    ("p", "y", "options", "message"),
    [
        ([0.5, 1.5], [0, 1], {}, "confidence number 1 is 1.5"),
        ([0.5, float("nan")], [0, 1], {}, "confidence number 1 is nan"),
        ([0.5, 0.5], [0, 2], {}, "correct number 1 is 2.0"),
        ([0.5], [1], {}, "two or more"),
        ([0.5, 0.5], [1], {}, "as many"),
        (["x", 0.5], [0, 1], {}, "must be numbers"),
        ([0.5, 0.5], [0, 1], {"num_bins": 0}, "num_bins"),
        ([0.5, 0.5], [0, 1], {"binning": "depth"}, "width or mass"),
        ([0.5, 0.5], [0, 1], {"num_resamples": 10}, "num_resamples"),
    ],
)
def test_what_cannot_be_meant_is_refused(p: list[float], y: list[int], options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        calibration_error(p, y, **options)  # type: ignore[arg-type]
