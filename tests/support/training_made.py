"""Small recipes, models and stores for the tests of `workbench train`."""

from __future__ import annotations

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


def plain_model(folder: Path, words: list[str] | None = None, name: str = "model") -> str:
    """A saved model, and tasks with answers in the store."""
    tokenizer = make_tokenizer(words)
    make_model(tokenizer, 1, 16, 1).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    tasks = [Task(f"sum-{i}", {"prompt": f"w{i} w{i + 1}"}, f"w{2 * i + 1}") for i in range(8)]
    with Store(folder / "s.duckdb") as store, store.transaction() as con:
        save_tasks(con, "sums", "train", tasks)
    return str(folder / name)
