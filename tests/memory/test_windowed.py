"""Vectors read together with their neighbours."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.memory.windowed import windowed


def chain(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours of one thread of so many documents."""
    before = np.concatenate([[count], np.arange(count - 1)])
    return before, np.append(np.arange(1, count), count)


def unit_rows(seed: int, count: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_orthogonal_neighbours_count_the_same() -> None:
    out = windowed(np.eye(3, dtype=np.float32), *chain(3))
    np.testing.assert_allclose(out[1], np.full(3, 3**-0.5), rtol=1e-6)
    np.testing.assert_allclose(out[0], [2**-0.5, 2**-0.5, 0], rtol=1e-6)


def test_weight_counts_once_for_each_neighbour() -> None:
    out = windowed(np.eye(3, dtype=np.float32), *chain(3), weight=0.5)
    np.testing.assert_allclose(out[1], np.array([0.5, 1, 0.5]) / 1.5**0.5, rtol=1e-6)


def test_rows_that_cancel_are_0() -> None:
    vectors = np.array([[1, 0], [-1, 0]], np.float32)
    np.testing.assert_array_equal(windowed(vectors, *chain(2)), np.zeros((2, 2)))


@settings(deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 8))
def test_weight_0_and_no_neighbours_leave_the_vectors(seed: int, count: int) -> None:
    vectors = unit_rows(seed, count)
    alone = np.full(count, count)
    np.testing.assert_allclose(windowed(vectors, *chain(count), weight=0.0), vectors, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(windowed(vectors, alone, alone), vectors, rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 8), weight=st.floats(0, 3))
def test_length_is_1_or_0_and_direction_reverses_with_the_thread(seed: int, count: int, weight: float) -> None:
    vectors = unit_rows(seed, count)
    before, after = chain(count)
    out = windowed(vectors, before, after, weight)
    length = np.linalg.norm(out, axis=1)
    assert np.all((np.abs(length - 1) < 1e-4) | (length == 0))
    np.testing.assert_allclose(windowed(vectors[::-1], before, after, weight), out[::-1], rtol=1e-3, atol=1e-4)
