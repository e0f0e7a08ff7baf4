"""Tells coding agents of the MCP server: what to put into whose configuration, and how to put it there safely.

Formats (checked against the clients' documentation, November 2026): Claude Code reads user-wide servers from
`mcpServers` in ~/.claude.json ($CLAUDE_CONFIG_DIR/.claude.json) and a project's from .mcp.json; Codex CLI reads
[mcp_servers.NAME] tables from ~/.codex/config.toml ($CODEX_HOME); Gemini CLI reads `mcpServers` from
~/.gemini/settings.json ($GEMINI_CLI_HOME/.gemini).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from workbench.errors import InputError, WorkbenchError

NAME = "workbench"
Status = Literal["written", "already configured"]


@dataclass(frozen=True, slots=True)
class Client:
    """A coding agent: its configuration file, what marks that it is in use here, and how an edit is made."""

    name: str
    title: str
    config: Callable[[], Path]
    marker: Callable[[], Path]
    snippet: Callable[[list[str]], str]
    edited: Callable[[str, list[str]], str]


@dataclass(frozen=True, slots=True)
class Written:
    """What `write` did."""

    path: Path
    status: Status
    backup: Path | None = None


def server_command(store: Path) -> list[str]:
    """The command line that starts the server: absolute paths, because agents start it anywhere, with a bare PATH."""
    program = Path(sys.argv[0])
    if program.stem == "workbench" and program.is_file():
        start = [str(program.absolute())]
    elif found := shutil.which("workbench"):
        start = [str(Path(found).absolute())]
    else:
        start = [sys.executable, "-m", "workbench"]
    return [*start, "--store", str(store.expanduser().absolute()), "mcp"]


# -- where ----------------------------------------------------------------------------------------------------------


def _home(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / default)


def _claude_config() -> Path:
    return Path(os.environ.get("CLAUDE_CONFIG_DIR") or Path.home()) / ".claude.json"


def _codex_config() -> Path:
    return _home("CODEX_HOME", ".codex") / "config.toml"


def _gemini_config() -> Path:
    return _home("GEMINI_CLI_HOME", "") / ".gemini" / "settings.json"


# -- what -----------------------------------------------------------------------------------------------------------


def _entry(command: list[str], stdio: bool) -> dict[str, Any]:
    return {**({"type": "stdio"} if stdio else {}), "command": command[0], "args": command[1:]}


def _json_snippet(command: list[str], stdio: bool) -> str:
    return json.dumps({"mcpServers": {NAME: _entry(command, stdio)}}, indent=2, ensure_ascii=False) + "\n"


def _claude_snippet(command: list[str]) -> str:
    return _json_snippet(command, stdio=True)


def _gemini_snippet(command: list[str]) -> str:
    return _json_snippet(command, stdio=False)


def _codex_snippet(command: list[str]) -> str:
    return _toml_table({"command": command[0], "args": command[1:]})


def claude_add_command(command: list[str]) -> str:
    """The line that lets Claude Code add the server by itself, for all projects of the user."""
    return shlex.join(["claude", "mcp", "add", "--scope", "user", NAME, "--", *command])


def claude_hook(command: list[str]) -> str:
    """A hook for Claude Code's settings.json that reads new logs in when a session ends."""
    workbench = shlex.join(command[:-1])
    projects = shlex.quote(str(_home("CLAUDE_CONFIG_DIR", ".claude") / "projects"))
    run = f"{workbench} ingest {projects}; {workbench} distill"  # also after exit code 3, a record in quarantine
    hook = {"type": "command", "command": run, "timeout": 60}
    return json.dumps({"hooks": {"SessionEnd": [{"hooks": [hook]}]}}, indent=2, ensure_ascii=False) + "\n"


# -- JSON -----------------------------------------------------------------------------------------------------------


def _claude_edited(text: str, command: list[str]) -> str:
    return _json_edited(text, _entry(command, stdio=True))


def _gemini_edited(text: str, command: list[str]) -> str:
    return _json_edited(text, _entry(command, stdio=False))


def _json_edited(text: str, entry: dict[str, Any]) -> str:
    """The text with our server in it; what else our entry holds (env, timeout, trust) is kept."""
    try:
        settings = json.loads(text, object_pairs_hook=_no_duplicates) if text.strip() else {}
    except ValueError as error:
        raise InputError(f"is no plain JSON ({error}); comments and trailing commas would be lost") from error
    servers = settings.setdefault("mcpServers", {}) if isinstance(settings, dict) else None
    if not isinstance(servers, dict) or not isinstance(servers.get(NAME, {}), dict):
        raise InputError("holds something else where an object with `mcpServers` is expected")
    wanted = {**servers.get(NAME, {}), **entry}
    if servers.get(NAME) == wanted:
        return text
    servers[NAME] = wanted
    indent = re.search(r"^\{\s*?\n([ \t]+)\S", text)
    dumped = json.dumps(settings, indent=indent.group(1) if indent else 2, ensure_ascii=False)
    if not text.strip() or text.endswith("\n"):
        dumped += "\n"
    return dumped.replace("\n", "\r\n") if "\r\n" in text else dumped


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


