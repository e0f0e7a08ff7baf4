"""Embedding models: a hashed one for the start, one learnt from the store's own text, sentence-transformers on request.

draft docstring"""

from __future__ import annotations

import time
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple, Protocol

import duckdb
import numpy as np
from numpy.typing import NDArray

from workbench.errors import InputError, MissingExtra, NotFound
from workbench.memory.postings import fetch
from workbench.memory.tokenizers import get_tokenizer

HASHED = "hashed/1"
DIM = 256
_TOKENIZER = "stem/1"
_TF_HALF = 1.2  # a feature counts tf / (tf + this): the second occurrence adds less than the first
_MAX_FEATURES = 65_536
_MAX_TRAINING_POSTINGS = 3_000_000
_POWER_ITERATIONS = 3
_EXTRA_COLUMNS = 16
_AT_ONCE = 16_384  # features summed at once: 16 MB of vectors


class Embedder(Protocol):
    """Text to vectors; rows have length 1, or 0 for a text without words. `name` carries the version."""

    name: str
    dim: int

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]: ...


class _Counts(NamedTuple):
    """Features of a batch of texts: one entry per text and distinct feature, sorted by text."""

    row: NDArray[np.int64]
    feature: NDArray[np.uint64]
    tf: NDArray[np.float32]
    is_pair: NDArray[np.bool_]


class _Features(NamedTuple):
    """What a learnt model knows of some features, sorted by feature."""

    feature: NDArray[np.uint64]
    idf: NDArray[np.float32]
    vector: NDArray[np.float32]


class LexicalEmbedder:
    def __init__(self, name: str, dim: int, known: _Features, scale: float, unseen_idf: float) -> None:
        self.name, self.dim = name, dim
        self._known, self._scale, self._unseen_idf = known, scale, unseen_idf

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        counts = _count(texts, pairs=bool(len(self._known.feature)))
        known = self._lookup(np.unique(counts.feature))
        at = np.searchsorted(known.feature, counts.feature)
        at[at == len(known.feature)] = 0
        seen = known.feature[at] == counts.feature if len(known.feature) else np.zeros(len(at), bool)
        keep = seen | ~counts.is_pair
        row, feature, tf, at, seen = counts.row[keep], counts.feature[keep], counts.tf[keep], at[keep], seen[keep]
        unseen, inverse = np.unique(feature[~seen], return_inverse=True)
        at[~seen] = len(known.feature) + inverse
        vectors = np.concatenate([known.vector, self._scale * _random_vectors(unseen, self.dim)])
        idf = np.concatenate([known.idf, np.full(len(unseen), self._unseen_idf, np.float32)])
        bounds = np.searchsorted(row, np.arange(len(texts) + 1))
        return _normalised(_sum_rows(vectors, at, tf / (tf + _TF_HALF) * idf[at], bounds))

    def _lookup(self, features: NDArray[np.uint64]) -> _Features:
        return self._known


def hashed_embedder() -> LexicalEmbedder:
    empty = _Features(np.empty(0, np.uint64), np.empty(0, np.float32), np.empty((0, DIM), np.float32))
    return LexicalEmbedder(HASHED, DIM, empty, 1.0, 1.0)


def learn(texts: Sequence[str], dim: int = DIM, cap: int = _MAX_FEATURES, min_pair: int = 2) -> LexicalEmbedder:
    counts = _count(texts, pairs=True)
    feature, inverse, df = np.unique(counts.feature, return_inverse=True, return_counts=True)
    is_pair = np.zeros(len(feature), bool)
    is_pair[inverse] = counts.is_pair
    kept = np.flatnonzero(~is_pair | (df >= min_pair))
    kept = np.sort(kept[np.argsort(-df[kept], kind="stable")[:cap]])
    number = np.full(len(feature), -1)
    number[kept] = np.arange(len(kept))
    column = number[inverse]
    use = column >= 0
    row, column, tf = counts.row[use], column[use], counts.tf[use]
    idf = np.log((len(texts) + 1) / (df[kept] + 1)).astype(np.float32)
    weight = tf / (tf + _TF_HALF) * idf[column]
    length = np.sqrt(np.bincount(row, weight**2, len(texts)))
    weight = (weight / np.maximum(length, 1e-12)[row]).astype(np.float32)
    vectors = _right_singular_vectors(row, column, weight, (len(texts), len(kept)), dim)
    vectors = vectors.astype(np.float16).astype(np.float32)
    scale = float(np.median(np.linalg.norm(vectors, axis=1)))
    name = "lsa/1:" + blake2b(feature[kept].tobytes() + vectors.tobytes(), digest_size=4).hexdigest()
    return LexicalEmbedder(name, vectors.shape[1], _Features(feature[kept], idf, vectors), scale, float(np.log(len(texts) + 1)))


