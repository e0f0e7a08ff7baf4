"""Named, versioned tokenizers: pure functions from text to terms, with a cache from raw tokens to terms.

A layer of the lexical index records the name of its tokenizer; a changed rule gets a new version.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from itertools import chain

from workbench.errors import InputError

_MAX_CACHED = 1_000_000
_MAX_TERM_CHARS = 64  # a SHA-256 in hex still fits; what is longer is data and is cut
_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")

# Function words of English, as the patterns below leave them (an apostrophe divides).
_FUNCTION_WORDS = """
    a about after again all am an and any are as at be because been before being below between both but by can cannot
    could did do does doing down during each few for from further had has have having he her here hers him his how i if
    in into is it its just let me more most my no nor not now of off on once only or other our out over own please same
    she should so some such than that the their them then there these they this those through to too under until up us
    very was we were what when where which while who whom why will with would you your yours
    don didn doesn isn wasn aren won couldn shouldn wouldn hasn haven hadn ll ve re im"""
STOP_WORDS = frozenset(_FUNCTION_WORDS.split())


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """One way from text to terms; `name` carries the version.

    Args:
        pattern: finds the raw tokens in the text.
        split: also divide a raw token at underscores and at changes of case ("parseHTMLFile" → parse, html, file).
        joined: keep a divided token as one term beside its parts ("parsehtmlfile").
        stop: drop English function words.
        stem: reduce a term to its Snowball English stem.
    """

    name: str
    pattern: str
    split: bool = False
    joined: bool = False
    stop: bool = False
    stem: bool = False
    _terms: _TermCache = field(init=False, repr=False, compare=False)
    _hashes: _HashCache = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_terms", _TermCache(self))
        object.__setattr__(self, "_hashes", _HashCache(self._terms))

    def __call__(self, text: str) -> list[str]:
        """The terms of a text, in order, with repetitions."""
        tokens = _compiled(self.pattern).findall(text)
        return list(chain.from_iterable(map(self._terms.__getitem__, tokens)))

    def hashes(self, text: str) -> list[int]:
        """The 64-bit hashes of the terms of a text, in order, with repetitions."""
        tokens = _compiled(self.pattern).findall(text)
        return list(chain.from_iterable(map(self._hashes.__getitem__, tokens)))


def term_hash(term: str) -> int:
    """The number by which the index knows a term: 8 bytes of BLAKE2b, the same on every machine."""
    return int.from_bytes(blake2b(term.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class _TermCache(dict[str, tuple[str, ...]]):
    """Raw token → its terms, worked out at the first meeting."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: str) -> tuple[str, ...]:
        if len(self) >= _MAX_CACHED:
            self.clear()
        terms = self[token] = tuple(_analyse(self._tokenizer, token))
        return terms


class _HashCache(dict[str, tuple[int, ...]]):
    """Raw token → the hashes of its terms."""

    def __init__(self, terms: _TermCache) -> None:
        super().__init__()
        self._terms = terms

    def __missing__(self, token: str) -> tuple[int, ...]:
        if len(self) >= _MAX_CACHED:
            self.clear()
        hashes = self[token] = tuple(map(term_hash, self._terms[token]))
        return hashes


def _analyse(rule: Tokenizer, token: str) -> list[str]:
    lowered = token.lower()[:_MAX_TERM_CHARS]
    if not rule.split:
        words = [lowered]
    elif _CJK.search(lowered):
        # These scripts write no spaces: overlapping pairs of characters stand in for words.
        words = [lowered[i : i + 2] for i in range(max(1, len(lowered) - 1))]
    else:
        token = token[:_MAX_TERM_CHARS]
        words = [part.lower() for part in (_PARTS.findall(token) if token.isascii() else token.split("_")) if part]
        if rule.joined and len(words) > 1:
            words.append(lowered.replace("_", ""))
    if rule.stop:
        words = [word for word in words if word not in STOP_WORDS]
    if rule.stem:
        words = [_stemmer()(word) if word.isalpha() else word for word in words]
    return words


@cache
def _stemmer():
    # snowballstemmer takes the C implementation (PyStemmer) when that is installed; both give the same stems.
    import snowballstemmer

    return snowballstemmer.stemmer("english").stemWord


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


_NO_UNDERSCORE = r"[^\W_]+"

TOKENIZERS: dict[str, Tokenizer] = {
    rule.name: rule
    for rule in (
        # Card 001: lower case, divided at white space and punctuation, _ - / \ . and : included.
        Tokenizer("code/1", _NO_UNDERSCORE),
        Tokenizer("words/1", r"\w+"),
        Tokenizer("stem/1", r"\w+", split=True, joined=True, stop=True, stem=True),
    )
}


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name; raises InputError, which lists the names, if there is none."""
    try:
        return TOKENIZERS[name]
    except KeyError:
        raise InputError(f"unknown tokenizer {name!r}; there are {', '.join(TOKENIZERS)}") from None
