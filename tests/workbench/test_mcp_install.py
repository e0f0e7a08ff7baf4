"""`workbench mcp install`: what it prints, and that it edits other programs' files without harm."""

from __future__ import annotations

import json
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench import mcp_install
from workbench.cli.app import run
from workbench.errors import InputError

COMMAND = ["/opt/wörk bench/bin/workbench", "--store", '/data/🦆 "quoted"/s.duckdb', "mcp"]
CONFIGS = {"claude-code": ".claude.json", "codex": ".codex/config.toml", "gemini-cli": ".gemini/settings.json"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("CLAUDE_CONFIG_DIR", "CODEX_HOME", "GEMINI_CLI_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def entry(path: Path) -> dict[str, object]:
    if path.suffix == ".toml":
        return tomllib.loads(path.read_text("utf-8"))["mcp_servers"]["workbench"]
    return json.loads(path.read_text("utf-8"))["mcpServers"]["workbench"]


def backups(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.*.bak"))


def edited(text: str, client: str = "codex", command: list[str] = COMMAND) -> str:
    return mcp_install.CLIENTS[client].edited(text, command)


def test_without_write_it_prints_and_touches_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--store", "s.duckdb", "mcp", "install"]) == 0
    out = capsys.readouterr().out
    store = str(Path("s.duckdb").absolute())
    assert store in out
    assert "claude mcp add --scope user workbench -- " in out
    assert "[mcp_servers.workbench]" in out
    assert str(home / ".gemini" / "settings.json") in out
    assert "SessionEnd" in out
    assert list(home.iterdir()) == []
    assert run(["--store", "s.duckdb", "mcp", "install", "--client", "codex", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [c["client"] for c in found["clients"]] == ["codex"]
    ours = tomllib.loads(found["clients"][0]["snippet"])["mcp_servers"]["workbench"]
    assert ours["args"][-3:] == ["--store", store, "mcp"]
    assert [ours["command"], *ours["args"]] == found["command"]
    assert Path(found["command"][0]).is_absolute()


def test_the_hook_distils_even_when_ingest_reports_a_quarantined_record(home: Path, tmp_path: Path) -> None:
    fake = tmp_path / "workbench"
    fake.write_text(f'#!/bin/sh\necho "$3" >> {tmp_path}/called\ntest "$3" = distill || exit 3\n')
    fake.chmod(0o755)
    hook = json.loads(mcp_install.claude_hook([str(fake), "--store", "s.duckdb", "mcp"]))
    command = hook["hooks"]["SessionEnd"][0]["hooks"][0]["command"]
    assert subprocess.run(["sh", "-c", command]).returncode == 0
    assert (tmp_path / "called").read_text().split() == ["ingest", "distill"]


def test_write_without_a_client_edits_the_agents_that_are_there(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / ".codex").mkdir()
    assert run(["mcp", "install", "--write", "--json"]) == 0
    clients = {c["client"]: c["status"] for c in json.loads(capsys.readouterr().out)["clients"]}
    assert clients == {"claude-code": "not found on this machine", "codex": "written",
                       "gemini-cli": "not found on this machine"}  # fmt: skip
    assert [p.name for p in home.iterdir()] == [".codex"]
    assert run(["mcp", "install", "--client", "emacs"]) == 2
    assert "claude-code, codex, gemini-cli" in capsys.readouterr().err


@pytest.mark.parametrize("client", CONFIGS)
def test_write_makes_a_file_once_and_again_does_nothing(client: str, home: Path) -> None:
    path = home / CONFIGS[client]
    done = mcp_install.write(mcp_install.CLIENTS[client], COMMAND)
    assert (done.status, done.backup) == ("written", None)
    assert entry(path)["command"] == COMMAND[0]
    assert entry(path)["args"] == COMMAND[1:]
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    assert mcp_install.write(mcp_install.CLIENTS[client], COMMAND).status == "already configured"
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert backups(path) == []
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left


@pytest.mark.parametrize(
    ("client", "variable", "path"),
    [
        ("claude-code", "CLAUDE_CONFIG_DIR", ".claude.json"),
        ("codex", "CODEX_HOME", "config.toml"),
        ("gemini-cli", "GEMINI_CLI_HOME", ".gemini/settings.json"),
    ],
)
def test_the_agents_own_variables_are_honoured(
    client: str, variable: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    assert mcp_install.write(mcp_install.CLIENTS[client], COMMAND).path == tmp_path / "elsewhere" / path
    assert entry(tmp_path / "elsewhere" / path)["command"] == COMMAND[0]


@pytest.mark.parametrize("client", ["claude-code", "gemini-cli"])
def test_json_keeps_everything_else(client: str, home: Path) -> None:
    path = home / CONFIGS[client]
    path.parent.mkdir(exist_ok=True)
    before = {"numStartups": 7, "ü": "größe 🦆", "big": 12345678901234567890, "share": 0.1, "nothing": None,
              "mcpServers": {"other": {"command": "x", "args": []}, "workbench": {"command": "old", "timeout": 5}},
              "z": {"nested": [1, {"a": True}]}}  # fmt: skip
    text = json.dumps(before, indent=4, ensure_ascii=False)
    path.write_text(text, "utf-8")
    path.chmod(0o640)
    done = mcp_install.write(mcp_install.CLIENTS[client], COMMAND)
    after = path.read_text("utf-8")
    found = json.loads(after)
    assert found["mcpServers"]["workbench"]["timeout"] == 5
    assert found["mcpServers"]["workbench"]["command"] == COMMAND[0]
    found["mcpServers"]["workbench"] = before["mcpServers"]["workbench"]
    assert found == before
    assert list(found) == list(before)
    assert after.startswith('{\n    "numStartups"')  # the indentation as it was
    assert not after.endswith("\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert done.backup is not None
    assert done.backup.read_text("utf-8") == text
    assert backups(path) == [done.backup]
    other = [*COMMAND[:-2], "/elsewhere.duckdb", "mcp"]
    assert mcp_install.write(mcp_install.CLIENTS[client], other).status == "written"
    assert entry(path)["args"] == other[1:]
    assert len(backups(path)) == 2


@pytest.mark.parametrize(
    ("client", "text", "says"),
    [
        ("gemini-cli", '{\n  // a comment\n  "a": 1\n}', "no plain JSON"),
        ("gemini-cli", '{"a": 1,}', "no plain JSON"),
        ("gemini-cli", '{"a": 1, "a": 2}', "a key stands twice"),
        ("claude-code", "[1]", "something else where an object"),
        ("claude-code", '{"mcpServers": []}', "something else where an object"),
        ("claude-code", '{"mcpServers": {"workbench": "x"}}', "something else where an object"),
        ("codex", "a = = 1", "no valid TOML"),
        ("codex", 'mcp_servers = { workbench = { command = "x" } }\n', "cannot be edited safely"),
        ("codex", 'mcp_servers.workbench.command = "x"\n', "cannot be edited safely"),
        ("codex", "mcp_servers = 3\n", "cannot be edited safely"),
        ("codex", 'a = """\n[mcp_servers.workbench]\n"""\n[mcp_servers.workbench]\ncommand = "x"\n', "safely"),
    ],
)
def test_what_cannot_be_edited_safely_is_left_as_it_is(
    client: str, text: str, says: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = home / CONFIGS[client]
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, "utf-8")
    assert run(["mcp", "install", "--client", client, "--write"]) == 2
    message = capsys.readouterr().err
    assert says in message
    assert str(path) in message
    assert "put this in by hand" in message
    assert path.read_text("utf-8") == text
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_bytes_that_are_no_text_are_left_as_they_are(home: Path) -> None:
    path = home / ".claude.json"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match="no UTF-8 text"):
        mcp_install.write(mcp_install.CLIENTS["claude-code"], COMMAND)
    assert path.read_bytes() == b'{"a": "\xff"}'


def test_a_link_stays_a_link(home: Path) -> None:
    real = home / "dotfiles" / "claude.json"
    real.parent.mkdir()
    real.write_text("{}\n")
    (home / ".claude.json").symlink_to(real)
    mcp_install.write(mcp_install.CLIENTS["claude-code"], COMMAND)
    assert (home / ".claude.json").is_symlink()
    assert entry(real)["command"] == COMMAND[0]
    assert len(backups(real)) == 1


TOML = """\
# my settings
model = "o3"   # the model

[mcp_servers.other]
command = "x"
args = ["[not a header]"]

[mcp_servers.workbench]   # ours
command = "old"
args = [
  "a",
]
startup_timeout_sec = 20
enabled = true
env = { A = "1", "b c" = "2" }

# about the profile
[profiles.fast]
model = "o4-mini"
"""


def test_toml_is_replaced_in_place_and_keeps_our_other_keys() -> None:
    after = edited(TOML)
    start, end = TOML.index("[mcp_servers.workbench]"), TOML.index("\n# about the profile")
    assert after.startswith(TOML[:start])
    assert after.endswith(TOML[end:])
    expected = tomllib.loads(TOML)
    expected["mcp_servers"]["workbench"] |= {"command": COMMAND[0], "args": COMMAND[1:]}
    assert tomllib.loads(after) == expected
    assert edited(after) == after


def test_toml_sub_tables_of_ours_stay_as_they_are() -> None:
    text = '[mcp_servers.workbench]\ncommand = "old"\n\n[mcp_servers.workbench.env]\nA = "1"  # why\n'
    after = edited(text)
    assert after.endswith('\n[mcp_servers.workbench.env]\nA = "1"  # why\n')
    assert tomllib.loads(after)["mcp_servers"]["workbench"]["env"] == {"A": "1"}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("ending", ["", "\n", "\n\n", "\n# end"])
def test_toml_is_appended_after_what_is_there(newline: str, ending: str) -> None:
    text = ("a = 1\n[b]\nc = 'd'" + ending).replace("\n", newline)
    after = edited(text)
    assert after.startswith(text)
    ours = {"command": COMMAND[0], "args": COMMAND[1:]}
    assert tomllib.loads(after) == {"a": 1, "b": {"c": "d"}, "mcp_servers": {"workbench": ours}}
    if newline == "\r\n" and "\r\n" in text:
        assert after.count("\n") == after.count("\r\n")


NAMES = st.text("abc_-", min_size=1, max_size=4)
VALUES = st.one_of(st.integers(-5, 5), st.booleans(), st.text(max_size=8), st.lists(st.text("a[]#=\n", max_size=4)))


def _safe(value: object) -> bool:
    return all(c in "\n" or (c.isprintable() and c != "\x7f") for c in json.dumps(value, ensure_ascii=False))


@given(
    st.dictionaries(NAMES, VALUES.filter(_safe), max_size=3),
    st.dictionaries(NAMES, st.dictionaries(NAMES, VALUES.filter(_safe), max_size=3), max_size=3),
    st.none() | st.dictionaries(NAMES, VALUES.filter(_safe), max_size=3),
    st.integers(0, 3),
)
def test_toml_edits_change_our_entry_and_nothing_else(
    top: dict[str, object], servers: dict[str, dict[str, object]], ours: dict[str, object] | None, at: int
) -> None:
    def lines(values: dict[str, object]) -> str:
        return "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in values.items())

    def table(name: str, values: dict[str, object]) -> str:
        return f"[mcp_servers.{name}]\n" + lines(values)

    tables = [table(name, values) + "# between\n\n" for name, values in servers.items()]
    if ours is not None:
        tables.insert(at, table("workbench", ours))
    text = lines(top) + "".join(tables)
    after = edited(text)
    wanted = {**(ours or {}), "command": COMMAND[0], "args": COMMAND[1:]}
    assert tomllib.loads(after) == {**top, "mcp_servers": {**servers, "workbench": wanted}}
    for line in text.split("\n"):
        if line not in table("workbench", ours or {}).split("\n"):
            assert line in after.split("\n")
    assert edited(after) == after
