"""runs list, show, page: what training runs did, to read and to compare."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.cli.app import app
from workbench.cli.output import Json, number, print_json, table
from workbench.data.store import Store
from workbench.errors import InputError

group = typer.Typer(no_args_is_help=True, help="Training runs: list them, look at one, compare several on a page.")
app.add_typer(group, name="runs")
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, or the beginning of it.")]


@group.command("list")
def list_(context: typer.Context, json: Json = False) -> None:
    """All runs of the store, the newest first."""
    from workbench.run_list import SHORT, runs

    with Store(context.obj, read_only=True) as store:
        rows = runs(store.con)
    if json:
        print_json(rows)
        return
    if not rows:
        typer.echo("The store has no runs yet. `workbench train RECIPE.yaml` makes one.")
        return
    shown = [
        (row["run_id"][:SHORT], row["method"], row["status"], _time(row["created_at"]), number(row["steps"]),
         _value(row["loss"]), *_headline(row["headline"]))
        for row in rows
    ]  # fmt: skip
    table("Runs", shown, ("id", "method", "status", "began (UTC)", "steps", "last loss", "headline", "of"))
    typer.echo("Next: `workbench runs show ID`, `workbench runs page ID [ID…] --out page.html`")


@group.command()
def show(context: typer.Context, run: Run, json: Json = False) -> None:
    """One run: recipe, lineage, metrics, artifacts, evaluations."""
    from workbench.run_list import describe, find_run, flat

    with Store(context.obj, read_only=True) as store:
        found = describe(store.con, find_run(store.con, run))
    if json:
        print_json(found)
        return
    table(f"{found['method']} {found['run_id']}", [
        ("status", found["status"] + (f": {found['error']}" if found["error"] else "")),
        ("began", _time(found["created_at"])), ("ended", _time(found["ended_at"])), ("folder", found["folder"]),
        ("code", found["code_version"]), ("packages", ", ".join(f"{n} {v}" for n, v in found["packages"].items())),
    ])  # fmt: skip
    table("\nRecipe", list(flat(found["recipe"])))
    table("\nLineage", list(flat(found["lineage"])))
    table("\nMetrics", [
        (f"{row['phase']}: {row['name']}", number(row["num"]), *(_value(row[name]) for name in _SUMMARY))
        for row in found["metrics"]
    ], ("metric", "values", *_SUMMARY))  # fmt: skip
    if bad := [row for row in found["metrics"] if row["not_finite"]]:
        typer.echo("Not finite: " + ", ".join(f"{number(row['not_finite'])} of {row['name']}" for row in bad))
    table("\nArtifacts", [(one["kind"], one["path"]) for one in found["artifacts"]])
    if not found["evaluations"]:
        typer.echo("\nNo evaluations yet: `workbench eval bench --model FOLDER` makes them.")
        return
    table("\nEvaluations", [
        (f"{one['task_set']} ({one['split']})", number(one["num"]), _interval(one["score_all"]), one["eval_id"])
        for one in found["evaluations"]
    ], ("tasks", "answers", "score", "id"))  # fmt: skip


_SUMMARY = ("first", "last", "lowest", "highest")


@group.command()
def page(
    context: typer.Context,
    run: Annotated[list[str], typer.Argument(metavar="RUN...", help="Ids, or beginnings; several are compared.")],
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="Write the page here.")],
    json: Json = False,
) -> None:
    """Write runs as one HTML file: curves, samples, evaluations, settings that differ, lineage."""
    from workbench.run_list import find_run
    from workbench.run_page import page as made
    from workbench.run_page import write

    if not out.absolute().parent.is_dir():
        raise InputError(f"The folder of {out} does not exist; make it, or name another file.")
    with Store(context.obj, read_only=True) as store:
        ids = list(dict.fromkeys(find_run(store.con, one) for one in run))
        command = shlex.join(["workbench", "runs", "page", *ids, "--out", out.name])
        write(out, made(store.con, ids, command))
    if json:
        print_json({"out": str(out), "runs": ids, "bytes": out.stat().st_size})
    else:
        typer.echo(f"{out}: {len(ids)} run{'s' * (len(ids) > 1)}, {number(out.stat().st_size)} bytes.")


def _time(iso: str | None) -> str:
    return iso[:16].replace("T", " ") if iso else "–"


def _value(value: float | None) -> str:
    from workbench.evals.svg_axes import short

    return "–" if value is None else short(value)


def _headline(found: dict[str, Any] | None) -> tuple[str, str]:
    return (_value(found["value"]), found["name"]) if found else ("–", "")


def _interval(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    return f"{found['estimate']:.3f}" + (
        f" [{found['low']:.3f}, {found['high']:.3f}]" if found["low"] is not None else ""
    )
