"""The model card of a trained student: where everything in it came from, so that it can be checked and made again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import duckdb

from workbench.policies.catalog import method_module


def card(
    run_id: str, recipe: Mapping[str, Any], lineage: Mapping[str, Any], code: str, packages: Mapping[str, str],
    version: str, evaluations: Sequence[Mapping[str, Any]],
) -> str:  # fmt: skip
    """README.md of the model, Markdown.

    Args: version: digest of the trained weights; evaluations: as `evaluations_of` gives them.
    """
    entry = method_module(recipe["method"]).ENTRY
    tasks = lineage["tasks"]
    models = [("student", lineage["student"]), *lineage["models"].items()]
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [workbench, distillation]",
        "---", "",
        f"# {recipe['method']} · {tasks['set']}", "",
        f"A student trained by {entry.title} (arXiv {entry.arxiv}, card {entry.seed}), run `{run_id}`.", "",
        "| | |", "|---|---|",
        f"| weights | `{version}` |", f"| seed | {recipe['settings']['seed']} |", f"| code | `{code}` |",
        f"| packages | {', '.join(f'{name} {number}' for name, number in packages.items())} |", "",
        "## Models", "", "| role | version | from |", "|---|---|---|",
        *(f"| {role} | `{one['version']}` | {_text(one['source'])} |" for role, one in models), "",
        "## Tasks and rollouts", "",
        f"{tasks['count']:,} tasks of `{tasks['set']}` ({tasks['split']}), digest `{tasks['digest']}`.", "",
    ]  # fmt: skip
    if lineage["rollouts"]:
        lines += ["| policy | rollouts | tasks | digest | written by |", "|---|---|---|---|---|"]
        lines += [
            f"| {one['policy']} | {one['num']:,} | {one['tasks']:,} | `{one['digest']}` | "
            f"{', '.join(f'`{_text(name)}`' for name in one['versions'])} |"
            for one in lineage["rollouts"]
        ]
    else:
        lines.append("No stored rollouts: everything was written during training.")
    lines += ["", "## Method", "", f"What is our reading rather than the paper's: {entry.reading}.", ""]
    lines += [
        "```json",
        json.dumps({key: recipe[key] for key in ("method", "config", "settings")}, indent=1),
        "```",
        "",
    ]
    lines += ["## Evaluations", ""]
    if evaluations:
        lines += [
            "| task set | split | grader | answers | not graded | mean score | id |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {one['task_set']} | {one['split']} | {one['grader']} | {one['num']:,} | {one['ungraded']:,} | "
            f"{'none' if one['score'] is None else format(one['score'], '.3f')} | `{one['eval_id']}` |"
            for one in evaluations
        ]
    else:
        lines.append("None in the store yet.")
    return "\n".join(lines) + "\n"


def evaluations_of(con: duckdb.DuckDBPyConnection, run_id: str, version: str) -> list[dict[str, Any]]:
    """One row for each evaluation of the run's model: num answers, those without a score, the mean of the others."""
    rows = con.execute(
        "SELECT b.eval_id, b.task_set, b.split, b.grader, count(*), count(*) - count(e.score), avg(e.score) "
        "FROM eval_benches b JOIN evaluations e USING (eval_id) WHERE b.run_id = ? OR b.model_version = ? "
        "OR contains(b.model, ?) GROUP BY ALL ORDER BY ALL",
        [run_id, version, f"{run_id}/model"],  # the last: a bench names a model by its folder, which holds the run's id
    ).fetchall()
    names = ("eval_id", "task_set", "split", "grader", "num", "ungraded", "score")
    return [dict(zip(names, row, strict=True)) for row in rows]


def _text(value: str) -> str:
    return " ".join(value.replace("|", "\\|").replace("`", "'").split())
