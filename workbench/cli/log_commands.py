"""ingest, remember, show, stats, quarantine, export: what goes into the store and what comes out verbatim."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli.app import app
from workbench.cli.output import Json, number, print_json, progress, say, table
from workbench.errors import EXIT_QUARANTINED

if TYPE_CHECKING:
    from workbench.data.ingest import Report


@app.command()
def ingest(
    context: typer.Context,
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="Log files, folders, zips, or - for stdin.")],
    format: Annotated[str | None, typer.Option(help="Read as this format instead of detecting it.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on: read what is added until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.01, help="With --watch: seconds between looks.")] = 2.0,
    json: Json = False,
) -> int:
    """Read agent logs into the store. Doing it twice adds nothing; a grown log is read from where it was left."""
    from workbench import api

    with progress(quiet=json) as say:

        def look(path: str, report: Report) -> None:
            say(f"{report.files:,} files, {report.messages_added:,} new messages · {path[-70:]}")

        report = api.ingest(paths, context.obj, format=format, progress=look)
    _print_report(context.obj, report, json)
    if watch:
        from workbench.watch import watch as follow

        follow(context.obj, paths, format=format, every_seconds=every, on_report=lambda r: _print_change(r, json))
    return EXIT_QUARANTINED if report.quarantined else 0


def _print_report(store: Path, report: Report, json: bool) -> None:
    if json:
        print_json(report.as_json())
        return
    r = report
    rows = [
        (
            "conversations",
            number(r.conversations_added),
            number(r.conversations_updated),
            number(r.conversations_unchanged),
        ),
        ("messages", number(r.messages_added), "", number(r.messages_unchanged)),
        ("exchanges", number(r.exchanges_added), "", number(r.exchanges_unchanged)),
    ]
    table(f"Ingested into {store}", rows, ("", "added", "grown", "unchanged"))
    formats = ", ".join(f"{name} ({count})" for name, count in r.formats.most_common())
    say(f"{r.files:,} files read in {r.seconds:.1f} s" + (f": {formats}" if formats else ""))
    if r.not_logs:
        some = ", ".join(Path(p).name for p in r.not_logs[:3]) + (", …" if len(r.not_logs) > 3 else "")
        say(f"In no known log format, left out: {number(len(r.not_logs))} ({some})")
    if r.quarantined:
        say(f"Could not be read, kept in quarantine: {number(r.quarantined)} (see `workbench quarantine`)")
    if r.exchanges_added:
        say("Next: `workbench distill`, then `workbench recall 'what I am looking for'`")


def _print_change(report: Report, json: bool) -> None:
    if json:
        print_json(report.as_json())
    else:
        say(f"+ {report.messages_added} messages, {report.exchanges_added} exchanges, {report.quarantined} quarantined")


@app.command()
def remember(
    context: typer.Context,
    text: Annotated[str, typer.Argument(help="What to remember; - reads it from stdin.")],
    project: Annotated[str | None, typer.Option(help="The project it belongs to.")] = None,
    file: Annotated[list[str] | None, typer.Option(help="A file it is about; may be given several times.")] = None,
    json: Json = False,
) -> None:
    """Note something for later. Never waits for another process; it is found by recall like everything else."""
    import sys

    from workbench import api

    note = sys.stdin.read() if text == "-" else text
    id = api.remember(note, context.obj, project=project, files=file or ())
    print_json({"conversation_id": id}) if json else say(f"Noted ({id}).")


@app.command()
def show(
    context: typer.Context,
    id: Annotated[str, typer.Argument(help="Id of a memory, exchange, conversation or message, or its first digits.")],
    neighbours: Annotated[int, typer.Option(min=0, help="How many exchanges before and after to name.")] = 1,
    json: Json = False,
) -> None:
    """Drill down to the verbatim source of a hit, with its neighbours."""
    from workbench import api

    found = api.show(id, context.obj, neighbours=neighbours)
    print_json(found) if json else _print_shown(found)


def _print_shown(found: dict[str, Any]) -> None:
    source = found["source"]
    say(f"{found['kind']} · {source['format']} · session {source['session_id']}", bold=True)
    say(f"{source['path']}")
    for name in ("title", "project", "started_at", "thread"):
        if found.get(name):
            say(f"{name}: {found[name]}")
    for memory in found.get("memories", []):
        say(f"\nmemory {memory['memory_id']} ({memory['distiller']})", fg="green")
        say(memory["core"] + (f"\n{memory['context']}" if memory["context"] else ""))
    for message in found.get("messages", []):
        at = f" · {message['created_at']}" if message["created_at"] else ""
        say(f"\n[{message['ply']}] {message['role']}{at}", fg="cyan")
        for part in message["parts"]:
            label = part["kind"] + (f" {part['name']}" if part.get("name") else "")
            if part["kind"] != "text":
                say(f"({label})", dim=True)
            say(part["text"] or ("" if part.get("data") is None else str(part["data"])))
    for exchange in found.get("exchanges", []) + found.get("neighbours", []):
        where = f"plies {exchange['ply_start']}-{exchange['ply_end']}"
        say(f"{exchange['exchange_id']} {where}: {exchange['user'][:80]!r}")


@app.command()
def stats(context: typer.Context, json: Json = False) -> None:
    """What the store holds."""
    from workbench import api

    found = api.stats(context.obj)
    if json:
        print_json(found)
        return
    rows = [
        (name, number(found[name]))
        for name in ("conversations", "messages", "exchanges", "rooms", "quarantined", "bytes")
    ]
    rows.append(("verbatim tokens", number(found["verbatim_tokens"])))
    if found["waiting_in_spool"]:
        rows.append(("notes still to be taken in", number(found["waiting_in_spool"])))
    for d in found["distillers"]:
        rows.append(
            (f"memories by {d['distiller']}", f"{d['memories']:,} ({d['tokens']:,} tokens, {d['compression']}x fewer)")
        )
    for group in ("by_format", "by_agent", "by_project"):
        rows += [(f"{group[3:]} {key}", number(count)) for key, count in found[group].items()]
    table(str(found["store"]), rows)


@app.command()
def quarantine(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, help="How many to list.")] = 50,
    json: Json = False,
) -> None:
    """What could not be read: where it is, and why."""
    from workbench.data.store import Store

    with Store(context.obj, read_only=True) as store:
        rows = store.con.execute(
            "SELECT quarantine_id, path, format, byte_offset, byte_length, reason, raw[:200]::BLOB FROM quarantine "
            "ORDER BY path, byte_offset LIMIT ?", [limit]
        ).fetchall()  # fmt: skip
        total = store.con.execute("SELECT count(*) FROM quarantine").fetchall()[0][0]
    names = ("quarantine_id", "path", "format", "byte_offset", "byte_length", "reason", "begins")
    entries = [dict(zip(names, (*row[:-1], bytes(row[-1]).decode("utf-8", "replace")), strict=True)) for row in rows]
    if json:
        print_json({"quarantine": entries, "total": total})
        return
    for e in entries:
        what = f"{e['byte_length']:,} bytes, {e['format'] or 'no known format'}"
        say(f"{e['path']} at byte {e['byte_offset']:,} ({what})", bold=True)
        say(f"  {e['reason']}\n  {e['begins'][:100]!r}")
    if total > len(entries):
        say(f"{number(total - len(entries))} more: raise --limit.")
    if not entries:
        say("Nothing is in quarantine.")


@app.command()
def export(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Where the Parquet files go.")],
    table_name: Annotated[list[str] | None, typer.Option("--table", help="Only this table; may be repeated.")] = None,
    json: Json = False,
) -> None:
    """Write the store's tables as Parquet files (Arrow and `datasets`: see workbench.data.export)."""
    from workbench.data.export import to_parquet
    from workbench.data.store import Store

    with Store(context.obj, read_only=True) as store:
        rows = to_parquet(store, folder, table_name)
    if json:
        print_json({"folder": str(folder), "rows": rows})
    else:
        table(f"Exported to {folder}", [(name, number(count)) for name, count in rows.items()], ("table", "rows"))
