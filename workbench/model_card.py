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
    tasks = lineage["tasks"]
    lines = [
        *_head(run_id, recipe, lineage, code, packages, version, tasks["set"], "transformers", "text-generation"),
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
    lines += [
        f"\nScores of `{one['teacher']}` (`{_text(one['version'])}`, prompt `{_text(one['context'])}`): its {one['k']} "
        f"likeliest words of every token of {one['num']:,} rollouts of {one['policy']}, from the store."
        for one in lineage.get("scores", ())
    ]
    lines += ["", *_method(recipe, ("method", "config", "settings")), "## Evaluations", ""]
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


def loop_card(
    run_id: str, recipe: Mapping[str, Any], lineage: Mapping[str, Any], code: str, packages: Mapping[str, str],
    version: str, measured: Mapping[str, float],
) -> str:  # fmt: skip
    """The same for a network of the loop engine. Args: measured: name -> figure, taken when the run ended."""
    data, kind = lineage["data"], method_module(recipe["method"]).ENTRY.backend
    pipeline = {"diffusion": "unconditional-image-generation", "vision": "image-classification"}[kind]
    lines = [
        *_head(run_id, recipe, lineage, code, packages, version, data["name"], "pytorch", pipeline),
        "`workbench.policies.loop.models.load(FOLDER)` reads it.", "",
        "## Data", "",
        f"{data['num']:,} rows of `{data['name']}`, shape {data['shape']}, {data['num_classes']} classes, digest "
        f"`{data['digest']}`.", "",
    ]  # fmt: skip
    lines += [
        f"{one['num']:,} pairs `{one['table']}` of `{one['teacher']}` (`{one['version']}`), "
        f"{json.dumps(one['sampling'])}, digest `{one['digest']}`.\n"
        for one in lineage["pools"]
    ]
    lines += _method(recipe, ("method", "config", "settings", "student", "data", "evaluation"))
    lines += ["## Measured when the run ended", "", "| figure | value |", "|---|---|"]
    lines += [f"| {name} | {value:.6g} |" for name, value in sorted(measured.items())]
    return "\n".join(lines) + "\n"


def _head(
    run_id: str, recipe: Mapping[str, Any], lineage: Mapping[str, Any], code: str, packages: Mapping[str, str],
    version: str, about: str, library: str, pipeline: str,
) -> list[str]:  # fmt: skip
    entry = method_module(recipe["method"]).ENTRY
    card = "" if entry.seed is None else f", card {entry.seed}"
    models = [("student", lineage["student"]), *lineage["models"].items()]
    return [
        "---", f"library_name: {library}", f"pipeline_tag: {pipeline}", "tags: [workbench, distillation]", "---", "",
        f"# {recipe['method']} · {about}", "",
        f"A student trained by {entry.title} (arXiv {entry.arxiv}{card}), run `{run_id}`.", "",
        "| | |", "|---|---|",
        f"| weights | `{version}` |", f"| seed | {recipe['settings']['seed']} |", f"| code | `{code}` |",
        f"| packages | {', '.join(f'{name} {number}' for name, number in packages.items())} |", "",
        "## Models", "", "| role | version | from |", "|---|---|---|",
        *(f"| {role} | `{one['version']}` | {_text(one['source'])} |" for role, one in models), "",
    ]  # fmt: skip


def _method(recipe: Mapping[str, Any], shown: Sequence[str]) -> list[str]:
    entry = method_module(recipe["method"]).ENTRY
    settings = json.dumps({key: recipe[key] for key in shown}, indent=1)
    return [
        "## Method", "", f"What is our reading rather than the paper's: {entry.reading}.", "", "```json", settings,
        "```", "",
    ]  # fmt: skip


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
