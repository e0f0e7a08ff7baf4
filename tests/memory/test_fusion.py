"""Fusion rules against values worked out by hand from their definitions (card 001 for the last two)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.memory import fusion
from workbench.memory.fusion import Arm


def arm(scores: dict[int, float]) -> Arm:
    return np.array(list(scores), np.int64), np.array(list(scores.values()), np.float64)


def check(found: Arm, wanted: dict[int, float]) -> None:
    assert found[0].tolist() == list(wanted)
    np.testing.assert_allclose(found[1], list(wanted.values()), atol=1e-12)


def test_top_orders_equal_scores_by_doc_and_cuts_among_them() -> None:
    docs, scores = np.array([9, 3, 5, 7, 1]), np.array([2.0, 1.0, 2.0, 1.0, 1.0])
    assert fusion.top(docs, scores)[0].tolist() == [5, 9, 1, 3, 7]
    for n in range(7):
        assert fusion.top(docs, scores, n)[0].tolist() == [5, 9, 1, 3, 7][:n]
    assert fusion.top(docs[:0], scores[:0], 3)[0].tolist() == []


@given(st.lists(st.integers(0, 4), max_size=40), st.integers(0, 45))
def test_top_n_is_the_head_of_the_whole_order(values: list[int], n: int) -> None:
    docs = np.random.default_rng(len(values)).permutation(len(values))
    scores = np.array(values, np.float64)
    assert fusion.top(docs, scores, n)[0].tolist() == fusion.top(docs, scores)[0].tolist()[:n]
    assert fusion.top(docs, scores)[0].tolist() == [d for _, d in sorted(zip(-scores, docs, strict=True))]


def test_reciprocal_rank_by_hand() -> None:
    keyword, vector = arm({1: 9.0, 2: 5.0, 3: 1.0}), arm({3: 0.9, 1: 0.8})
    check(
        fusion.reciprocal_rank([keyword, vector], k=60),
        {1: 1 / 61 + 1 / 62, 3: 1 / 63 + 1 / 61, 2: 1 / 62},
    )
    check(
        fusion.reciprocal_rank([keyword, vector], k=10, weights=[1.0, 3.0]),
        {3: 1 / 13 + 3 / 11, 1: 1 / 11 + 3 / 12, 2: 1 / 12},
    )


def test_p95_normalisation_and_its_branch_for_short_lists() -> None:
    nine = np.arange(1.0, 10.0)
    np.testing.assert_allclose(fusion.normalise_p95(nine), nine / 9)
    # Of 0 … 100 the 95th percentile is 95: what is above is capped at 1.
    long = np.arange(101.0)
    np.testing.assert_allclose(fusion.normalise_p95(long), np.minimum(long / 95, 1))
    np.testing.assert_allclose(fusion.normalise_p95(np.array([-2.0, -1.0])), [-2.0, -1.0])
    np.testing.assert_allclose(fusion.normalise_p95(np.zeros(12)), np.zeros(12))


def test_comb_mnz_by_hand() -> None:
    found = fusion.comb_mnz([arm({1: 4.0, 2: 2.0}), arm({2: 10.0, 3: 5.0})])
    # 1: 1 × 1; 2: (0.5 + 1) × 2; 3: 0.5 × 1
    check(found, {2: 3.0, 1: 1.0, 3: 0.5})


def test_comb_sum_by_hand() -> None:
    keyword, vector = arm({1: 4.0, 2: 3.0, 3: 2.0}), arm({2: 0.5, 4: 0.1})
    check(fusion.comb_sum([keyword, vector]), {2: 1.5, 1: 1.0, 3: 0.0, 4: 0.0})
    check(fusion.comb_sum([keyword, vector], weights=[0.5, 2.0]), {2: 2.25, 1: 0.5, 3: 0.0, 4: 0.0})
    check(fusion.comb_sum([arm({7: -3.0, 8: -3.0})]), {7: 1.0, 8: 1.0})


def test_card_rule_within_a_layer_on_three_records() -> None:
    # keyword / 8, vector / 0.8; 0.6 and 0.4; × 1.2 for record 2, which is in both.
    found = fusion.within_layer(arm({1: 8.0, 2: 4.0}), arm({2: 0.8, 3: 0.4}))
    check(found, {2: (0.6 * 0.5 + 0.4) * 1.2, 1: 0.6, 3: 0.2})


def test_card_rule_across_layers_on_three_records() -> None:
    distilled, verbatim = arm({1: 0.9, 2: 0.5}), arm({2: 1.0, 3: 0.8})
    # 2: (0.25 + 0.5) × 1.2 = 0.9 is the best of the intersection, and all are divided by it.
    check(fusion.across_layers(distilled, verbatim), {2: 1.0, 1: 0.45 / 0.9, 3: 0.4 / 0.9})
    check(fusion.across_layers(arm({1: 0.9}), arm({3: 0.8})), {1: 0.45, 3: 0.4})


RULES = [
    fusion.reciprocal_rank, fusion.comb_mnz, fusion.comb_sum, lambda arms: fusion.within_layer(*arms),
    lambda arms: fusion.across_layers(*arms),
]  # fmt: skip
SCORED = st.dictionaries(st.integers(0, 30), st.floats(0, 1e3), max_size=20)


@pytest.mark.parametrize("rule", RULES)
@given(left=SCORED, right=SCORED, seed=st.integers(0, 9))
def test_every_rule_keeps_all_documents_and_does_not_depend_on_order(rule, left, right, seed: int) -> None:
    arms = [arm(left), arm(right)]
    found = rule(arms)
    assert sorted(found[0].tolist()) == sorted(left.keys() | right.keys())
    assert np.all(np.diff(found[1]) <= 0)
    shuffle = [np.random.default_rng(seed).permutation(len(docs)) for docs, _ in arms]
    again = rule([(docs[order], scores[order]) for (docs, scores), order in zip(arms, shuffle, strict=True)])
    assert again[0].tolist() == found[0].tolist()
    np.testing.assert_array_equal(again[1], found[1])
