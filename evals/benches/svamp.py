"""SVAMP (Patel et al. 2021, arXiv 2103.07191, MIT): word problems with one operation and a distraction."""

from __future__ import annotations

from workbench.evals.benches.base import FINAL_LINE, Split, prompts, split_of
from workbench.evals.tasks.base import read_jsonl, shared_data
from workbench.evals.verifiers import NUMBER as GRADER
from workbench.evals.verifiers import number as verify
from workbench.policies.tasks import Task

__all__ = ["GRADER", "MAX_TOKENS", "load", "verify"]
MAX_TOKENS = 256


def load(split: Split) -> list[Task]:
    """Half of the 1,000 problems, by their text; published figures are over all of them (split all)."""
    tasks = []
    for row in read_jsonl(shared_data("llm/svamp_test.jsonl")):
        body = row.words("Body").strip()
        question = f"{body}{'' if body.endswith(('.', '!', '?')) else '.'} {row.words('Question').strip()}"
        if split_of(question) == split:
            worked = f"{row.words('Equation')}\n#### {row.get('Answer', float):g}"
            texts = prompts(f"{question}\n\n{FINAL_LINE}\n", worked)
            tasks.append(Task(f"svamp-{row.words('ID')}", texts, worked, meta={"type": row.words("Type")}))
    return tasks
