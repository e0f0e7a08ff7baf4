"""Agreement, similarity of features and risk-coverage of a student: hand-made cases and invariances."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.evals.student_quality import linear_cka, risk_coverage, top1_agreement


def test_agreement_by_hand() -> None:
    teacher = [[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    student = [[0.4, 0.3, 0.3], [0.4, 0.3, 0.3], [0.1, 0.2, 0.7], [0.5, 0.2, 0.3]]
    assert top1_agreement(student, teacher) == 0.75
    assert top1_agreement(teacher, teacher) == 1
    with pytest.raises(InputError, match=r"not \(4, 3\) and \(3, 3\)"):
        top1_agreement(student, teacher[:3])
    with pytest.raises(InputError, match="2 classes or more"):
        top1_agreement([1.0, 2.0], [1.0, 2.0])


def by_gram_matrices(a: np.ndarray, b: np.ndarray) -> float:
    """Linear CKA in its other form: HSIC of the centred Gram matrices [N, N]."""
    centre = np.eye(len(a)) - 1 / len(a)
    k, m = (centre @ rows @ rows.T @ centre for rows in (a, b))
    return float((k * m).sum() / math.sqrt((k * k).sum() * (m * m).sum()))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), d=st.integers(1, 6), e=st.integers(1, 6), scale=st.floats(1e-6, 1e6))
def test_linear_cka(seed: int, d: int, e: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((12, d)), rng.standard_normal((12, e))
    value = linear_cka(a, b)
    assert 0 <= value <= 1 + 1e-12
    assert value == pytest.approx(by_gram_matrices(a, b))
    assert linear_cka(b, a) == pytest.approx(value)
    turn, _ = np.linalg.qr(rng.standard_normal((d, d)))
    assert linear_cka(a @ turn * scale + 3 * scale, b) == pytest.approx(value)
    assert linear_cka(a, -2 * (a @ turn) + 1) == pytest.approx(1)


def test_linear_cka_by_hand_and_of_strangers() -> None:
    assert linear_cka([1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]) == 0
    # columns u and v of equal length at a right angle against u alone: 1 / sqrt(2)
    u, v = [1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]
    assert linear_cka(np.array([u, v]).T, u) == pytest.approx(1 / math.sqrt(2))
    rng = np.random.default_rng(0)
    assert linear_cka(rng.standard_normal((2000, 4)), rng.standard_normal((2000, 4))) < 0.02
    assert linear_cka(rng.standard_normal((8, 400)), rng.standard_normal((8, 400))) > 0.8  # biased: few inputs


def test_linear_cka_refuses() -> None:
    with pytest.raises(InputError, match="3 and 4 rows"):
        linear_cka(np.eye(3), np.eye(4))
    with pytest.raises(InputError, match="second features are the same for all 3 inputs"):
        linear_cka(np.eye(3), np.full((3, 2), 0.1))
    with pytest.raises(InputError, match="has 1 samples; this needs 2"):
        linear_cka([[1.0, 2.0]], [[1.0, 2.0]])


def test_risk_coverage_by_hand() -> None:
    # By falling confidence: right, wrong, right, right, wrong.
    curve = risk_coverage([0.6, 0.9, 0.8, 0.5, 0.7], [1, 1, 0, 0, 1])
    assert curve.risks == pytest.approx([0, 1 / 2, 1 / 3, 1 / 4, 2 / 5])
    assert curve.aurc == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 2 / 5) / 5)
    assert curve.excess == pytest.approx(curve.aurc - (1 / 4 + 2 / 5) / 5)
    best = risk_coverage([5, 4, 3, 2, 1], [1, 1, 1, 0, 0])
    assert (best.aurc, best.excess) == pytest.approx(((1 / 4 + 2 / 5) / 5, 0))
    worst = risk_coverage([5, 4, 3, 2, 1], [0, 0, 1, 1, 1])
    assert worst.aurc == pytest.approx((1 + 1 + 2 / 3 + 2 / 4 + 2 / 5) / 5)
    assert risk_coverage([0.3], [1]).aurc == 0
    assert risk_coverage([0.3, 0.2], [0, 0]).aurc == 1


def test_ties_count_as_the_mean_over_their_orders() -> None:
    tied, right = [0.9, 0.5, 0.5, 0.5, 0.1], [0, 1, 0, 1, 0]
    orders = [
        risk_coverage([0.9, *(0.5 + 0.01 * place for place in order), 0.1], right)
        for order in itertools.permutations(range(3))
    ]
    mean = np.mean([curve.aurc for curve in orders])
    assert risk_coverage(tied, right).aurc == pytest.approx(mean)
    assert len({curve.aurc for curve in orders}) > 1


@settings(max_examples=40, deadline=None)
@given(answers=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), min_size=1, max_size=30), seed=st.integers())
def test_risk_coverage_depends_on_ranks_only(answers: list[tuple[int, int]], seed: int) -> None:
    confidence, right = (np.array(column) for column in zip(*answers, strict=True))
    curve = risk_coverage(confidence, right)
    assert curve.risks[-1] == pytest.approx(1 - right.mean())
    assert -1e-12 <= curve.excess <= curve.aurc <= 1
    order = np.random.default_rng(abs(seed)).permutation(len(right))
    assert risk_coverage(np.exp(confidence)[order], right[order]).risks == pytest.approx(curve.risks)


def test_risk_coverage_refuses() -> None:
    with pytest.raises(InputError, match="2 confidences need as many answers that are 0 or 1, not 1"):
        risk_coverage([0.5, 0.6], [1])
    with pytest.raises(InputError, match="0 or 1"):
        risk_coverage([0.5, 0.6], [1, 0.5])
    with pytest.raises(InputError, match="1 of 2 rows are not finite, the first is row 1"):
        risk_coverage([0.5, math.nan], [1, 0])
    with pytest.raises(InputError, match="list of numbers, not 2 numbers for each"):
        risk_coverage([[0.5, 0.5]], [1])
