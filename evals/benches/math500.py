"""MATH-500 (Hendrycks et al. 2021, arXiv 2103.03874; the 500 of Lightman et al. 2023, MIT): competition mathematics."""

from __future__ import annotations

from workbench.evals.benches.base import Split, prompts, split_of
from workbench.evals.tasks.base import read_json, row_of, shared_data
from workbench.evals.verifiers import MATH as GRADER
from workbench.evals.verifiers import mathematics as verify
from workbench.policies.tasks import Task

__all__ = ["GRADER", "MAX_TOKENS", "load", "verify"]
MAX_TOKENS = 1024


def load(split: Split) -> list[Task]:
    """Half of the 500 problems, by their text; published figures are over all of them (split all)."""
    path = shared_data("llm/math500_test.json")
    tasks = []
    for at, value in enumerate(read_json(path, list)):
        row = row_of(f"{path}, problem {at}", value)
        problem, worked = row.words("problem"), row.words("solution")
        if split_of(problem) == split:
            texts = prompts(f"{problem}\n\nWork it out, then give the final answer in \\boxed{{}}.\n", worked)
            meta = {"subject": row.words("subject"), "level": row.get("level", int)}
            tasks.append(Task(f"math500-{row.words('unique_id').removesuffix('.json')}", texts, worked, meta=meta))
    return tasks
