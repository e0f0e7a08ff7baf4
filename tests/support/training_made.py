"""Small recipes, models and stores for the tests of `workbench train`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from tiny_models import make_model, make_tokenizer

from workbench.data.store import Store
from workbench.policies.store import save_tasks
from workbench.policies.tasks import Task
from workbench.recipes import Recipe, parse

SMALL: dict[str, Any] = {
    "method": "gkd",
    "student": {"new": {"hidden": 16, "layers": 1, "seed": 1}},
    "models": {"teacher": {"new": {"hidden": 16, "layers": 1, "seed": 2}}},
    "environment": {"name": "rooms", "size": 3},
    "tasks": {"limit": 8},
    "settings": {
        "steps": 2, "batch_size": 4, "learning_rate": 1e-2, "max_completion_tokens": 8, "log_every": 1, "cpu": True,
    },
}  # fmt: skip


def recipe(folder: Path, **changes: Any) -> Recipe:
    settings = {**SMALL["settings"], **changes.pop("settings", {})}
    return parse({**SMALL, "output": str(folder / "out"), **changes, "settings": settings})


def query(folder: Path, sql: str) -> list[Any]:
    with Store(folder / "s.duckdb", read_only=True) as store:
        return store.con.execute(sql).fetchall()


CHILD_CODE = "the child's code"
_CHILD = """
import sys
import torch
torch.set_num_threads(1)
from workbench import train as training
from workbench.policies.running import Interrupted
from workbench.recipes import read
recipe, store, phase, code = sys.argv[1:]
training.code_version = lambda: code
asked = []
def say(text):
    if f"{phase}: step" in text and not asked:
        asked.append(text)
        print("metric", flush=True)
        sys.stdin.readline()
try:
    training.train(read(recipe), store, say=say)
except Interrupted as stop:
    print(stop)
    sys.exit(130)
"""


def training_child(folder: Path, phase: str) -> subprocess.Popen[str]:
    """A process that trains folder/r.yaml as CHILD_CODE, stopped at the phase's first metrics until a line comes in."""
    command = [sys.executable, "-c", _CHILD, str(folder / "r.yaml"), str(folder / "s.duckdb"), phase, CHILD_CODE]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout
    assert child.stdout.readline() == "metric\n", child.communicate(timeout=60)[1][-3000:]
    return child


def plain_model(folder: Path, words: list[str] | None = None, name: str = "model") -> str:
    """A saved model, and tasks with answers in the store."""
    tokenizer = make_tokenizer(words)
    make_model(tokenizer, 1, 16, 1).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    tasks = [Task(f"sum-{i}", {"prompt": f"w{i} w{i + 1}"}, f"w{2 * i + 1}") for i in range(8)]
    with Store(folder / "s.duckdb") as store, store.transaction() as con:
        save_tasks(con, "sums", "train", tasks)
    return str(folder / name)
