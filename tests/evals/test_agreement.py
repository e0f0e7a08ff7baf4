"""Agreement between raters against statsmodels and Krippendorff's published example."""

from __future__ import annotations

import math

import numpy as np
import pytest

from workbench.errors import InputError
from workbench.evals.agreement import Level, cohens_kappa, krippendorff_alpha, raw_agreement

# Krippendorff, "Computing Krippendorff's Alpha-Reliability", section C: 4 observers, 12 units, 0 = no value.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
    [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
]
PUBLISHED = [[v or None for v in row] for row in OBSERVERS]


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_equals_the_published_example(level: Level, alpha: float) -> None:
    assert krippendorff_alpha(PUBLISHED, level) == pytest.approx(alpha, abs=5e-4)


@pytest.mark.parametrize("seed", range(5))
def test_kappa_equals_statsmodels(seed: int) -> None:
    inter_rater = pytest.importorskip("statsmodels.stats.inter_rater", reason="statsmodels is the reference")
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 3, 60)
    b = np.where(rng.random(60) < 0.6, a, rng.integers(0, 3, 60))
    table = np.zeros((3, 3))
    np.add.at(table, (a, b), 1)
    assert cohens_kappa(a.tolist(), b.tolist()) == pytest.approx(inter_rater.cohens_kappa(table).kappa)
    assert raw_agreement(a.tolist(), b.tolist()) == pytest.approx(np.mean(a == b))


def test_two_judges_who_always_say_yes_agree_by_chance_only() -> None:
    """Raw agreement alone hides that a judge cannot tell anything apart."""
    yes = [1.0] * 95 + [0.0] * 5
    other = [0.0] * 5 + [1.0] * 95
    assert raw_agreement(yes, other) == 0.9
    assert cohens_kappa(yes, other) < 0
    assert krippendorff_alpha([yes, other]) < 0
    assert math.isnan(cohens_kappa(["yes"] * 3, ["yes"] * 3))
    assert math.isnan(krippendorff_alpha([[1, 1], [1, 1]]))


def test_perfect_agreement_and_gaps() -> None:
    ratings = [[0, 1, 2, None, 1], [0, 1, 2, 2, None]]
    for level in ("nominal", "ordinal", "interval"):
        assert krippendorff_alpha(ratings, level) == 1
    assert cohens_kappa(*ratings) == raw_agreement(*ratings) == 1


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="2 and 1 ratings"):
        raw_agreement([1, 2], [1])
    with pytest.raises(InputError, match="no item"):
        cohens_kappa([1, None], [None, 1])
    with pytest.raises(InputError, match="same items"):
        krippendorff_alpha([[1, 2], [1]])
    with pytest.raises(InputError, match="no item"):
        krippendorff_alpha([[1, None], [None, 2]])
