"""Numbers the pieces that blanks and line breaks cut texts into, with NumPy: equal pieces have equal numbers.

What is asked of a text piece by piece (its terms, tokens, paths) is then worked out once for each different piece and
looked up by number. The key of a piece is its UTF-8 bytes and their number, as 64-bit words: two of them up to 15
bytes, eight up to 63, so that different pieces never meet. What is longer is known by its SHA-256.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_CHUNK_BYTES = 1 << 18  # that many bytes of text are looked at together: their arrays stay in the CPU's cache
_MAX_PIECES, _MAX_BYTES = 200_000, 16 << 20
_MIN_SLOT_BITS = 12

_DELIMITER = re.compile(rb"[ \n]")
_BLANK, _LINE_BREAK = b" \n"
_PADDING = b" " * 72  # behind the text, so that eight words can be read at any place of it
_FIRST_BYTES = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)  # masks
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93], np.uint64)


@dataclass(frozen=True, slots=True)
class Cut:
    """The pieces of some texts.

    Args:
        vocabulary: whose numbers these are.
        number: of each piece, in the order of the texts.
        bounds: the pieces of text i are bounds[i] to bounds[i + 1].
        ends_line: whether a line break follows the piece.
        line_breaks: how many runs of line breaks each text has.
    """

    vocabulary: Vocabulary
    number: NDArray[np.int32]
    bounds: NDArray[np.int64]
    ends_line: NDArray[np.bool_]
    line_breaks: NDArray[np.int64]


class Pieces(NamedTuple):
    """The numbers of the pieces of what a user said and of what was answered, in a vocabulary."""

    vocabulary: Vocabulary
    user: NDArray[np.int32]
    assistant: NDArray[np.int32]


def cut(texts: Sequence[str]) -> Cut:
    """The pieces of the texts, in the process's vocabulary, which begins anew when it is full."""
    global _shared
    with _lock:
        vocabulary = Vocabulary() if _shared is None or _shared.is_full else _shared
        _shared = None  # what an interruption leaves half done is not used again
        found = vocabulary.cut(texts)
        _shared = vocabulary
    return found


def numbered(
    texts: Sequence[tuple[str, str]], known: Sequence[Pieces | None]
) -> tuple[Vocabulary, NDArray[np.int32], NDArray[np.int64]]:
    """The numbers of the pieces of the texts of some documents, in turn, and how many each text has.

    Args: known: the pieces of each document; if they are missing, or of several vocabularies, the texts are cut anew.
    """
    pieces = [each for each in known if each is not None and known[0] and each.vocabulary is known[0].vocabulary]
    if len(pieces) < len(texts) or not pieces:
        found = cut([text for both in texts for text in both])
        return found.vocabulary, found.number, np.diff(found.bounds)
    columns = [number for each in pieces for number in (each.user, each.assistant)]
    return pieces[0].vocabulary, np.concatenate(columns), np.array([*map(len, columns)])


