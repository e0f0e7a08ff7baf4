"""Retrievers of users that change what they are given, or that hide what went wrong."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import recall_made as m

from workbench.data.store import Store
from workbench.errors import InputError
from workbench.evals import recall_scores
from workbench.evals.recall_run import run
from workbench.evals.tasks.base import Document


def _scored(path: Path, task: Any, run_id: str) -> recall_scores.Scored:
    stored = recall_scores.fetch(path, run_id)
    return recall_scores.score(stored, task, task.queries, recall_scores.tokens_of(task))


def test_a_retriever_that_empties_its_documents_does_not_change_what_others_search(tmp_path: Path) -> None:
    """P1: the others' answers are stored under their own ids, and would be believed later."""

    class Greedy(m.Made):  # type: ignore[name-defined]
        def build(self, documents: Any, folder: Path) -> Any:
            del documents[1:]
            return super().build(documents, folder)

    task = m.made()
    found = {}
    for name, before in (("alone", []), ("after", [Greedy("greedy", lambda *_: [])])):
        path = tmp_path / f"{name}.duckdb"
        outcome = run(path, task, [*before, m.overlap()], split="all", k=10)
        with Store(path) as store:
            found[name] = store.con.execute(
                "SELECT query_id, docs FROM eval_results WHERE run_id = ? ORDER BY query_id",
                [outcome.run_ids["overlap"]],
            ).fetchall()
    assert found["alone"] == found["after"]


def test_a_timeout_that_the_retriever_caught_is_no_empty_answer(tmp_path: Path) -> None:
    """P5: such a query would be a 0 that looks like an answer."""

    def search(text: str, documents: Sequence[Document], k: int) -> list[tuple[str, float]]:
        with contextlib.suppress(Exception):
            time.sleep(30)
        return []

    path, task = tmp_path / "s.duckdb", m.made(2)
    outcome = run(path, task, [m.Made("careless", search)], split="all", timeout_seconds=0.1)
    result = _scored(path, task, outcome.run_ids["careless"])
    assert result.statuses() == {"timeout": 2}
    assert result.first_error() == "TimeoutError: no answer within 0.1 s"


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_timeout_that_cannot_be_meant_is_refused(tmp_path: Path, seconds: float) -> None:
    with pytest.raises(InputError, match="timeout of a query"):
        run(tmp_path / "s.duckdb", m.made(2), [m.overlap()], split="all", timeout_seconds=seconds)
