"""Tokenizers: their rules by example, and their properties on arbitrary text."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.memory import tokenizers
from workbench.memory.tokenizers import TOKENIZERS, Tokenizer, get_tokenizer, term_hash


def test_code_divides_as_card_001_says() -> None:
    assert get_tokenizer("code/1")("a_b/c-d.py") == ["a", "b", "c", "d", "py"]
    assert get_tokenizer("code/1")(r"C:\Users\Me: 42!") == ["c", "users", "me", "42"]
    assert get_tokenizer("code/1")("parseHTMLFile") == ["parsehtmlfile"]


def test_words_keeps_underscores() -> None:
    assert get_tokenizer("words/1")("MAX_VALUE is 3.14") == ["max_value", "is", "3", "14"]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("parseHTMLFile", ["pars", "html", "file", "parsehtmlfil"]),
        ("MAX_VALUE", ["max", "valu", "maxvalu"]),
        ("The tests are running", ["test", "run"]),
        ("sha256 of utf-8", ["sha", "256", "sha256", "utf", "8"]),
        ("你好世界", ["你好", "好世", "世界"]),
        ("naïve café", ["naïv", "café"]),
    ],
)
def test_stem_reads_identifiers_and_words(text: str, terms: list[str]) -> None:
    assert get_tokenizer("stem/1")(text) == terms


def test_what_is_longer_than_a_hash_is_cut() -> None:
    assert get_tokenizer("words/1")("A" * 1_000) == ["a" * 64]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text())
def test_terms_and_hashes_agree_and_come_in_order(name: str, text: str) -> None:
    tokenizer = get_tokenizer(name)
    terms = tokenizer(text)
    assert tokenizer.hashes(text) == [term_hash(term) for term in terms]
    assert tokenizer(f"{text} — {text}") == terms * 2
    assert all(terms)


def test_a_full_cache_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "_MAX_CACHED", 3)
    tokenizer = Tokenizer("trial/1", r"\w+", stop=True, stem=True)
    text = "one of those five words that were running and running"
    assert tokenizer(text) == ["one", "five", "word", "run", "run"]
    assert tokenizer.hashes(text) == [term_hash(term) for term in ["one", "five", "word", "run", "run"]]
    assert len(tokenizer._hashes) <= 3


def test_hashes_are_the_same_in_every_process() -> None:
    assert term_hash("workbench") == 1590392673169579791


def test_both_stemmers_agree() -> None:
    pytest.importorskip("Stemmer", reason="needs PyStemmer")
    words = "running generously organization arguments skies dying flies' consign knightly programs indexes"
    program = (
        "import sys; sys.modules['Stemmer'] = None\n"
        "from workbench.memory.tokenizers import get_tokenizer\n"
        f"print(*get_tokenizer('stem/1')({words!r}))\n"
        "import snowballstemmer\n"
        "assert type(snowballstemmer.stemmer('english')).__module__.startswith('snowballstemmer')"
    )
    pure = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert pure.split() == get_tokenizer("stem/1")(words)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"stem/7.*code/1, words/1, stem/1"):
        get_tokenizer("stem/7")
