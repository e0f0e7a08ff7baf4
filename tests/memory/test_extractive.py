"""The built-in distiller: its own words only, whatever comes in; the same record each time; linear cost."""

from __future__ import annotations

import re
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.memory.checks import violations
from workbench.memory.distillers.extractive import Extractive, Weights, stem
from workbench.memory.tokens import count_tokens
from workbench.memory.types import Distilled, Exchange, Failed, FileTouch


def distil(user: str, assistant: str = "", **fields: object) -> Distilled:
    record = Extractive().distil_one(Exchange("e", user, assistant, **fields))  # type: ignore[arg-type]
    assert isinstance(record, Distilled)
    return record


MESSY = {
    "one word": ("yes", ""),
    "function words only": ("ok, do it then", ""),
    "marks only": ("?!", ""),
    "empty answer": ("Please rename the invoice parser", ""),
    "code": ("why?", "```go\nfunc (s *Store) SaveChanges(ctx context.Context) error { return nil }\n```"),
    "log": ("2026-02-03T03:49:43Z ERROR db: connection refused at 10.0.0.7:5432 (attempt 3)\n" * 30, "Restarted."),
    "table": ("| name | size |\n|---|---|\n| alpha | 12 |\n| beta | 900 |", "Sorted by size."),
    "tags": ("<command-name>/clear</command-name><bash-stdout>main 706e2e3 Merge</bash-stdout>", ""),
    "only tags": ("<bash-stdout></bash-stdout><bash-stderr></bash-stderr>", ""),
    "windows": (r"fix C:\Users\ann\proj\build_tool.py please", r"Edited C:\Users\ann\proj\build_tool.py."),
    "hashes": ("253fd5ef-38bf-4f4a-804a-98df5088a868 706e2e3314fef3b2208da19d2ba0388870c1656a", ""),
    "glued": ("x1https://a.b/c2 2fa3 __init__ foo-_bar 修复bug2的问题", ""),
    "chinese": ("请修复登录页面的错误，用户无法提交表单。", "已修复：表单校验逻辑有误。"),
    "german": ("Bitte die Rechnungsprüfung überarbeiten", "Erledigt: Prüfsumme größer als 4711 wird abgewiesen."),
    "blob": ("A9" * 5000, ""),
    "digits": ("1" * 5000, ""),
    "emoji": ("🎉🎉", "👍"),
    "surrogate": ("broken \ud800 text", ""),
}


@pytest.mark.parametrize("name", MESSY)
def test_messy_text_gives_a_record_that_holds(name: str) -> None:
    user, assistant = MESSY[name]
    exchange = Exchange("e", user, assistant)
    assert violations(exchange, distil(user, assistant)) == []


ALPHABET = st.sampled_from([*"aB1_-'’./:`\"<> \n(),;!€é你", "error: ", "https://", "```", "--x", "foo_bar", "2.5"])
TEXT = st.lists(ALPHABET, max_size=60).map("".join)


@given(TEXT, TEXT)
def test_every_record_passes_the_checks(user: str, assistant: str) -> None:
    exchange = Exchange("e", user, assistant)
    record = Extractive().distil_one(exchange)
    if isinstance(record, Failed):
        assert not exchange.text.strip()
    else:
        assert violations(exchange, record) == []


def test_every_word_of_core_is_the_exchanges_own_and_no_term_is_told_twice() -> None:
    user = "The invoice parser rejects invoices with negative totals. Can you look at why?"
    assistant = "The parser compared totals as strings. I changed `compare_totals` and added a regression test."
    record = distil(user, assistant)
    words = re.findall(r"[\w'-]+", record.text)
    assert set(words) <= set(re.findall(r"[\w'-]+", f"{user} {assistant}"))
    keys = [stem(word.lower()) for word in re.findall(r"[\w'-]+", record.core)]
    assert len(keys) == len(set(keys))
    assert {stem("invoices"), stem("parser")} <= set(keys)


def test_core_is_at_most_two_sentences_in_the_order_of_the_text() -> None:
    record = distil("Rename the invoice parser module.", "Renamed; the importer's documentation mentions billing now.")
    sentences = record.core.split(". ")
    assert len(sentences) == 2
    assert "invoice" in sentences[0]
    assert sentences[1].index("importer") < sentences[1].index("billing")


LONG_ANSWER = " ".join(f"Step {i} restarts worker number {i} and waits for its health probe." for i in range(40))


@pytest.mark.parametrize(
    ("user", "answer", "context"),
    [
        ("it stops: PoolError: connection refused, help", LONG_ANSWER, "PoolError: connection refused"),
        ("which option skips the hooks in the pre-push stage?", "Use --no-verify for that.", "--no-verify"),
        ("how do I run it?", f"Run `make demo` first. {LONG_ANSWER}", "make demo"),
        ("where is the budget computed in this project now?", "In compute_budget, see there.", "compute_budget"),
        ("nothing to quote here, only words", "Agreed, only words.", ""),
    ],
)
def test_context_is_an_error_an_option_a_code_span_or_a_name(user: str, answer: str, context: str) -> None:
    assert distil(user, answer).context == context


def test_an_exchange_that_changed_files_gets_a_longer_record() -> None:
    text = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(300))
    short = distil(text, files=(FileTouch("a.py", "read"),))
    long = distil(text, files=(FileTouch("a.py", "modified"),))
    assert count_tokens(long.text) > 2 * count_tokens(short.text)


def test_a_record_never_outgrows_its_exchange() -> None:
    for size in (1, 3, 10, 30, 100, 1000):
        text = " ".join(f"alpha{i}x" for i in range(size))
        assert count_tokens(distil(text, files=(FileTouch("a.py", "modified"),)).text) <= count_tokens(text) + 1


def test_records_do_not_depend_on_the_batch() -> None:
    exchanges = [Exchange(name, user, answer) for name, (user, answer) in list(MESSY.items())[:4]]
    alone = {e.exchange_id: Extractive().distil_one(e) for e in exchanges}
    for order in permutations(exchanges):
        assert {e.exchange_id: record for e, record in Extractive().distil(order)} == alone


def test_an_exchange_without_words_fails_with_a_reason() -> None:
    assert Extractive().distil_one(Exchange("e", " \n", "")) == Failed("the exchange holds no words")


def test_the_record_of_a_long_paste_stays_small() -> None:
    line = "ERROR worker 17: retry `job_id=42` --force <tag attr failed (no space left); "
    small, large = (Exchange("e", line * n, "") for n in (130, 1300))
    assert len(large.text) > 100_000
    records = [Extractive().distil_one(e) for e in (small, large)]
    assert all(isinstance(r, Distilled) for r in records)
    tokens = [count_tokens(r.text) for r in records if isinstance(r, Distilled)]
    assert tokens[1] <= 10 ** Weights().exponent * tokens[0] + 12
