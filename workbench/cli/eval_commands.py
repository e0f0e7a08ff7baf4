"""eval: recall on public tasks and on your own, with statistics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli import bench_command, eval_task_commands
from workbench.cli.app import app
from workbench.cli.output import Json, number, print_json, progress, table

if TYPE_CHECKING:
    from workbench.evals.recall_run import Progress

group = typer.Typer(no_args_is_help=True, help="Measure recall, on public tasks and on your own logs.")
app.add_typer(group, name="eval")
eval_task_commands.register(group)
bench_command.register(group)


@group.command()
def recall(
    context: typer.Context,
    task: Annotated[list[str], typer.Option("--task", help="A name (`eval tasks`) or a FILE.jsonl; repeatable.")],
    split: Annotated[str, typer.Option(help="tune, report or all: the half of the queries.")] = "report",
    grid: Annotated[
        list[str] | None, typer.Option("--grid", help="default, fusions, tokenizers or paper-107; repeatable.")
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option("--peer", help="Another system by name, or all; repeatable.")
    ] = None,
    retriever: Annotated[
        list[str] | None, typer.Option("--retriever", metavar="FILE.py:NAME", help="One of your own; repeatable.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Hits to ask for.")] = 100,
    budget: Annotated[int | None, typer.Option(help="Cut every list where its hits exceed this many tokens.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Compare with this configuration; default: the best that returns verbatim text.")
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write the report here.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one query.")] = 60.0,
    retry: Annotated[bool, typer.Option("--retry", help="Ask again what failed before.")] = False,
    no_times: Annotated[
        bool, typer.Option("--no-times", help="Leave out what clocks say: two runs then give the same report.")
    ] = False,
    json: Json = False,
) -> None:
    """Compare ways to recall on a task: every answer is kept in the store, and none is asked for twice.

    Ctrl-C keeps what was committed; the same command goes on from there.
    """
    from workbench import api
    from workbench.evals.recall_report import markdown

    with progress(quiet=json) as say:

        def look(now: Progress) -> None:
            failed = f", {now.failed:,} failed" if now.failed else ""
            say(f"{now.task}: {now.done:,} of {now.total:,} answers{failed}; {now.doing}")

        found = api.evaluate_recall(
            task, context.obj, report=report, timeout_seconds=timeout, retry=retry, progress=look, split=split,
            grids=grid or ("default",), peers=peer or (), retrievers=retriever or (), k=k, budget=budget,
            baseline=baseline, times=not no_times,
        )  # fmt: skip
    if json:
        print_json(found)
        return
    typer.echo(markdown(found).encode("utf-8", "replace").decode())
    typer.echo(f"{number(found['asked'])} answers were asked for, {number(found['stored'])} were in the store.")
    if report is not None:
        typer.echo(f"Report: {report}")


@group.command()
def tasks(json: Json = False) -> None:
    """List the tasks that --task takes by name."""
    from workbench.evals.tasks import TASKS

    if json:
        print_json([{"name": name, "asks": asks} for name, asks in TASKS.items()])
    else:
        table("Tasks", list(TASKS.items()))
