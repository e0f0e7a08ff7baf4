"""Pieces, and what is worked out by piece, beside the plain functions that look at each text as a whole."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.memory import pieces as module
from workbench.memory.files import paths_in_text
from workbench.memory.pieces import Vocabulary
from workbench.memory.scan import scan
from workbench.memory.terms import count_terms
from workbench.memory.tokenizers import TOKENIZERS, get_tokenizer
from workbench.memory.tokens import count_tokens

WORDS = st.sampled_from(
    ["parseHTMLFile", "snake_case_name", "src/memory/pieces.py", "a.py", "x", "Änderung", "日本語", "naïve", "\x00",
     "a\x00", "a" * 15, "a" * 16, "b" * 63, "b" * 64, "c" * 400, "...", "a.", "(a).", "…", "¼", "\ud800", "\udc00", "_",
     "-", "https://x.org/a.py", "3.14", "ﬁ", "\u200b", "\x85", "\u2028", "p" * 298 + ".py", "p/" * 150 + ".py"]
)  # fmt: skip
GAPS = st.sampled_from([" ", "\n", "\n\n", " \n ", "\t", "\r\n", "\x0b", "", ".\n", "  "])
TEXTS = st.lists(
    st.lists(WORDS | GAPS | st.text(max_size=20), max_size=12).map("".join) | st.text(max_size=60), max_size=6
)


def plain_pieces(text: str) -> list[str]:
    return [piece for piece in re.split("[ \n]", text) if piece]


def pieces_of(vocabulary: Vocabulary, texts: list[str]) -> list[list[str]]:
    cut = vocabulary.cut(texts)
    named = [vocabulary.pieces[number] for number in cut.number.tolist()]
    return [named[start:end] for start, end in zip(cut.bounds[:-1], cut.bounds[1:], strict=True)]


@given(TEXTS)
def test_texts_are_cut_at_blanks_and_line_breaks(texts: list[str]) -> None:
    vocabulary = Vocabulary()
    for _ in range(2):  # all is new, all is known
        assert pieces_of(vocabulary, texts) == [plain_pieces(text) for text in texts]
    assert len(set(vocabulary.pieces)) == len(vocabulary.pieces)
    cut = vocabulary.cut(texts)
    assert cut.line_breaks.tolist() == [len(re.findall("\n+", text)) for text in texts]
    ends = [end for text in texts for _, end in re.findall("([^ \n]+)(\n?)", text)]
    assert cut.ends_line.tolist() == [end == "\n" for end in ends]


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1000])
def test_chunks_make_no_difference(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(7)
    texts = [
        "".join(rng.choices(["word ", "wörter", "\n", " ", "\n\n ", "x" * 70], k=rng.randrange(60))) for _ in range(40)
    ]
    whole = Vocabulary().cut(texts)
    monkeypatch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
    vocabulary = Vocabulary()
    assert pieces_of(vocabulary, texts) == [plain_pieces(text) for text in texts]
    again = vocabulary.cut(texts)
    for name in ("bounds", "ends_line", "line_breaks"):
        assert np.array_equal(getattr(again, name), getattr(whole, name))


def test_many_pieces_that_share_bytes_keep_their_own_numbers() -> None:
    rng = random.Random(3)
    words = sorted(
        {"ab\x00"[rng.randrange(3)] * rng.randrange(1, 90) + str(rng.randrange(30_000)) for _ in range(60_000)}
    )
    vocabulary = Vocabulary()
    for start in range(0, len(words), 7_000):  # the tables grow on the way
        assert pieces_of(vocabulary, [" ".join(words[start : start + 7_000])]) == [words[start : start + 7_000]]
    size = len(vocabulary.pieces)
    assert size == len(words) == len(set(vocabulary.pieces))
    rng.shuffle(words)
    assert pieces_of(vocabulary, [" ".join(words)]) == [words]
    assert len(vocabulary.pieces) == size


def test_keys_that_want_the_same_slot_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._Table, "_slots", lambda self, keys: np.zeros(len(keys[0]), np.int64))
    words = [f"{'w' * (i % 20)}{i}" for i in range(100)]
    vocabulary = Vocabulary()
    for _ in range(2):
        assert pieces_of(vocabulary, [" ".join(words * 2)]) == [words * 2]
    assert sorted(vocabulary.pieces) == sorted(words)


@given(TEXTS)
def test_scan_finds_what_looking_at_each_text_finds(texts: list[str]) -> None:
    found = scan(texts)
    assert [each.num_tokens for each in found] == [count_tokens(text) for text in texts]
    assert [each.paths for each in found] == [paths_in_text(text) for text in texts]


def plain_counts(name: str, texts: list[tuple[str, str]]) -> dict[tuple[int, int], tuple[int, int]]:
    hashes = get_tokenizer(name).hashes
    postings: dict[tuple[int, int], Any] = {}
    for row, (user, assistant) in enumerate(texts):
        of_user, both = Counter(hashes(user)), Counter(hashes(user) + hashes(assistant))
        postings |= {(term, row): (count, of_user[term]) for term, count in both.items()}
    return dict(sorted(postings.items()))


@given(st.sampled_from([*TOKENIZERS]), st.lists(st.tuples(TEXTS.map(" ".join), TEXTS.map("".join)), max_size=5))
def test_terms_are_counted_as_by_document(name: str, texts: list[tuple[str, str]]) -> None:
    vocabulary = Vocabulary()
    cut = vocabulary.cut([text for both in texts for text in both])
    counts = count_terms(get_tokenizer(name), vocabulary, cut.number, np.diff(cut.bounds))
    keys = zip(counts.term.tolist(), counts.row.tolist(), strict=True)
    values = zip(counts.tf.tolist(), counts.tf_user.tolist(), strict=True)
    assert list(zip(keys, values, strict=True)) == list(plain_counts(name, texts).items())
    hashes = get_tokenizer(name).hashes
    assert counts.length_user.tolist() == [len(hashes(user)) for user, _ in texts]
    assert counts.length.tolist() == [len(hashes(user)) + len(hashes(assistant)) for user, assistant in texts]


def test_a_full_vocabulary_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    first = module.cut(["one two three"]).vocabulary
    monkeypatch.setattr(module, "_MAX_PIECES", 1)
    second = module.cut(["one two"]).vocabulary
    assert first is not second
    assert second.pieces == ["one", "two"]
    assert [each.num_tokens for each in scan(["some more words of text\n"] * 2)] == [6, 6]
    assert module.cut([]).number.tolist() == []


def test_what_an_interruption_left_half_done_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["an interrupted text\n", "with src/interrupted.py in it"]
    wanted = [(count_tokens(text), paths_in_text(text)) for text in texts]
    for owner, name, last in ((module._Table, "find", 2), (np, "append", 4)):
        scan(["words that are known"])
        original, calls = getattr(owner, name), 0

        def interrupted(*args: Any, original: Any = original, last: int = last) -> Any:
            nonlocal calls
            calls += 1
            result = original(*args)
            if calls == last:
                raise KeyboardInterrupt
            return result

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                scan([*texts, f"{owner} {name} and-something-longer-and-new"])
        assert [(each.num_tokens, each.paths) for each in scan(texts)] == wanted
