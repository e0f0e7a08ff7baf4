"""A task whose rationale can be checked: the sum of digits modulo 3, and as its rationale the running sum's states.

What distilling step-by-step is tried on: few labelled examples, of which a student without rationales learns little.
Three policies are stored: "labels" (the answer), "rationales" (the states after each digit, the last of which is the
answer), and "shuffled" (each task has the rationale of another one: as many words of the same kind, no information).
"""

from __future__ import annotations

import copy
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workbench.policies.lm.rollout import Rollout
from workbench.policies.lm.run import run_method
from workbench.policies.lm.settings import Settings
from workbench.policies.lm.tiny import make_model, make_tokenizer
from workbench.policies.nouns import Method
from workbench.policies.tasks import Task

MODULUS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Of a school; the defaults are those of benchmarks/bench_step_by_step.py.

    Args: digits: of a task; num_train, num_test: tasks, no digits of one are those of another; hidden, layers: of the
        student.
    """

    digits: int = 4
    num_train: int = 200
    num_test: int = 1000
    hidden: int = 64
    layers: int = 2


@dataclass(frozen=True, slots=True)
class School:
    """What all methods share for one seed."""

    seed: int
    start: Any
    tokenizer: Any
    train: list[Task]
    test: list[Task]
    stored: dict[str, dict[str, list[Rollout]]]


def make_school(seed: int, sizes: Sizes | None = None) -> School:
    """An untrained student, tasks, and what is written about them, all by the seed."""
    sizes = sizes or Sizes()
    tokenizer = make_tokenizer(["predict", "explain", *map(str, range(10)), *(f"s{n}" for n in range(MODULUS))])
    rng = random.Random(seed)
    numbers = rng.sample(range(10**sizes.digits), sizes.num_train + sizes.num_test)
    tasks = [_task([int(digit) for digit in f"{number:0{sizes.digits}d}"]) for number in numbers]
    known = tasks[: sizes.num_train]
    others = known[1:] + known[:1]  # in a random order already
    stored = {
        "labels": {task.id: [_written(tokenizer, task, "prompt", task.answer)] for task in known},
        "rationales": {task.id: [_written(tokenizer, task, "explain", task.meta["states"])] for task in known},
        "shuffled": {
            task.id: [_written(tokenizer, task, "explain", other.meta["states"])]
            for task, other in zip(known, others, strict=True)
        },
    }
    start = make_model(tokenizer, seed, sizes.hidden, sizes.layers)
    return School(seed, start, tokenizer, known, tasks[sizes.num_train :], stored)


def _task(digits: list[int]) -> Task:
    text = " ".join(map(str, digits))
    states = [f"s{sum(digits[: n + 1]) % MODULUS}" for n in range(len(digits))]
    prompts = {"prompt": f"predict {text}", "explain": f"explain {text}"}
    return Task(f"digits-{text.replace(' ', '')}", prompts, states[-1], meta={"states": " ".join(states)})


def _written(tokenizer: Any, task: Task, context: str, text: str) -> Rollout:
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return Rollout(task.id, tokenizer(task.prompt(context))["input_ids"], ids)


def graduate(school: School, method: Method, settings: Settings) -> NDArray[np.float64]:
    """1 for each test task whose answer the student gives after training by the method, else 0."""
    with tempfile.TemporaryDirectory() as folder:
        student = run_method(
            copy.deepcopy(school.start), school.tokenizer, method, school.train, replace(settings, seed=school.seed),
            Path(folder), stored=school.stored,
        )  # fmt: skip
    return answers(student, school)


def answers(student: Any, school: School) -> NDArray[np.float64]:
    """1 for each test task whose answer is the student's likeliest next word after the prompt, else 0."""
    import torch

    ids = torch.tensor([school.tokenizer(task.prompt("prompt"))["input_ids"] for task in school.test])
    with torch.no_grad():
        said = student.eval()(input_ids=ids).logits[:, -1].argmax(-1).tolist()
    right = [
        school.tokenizer.convert_ids_to_tokens(word) == t.answer for word, t in zip(said, school.test, strict=True)
    ]
    return np.array(right, np.float64)
