"""The two baselines of card 001 for a distiller: the beginning of an exchange, and a random span of it.

Paper: Structured Distillation for Personalized Agent Memory, arXiv 2603.13017, seed id 1 (card 001, smallest test).
Deviations: the span starts at a random word drawn from the exchange's id, not anew for every run.
Verified by: tests/evals/test_ours.py.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator

from workbench.memory.rooms import assign_rooms
from workbench.memory.tokens import count_tokens
from workbench.memory.types import Distilled, Exchange, Failed

TOKENS = 38
_WORD = re.compile(r"\S+")


class Head:
    """The first 38 tokens, cut at a word; the whole first word if that is longer already."""

    name = "head/1"

    def distil(self, exchanges: Iterable[Exchange]) -> Iterator[tuple[Exchange, Distilled | Failed]]:
        """A record for every exchange, in their order; Failed where there is no word."""
        for exchange in exchanges:
            yield exchange, _record(exchange, 0)


class Span:
    """38 tokens from a random word on, the same word for the same exchange; less at the end of the text."""

    name = "span/1"

    def distil(self, exchanges: Iterable[Exchange]) -> Iterator[tuple[Exchange, Distilled | Failed]]:
        """A record for every exchange, in their order; Failed where there is no word."""
        for exchange in exchanges:
            num_words = sum(1 for _ in _WORD.finditer(exchange.text))
            start = random.Random(exchange.exchange_id).randrange(num_words) if num_words else 0
            yield exchange, _record(exchange, start)


def _record(exchange: Exchange, start: int) -> Distilled | Failed:
    words = list(_WORD.finditer(exchange.text))[start:]
    if not words:
        return Failed("the exchange holds no words")
    end, left = words[0].end(), TOKENS - count_tokens(words[0].group())
    for word in words[1:]:
        left -= count_tokens(f" {word.group()}")
        if left < 0:
            break
        end = word.end()
    return Distilled(exchange.text[words[0].start() : end], "", assign_rooms(exchange, []))
