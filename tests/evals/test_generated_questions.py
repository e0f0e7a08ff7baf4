"""The leak filter of generated questions: what may be asked of a source, and what would only measure copying."""

from __future__ import annotations

import pytest

from workbench.evals.generated_questions import _accept, leak

SOURCE = (
    "the upload stops at large files\nThe proxy cut requests off after 60 seconds; I raised proxy_read_timeout in "
    "nginx.conf to 600 and the upload of the 2 GB archive finishes now."
)


@pytest.mark.parametrize(
    ("question", "answer", "problem"),
    [
        ("Why did big transfers break before they were through the proxy?", "cut off after 60 seconds", ""),
        ("Which setting made sending huge archives work again?", "proxy_read_timeout in nginx.conf", ""),
        ("Why does the upload stops at large files happen?", "the proxy cut requests off", "copied_phrase"),
        ("What did proxy timeout, nginx upload, archive requests raise?", "600", "copied_words"),
        ("Which colour has the moon over the sea?", "600", "unrelated"),
        ("Which setting made sending huge archives work again?", "a bigger machine was bought", "answer_not_in_source"),
        ("Which setting made sending huge archives work again?", "the", "answer_not_in_source"),
        ("What was wrong?", "the proxy", "unfit_length"),
        ("What about archives " + "and so on " * 20, "the proxy", "unfit_length"),
        ("Which token was [REDACTED:api-key] for the archives there?", "proxy", "about_a_secret"),
    ],
)
def test_leak(question: str, answer: str, problem: str) -> None:
    assert leak(question, answer, SOURCE) == problem


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"question": "why  so?", "answer": " it is "}', '{"question": "why so?", "answer": "it is"}'),
        ('```json\n{"question": "q", "answer": "a"}\n```', '{"question": "q", "answer": "a"}'),
        ('{"question": "q"}', ""),
        ('{"question": "q", "answer": ""}', ""),
        ('{"question": "q", "answer": 1}', ""),
        ('["question", "answer"]', ""),
        ("What is it?", ""),
        ("", ""),
        ('{"question": "q", "answer": ', ""),
    ],
)
def test_only_an_object_with_both_texts_is_kept(text: str, kept: str) -> None:
    assert _accept(text) == kept
