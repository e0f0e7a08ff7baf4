"""What an exchange's row says of its texts, for many texts at a time: their tokens and the files that they name.

A piece between blanks and line breaks is looked at once however often it comes (`pieces`); neither a path nor, but for
a line break behind punctuation, a token reaches beyond one.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from workbench.memory.files import paths_in_text
from workbench.memory.pieces import Vocabulary, cut
from workbench.memory.tokens import count_tokens, ends_in_punctuation


class Scanned(NamedTuple):
    """Of one text: `count_tokens`, `paths_in_text`, and the numbers of its pieces in a vocabulary."""

    num_tokens: int
    paths: list[str]
    vocabulary: Vocabulary
    pieces: NDArray[np.int32]


class _Facts:
    """What is known of each piece of a vocabulary, by its number."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.num_tokens = np.zeros(0, np.int32)
        self.joins_break = np.zeros(0, bool)  # whether a line break behind it belongs to its last token
        self.names_file = np.zeros(0, bool)
        self.paths: dict[int, list[str]] = {}

    def learn(self) -> None:
        """Takes in the facts of the pieces that have come since."""
        before = len(self.num_tokens)
        pieces = self.vocabulary.pieces[before:]
        if not pieces:
            return
        found = [paths_in_text(piece) if "." in piece else [] for piece in pieces]
        self.paths |= {number: paths for number, paths in enumerate(found, before) if paths}
        self.num_tokens = np.append(self.num_tokens, np.array([*map(count_tokens, pieces)], np.int32))
        self.joins_break = np.append(self.joins_break, np.array([*map(ends_in_punctuation, pieces)], bool))
        self.names_file = np.append(self.names_file, np.array([*map(bool, found)], bool))


_facts: _Facts | None = None
_lock = threading.Lock()


def scan(texts: Sequence[str]) -> list[Scanned]:
    """Counts the tokens and finds the paths of each text."""
    global _facts
    pieces = cut(texts)
    with _lock:
        facts = _facts
        if facts is None or facts.vocabulary is not pieces.vocabulary:
            facts = _Facts(pieces.vocabulary)
        _facts = None  # what an interruption leaves half done is not used again
        facts.learn()
        _facts = facts
    tokens = facts.num_tokens[pieces.number]
    tokens -= pieces.ends_line & facts.joins_break[pieces.number]
    totals = np.diff(np.append(0, np.cumsum(tokens))[pieces.bounds]) + pieces.line_breaks
    places = np.flatnonzero(facts.names_file[pieces.number])
    found: list[dict[str, None]] = [{} for _ in texts]
    owners = np.searchsorted(pieces.bounds, places, "right") - 1
    for owner, number in zip(owners.tolist(), pieces.number[places].tolist(), strict=True):
        found[owner].update(dict.fromkeys(facts.paths[number]))
    bounds = pieces.bounds.tolist()
    return [
        Scanned(total, list(paths), pieces.vocabulary, pieces.number[start:end])
        for total, paths, (start, end) in zip(totals.tolist(), found, pairwise(bounds), strict=True)
    ]
