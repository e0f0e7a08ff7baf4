"""Countdown: make the target of the given numbers with + - * /, each number at most once. Solvable by construction."""

from __future__ import annotations

import random
from fractions import Fraction

from workbench.evals.benches.base import Split, prompts, split_of
from workbench.evals.verifiers import COUNTDOWN as GRADER
from workbench.evals.verifiers import countdown as verify
from workbench.policies.tasks import Task

__all__ = ["GRADER", "MAX_TOKENS", "load", "verify"]
MAX_TOKENS = 256
NUM_PROBLEMS = {"train": 2000, "test": 500}
_MAX_TARGET = 999


def load(split: Split, seed: int = 0) -> list[Task]:
    """Problems of 3 or 4 numbers up to 25, in the order of a seeded stream that both splits are drawn from."""
    rng = random.Random(f"countdown/{seed}")
    tasks: list[Task] = []
    seen: set[str] = set()
    while len(tasks) < NUM_PROBLEMS[split]:
        numbers = sorted(rng.randint(1, 25) for _ in range(rng.choice((3, 4))))
        target, expression = _combine(rng, numbers)
        key = f"{'-'.join(map(str, numbers))}-{target}"
        if target in numbers or not 10 <= target <= _MAX_TARGET or target.denominator != 1 or key in seen:
            continue
        seen.add(key)
        if split_of(key, test_share=0.2) == split:
            worked = f"#### {expression}"
            question = (
                f"Make {target} of the numbers {', '.join(map(str, numbers))} with + - * / and parentheses; use each "
                "number at most once. End with one line: #### and the expression.\n"
            )
            meta = {"numbers": numbers, "target": int(target)}
            tasks.append(Task(f"countdown-{key}", prompts(question, worked), worked, meta=meta))
    return tasks


def _combine(rng: random.Random, numbers: list[int]) -> tuple[Fraction, str]:
    """A random expression of all the numbers, and its value."""
    parts = [(Fraction(number), str(number)) for number in numbers]
    while len(parts) > 1:
        rng.shuffle(parts)
        (a, left), (b, right) = parts.pop(), parts.pop()
        signs = "+-*/" if b and (a / b).denominator == 1 else "+-*"
        sign = rng.choice(signs)
        value = {"+": a + b, "-": a - b, "*": a * b}[sign] if sign != "/" else a / b
        parts.append((value, f"({left} {sign} {right})"))
    value, expression = parts[0]
    return value, expression[1:-1]
