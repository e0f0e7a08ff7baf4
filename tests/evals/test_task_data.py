"""The recall tasks on the shared evaluation data: counts, known scores, and a published baseline."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from workbench.evals.metrics import evaluate
from workbench.evals.tasks import TASKS, load_task, locomo
from workbench.evals.tasks.base import judgements, oracle_run, random_run

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("WORKBENCH_SHARED_DATA", ROOT.parent / "shared" / "data"))
needs_real = pytest.mark.skipif(
    not (SHARED / "locomo10.json").is_file(), reason=f"no evaluation data in {SHARED} (set WORKBENCH_SHARED_DATA)"
)


@needs_real
def test_real_locomo_has_the_counts_of_the_notes() -> None:
    task = load_task("locomo")
    assert (len(task.scopes()), len(task.documents), len(task.queries)) == (10, 5882, 1536)
    counts = dict.fromkeys((q.category for q in task.queries), 0)
    for query in task.queries:
        counts[query.category] += 1
    assert counts == {"multi-hop": 282, "temporal": 321, "open-domain": 92, "single-hop": 841}
    assert task.notes == {
        "audit_changed_turns": 92, "audit_entries": 156, "audit_without_turn": 1, "evidence_malformed": 7,
        "evidence_unknown_turn": 3, "questions_without_evidence": 4,
    }  # fmt: skip
    assert len(locomo.load(adversarial=True).queries) == 1982


@needs_real
def test_real_agentlog_and_skills_have_the_counts_of_the_notes() -> None:
    task = load_task("agentlog")
    assert (len(task.documents), len(task.queries)) == (1887, 427)
    assert sum(len(q.relevance) for q in task.queries) == 961
    routing = load_task("skills")
    assert (len(routing.documents), len(routing.queries)) == (1505, 26)


@needs_real
@pytest.mark.parametrize("name", TASKS)
def test_oracle_and_chance_on_real_tasks(name: str) -> None:
    """Silent failure P2, per task: a random policy and one that knows the answers, against known scores."""
    task = load_task(name)
    grades = judgements(task.queries)
    best = evaluate(oracle_run(task.queries), grades, ["ndcg@10", "mrr"], relevant_from=task.relevant_from)
    assert best.means() == pytest.approx({"ndcg@10": 1.0, "mrr": 1.0})
    assert (best.num_judged_empty, best.num_empty) == (0, 0)
    chance = evaluate(random_run(task, task.queries), grades, ["recall@50"], relevant_from=task.relevant_from)
    sizes = {scope: len(documents) for scope, documents in task.scopes().items()}
    expected = sum(50 / sizes[q.scope] for q in task.queries) / len(task.queries)
    spread = max(0.01, 4 * (expected / len(task.queries)) ** 0.5)
    assert chance.means()["recall@50"] == pytest.approx(expected, abs=spread)


@needs_real
def test_bm25_on_real_agentlog_is_near_the_published_baseline() -> None:
    """research/memory.md section 6.2: nDCG@10 .384, MRR .430, Recall@10 .462 with another stop list."""
    import duckdb

    from workbench.memory import postings
    from workbench.memory.bm25 import WarmBm25

    task = load_task("agentlog")
    con = duckdb.connect()
    con.execute((ROOT / "data/schema/0002_recall.sql").read_text())
    at = {document.id: number for number, document in enumerate(task.documents)}
    rows = [(at[d.id], d.user, d.assistant, None if d.previous is None else at[d.previous]) for d in task.documents]
    postings.add(con, "verbatim", "stem/1", rows)
    searcher, run = WarmBm25(con, "verbatim"), {}
    for query in task.queries:
        docs, scores = searcher.search(query.text, 1000)
        run[query.id] = [(task.documents[d].id, float(s)) for d, s in zip(docs, scores, strict=True)]
    means = evaluate(run, judgements(task.queries), ["ndcg@10", "mrr", "recall@10"]).means()
    assert means == pytest.approx({"ndcg@10": 0.384, "mrr": 0.430, "recall@10": 0.462}, abs=0.015)
    rng = random.Random(0)
    shuffled = {query: rng.sample(found, len(found)) for query, found in run.items()}
    assert evaluate(shuffled, judgements(task.queries), ["ndcg@10", "mrr", "recall@10"]).means() == means
