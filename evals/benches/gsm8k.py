"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168, MIT): word problems of grade school with worked answers.

The calculator's marks (<<48/2=24>>) are left out of the worked answers.
"""

from __future__ import annotations

import re

from workbench.evals.benches.base import FINAL_LINE, Split, prompts
from workbench.evals.tasks.base import read_jsonl, shared_data
from workbench.evals.verifiers import NUMBER as GRADER
from workbench.evals.verifiers import number as verify
from workbench.policies.tasks import Task

__all__ = ["GRADER", "MAX_TOKENS", "load", "verify"]
MAX_TOKENS = 512


def load(split: Split) -> list[Task]:
    """The data's own split."""
    tasks = []
    for at, row in enumerate(read_jsonl(shared_data(f"llm/gsm8k_{split}.jsonl"))):
        worked = re.sub(r"<<[^>]*>>", "", row.words("answer"))
        question = f"{row.words('question').strip()}\n\n{FINAL_LINE}\n"
        tasks.append(Task(f"gsm8k-{split}-{at}", prompts(question, worked), worked))
    return tasks