# -- TOML -----------------------------------------------------------------------------------------------------------

_HEADER = re.compile(r"^[ \t]*\[", re.MULTILINE)
_OUR_HEADER = re.compile(
    rf"^[ \t]*\[[ \t]*mcp_servers[ \t]*\.[ \t]*([\"']?){NAME}\1[ \t]*\][ \t]*(?:#[^\n]*)?$\n?", re.MULTILINE
)
_OUR_SUB_TABLE = re.compile(rf"^[ \t]*\[[ \t]*mcp_servers\.([\"']?){NAME}\1\.([\w-]+)", re.MULTILINE)


def _toml_table(values: dict[str, Any]) -> str:
    return "\n".join([f"[mcp_servers.{NAME}]", *(f"{_toml_key(k)} = {_toml(v)}" for k, v in values.items())]) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml_key(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)  # strings, numbers, booleans and arrays are written as in JSON


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _codex_edited(text: str, command: list[str]) -> str:
    """The text with our table added at its end or replaced where it stands; everything else stays byte for byte."""
    newline = "\r\n" if "\r\n" in text else "\n"
    try:
        settings = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"is no valid TOML ({error})") from error
    servers = settings.get("mcp_servers", {})
    old = servers.get(NAME, {}) if isinstance(servers, dict) else {}
    wanted = {**(old if isinstance(old, dict) else {}), "command": command[0], "args": command[1:]}
    if old == wanted:
        return text
    plain = text.replace("\r\n", "\n")
    header = _OUR_HEADER.search(plain)
    sub_tables = {m.group(2) for m in _OUR_SUB_TABLE.finditer(plain)}
    table = _toml_table({k: v for k, v in wanted.items() if k not in sub_tables})
    if header:
        following = _HEADER.search(plain, header.end())
        end = following.start() if following else len(plain)
        for line in reversed(plain[header.end() : end].splitlines(keepends=True)):
            if line.strip() and not line.lstrip().startswith("#"):
                break
            end -= len(line)  # blank lines and comments before the next header belong to that
        edited = plain[: header.start()] + table + plain[end:]
    else:
        gap = "" if not plain.strip() else "\n" if plain.endswith("\n") else "\n\n"
        edited = plain + gap + table
    expected = {**settings, "mcp_servers": {**servers, NAME: wanted}} if isinstance(servers, dict) else None
    try:
        same = tomllib.loads(edited) == expected
    except tomllib.TOMLDecodeError:
        same = False
    if not same:
        raise InputError(f"holds mcp_servers.{NAME} in a form that cannot be edited safely")
    return edited.replace("\n", newline)


# -- writing --------------------------------------------------------------------------------------------------------

CLIENTS = {
    client.name: client
    for client in (
        Client("claude-code", "Claude Code", _claude_config, lambda: _home("CLAUDE_CONFIG_DIR", ".claude"),
               _claude_snippet, _claude_edited),
        Client("codex", "Codex CLI", _codex_config, lambda: _codex_config().parent, _codex_snippet, _codex_edited),
        Client("gemini-cli", "Gemini CLI", _gemini_config, lambda: _gemini_config().parent,
               _gemini_snippet, _gemini_edited),
    )
}  # fmt: skip


def chosen(name: str | None) -> list[Client]:
    """The client of this name; None = all. Raises: InputError for a name that is none."""
    if name is None:
        return list(CLIENTS.values())
    if name not in CLIENTS:
        raise InputError(f"--client must be one of {', '.join(CLIENTS)}, not {name!r}.")
    return [CLIENTS[name]]


def in_use(client: Client) -> bool:
    """Whether the agent has left its configuration on this machine."""
    return client.config().exists() or client.marker().is_dir()


def write(client: Client, command: list[str]) -> Written:
    """Puts the server into the client's configuration: after a backup beside it, atomically, and only if needed.

    Raises: InputError if the file is not as expected, WorkbenchError if it cannot be written; it is then as it was.
    """
    given = client.config()
    # A link (dotfiles in a repository) stays a link.
    path = given.resolve()
    try:
        before = path.read_bytes() if path.exists() else None
        text = (before or b"").decode("utf-8")
        after = client.edited(text, command).encode("utf-8")
        if before is not None and after == before:
            return Written(given, "already configured")
        backup = _back_up(path) if before is not None else None
        _replace(path, after)
        return Written(given, "written", backup)
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise InputError(f"{given} is no UTF-8 text ({error.reason}); it was left as it is.") from error
    except InputError as error:
        raise InputError(
            f"{given} {error}. It was left as it is; put this in by hand:\n{client.snippet(command)}"
        ) from error
    except OSError as error:
        raise WorkbenchError(f"{given} cannot be edited: {error.strerror}. It was left as it is.") from error


def _back_up(path: Path) -> Path:
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    backup = path.with_name(f"{path.name}.{stamp}.bak")
    number = 1
    while backup.exists():
        number += 1
        backup = path.with_name(f"{path.name}.{stamp}-{number}.bak")
    shutil.copy2(path, backup)
    return backup


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
