"""Counts the terms of many documents at a time, as postings.

A piece between blanks and line breaks is tokenised once however often it comes (`pieces`): no term of any tokenizer
reaches beyond one.
"""

from __future__ import annotations

import threading
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from workbench.memory.pieces import Vocabulary
from workbench.memory.tokenizers import Tokenizer


class Counts(NamedTuple):
    """How often each term comes in each document, parallel arrays sorted by term, then row; and documents' lengths."""

    term: NDArray[np.uint64]
    row: NDArray[np.int64]
    tf: NDArray[np.int32]
    tf_user: NDArray[np.int32]
    length: NDArray[np.int32]
    length_user: NDArray[np.int32]


class _Terms:
    """The terms of each piece of a vocabulary: piece n has `size[n]` terms from `start[n]` on."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.start, self.size = np.zeros(0, np.int32), np.zeros(0, np.int32)
        self.terms = np.zeros(0, np.int32)  # places in `hashes`
        self.hashes = np.zeros(0, np.uint64)
        self._place: dict[int, int] = {}

    def learn(self) -> None:
        """Takes in the terms of the pieces that have come since."""
        known = self._place
        before = len(known)
        pieces = self.vocabulary.pieces[len(self.size) :]
        if not pieces:
            return
        found = [self.tokenizer.hashes(piece) for piece in pieces]
        terms = [known.setdefault(term, len(known)) for each in found for term in each]
        sizes = np.array([*map(len, found)], np.int32)
        self.start = np.append(self.start, (len(self.terms) + np.cumsum(sizes) - sizes).astype(np.int32))
        self.size = np.append(self.size, sizes)
        self.terms = np.append(self.terms, np.array(terms, np.int32))
        self.hashes = np.append(self.hashes, np.array([*islice(known, before, None)], np.uint64))

    def of(self, number: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The terms of pieces (places in `hashes`), in order, and how many there are before each piece and in all."""
        before = np.append(0, np.cumsum(self.size[number], dtype=np.int64))
        terms = np.empty(before[-1], np.int32)
        for low in range(0, len(number), _PIECES_AT_ONCE):
            some = number[low : low + _PIECES_AT_ONCE]
            start, end = before[low], before[low + len(some)]
            shift = self.start[some] - before[low : low + len(some)]
            terms[start:end] = self.terms[np.arange(start, end) + np.repeat(shift, self.size[some])]
        return terms, before


_PIECES_AT_ONCE = 1 << 16  # whose terms are looked up together: their arrays stay in the CPU's cache
_terms: dict[str, _Terms] = {}
_lock = threading.Lock()


def count_terms(
    tokenizer: Tokenizer, vocabulary: Vocabulary, number: NDArray[np.int32], sizes: NDArray[np.int64]
) -> Counts:
    """The postings of some documents.

    Args:
        vocabulary, number: the numbers of the documents' pieces: what the user said and what was answered, in turn.
        sizes: how many pieces each of these texts has (two for each document).
    """
    with _lock:
        known = _terms.pop(tokenizer.name, None)  # what an interruption leaves half done is not used again
        if known is None or known.vocabulary is not vocabulary:
            known = _Terms(tokenizer, vocabulary)
        known.learn()
        _terms[tokenizer.name] = known
        terms, before = known.of(number)
        hashes = known.hashes
    lengths = np.diff(before[np.append(0, np.cumsum(sizes))])
    is_used = np.zeros(len(hashes), bool)
    is_used[terms] = True
    used = np.flatnonzero(is_used)
    used = used[np.argsort(hashes[used])]
    rank = np.zeros(len(hashes), np.uint64)
    rank[used] = np.arange(len(used))
    # One number to sort by: the term's rank by hash, the row, and whether the user says it (texts come in pairs).
    bits = len(lengths).bit_length()
    key = rank[terms]
    key <<= np.uint64(bits)
    key |= np.repeat(np.arange(len(lengths), dtype=np.uint64) ^ np.uint64(1), lengths)
    key.sort()
    is_first = np.ones(len(key), bool)
    is_first[1:] = (key[1:] ^ key[:-1]) > 1
    starts = np.flatnonzero(is_first)
    limits = np.append(starts, len(key))
    users = np.append(0, np.cumsum(key & np.uint64(1), dtype=np.int32))
    first = key[starts]
    lengths = lengths.reshape(-1, 2)
    return Counts(
        hashes[used[(first >> np.uint64(bits)).view(np.int64)]],
        ((first & np.uint64((1 << bits) - 1)) >> np.uint64(1)).view(np.int64),
        np.diff(limits).astype(np.int32),
        np.diff(users[limits]).astype(np.int32),
        lengths.sum(axis=1, dtype=np.int32),
        lengths[:, 0].astype(np.int32),
    )
