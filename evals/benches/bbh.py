"""BIG-Bench Hard (Suzgun et al. 2022, arXiv 2210.09261, MIT): 27 tasks with a choice, a word, a number or brackets.

Prompts have no examples and no chains of thought, so that scores are below those of the paper's few-shot prompts.
"""

from __future__ import annotations

from workbench.evals.benches.base import FINAL_LINE, Split, prompts, split_of
from workbench.evals.tasks.base import read_json, row_of, shared_data
from workbench.evals.verifiers import EXACT as GRADER
from workbench.evals.verifiers import exact as verify
from workbench.policies.tasks import Task

__all__ = ["GRADER", "MAX_TOKENS", "TASKS", "load", "verify"]
MAX_TOKENS = 512
TASKS = (
    "boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages",
    "formal_fallacies", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects",
    "logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation",
    "multistep_arithmetic_two", "navigate", "object_counting", "penguins_in_a_table",
    "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks",
    "sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies",
    "word_sorting",
)  # fmt: skip


def load(split: Split) -> list[Task]:
    """Half of the problems of every task, by their text; published figures are over all of them (split all)."""
    return [task for name in TASKS for task in _load(name) if split_of(f"{name}/{task.prompt('prompt')}") == split]


def _load(name: str) -> list[Task]:
    path = shared_data(f"llm/bbh/{name}.json")
    tasks = []
    for at, value in enumerate(row_of(str(path), read_json(path, dict)).get("examples", list)):
        row = row_of(f"{path}, example {at}", value)
        question = prompts(f"{row.words('input')}\n\n{FINAL_LINE}\n")
        tasks.append(Task(f"bbh-{name}-{at}", question, f"#### {row.words('target')}", meta={"task": name}))
    return tasks