def _count(texts: Sequence[str], pairs: bool) -> _Counts:
    hashes = get_tokenizer(_TOKENIZER).hashes
    terms = [np.array(hashes(text), np.uint64) for text in texts]
    sizes = np.array([len(each) for each in terms])
    feature = np.concatenate(terms) if terms else np.empty(0, np.uint64)
    row = np.repeat(np.arange(len(texts)), sizes)
    is_pair = np.zeros(len(feature), bool)
    if pairs and len(feature) > 1:
        same = row[1:] == row[:-1]
        pair = (feature[:-1] * np.uint64(0x9E3779B97F4A7C15) + feature[1:]) ^ np.uint64(0xD1B54A32D192ED03)
        feature, row = np.concatenate([feature, pair[same]]), np.concatenate([row, row[1:][same]])
        is_pair = np.concatenate([is_pair, np.ones(int(same.sum()), bool)])
    order = np.lexsort((feature, row))
    feature, row, is_pair = feature[order], row[order], is_pair[order]
    starts = np.flatnonzero(np.concatenate([[True], (feature[1:] != feature[:-1]) | (row[1:] != row[:-1])])[: len(feature)])
    tf = np.diff(np.append(starts, len(feature))).astype(np.float32)
    return _Counts(row[starts], feature[starts], tf, is_pair[starts])


def _random_vectors(features: NDArray[np.uint64], dim: int) -> NDArray[np.float32]:
    # Signs from the bits of SplitMix64, seeded by the feature: the same on every machine; each vector has length 1.
    words = -(-dim // 64)
    state = features[:, None] + np.arange(1, words + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    bits = np.unpackbits(state.astype("<u8").view(np.uint8), axis=1)[:, :dim]
    return (bits.astype(np.float32) * 2 - 1) / np.float32(np.sqrt(dim))


def _sum_rows(vectors, at, weight, bounds) -> NDArray[np.float32]:
    # For each i the weighted sum of the vectors at[bounds[i]:bounds[i + 1]]: a sparse matrix times a dense one.
    out = np.zeros((len(bounds) - 1, vectors.shape[1]), np.float32)
    start = 0
    while start < len(out):
        stop = max(int(np.searchsorted(bounds, bounds[start] + _AT_ONCE, side="right")) - 1, start + 1)
        part = slice(int(bounds[start]), int(bounds[stop]))
        if part.stop > part.start:
            some = vectors[at[part]] * weight[part, None]
            filled = start + np.flatnonzero(np.diff(bounds[start : stop + 1]))
            out[filled] = np.add.reduceat(some, bounds[filled] - part.start, axis=0)
        start = stop
    return out


def _right_singular_vectors(row, column, weight, shape, dim) -> NDArray[np.float32]:
    # Randomised subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 5.1 with power iterations).
    by_column = np.argsort(column, kind="stable")
    row_bounds = np.searchsorted(row, np.arange(shape[0] + 1))
    column_bounds = np.searchsorted(column[by_column], np.arange(shape[1] + 1))
    size = min(dim + _EXTRA_COLUMNS, *shape)
    image = _sum_rows(_random_vectors(np.arange(shape[1], dtype=np.uint64), size), column, weight, row_bounds)
    for step in range(_POWER_ITERATIONS):
        basis = np.linalg.qr(image)[0]
        back = _sum_rows(basis, row[by_column], weight[by_column], column_bounds)
        if step < _POWER_ITERATIONS - 1:
            image = _sum_rows(back, column, weight, row_bounds)
    square, rotation = np.linalg.eigh((back.T @ back).astype(np.float64))
    order = np.argsort(-square)[:dim]
    scale = np.sqrt(np.maximum(square[order], 1e-12))
    vectors = np.zeros((shape[1], dim), np.float32)
    vectors[:, : len(order)] = back @ (rotation[:, order] / scale).astype(np.float32)
    return vectors


def _normalised(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1)
