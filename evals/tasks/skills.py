"""Skill routing: a task's instruction -> the skills that it needs, among 1,505 SKILL.md documents.

Paper: "SkillRouter" (2603.22455, card 152). Data: SkillsBench tasks; a pool of public skills (Apache-2.0 and MIT).
Deviations: SkillRouter grades its degraded copies 1; here grade 1 goes to the near duplicates of a gold skill from
    other collections. Gold is 3, and binary metrics count gold only, as in the paper.
Verified by: tests/evals/test_tasks.py.
"""

from __future__ import annotations

from pathlib import Path

from workbench.evals.tasks.base import Document, Query, RecallTask, read_jsonl, shared_data

GOLD, NEAR_DUPLICATE = 3.0, 1.0


def load(pool_path: Path | None = None, queries_path: Path | None = None, *, with_body: bool = True) -> RecallTask:
    """Skill routing; one scope, one document a skill.

    Args: pool_path, queries_path: skills_pool.jsonl.gz and skills_queries_dev.jsonl, None = the shared data;
        with_body: False leaves name and description only (the paper's ablation).
    Raises: InputError that names file and line.
    """
    documents: list[Document] = []
    seen: set[str] = set()
    for row in read_jsonl(pool_path or shared_data("skills_pool.jsonl.gz")):
        parts = [row.get("name", str), row.get("description", str), row.get("body", str) if with_body else ""]
        documents.append(Document(row.new_id("id", seen), "\n".join(part for part in parts if part)))
    known = {document.id for document in documents}
    queries = []
    for row in read_jsonl(queries_path or shared_data("skills_queries_dev.jsonl")):
        gold, near = row.texts("gold"), row.texts("near_duplicates")
        if missing := [doc for doc in (*gold, *near) if doc not in known]:
            raise row.error(f"the skill {missing[0]!r} is not in the pool")
        relevance = dict.fromkeys(near, NEAR_DUPLICATE) | dict.fromkeys(gold, GOLD)
        category = "single" if len(gold) == 1 else "multi"
        queries.append(Query(row.words("qid"), row.words("query"), relevance, category=category))
    return RecallTask(
        "skills", "1" if with_body else "1-names", tuple(documents), tuple(queries), relevant_from=GOLD,
        licence="Apache-2.0, MIT",
    )  # fmt: skip
