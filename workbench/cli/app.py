"""Assembles the commands and turns errors into one message and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from workbench.errors import WorkbenchError, is_interrupt

INTERRUPTED = 130
#: Which module registers which command: a command line loads only its own (they cost 50 ms of CPU together).
COMMANDS = {
    "ingest": "log_commands", "remember": "log_commands", "show": "log_commands", "stats": "log_commands",
    "quarantine": "log_commands", "export": "log_commands", "recall": "memory_commands",
    "calibrate": "memory_commands", "methods": "memory_commands", "distill": "distill_command",
    "mcp": "mcp_commands", "demo": "demo_command", "demo-train": "demo_command", "demo-diffusion": "demo_command",
    "eval": "eval_commands", "train": "train_command", "runs": "runs_command",
}  # fmt: skip

app = typer.Typer(
    name="workbench",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Agent logs go in; compact, searchable memories come out. Start with `workbench demo`, or with "
    "`workbench ingest ~/.claude/projects`, then `workbench distill`, then `workbench recall 'what I am looking for'`.",
    epilog="Exit codes: 0 done; 2 wrong use; 3 done, but something is left over (in quarantine, or not distilled); "
    "4 not found; 5 an extra is missing; 6 a model server failed; 10-16 the store (11 newer, 12 damaged, "
    "13 read-only, 14 disk full, 15 busy, 16 missing); 130 interrupted.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from workbench import __version__

        typer.echo(f"workbench {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    store: Annotated[
        Path | None,
        typer.Option("--store", metavar="FILE", help="The store; default $WORKBENCH_STORE, else in your data folder."),
    ] = None,
    _show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    from workbench.data.store import default_path

    if os.environ.get("NO_COLOR"):  # no-color.org
        context.color = False
    context.obj = store or default_path()


def run(arguments: Sequence[str]) -> int:
    """Runs one command line; returns the exit code."""
    for name in _modules(arguments):
        import_module(f"workbench.cli.{name}")  # importing them registers their commands on `app`
    try:
        result = app(list(arguments), standalone_mode=False)
        if result == INTERRUPTED:  # typer catches Ctrl-C itself and says nothing
            return _interrupted()
        return result if isinstance(result, int) else 0
    except WorkbenchError as error:
        _complain(str(error))
        return error.exit_code
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        return _interrupted()
    except typer.TyperException as error:  # wrong use: typer's own classes know how to show themselves
        cast(Any, error).show()
        return cast(Any, error).exit_code
    except KeyboardInterrupt:
        return _interrupted()
    except RuntimeError as error:
        if not is_interrupt(error):
            raise
        return _interrupted()
    except (BrokenPipeError, SystemExit):  # the second is what typer makes of the first: a pager that went
        return 0
    except OSError as error:  # of the store they are StoreErrors: this is a file or stdout that cannot be written
        _complain(f"The output is not complete: {error}" if error.errno and not error.filename else str(error))
        return 1


def _modules(arguments: Sequence[str]) -> list[str]:
    """The module of the command that is called, all of them where none is (help, a wrong name)."""
    rest = iter(arguments)
    for argument in rest:
        if argument == "--store":
            next(rest, None)
        elif not argument.startswith("-"):
            return [COMMANDS[argument]] if argument in COMMANDS else list(dict.fromkeys(COMMANDS.values()))
    return list(dict.fromkeys(COMMANDS.values()))


def _interrupted() -> int:
    _complain("Interrupted. What was committed is kept; run the same command again to go on.")
    return INTERRUPTED


def _complain(message: str) -> None:
    plain = os.environ.get("NO_COLOR") or not sys.stderr.isatty()
    typer.secho(f"workbench: {message}", err=True, fg=None if plain else "red")
