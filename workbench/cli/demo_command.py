"""demo, demo-train, demo-diffusion: memories, smaller language models, one-step generators, each in one command."""

from __future__ import annotations

import sys
from pathlib import Path
from shutil import which
from typing import Annotated, Any

import typer

from workbench.cli.app import app
from workbench.cli.output import Json, number, print_json, progress, say, table
from workbench.errors import MissingExtra


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo's store goes.")] = Path("demo-out"),
    json: Json = False,
) -> None:
    """Ingest, distil and recall on the sample logs that come with the package. Needs no network, no key and no GPU."""
    from workbench import demo as main_job

    store = folder / "demo.duckdb"
    result = main_job.run(store)
    print_json(result) if json else _print(result, store)


@app.command("demo-train")
def demo_train(
    folder: Annotated[Path, typer.Option(help="Where the demo's store goes.")] = Path("demo-out"),
    seeds: Annotated[int, typer.Option(min=1, help="Maps, teachers and students to compare over.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Of each method.")] = 200,
    teacher_steps: Annotated[int, typer.Option(min=1, help="Of the teacher's own training.")] = 400,
    json: Json = False,
) -> None:
    """Train a teacher, store its rollouts, let three methods train a student, say which won. On a CPU, in minutes."""
    from importlib.util import find_spec

    if find_spec("trl") is None:
        raise MissingExtra("demo-train needs trl, which is not installed", "train")
    from workbench import demo_train as training

    with progress(quiet=json) as say:
        result = training.run(folder / "demo-train.duckdb", range(seeds), say, steps, teacher_steps)
    if json:
        print_json(result)
        return
    rows = []
    for row in result["rows"]:
        low, high = row["ci95"]
        against = "baseline"
        if "difference" in row:
            worse, better = row["difference_ci95"]
            against = f"{row['difference']:+.3f} [{worse:+.3f}, {better:+.3f}], p {row['p_holm']:.2g}"
        rows.append((row["method"], f"{row['mean']:.3f} [{low:.3f}, {high:.3f}]", against, f"{row['cpu_seconds']:.0f}"))
    table(f"Success on unseen pairs of rooms, {seeds} seeds, 95 % intervals; p corrected by Holm", rows,
          ("method", "success", f"against {result['baseline']}", "CPU s"))  # fmt: skip
    typer.echo(f"Winner: {result['winner']}. {result['rollouts_stored']} rollouts are in {result['store']}.")
    typer.echo("Next: `workbench methods`, `workbench methods show gkd`")


@app.command("demo-diffusion")
def demo_diffusion(
    folder: Annotated[Path, typer.Option(help="Where the store, the runs and the picture go.")] = Path("demo-out"),
    seed: Annotated[int, typer.Option(min=0, help="Of the networks and of every draw.")] = 0,
    steps: Annotated[int, typer.Option(min=3, help="Of the distillation.")] = 1000,
    teacher_steps: Annotated[int, typer.Option(min=1, help="Of the teacher's own training.")] = 2000,
    json: Json = False,
) -> None:
    """Train a generator of digits, distil it to a single step, and draw what both make. On a CPU, in minutes."""
    from importlib.util import find_spec

    for package in ("torch", "accelerate", "sklearn"):
        if find_spec(package) is None:
            raise MissingExtra(f"demo-diffusion needs {package}, which is not installed", "train")
    from workbench import demo_diffusion as distilling

    with progress(quiet=json) as say:
        result = distilling.run(folder, say, seed, steps, teacher_steps)
    if json:
        print_json(result)
        return
    rows = [
        (row["generator"], f"{row['sliced_wasserstein']:.4f}", f"{row['energy_distance']:.4f}")
        for row in result["rows"]
    ]
    table("Distance of 1,797 samples to the 1,797 digits; smaller is closer", rows,
          ("generator", "sliced Wasserstein", "energy distance"))  # fmt: skip
    typer.echo(
        f"{result['picture']} shows, from left to right: {', '.join(row['generator'] for row in result['rows'])}."
    )
    typer.echo(f"Both networks, with their cards: {result['teacher']['model']}, {result['student']['model']}")


def _print(result: dict[str, Any], store: Path) -> None:
    ingested, again, distilled, stats = result["ingest"], result["ingest_again"], result["distill"], result["stats"]
    tokens = next(iter(stats["distillers"]))
    rows = [
        ("log formats recognised", str(len(stats["by_format"])), ", ".join(stats["by_format"])),
        ("conversations", number(stats["conversations"]), f"{ingested['conversations']['added']} new in this run"),
        ("messages", number(stats["messages"]), f"{again['messages']['added']} more when read a second time"),
        ("exchanges", number(stats["exchanges"]), f"{number(stats['verbatim_tokens'])} tokens, verbatim"),
        ("memories", number(tokens["memories"]), f"{number(tokens['tokens'])} tokens: {tokens['compression']}x fewer"),
        ("in quarantine", number(stats["quarantined"]), "broken on purpose: workbench quarantine shows them"),
        ("seconds", f"{ingested['seconds'] + distilled['seconds']:.1f}", "ingest and distill, no model, no network"),
    ]
    table("What happened", rows)
    for answer in result["answers"]:
        say(f"\n? {answer['query']}", bold=True)
        for hit in answer["hits"][:2]:
            say(f"  {hit['exchange_id']}", fg="cyan", nl=False)
            say(f" · {hit['agent'] or hit['source']['format']} · {(hit['started_at'] or '')[:10]}")
            say(f"    “{hit['asked'][:110]}”")
            for line in filter(None, (hit["core"], hit["context"])):
                say(f"    {line[:110]}", fg="green")
    first = next((a["hits"][0]["exchange_id"] for a in result["answers"] if a["hits"]), "ID")
    say("\nTry next", bold=True)
    here = "workbench" if which("workbench") else sys.argv[0]
    say(f"  {here} --store {store} recall 'database is locked' --json")
    say(f"  {here} --store {store} show {first}")
    say(f"  {here} ingest ~/.claude/projects   # your own logs; also ~/.codex/sessions, ~/.gemini/tmp, exports")
    say(f"  {here} distill && {here} recall 'what I am looking for'")
    say(f"  {here} mcp install                 # let your agents ask")
