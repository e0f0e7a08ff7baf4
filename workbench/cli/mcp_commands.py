"""mcp: serve memory to coding agents, and tell them of the server."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.cli.app import app
from workbench.cli.output import Json, print_json

if TYPE_CHECKING:
    from workbench.mcp_install import Client

mcp = typer.Typer(help="Serve memory to coding agents over MCP (stdio); `mcp install` tells them of it.")
app.add_typer(mcp, name="mcp")


@mcp.callback(invoke_without_command=True)
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        _serve(context.obj)


@mcp.command()
def serve(context: typer.Context) -> None:
    """Serve over stdin and stdout until stdin closes. Agents start this themselves; see `mcp install`."""
    _serve(context.obj)


def _serve(store: Path) -> None:
    try:
        from workbench.mcp_server import serve as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0].startswith("workbench"):
            raise
        from workbench.errors import MissingExtra

        raise MissingExtra(f"The MCP server needs the package {error.name!r}", "serve") from error
    run(store)


@mcp.command()
def install(
    context: typer.Context,
    client: Annotated[str | None, typer.Option(help="claude-code, codex or gemini-cli; default all.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Edit the configuration, after a backup beside it.")] = False,
    json: Json = False,
) -> None:
    """Print what to put into the agents' configuration; with --write, put it there (default: of the agents found)."""
    from workbench import mcp_install

    command = mcp_install.server_command(context.obj)
    clients = mcp_install.chosen(client)
    results = [_written(c, command, asked=client is not None) if write else _described(c, command) for c in clients]
    if find_spec("mcp") is None:
        typer.echo("The server needs one package more. In the workbench's folder: pip install -e '.[serve]'", err=True)
    if json:
        print_json({"command": command, "clients": results})
    elif write:
        for r in results:
            backup = f" (before: {r['backup']})" if r["backup"] else ""
            typer.echo(f"{r['title']}: {r['status']} · {r['path']}{backup}")
        if any(r["status"] == "written" for r in results):
            typer.echo("Restart the agent, and ask it what its memory holds.")
    else:
        for r in results:
            _print(r, command)


def _described(client: Client, command: list[str]) -> dict[str, Any]:
    return {"client": client.name, "title": client.title, "path": str(client.config()), "status": "printed",
            "snippet": client.snippet(command)}  # fmt: skip


def _written(client: Client, command: list[str], asked: bool) -> dict[str, Any]:
    from workbench import mcp_install

    described = {**_described(client, command), "backup": None}
    if not asked and not mcp_install.in_use(client):
        return {**described, "status": "not found on this machine"}
    done = mcp_install.write(client, command)
    return {**described, "status": done.status, "backup": str(done.backup) if done.backup else None}


def _print(described: dict[str, Any], command: list[str]) -> None:
    from workbench import mcp_install

    typer.secho(f"# {described['title']}: {described['path']}", bold=True)
    typer.echo(described["snippet"])
    if described["client"] == "claude-code":
        typer.echo("The same in .mcp.json shares it with a project. Or let Claude Code add it for all your projects:")
        typer.echo(f"  {mcp_install.claude_add_command(command)}")
        typer.echo("To have every session read in when it ends, add this to its settings.json:")
        typer.echo(mcp_install.claude_hook(command))
