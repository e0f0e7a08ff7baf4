"""Template marks: found where a text was not rendered, and not where braces mean something else."""

from __future__ import annotations

import pytest

from workbench.evals.templates import template_mark


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("Q: {{question}}", "{{question}}"),
        ("{{- choices[0] | trim }} or", "{{- choices[0] | trim }}"),
        ("a {% if x %} b", "{% if x %}"),
        ("Question: {question}\nAnswer:", "{question}"),
        ("{choices}", "{choices}"),
    ],
)
def test_marks_that_were_left(text: str, mark: str) -> None:
    assert template_mark(text) == mark


@pytest.mark.parametrize(
    "text",
    [
        "", "plain", "${{ github.sha }}", "GET /users/{id}", "/v1/{query}", "\\frac{1}{2}", "{}", "f(x) = {x}", "{{}}",
        "if (a) { b }", "set {1, 2}", "{{1, 2}, {3}}", "100%", "{'answer': 1}",
    ],
)  # fmt: skip
def test_braces_that_are_no_marks(text: str) -> None:
    assert template_mark(text) == ""