class Vocabulary:
    """All pieces met so far; their numbers are their places in `pieces`."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self._size_bytes = 0
        self._short, self._middle = _Table(2), _Table(8)
        self._long: dict[bytes, int] = {}

    @property
    def is_full(self) -> bool:
        """Whether it is time to begin with an empty one; there is no hard limit."""
        return len(self.pieces) > _MAX_PIECES or self._size_bytes > _MAX_BYTES

    def cut(self, texts: Sequence[str]) -> Cut:
        """The pieces of the texts; what was not met before is added."""
        columns = [self._cut(group) for group in _groups(texts)]
        if not columns:
            return Cut(self, np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, bool), np.zeros(0, np.int64))
        number, sizes, ends_line, line_breaks = map(np.concatenate, zip(*columns, strict=True))
        return Cut(self, number, np.append(0, np.cumsum(sizes)), ends_line, line_breaks)

    def _cut(self, encoded: list[bytes]) -> tuple[NDArray[Any], ...]:
        """The numbers of the pieces, how many each text has, where a line ends, line breaks of each text."""
        text = b" ".join([b"", *encoded, _PADDING])
        codes = np.frombuffer(text, np.uint8)
        chunks = [self._chunk(text, codes, *limits) for limits in _chunks(text)]
        start, number, ends_line, lone_break = map(np.concatenate, zip(*chunks, strict=True))
        before = np.cumsum([0, *(len(each) + 1 for each in encoded)])  # where the blank before each text stands
        bounds = np.searchsorted(start, before)
        breaks = np.append(0, np.cumsum(ends_line))[bounds] + np.searchsorted(lone_break, before)
        return number, np.diff(bounds), ends_line, np.diff(breaks)

    def _chunk(self, text: bytes, codes: NDArray[np.uint8], start: int, end: int) -> tuple[NDArray[Any], ...]:
        """The pieces between two delimiters, at start and end.

        Returns: where they begin, their numbers, whether a line break follows; where one follows a blank.
        """
        here = codes[start : end + 1]
        is_break, is_blank = here == _LINE_BREAK, here == _BLANK
        is_delimiter = is_break | is_blank
        edges = np.flatnonzero(is_delimiter[1:] != is_delimiter[:-1]) + (start + 1)
        starts, ends = edges[::2], edges[1::2]
        lone_break = np.flatnonzero(is_break[1:] & is_blank[:-1]) + (start + 1)
        return starts, self._numbers(text, codes, starts, ends), codes[ends] == _LINE_BREAK, lone_break

    def _numbers(
        self, text: bytes, codes: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> NDArray[np.int32]:
        sizes = ends - starts
        # The eight bytes from every place on: a view that needs no copy of the text.
        words = np.ndarray((len(codes) - 7,), "<u8", codes, 0, (1,))

        def add(places: list[int]) -> None:
            pieces = [text[s:e] for s, e in zip(starts[places].tolist(), ends[places].tolist(), strict=True)]
            self.pieces += [piece.decode("utf-8", "surrogatepass") for piece in pieces]
            self._size_bytes += sum(map(len, pieces))

        low = words[starts] & _FIRST_BYTES[np.minimum(sizes, 8)]
        high = sizes.astype(np.uint64) << np.uint64(56)
        more = np.flatnonzero(sizes > 8)
        high[more] |= words[starts[more] + 8] & _FIRST_BYTES[np.minimum(sizes[more] - 8, 7)]
        longer = more[sizes[more] >= 8 * 2]
        high[longer] = 0
        number, first = self._short.find([low, high], len(self.pieces))
        add(first)
        if len(longer):
            keys = _long_keys(words, starts[longer], sizes[longer])
            number[longer], first = self._middle.find(keys, len(self.pieces))
            add(longer[first].tolist())
        for i in longer[sizes[longer] >= 8 * 8].tolist():
            key = sha256(text[starts[i] : ends[i]]).digest()
            if key not in self._long:
                self._long[key] = len(self.pieces)
                add([i])
            number[i] = self._long[key]
        return number


class _Table:
    """Numbers by key, in NumPy arrays: a hash table with linear probing, for many keys at a time.

    A key is `num_words` words, the last of which is not 0.
    """

    def __init__(self, num_words: int, slot_bits: int = _MIN_SLOT_BITS) -> None:
        self._bits = slot_bits
        self._used = 0
        self._keys = [np.zeros(1 << slot_bits, np.uint64) for _ in range(num_words)]
        self._number = np.zeros(1 << slot_bits, np.int32)

    def find(self, keys: list[NDArray[np.uint64]], next_number: int) -> tuple[NDArray[np.int32], list[int]]:
        """The numbers of keys, given by word; what is new gets the next numbers.

        Returns: numbers (any where the last word is 0), and the first places of the new keys by ascending number.
        """
        self._make_room(len(keys[-1]))
        slot = self._slots(keys)
        number = self._number[slot]
        left = np.flatnonzero(self._differ(slot, keys) & (keys[-1] != 0))
        slot, keys = slot[left], [word[left] for word in keys]
        new: list[int] = []
        while len(left):
            claims = np.flatnonzero(self._keys[-1][slot] == 0)
            self._number[slot[claims]] = claims  # of several keys that want a slot the last gets it
            claims = claims[self._number[slot[claims]] == claims]
            for column, word in zip(self._keys, keys, strict=True):
                column[slot[claims]] = word[claims]
            self._number[slot[claims]] = np.arange(next_number, next_number + len(claims))
            next_number += len(claims)
            new += left[claims].tolist()
            differ = self._differ(slot, keys)
            number[left[~differ]] = self._number[slot[~differ]]
            left, keys = left[differ], [word[differ] for word in keys]
            slot = (slot[differ] + 1) & ((1 << self._bits) - 1)
        self._used += len(new)
        return number, new

    def _differ(self, slot: NDArray[np.int64], keys: list[NDArray[np.uint64]]) -> NDArray[np.bool_]:
        differ = self._keys[0][slot] != keys[0]
        for column, word in zip(self._keys[1:], keys[1:], strict=True):
            differ |= column[slot] != word
        return differ

    def _slots(self, keys: list[NDArray[np.uint64]]) -> NDArray[np.int64]:
        mixed = keys[0] * _FACTORS[0]
        for word in keys[1:]:
            mixed ^= mixed >> np.uint64(32)
            mixed += word
            mixed *= _FACTORS[1]
        mixed ^= mixed >> np.uint64(32)
        mixed *= _FACTORS[0]
        return (mixed >> np.uint64(64 - self._bits)).view(np.int64)

    def _make_room(self, num_keys: int) -> None:
        """Keeps half of the slots free, even if these many keys are all new."""
        bits = (2 * (self._used + num_keys)).bit_length()
        if bits <= self._bits:
            return
        used = self._keys[-1] != 0
        larger = _Table(len(self._keys), bits)
        _, places = larger.find([column[used] for column in self._keys], 0)
        renumbered = self._number[used][places]
        filled = larger._keys[-1] != 0
        larger._number[filled] = renumbered[larger._number[filled]]
        self._bits, self._keys, self._number = bits, larger._keys, larger._number


def _long_keys(
    words: NDArray[np.uint64], starts: NDArray[np.int64], sizes: NDArray[np.int64]
) -> list[NDArray[np.uint64]]:
    """Keys of eight words; the last holds the size, and is 0 where the piece is longer still."""
    keys = [words[starts + 8 * i] & _FIRST_BYTES[np.clip(sizes - 8 * i, 0, 8)] for i in range(7)]
    last = words[starts + 56] & _FIRST_BYTES[np.clip(sizes - 56, 0, 7)]
    last |= sizes.astype(np.uint64) << np.uint64(56)
    return [*keys, np.where(sizes < 8 * 8, last, np.uint64(0))]


def _groups(texts: Sequence[str]) -> Iterator[list[bytes]]:
    """The texts in UTF-8, in groups of a chunk's size; a longer text stands in a group with those before it."""
    group: list[bytes] = []
    size = 0
    for text in texts:
        group.append(text.encode("utf-8", "surrogatepass"))
        size += len(group[-1])
        if size > _CHUNK_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _chunks(text: bytes) -> Iterator[tuple[int, int]]:
    """Cuts a text that begins and ends with a blank at delimiters: places of two delimiters each."""
    last, start = len(text) - len(_PADDING), 0
    while start < last:
        # A rest that is shorter than a chunk is not worth one of its own.
        found = _DELIMITER.search(text, start + _CHUNK_BYTES, last) if last - start > 2 * _CHUNK_BYTES else None
        end = found.start() if found else last
        yield start, end
        start = end


_shared: Vocabulary | None = None
_lock = threading.Lock()
