"""The token estimator: fixed values, additivity, and its calibration on the recorded sessions."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.memory.tokens import count_tokens

DATA = Path(os.environ.get("WORKBENCH_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        ("   ", 0),
        ("the cat sat", 3),
        ("manual_commit_hooks.go", 4),
        ("SaveChanges()", 3),
        ("2026", 2),
        ("日本語", 3),
        ("end.\n\nNext", 3),
    ],
)
def test_known_counts(text: str, tokens: int) -> None:
    assert count_tokens(text) == tokens


@given(st.text(max_size=80), st.text(max_size=80))
def test_joining_two_texts_with_a_blank_adds_at_most_one_token(left: str, right: str) -> None:
    together = count_tokens(f"{left} {right}")
    assert abs(together - count_tokens(left) - count_tokens(right)) <= 1


def test_mean_of_the_development_corpus() -> None:
    path = DATA / "agentlog_corpus_dev.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is missing: set WORKBENCH_SHARED_DATA to the folder with the development corpus")
    with gzip.open(path) as lines:
        rows = [orjson.loads(line) for line in lines]
    texts = [f"{row['user']}\n\n{row['assistant']}" if row["assistant"] else row["user"] for row in rows]
    # 541 is the mean of the study's BPE (research/memory.md, 6.3).
    assert sum(map(count_tokens, texts)) / len(texts) == pytest.approx(541, rel=0.01)
