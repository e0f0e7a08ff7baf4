"""Template marks that were left in what should be a finished text.

An unrendered prompt or choice scores without complaint (an untrained model got 100 % on a list of choices that was
never rendered, evals.md P2). So a text that still has a mark is refused, unless its row says that it is meant.

Verified by: tests/evals/test_templates.py.
"""

from __future__ import annotations

import re

#: {{ name }} and {% tag %} of Jinja (not GitHub's ${{ … }}), and str.format's {name} for the names of a prompt's parts.
_MARK = re.compile(
    r"(?<!\$)\{\{-?\s*[A-Za-z_][^{}]*\}\}|\{%-?.*?%\}"
    r"|(?<![{\w/])\{(?:question|answer|choices?|context|passage|prompt|query|target|reference|input|text)\}(?!\})",
    re.DOTALL,
)


def template_mark(text: str) -> str:
    """The first template mark in a text, "" if it has none."""
    found = _MARK.search(text)
    return found.group() if found else ""
