"""Policies with known scores over characters as tokens, for the tests of benches.

Also run as a script (`python bench_made.py STORE KILL_AT`): an evaluation that is killed in its KILL_AT-th batch.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from workbench.data.store import Store
from workbench.evals.bench_report import report
from workbench.evals.bench_run import Policy, Sampling, run_bench
from workbench.evals.benches.base import Bench
from workbench.evals.verifiers import NUMBER, number
from workbench.policies.tasks import Task

#: (what the policy reads, random numbers of this completion) -> what it says.
Say = Callable[[str, random.Random], str]


class Characters:
    """A tokenizer: one token a character, 0 = end."""

    eos_token_id = 0
    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) + 1 for c in text]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(i - 1) for i in ids if i)

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> list[int]:
        return self("".join(f"<{m['role']}>{m['content']}" for m in messages))["input_ids"]


def policy(say: Say, version: str = "1", name: str = "made") -> Policy:
    """A policy that says what the function returns, and then ends."""
    tokenizer = Characters()

    def writer(temperature: float, seed: int) -> Any:
        def write(prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
            return [
                [*tokenizer(say(tokenizer.decode(ids), random.Random(f"{seed}/{at}")))["input_ids"], 0][:max_tokens]
                for at, ids in enumerate(prompts)
            ]

        return write

    return Policy(name, version, tokenizer, writer)


def oracle(tasks: Sequence[Task]) -> Policy:
    """Says a task's answer."""
    answers = {task.prompts["prompt"]: task.answer for task in tasks}
    return policy(lambda prompt, rng: answers[prompt])


def sums(num: int = 60) -> Bench:
    """Tasks `a + b`."""
    tasks = [Task(f"sum-{n:03d}", {"prompt": f"{n} + {n * n} = "}, f"#### {n + n * n}") for n in range(num)]
    return Bench("sums", "test", tasks, NUMBER, 64, number)


def adder(share: float, version: str = "1") -> Policy:
    """Right with this probability, otherwise one too many."""

    def say(prompt: str, rng: random.Random) -> str:
        a, b = prompt.removesuffix(" = ").split(" + ")
        return f"#### {int(a) + int(b) + (rng.random() >= share)}"

    return policy(say, version)


def killed_at(batch: int) -> Policy:
    """As adder(0.5), but its process dies in that batch."""
    inner, calls = adder(0.5), [0]

    def writer(temperature: float, seed: int) -> Any:
        calls[0] += 1
        if calls[0] == batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner.writer(temperature, seed)

    return Policy(inner.name, inner.version, inner.tokenizer, writer)


SAMPLING = Sampling(temperature=1.0, max_tokens=64, batch_size=16)
GREEDY = replace(SAMPLING, temperature=0.0)
COLUMNS = "eval_id, task_id, sample, status, score, text, extracted, grader, tokens, error"


def rows(store: Path) -> list[Any]:
    with Store(store, read_only=True) as opened:
        return opened.con.execute(f"SELECT {COLUMNS} FROM evaluations ORDER BY ALL").fetchall()


def scored(tmp_path: Path, bench: Any, policy: Policy, sampling: Sampling = GREEDY, **options: Any) -> dict[str, Any]:
    store = tmp_path / "s.duckdb"
    return report(store, run_bench(store, bench, policy, sampling, **options))


if __name__ == "__main__":
    run_bench(Path(sys.argv[1]), sums(), killed_at(int(sys.argv[2])), SAMPLING, num_samples=2)
