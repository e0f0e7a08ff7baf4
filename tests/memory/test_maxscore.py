"""The n best by MaxScore are those of adding up everything, to the last bit; also where it looks terms up early."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.memory import maxscore
from workbench.memory.fusion import top
from workbench.memory.maxscore import best_documents


class Term:
    """Gains by position, in two pieces, with a made-up price; counts what is done with it."""

    def __init__(self, gains: np.ndarray, bound: float, num_affordable: int, is_in_memory: bool) -> None:
        self.gains, self.bound, self.is_in_memory = gains, bound, is_in_memory
        self.num_affordable = num_affordable
        self.reads = self.looked_up = 0

    def read(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        self.reads += 1
        positions = np.flatnonzero(self.gains)
        for part in (positions[::2], positions[1::2]):
            yield part, self.gains[part]

    def look_up(self, positions: np.ndarray) -> np.ndarray:
        self.looked_up += len(positions)
        return self.gains[positions]


def everything(terms: list[Term], allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores = np.zeros(len(allowed))
    for term in terms:
        scores = scores + term.gains
    at = np.flatnonzero(allowed & (scores > 0))
    return at, scores[at]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_equals_adding_up_everything(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    size, n = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 30))
    steps = data.draw(st.sampled_from([2, 5, 1000]))  # few steps: many equal scores
    terms = []
    for _ in range(data.draw(st.integers(1, 6))):
        share, scale = rng.uniform(0, 1), rng.uniform(0.1, 5)
        gains = np.where(rng.random(size) < share, rng.integers(1, steps + 1, size) / steps * scale, 0)
        bound = max(gains.max() * rng.choice([1, 1, 1.3]), 1e-3)
        terms.append(Term(gains, bound, int(rng.choice([0, 10, 100, 1000])), bool(rng.integers(2))))
    allowed = rng.random(size) < data.draw(st.sampled_from([0.05, 0.5, 1.0]))
    blocked = rng.random(size) < data.draw(st.sampled_from([0.0, 0.2]))
    positions = np.flatnonzero(allowed & ~blocked) if data.draw(st.booleans()) or not allowed.all() else None
    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(maxscore, "_SAMPLED", data.draw(st.sampled_from([1, 3]))))
        patched.enter_context(mock.patch.object(maxscore, "_WATCHED_MIN", data.draw(st.sampled_from([1, 20]))))
        patched.enter_context(mock.patch.object(maxscore, "_WORTH_A_LOOK", data.draw(st.sampled_from([1, 1_000]))))
        patched.enter_context(mock.patch.object(maxscore, "_RANGE", data.draw(st.sampled_from([7, 40, 1_000]))))
        found = best_documents(terms, size, n, allowed=positions, blocked=np.flatnonzero(blocked))
    wanted = top(*everything(terms, allowed & ~blocked), n)
    got = top(*found, n)
    np.testing.assert_array_equal(got[0], wanted[0])
    np.testing.assert_array_equal(got[1], wanted[1])


def test_frequent_terms_are_not_read() -> None:
    rng = np.random.default_rng(0)
    rare, frequent = np.zeros(50_000), rng.random(50_000) * 0.3
    rare[rng.choice(50_000, 300, replace=False)] = rng.uniform(0.5, 1, 300)
    terms = [Term(rare, 1.0, 500, True), Term(frequent, 0.3, 5_000, True)]
    docs, scores = top(*best_documents(terms, 50_000, 10), 10)
    expected = top(np.arange(50_000), rare + frequent, 10)
    np.testing.assert_array_equal(docs, expected[0])
    np.testing.assert_array_equal(scores, expected[1])
    assert terms[1].reads == 0
    assert terms[1].looked_up < 1_000


def test_what_the_first_range_found_spares_the_next_ones_the_frequent_term() -> None:
    rng = np.random.default_rng(2)
    rare, frequent = np.zeros(4_000), np.full(4_000, 0.3)
    rare[rng.choice(4_000, 400, replace=False)] = rng.uniform(0.5, 1, 400)
    terms = [Term(rare, 1.0, 4_000, True), Term(frequent, 0.3, 4_000, True)]
    with mock.patch.object(maxscore, "_RANGE", 1_000), mock.patch.object(maxscore, "_WORTH_A_LOOK", 1):
        docs, scores = top(*best_documents(terms, 4_000, 5), 5)
    expected = top(np.arange(4_000), rare + frequent, 5)
    np.testing.assert_array_equal(docs, expected[0])
    np.testing.assert_array_equal(scores, expected[1])
    assert terms[0].reads == 1
    assert terms[1].reads == 0


def test_few_allowed_documents_are_looked_up_at_once() -> None:
    gains = np.random.default_rng(1).random(10_000)
    terms = [Term(gains, 1.0, 100, False)]
    at, scores = best_documents(terms, 10_000, 2, allowed=np.array([5, 7, 9_000]))
    assert set(at.tolist()) <= {5, 7, 9_000}
    assert scores.max() == gains[[5, 7, 9_000]].max()
    assert (terms[0].reads, terms[0].looked_up) == (0, 3)
