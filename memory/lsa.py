"""Latent semantic analysis in numpy: words and pairs of words as directions in a space of few dimensions.

The matrix of texts by features, tf / (tf + 1.2) * idf with rows of length 1, is factored by a randomised singular
value decomposition; a feature's vector is its row among the right singular vectors, so that words of the same texts
point the same way. Source: Deerwester et al. 1990; Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from workbench.memory.tokenizers import get_tokenizer

TOKENIZER = "stem/1"
_TF_HALF = 1.2  # the second occurrence of a feature in a text adds less than the first
_POWER_ITERATIONS = 2
_EXTRA_COLUMNS = 16
_POSTINGS_AT_ONCE = 4_096  # with 256 dimensions 4 MB of vectors
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Counts(NamedTuple):
    """Features of a batch of texts: one entry for each text (row) and distinct feature, sorted by row."""

    row: NDArray[np.int64]
    feature: NDArray[np.uint64]
    weight: NDArray[np.float32]  # tf / (tf + 1.2)
    is_pair: NDArray[np.bool_]


class Features(NamedTuple):
    """What is known of some features, sorted by feature (uint64); idf and vectors float32."""

    feature: NDArray
    idf: NDArray
    vector: NDArray


def count_features(texts: Sequence[str], pairs: bool) -> Counts:
    """Words of the texts (stems, without stop words), and with `pairs` also adjacent words as one feature."""
    hashes = get_tokenizer(TOKENIZER).hashes
    terms = [np.array(hashes(text), np.uint64) for text in texts]
    feature = np.concatenate(terms) if terms else np.empty(0, np.uint64)
    row = np.repeat(np.arange(len(texts)), [len(each) for each in terms])
    is_pair = np.zeros(len(feature), bool)
    if pairs:
        adjacent = row[1:] == row[:-1]
        pair = (feature[:-1] * _GOLDEN + feature[1:])[adjacent]
        feature, row = np.concatenate([feature, pair]), np.concatenate([row, row[1:][adjacent]])
        is_pair = np.concatenate([is_pair, np.ones(len(pair), bool)])
    order = np.lexsort((feature, row))
    feature, row, is_pair = feature[order], row[order], is_pair[order]
    is_start = np.ones(len(feature), bool)
    is_start[1:] = (feature[1:] != feature[:-1]) | (row[1:] != row[:-1])
    starts = np.flatnonzero(is_start)
    tf = np.diff(np.append(starts, len(feature))).astype(np.float32)
    weight = (tf / (tf + _TF_HALF)).astype(np.float32)
    return Counts(row[starts], feature[starts], weight, is_pair[starts])


def learn_features(texts: Sequence[str], dim: int, max_features: int) -> Features:
    """The most frequent words and pairs of words (pairs that two texts have), with their idf and vectors.

    Args: dim: of the vectors; where the texts span fewer dimensions, the rest is 0.
    """
    counts = count_features(texts, pairs=True)
    feature, inverse, df = np.unique(counts.feature, return_inverse=True, return_counts=True)
    is_pair = np.zeros(len(feature), bool)
    is_pair[inverse] = counts.is_pair
    kept = np.flatnonzero(~is_pair | (df > 1))
    kept = np.sort(kept[np.argsort(-df[kept], kind="stable")[:max_features]])
    number = np.full(len(feature), -1)
    number[kept] = np.arange(len(kept))
    column = number[inverse]
    use = column >= 0
    row, column = counts.row[use], column[use]
    idf = np.log1p(len(texts) / df[kept]).astype(np.float32)
    weight = counts.weight[use] * idf[column]
    length = np.sqrt(np.bincount(row, weight**2, len(texts)))
    weight = (weight / np.where(length > 0, length, 1)[row]).astype(np.float32)
    vectors = _right_singular_vectors(row, column, weight, (len(texts), len(kept)), dim)
    return Features(feature[kept], idf, vectors)


def random_vectors(features: NDArray[np.uint64], dim: int) -> NDArray[np.float32]:
    """A vector of length 1 for each feature, its signs drawn by SplitMix64 from the feature: the same everywhere."""
    state = features[:, None] + np.arange(1, -(-dim // 64) + 1, dtype=np.uint64) * _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    bits = np.unpackbits(state.astype("<u8").view(np.uint8), axis=1)[:, :dim]
    return (bits.astype(np.float32) * 2 - 1) / np.float32(np.sqrt(dim))


def sum_rows(
    vectors: NDArray[np.float32], at: NDArray[np.int64], weight: NDArray[np.float32], bounds: NDArray[np.int64]
) -> NDArray[np.float32]:
    """For each i the weighted sum of vectors[at[bounds[i] : bounds[i + 1]]]: a sparse (CSR) times a dense matrix."""
    out = np.zeros((len(bounds) - 1, vectors.shape[1]), np.float32)
    start = 0
    while start < len(out):
        stop = max(int(np.searchsorted(bounds, bounds[start] + _POSTINGS_AT_ONCE, side="right")) - 1, start + 1)
        part = slice(int(bounds[start]), int(bounds[stop]))
        if part.stop > part.start:
            filled = start + np.flatnonzero(np.diff(bounds[start : stop + 1]))
            some = vectors[at[part]] * weight[part, None]
            out[filled] = np.add.reduceat(some, bounds[filled] - part.start, axis=0)
        start = stop
    return out


def _right_singular_vectors(
    row: NDArray, column: NDArray, weight: NDArray[np.float32], shape: tuple[int, int], dim: int
) -> NDArray[np.float32]:
    # Of the sparse matrix with these entries, sorted by row. Orthogonalised on the side of the texts, the shorter one.
    vectors = np.zeros((shape[1], dim), np.float32)
    size = min(dim + _EXTRA_COLUMNS, *shape)
    if not size:
        return vectors
    by_column = np.argsort(column, kind="stable")
    row_bounds = np.searchsorted(row, np.arange(shape[0] + 1))
    column_bounds = np.searchsorted(column[by_column], np.arange(shape[1] + 1))
    back = random_vectors(np.arange(shape[1], dtype=np.uint64), size)
    for _ in range(_POWER_ITERATIONS):
        basis = np.linalg.qr(sum_rows(back, column, weight, row_bounds))[0]
        back = sum_rows(basis, row[by_column], weight[by_column], column_bounds)
    # back = matrix.T @ basis; its left singular vectors, by way of the small matrix back.T @ back.
    squares, rotation = np.linalg.eigh((back.T @ back).astype(np.float64))
    order = np.argsort(-squares, kind="stable")[:dim]
    order = order[squares[order] > 1e-6 * squares.max()]
    vectors[:, : len(order)] = back @ (rotation[:, order] / np.sqrt(squares[order])).astype(np.float32)
    return vectors
