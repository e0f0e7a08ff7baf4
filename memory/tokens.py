"""Counts tokens without a tokenizer file: the matches of one expression stand for BPE pieces."""

from __future__ import annotations

import re

# Byte-pair vocabularies of 100k to 200k pieces hold most lower-case words of up to 8 letters as one piece, with a
# leading capital, blank or connector ("_commit", ".go"), cut digits by three, and join runs of punctuation with the
# line break after them. On the development corpus of recorded sessions (1,887 exchanges) this gives 539 tokens an
# exchange, where the study's BPE counts 541; the correlation with WordPiece counts over its exchanges is 0.990.
_PIECE = re.compile(
    r"[_./-]?(?:[A-Z]?[a-z]{1,8}|[A-Z]{1,3}(?![a-z])|[A-Z])"
    r"|[0-9]{1,3}|[^\W\d_A-Za-z]|[^\w\s]{1,3}\n*|_+|\n+"
)


def count_tokens(text: str) -> int:
    """The estimated number of BPE tokens of `text`; 0 for an empty string, additive up to one token at a seam."""
    return sum(map(_counted.__getitem__, text.split(" ")))  # no piece holds a blank


def ends_in_punctuation(text: str) -> bool:
    """Whether a line break behind the text (not empty) belongs to its last token, and is none of its own."""
    last = text[-1]
    return not (last.isalnum() or last == "_" or last.isspace())


class _Counted(dict[str, int]):
    """What stands between two blanks → its number of pieces; the frequent words make up most of any text."""

    def __missing__(self, word: str) -> int:
        count = len(_PIECE.findall(word))
        if len(word) <= _MAX_CHARS:
            if len(self) >= _MAX_WORDS:
                self.clear()
            self[word] = count
        return count


_MAX_WORDS, _MAX_CHARS = 100_000, 32
_counted = _Counted()
