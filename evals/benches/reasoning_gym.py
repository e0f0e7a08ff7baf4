"""Problems of reasoning-gym (Stojanovski et al. 2025, arXiv 2505.24760, Apache-2.0), judged by its own scorers."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

from workbench.errors import MissingExtra
from workbench.evals.benches.base import Split, prompts
from workbench.evals.verifiers import REASONING_GYM as GRADER
from workbench.evals.verifiers import reasoning_gym as verify
from workbench.policies.tasks import Task

__all__ = ["GENERATORS", "GRADER", "MAX_TOKENS", "load", "verify"]
MAX_TOKENS = 512
#: Those whose problems survive JSON, whose answer is text, and which take a few milliseconds each.
GENERATORS = (
    "chain_sum", "basic_arithmetic", "lcm", "leg_counting", "letter_counting", "number_sorting", "word_sorting",
    "simple_equations", "gcd", "base_conversion", "mini_sudoku", "knights_knaves", "shortest_path",
    "family_relationships", "calendar_arithmetic", "largest_island",
)  # fmt: skip
NUM_EACH = {"test": 50, "train": 200}
SEEDS = {"test": 1, "train": 2}


def load(split: Split) -> list[Task]:
    """Problems of every generator; a train problem that is a test problem too is left out.

    Raises: MissingExtra without reasoning-gym.
    """
    tasks = []
    for name in GENERATORS:
        taken = {entry["question"] for entry in _entries(name, "test")} if split == "train" else set()
        for at, entry in enumerate(_entries(name, split)):
            if entry["question"] not in taken:
                taken.add(entry["question"])
                tasks.append(_task(f"reasoning_gym-{name}-{split}-{at}", name, entry))
    return tasks


def _entries(name: str, split: Split) -> list[dict[str, Any]]:
    try:
        library = import_module("reasoning_gym")
    except ImportError as error:
        raise MissingExtra("This bench needs reasoning-gym", "evals") from error
    problems = library.create_dataset(name, size=NUM_EACH[split], seed=SEEDS[split])
    # By way of JSON, as the store keeps them: tuples become lists.
    return [json.loads(json.dumps(problems[at])) for at in range(NUM_EACH[split])]


def _task(id: str, name: str, entry: dict[str, Any]) -> Task:
    question = f"{entry['question']}\n\nWork it out, then give the answer between <answer> and </answer>.\n"
    worked = f"<answer>{entry['answer']}</answer>"
    return Task(id, prompts(question, worked), worked, meta={"generator": name, "entry": entry})
