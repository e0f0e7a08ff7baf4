"""distill, recall, calibrate, methods: from exchanges to memories, and back to whoever asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from workbench.cli.app import app
from workbench.cli.output import Json, number, print_json, say, table

if TYPE_CHECKING:
    from workbench.memory.recall import Hit


@app.command()
def recall(
    context: typer.Context,
    query: Annotated[str, typer.Argument(help="What to look for, in your own words.")],
    mode: Annotated[str, typer.Option(help="keyword, vector or hybrid.")] = "hybrid",
    layer: Annotated[str, typer.Option(help="verbatim, distilled or both.")] = "both",
    k: Annotated[int, typer.Option("-k", help="How many hits.")] = 10,
    fusion: Annotated[str, typer.Option(help="combsum, rrf, combmnz or card.")] = "combsum",
    project: Annotated[str | None, typer.Option(help="Only this project (or part of its name).")] = None,
    agent: Annotated[str | None, typer.Option(help="Only this agent, e.g. claude-code.")] = None,
    since: Annotated[str | None, typer.Option(help="Not before this time (ISO 8601).")] = None,
    until: Annotated[str | None, typer.Option(help="Before this time (ISO 8601).")] = None,
    file: Annotated[str | None, typer.Option(help="Only exchanges that touched a file with this in its path.")] = None,
    room: Annotated[str | None, typer.Option(help="Only this room (id, key or label).")] = None,
    tool: Annotated[str | None, typer.Option(help="Only exchanges that called this tool.")] = None,
    budget: Annotated[
        int | None, typer.Option(min=1, help="Print a block for a prompt of at most this many tokens.")
    ] = None,
    json: Json = False,
) -> None:
    """Find the exchanges that fit a query, in the logs' own words and in the memories made of them."""
    from workbench import api
    from workbench.memory.prompt_block import block
    from workbench.memory.recall import Filters

    filters = Filters(project, agent, since, until, file, room, tool)
    hits = api.recall(query, context.obj, mode=mode, layer=layer, k=k, filters=filters, fusion=fusion)
    if json and budget is None:
        print_json([hit.as_json() for hit in hits])
    elif budget is not None and (json or hits):
        text = block(hits, budget)
        none = f"None of the {len(hits)} hits fits into {budget} tokens; raise --budget."
        print_json({"block": text}) if json else say(text or none)
    else:
        _print_hits(query, hits)


def _print_hits(query: str, hits: list[Hit]) -> None:
    if not hits:
        say("Nothing found. `workbench stats` shows what the store holds; `workbench distill` makes memories.")
        return
    for i, hit in enumerate(hits, 1):
        when = f" · {hit.started_at[:16].replace('T', ' ')}" if hit.started_at else ""
        say(f"{i}. {hit.exchange_id}", fg="cyan", bold=True, nl=False)
        say(f" · {hit.score:.3f}{when} · {hit.agent or hit.source['format']} · {hit.project or ''}")
        say(f"   “{hit.asked}”")
        for line in filter(None, (hit.core, hit.context)):
            say(f"   {line[:200]}", fg="green")
        names = [f"{f['path'].rsplit('/', 1)[-1]} ({f['action']})" for f in hit.files[:4]]
        if names:
            say(f"   files: {', '.join(names)}{' …' if len(hit.files) > 4 else ''}", dim=True)
        say(f"   why: {'; '.join(hit.why)}", dim=True)
    if all(hit.memory_id is None for hit in hits):
        say("These exchanges have no memories yet: run `workbench distill`.")
    say(f"Source: `workbench show {hits[0].exchange_id}`")


@app.command()
def calibrate(context: typer.Context, json: Json = False) -> None:
    """Find the weights that suit your own logs: commits and titles in them say what should be found.

    Half of these queries are searched, the other half decides whether the weights are kept.
    """
    from workbench import api

    result = api.calibrate(context.obj)
    if json:
        print_json(result)
        return
    kept = "kept" if result["accepted"] else "not kept: no gain, or too few queries in the logs"
    rows = [(name, f"{weight:.2f}") for name, weight in result["weights"].items()]
    rows += [("queries", number(result["num_queries"])),
             ("MRR on the unseen half", f"{result['mrr_before']:.3f} -> {result['mrr_after']:.3f}")]  # fmt: skip
    table(f"Fusion weights ({kept})", rows)


@app.command()
def methods(
    action: Annotated[str, typer.Argument(help="list, or show NAME.")] = "list",
    name: Annotated[str | None, typer.Argument(help="A method's name.")] = None,
    json: Json = False,
) -> None:
    """The published systems that are built here: where each comes from and what was shown."""
    from difflib import get_close_matches

    from workbench.errors import InputError, NotFound
    from workbench.methods import entries

    if action not in ("list", "show") or (action == "show") != (name is not None):
        raise InputError("Use `workbench methods list` or `workbench methods show NAME`.")
    known = entries()
    chosen = [entry for entry in known if name in (None, entry.name)]
    if not chosen:
        near = get_close_matches(name or "", [entry.name for entry in known], 3, 0.0)
        raise NotFound(f"No method is called {name!r}. Nearest: {', '.join(near)}.")
    rows = [entry.as_json() for entry in chosen]
    if json:
        print_json(rows if action == "list" else rows[0])
    elif action == "list":
        columns = ("name", "seed", "backend", "family", "access", "degree")
        cells = [tuple("" if row[column] is None else str(row[column]) for column in columns) for row in rows]
        table("Methods", cells, ("name", "card", "backend", "family", "access", "policy degree"))
    else:
        for key, value in rows[0].items():
            say(f"{key}: {value}")
