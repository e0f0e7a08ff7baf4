"""Ranking metrics against ir-measures (pytrec_eval) and by hand; the conventions in which libraries differ."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.evals.metrics import Evaluation, evaluate, paired, parse_metric, rank, score_query

Scores = dict[str, dict[str, float]]
Grades = dict[str, dict[str, int]]

ALL = (
    "recall@3", "recall@10", "hit@1", "hit@10", "full_coverage@5", "precision@5", "r_precision", "mrr", "mrr@10", "ap",
    "ap@10", "ap_mink@5", "ndcg", "ndcg@10", "ndcg_exp@10", "ndcg_exp", "ndcg_jk@5",
)  # fmt: skip


def random_run(seed: int, *, tied: bool, num_queries: int = 40) -> tuple[Scores, Grades]:
    """Runs over documents 000…059, some lists empty, some short, some queries all relevant."""
    rng = random.Random(seed)
    docs = [f"{i:03d}" for i in range(60)]
    run: Scores = {}
    judgements: Grades = {}
    for q in range(num_queries):
        judged = rng.sample(docs, rng.randint(1, 12))
        judgements[f"q{q}"] = {d: rng.randint(0, 3) for d in judged} | {judged[0]: rng.randint(1, 3)}
        found = rng.sample(docs, rng.choice([0, 1, 4, 12, 30]))
        run[f"q{q}"] = {
            d: float(rng.randint(0, 4)) if tied else score
            for d, score in zip(found, rng.sample(range(1000), len(found)), strict=True)
        }
    return run, judgements


def mirrored(doc: str) -> str:
    """trec_eval breaks ties by descending id; under these names that is our ascending order."""
    return f"{999 - int(doc):03d}"


def by_ir_measures(run: Scores, judgements: Grades, relevant_from: int) -> dict[str, dict[str, float]]:
    im = pytest.importorskip("ir_measures", reason="ir-measures is the reference (pip install ir-measures)")
    r = relevant_from
    exp = {1: 1, 2: 3, 3: 7}
    measures: dict[Any, str] = {
        im.R(rel=r) @ 3: "recall@3", im.R(rel=r) @ 10: "recall@10", im.Success(rel=r) @ 1: "hit@1",
        im.Success(rel=r) @ 10: "hit@10", im.P(rel=r) @ 5: "precision@5", im.Rprec(rel=r): "r_precision",
        im.RR(rel=r): "mrr", im.AP(rel=r): "ap", im.AP(rel=r) @ 10: "ap@10", im.nDCG: "ndcg", im.nDCG @ 10: "ndcg@10",
        im.nDCG(gains=exp) @ 10: "ndcg_exp@10", im.nDCG(gains=exp): "ndcg_exp",
    }  # fmt: skip
    qrels = [im.Qrel(q, mirrored(d), grade) for q, grades in judgements.items() for d, grade in grades.items()]
    scored = [im.ScoredDoc(q, mirrored(d), s) for q, found in run.items() for d, s in found.items()]
    values: dict[str, dict[str, float]] = {q: {} for q in judgements}
    for metric in im.pytrec_eval.iter_calc(list(measures), qrels, scored):
        values[metric.query_id][measures[metric.measure]] = metric.value
    return values


def as_lists(run: Scores) -> dict[str, list[tuple[str, float]]]:
    return {q: list(found.items()) for q, found in run.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("relevant_from", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_equals_ir_measures(seed: int, relevant_from: int, tied: bool) -> None:
    run, judgements = random_run(seed, tied=tied)
    ours = evaluate(as_lists(run), judgements, ALL, relevant_from=relevant_from)
    reference = by_ir_measures(run, judgements, relevant_from)
    assert ours.num_empty > 0
    assert (ours.num_tied > 0) == tied
    for at, query in enumerate(ours.query_ids):
        if not run[query]:
            assert all(values[at] == 0 for values in ours.values.values())
            continue
        assert len(reference[query]) == 13
        for key, value in reference[query].items():
            assert ours.values[key][at] == pytest.approx(value, abs=1e-9), (query, key)


def test_mrr_at_k_equals_ir_measures_msmarco_which_breaks_ties_by_ascending_id() -> None:
    im = pytest.importorskip("ir_measures", reason="ir-measures is the reference (pip install ir-measures)")
    run, judgements = random_run(9, tied=True)
    qrels = [im.Qrel(q, d, grade) for q, grades in judgements.items() for d, grade in grades.items()]
    scored = [im.ScoredDoc(q, d, s) for q, found in run.items() for d, s in found.items()]
    reference = {m.query_id: m.value for m in im.msmarco.iter_calc([im.RR @ 10], qrels, scored)}
    ours = evaluate(as_lists(run), judgements, ["mrr@10"])
    assert dict(zip(ours.query_ids, ours.values["mrr@10"], strict=True)) == pytest.approx(
        {q: reference.get(q, 0.0) for q in ours.query_ids}
    )


@pytest.mark.slow
def test_equals_ranx() -> None:
    ranx = pytest.importorskip("ranx", reason="ranx is not installed (it brings numba)", exc_type=ImportError)
    run, judgements = random_run(3, tied=False)
    run = {q: found or {"none": 0.0} for q, found in run.items()}
    keys = {
        "ndcg@10": "ndcg@10", "ndcg_exp@10": "ndcg_burges@10", "mrr": "mrr", "recall@10": "recall@10",
        "precision@5": "precision@5", "ap@10": "map@10", "hit@10": "hit_rate@10", "r_precision": "r-precision",
    }  # fmt: skip
    positive = {q: {d: g for d, g in grades.items() if g} for q, grades in judgements.items()}
    theirs = ranx.evaluate(ranx.Qrels(positive), ranx.Run(run), list(keys.values()), make_comparable=True)
    ours = evaluate(as_lists(run), judgements, list(keys)).means()
    assert ours == pytest.approx({key: theirs[name] for key, name in keys.items()}, abs=1e-9)


def brute(ordered: list[str], grades: Mapping[str, float], key: str) -> float:
    """The definitions once more, in the plainest words."""
    name, _, at = key.partition("@")
    relevant = {d for d, g in grades.items() if g >= 1}
    cut = ordered[: int(at)] if at else ordered
    if name == "full_coverage":
        return float(relevant <= set(cut))
    if name == "ap_mink":
        total = sum(len(relevant & set(cut[: i + 1])) / (i + 1) for i, d in enumerate(cut) if d in relevant)
        return total / min(int(at), len(relevant))
    assert name == "ndcg_jk"

    def dcg(gains: list[float]) -> float:
        return sum(g if i == 0 else g / math.log2(i + 1) for i, g in enumerate(gains[: int(at)]))

    return dcg([grades.get(d, 0) for d in cut]) / dcg(sorted(grades.values(), reverse=True))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_variants_without_a_reference_equal_their_definitions(data: st.DataObject) -> None:
    docs = [f"d{i}" for i in range(8)]
    grades = {d: data.draw(st.integers(0, 3)) for d in docs[:5]} | {"d0": 1}
    found = data.draw(st.lists(st.sampled_from(docs), unique=True))
    results = [(d, -i) for i, d in enumerate(found)]
    k = data.draw(st.integers(1, 9))
    for name in ("full_coverage", "ap_mink", "ndcg_jk"):
        key = f"{name}@{k}"
        assert score_query(results, grades, [key])[key] == pytest.approx(brute(found, grades, key))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=12).filter(any),
    st.integers(0, 10),
    st.randoms(use_true_random=False),
)
def test_bounds_order_of_input_and_moving_a_relevant_document_up(
    grades: list[int], at: int, rng: random.Random
) -> None:
    judged = {f"d{i}": g for i, g in enumerate(grades)} | {"d0": max(1, grades[0])}
    docs = sorted(judged)
    rng.shuffle(docs)
    results = [(d, float(len(docs) - i)) for i, d in enumerate(docs)]
    before = score_query(results, judged, ALL)
    assert all(0 <= value <= 1 + 1e-12 for value in before.values())
    assert score_query(rng.sample(results, len(results)), judged, ALL) == before
    at = at % (len(docs) - 1)
    upper, lower = docs[at], docs[at + 1]
    if judged[lower] >= judged[upper]:
        swapped = [(d, s) for d, s in results if d not in (upper, lower)]
        swapped += [(lower, results[at][1]), (upper, results[at + 1][1])]
        after = score_query(swapped, judged, ALL)
        # precision-like metrics are over a set, the others reward the earlier rank: none may fall.
        assert all(after[key] >= before[key] - 1e-12 for key in ALL)


def test_the_ideal_run_scores_one_and_graded_gains_are_those_of_the_card() -> None:
    grades = {"a": 3, "b": 1, "c": 0, "d": 1}
    best = [("a", 3.0), ("b", 2.0), ("d", 1.0)]
    assert set(score_query(best, grades, ["ndcg", "ndcg_exp", "ndcg_jk", "ap", "mrr", "r_precision"]).values()) == {1.0}
    values = score_query([("c", 9.0), ("b", 8.0), ("a", 7.0)], grades, ["ndcg@3", "ndcg_exp@3", "ndcg_jk@3"])
    log3 = math.log2(3)
    assert values["ndcg@3"] == pytest.approx((1 / log3 + 3 / 2) / (3 + 1 / log3 + 1 / 2))
    assert values["ndcg_exp@3"] == pytest.approx((1 / log3 + 7 / 2) / (7 + 1 / log3 + 1 / 2))
    assert values["ndcg_jk@3"] == pytest.approx((1 + 3 / log3) / (3 + 1 + 1 / log3))


def test_card_001_mrr_of_ranks_1_2_and_never_is_one_half() -> None:
    run = {"p": [("a", 2.0)], "q": [("x", 2.0), ("a", 1.0)], "r": [("x", 1.0)]}
    assert evaluate(run, {q: {"a": 1} for q in "pqr"}, ["mrr"]).means()["mrr"] == 0.5


def test_card_152_full_coverage_is_0_when_one_of_three_is_at_rank_11() -> None:
    results = [(f"d{i:02d}", -float(i)) for i in range(1, 12)]
    grades = {"d01": 1, "d02": 1, "d11": 1}
    values = score_query(results, grades, ["full_coverage@10", "full_coverage@11", "recall@10"])
    assert values == {"full_coverage@10": 0.0, "full_coverage@11": 1.0, "recall@10": 2 / 3}


def test_one_tie_order_for_all_metrics() -> None:
    """Silent failure P3: libraries break ties differently, even between two metrics of one library."""
    tied = [("b", 1.0), ("c", 1.0), ("a", 1.0), ("z", 2.0)]
    expected = [("z", 2.0), ("a", 1.0), ("b", 1.0), ("c", 1.0)]
    assert all(rank(order) == expected for order in itertools.permutations(tied))
    values = evaluate({"q": tied}, {"q": {"b": 1}}, ["mrr", "ndcg", "ap", "recall@2", "precision@3", "hit@3"])
    assert values.means() == pytest.approx(
        {"mrr": 1 / 3, "ndcg": 0.5, "ap": 1 / 3, "recall@2": 0.0, "precision@3": 1 / 3, "hit@3": 1.0}
    )
    assert values.num_tied == 1
    assert evaluate({"q": [("b", 1.0), ("x", 0.5), ("y", 0.5)]}, {"q": {"b": 1}}).num_tied == 0


def test_conventions_are_told_apart_by_their_keys() -> None:
    """Silent failure P4: the same word for different numbers."""
    grades = {"a": 1, "b": 3, "c": 1, "d": 1}
    results = [("a", 4.0), ("x", 3.0), ("b", 2.0)]
    keys = ["ndcg@3", "ndcg_exp@3", "ndcg_jk@3", "ap@3", "ap_mink@3"]
    assert len(set(score_query(results, grades, keys).values())) == len(keys)
    assert score_query(results, grades, ["ap@3", "ap_mink@3"]) == pytest.approx(
        {"ap@3": (1 + 2 / 3) / 4, "ap_mink@3": (1 + 2 / 3) / 3}
    )


def test_empty_and_judged_empty_queries_are_counted_and_absent_ones_refused() -> None:
    """Silent failure P4: queries without results and queries without relevant documents."""
    judgements = {"found": {"a": 1}, "nothing": {"a": 1}, "no answer": {"a": 0}, "no judgement": {}}
    run = {"found": [("a", 1.0)], "nothing": [], "no answer": [("a", 1.0)], "other": [("a", 1.0)]}
    result = evaluate(run, judgements, ["mrr"])
    assert result.as_json() == {
        "means": {"mrr": 0.5}, "num_queries": 2, "num_empty": 1, "num_tied": 0, "num_judged_empty": 2,
        "num_unjudged": 1,
    }  # fmt: skip
    assert result.means(["found"]) == {"mrr": 1.0}
    del run["nothing"]
    with pytest.raises(InputError, match=r"lacks 1 of 2 judged queries.*'nothing'"):
        evaluate(run, judgements, ["mrr"])


def wrong() -> Iterator[tuple[Any, Any, Any, str]]:
    good = {"a": 1}
    yield [("a", 1.0), ("a", 0.5)], good, ["mrr"], r"'q'.*'a' comes twice"
    yield [("a", math.nan)], good, ["mrr"], r"'a' is not a number"
    yield [("a", 1.0)], {"a": 1, "b": -1}, ["mrr"], r"'b' is -1"
    yield [("a", 1.0)], {"a": 1, "b": math.nan}, ["mrr"], r"'b' is nan"
    yield [("a", 1.0)], {"a": 0}, ["mrr"], r"None of the 1 queries"
    for key in ("ndcg@0", "recall", "r_precision@5", "map@10", "NDCG@10", "ndcg@1.5", "ndcg@-1", ""):
        yield [("a", 1.0)], good, [key], r"Unknown metric.*ndcg_exp\[@k\]"


@pytest.mark.parametrize(("results", "grades", "metrics", "message"), list(wrong()))
def test_mistakes_are_named(results: Any, grades: Any, metrics: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate({"q": results}, {"q": grades}, metrics)


def test_relevant_from_divides_binary_metrics_but_not_gains() -> None:
    grades = {"gold": 3, "near": 1}
    values = score_query([("near", 2.0), ("gold", 1.0)], grades, ["mrr", "recall@1", "ndcg@1"], relevant_from=3)
    assert values == {"mrr": 0.5, "recall@1": 0.0, "ndcg@1": pytest.approx(1 / 3)}
    result = evaluate({"q": [], "r": []}, {"q": grades, "r": {"near": 1}}, ["mrr"], relevant_from=3)
    assert result.query_ids == ("q",)
    with pytest.raises(InputError, match="relevant_from"):
        evaluate({"q": []}, {"q": grades}, ["mrr"], relevant_from=0)


def test_paired_refuses_runs_over_other_queries() -> None:
    def made(*ids: str) -> Evaluation:
        return evaluate({q: [("a", 1.0)] for q in ids}, {q: {"a": 1} for q in ids}, ["mrr"])

    first, second = paired(made("p", "q"), made("q", "p"), "mrr")
    np.testing.assert_array_equal(first, second)
    with pytest.raises(InputError, match=r"differ in 1 queries.*'r'"):
        paired(made("p", "q"), made("p", "q", "r"), "mrr")
    with pytest.raises(InputError, match="no metric 'ap'"):
        paired(made("p"), made("p"), "ap")
    with pytest.raises(InputError, match="No value for query 'x'"):
        made("p").means(["x"])


def test_keys_are_parsed_whole() -> None:
    assert parse_metric("ndcg_exp@10") == ("ndcg_exp", 10)
    assert parse_metric("r_precision") == ("r_precision", None)
