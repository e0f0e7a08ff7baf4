"""train: a student, as a recipe says."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.app import INTERRUPTED, app
from workbench.cli.output import Json, number, print_json, progress, table

#: Of the metrics, what is measured when a run on the loop engine ends: "student@1/energy_distance", "teacher/accuracy".
MEASURED = ("student@", "teacher@", "student/", "teacher")


@app.command()
def train(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to train; see recipes/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example settings.steps=10.")
    ] = None,
    json: Json = False,
) -> None:
    """Train a student (a language model, a generator, a classifier) by any method of `workbench methods list`.

    What the method needs and the store lacks is made and kept. Ctrl-C saves; the same command goes on, and on a run
    that is done it trains nothing.
    """
    from workbench.recipes import read
    from workbench.train import train as run

    chosen = read(recipe, overrides or ())
    with progress(quiet=json) as say:
        try:
            result = run(chosen, context.obj, say=say)
        except KeyboardInterrupt as stop:
            again = ["workbench", "--store", str(context.obj), "train", str(recipe), *(overrides or ())]
            typer.echo(f"{stop or 'Stopped.'} Go on with: {shlex.join(again)}", err=True)
            raise typer.Exit(INTERRUPTED) from stop
    if json:
        print_json(result.as_json())
        return
    rows = [("run", result.run_id), ("model", str(result.model)), ("weights", result.version)]
    rows += [
        (f"rollouts of {one['policy']}", f"{number(one['reused'])} from the store, {number(one['made'])} made")
        for one in result.rollouts
    ]
    rows += [
        (f"scores of {one['teacher']}", f"{number(one['reused'])} from the store, {number(one['made'])} made")
        for one in result.scores
    ]
    rows += [
        (f"pairs {one['table']}", f"{number(one['reused'])} from the store, {number(one['made'])} made")
        for one in result.pools
    ]
    rows += [("last loss", f"{result.metrics['loss']:.4g}")] if "loss" in result.metrics else []
    rows += [(name, f"{value:.4g}") for name, value in sorted(result.metrics.items()) if name.startswith(MEASURED)]
    rows += [("same recipe, other code", one) for one in result.other_code]
    table("Done before: nothing was trained" if result.was_done else f"Trained in {result.seconds:.1f} s", rows)
