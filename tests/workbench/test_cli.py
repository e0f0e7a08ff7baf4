"""The command line as a program sees it: objects, fields, exit codes; in-process, on the shipped samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from workbench.cli.app import run

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "data" / "samples"
HIT_FIELDS = {
    "memory_id", "exchange_id", "conversation_id", "source", "ply_start", "ply_end", "started_at", "score", "why",
    "core", "context", "files", "rooms",
}  # fmt: skip


class Cli:
    """Runs commands on one store and returns (exit code, parsed JSON or text)."""

    def __init__(self, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.store, self.capsys = store, capsys

    def __call__(self, *arguments: str) -> tuple[int, Any]:
        self.capsys.readouterr()
        code = run(["--store", str(self.store), *arguments])
        out, self.err = self.capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if "--json" in arguments and out.strip() else out


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(tmp_path / "store.duckdb", capsys)


def test_main_job(cli: Cli) -> None:
    code, report = cli("ingest", str(SAMPLES), "--json")
    assert code == 3, "the samples hold records that are broken on purpose"
    assert report["conversations"]["added"] > 20
    assert report["conversations"]["unchanged"] == 0
    assert report["messages"]["added"] > 200
    assert report["exchanges"]["added"] > 30
    assert report["quarantined"] > 5
    assert report["seconds"] > 0

    code, again = cli("ingest", str(SAMPLES), "--json")
    assert code == 0
    assert {again[noun]["added"] for noun in ("conversations", "messages", "exchanges")} == {0}
    for noun in ("conversations", "messages", "exchanges"):
        assert again[noun]["unchanged"] == report[noun]["added"], noun

    code, distilled = cli("distill", "--json")
    assert (code, distilled["memories"]["failed"], distilled["memories"]["pending"]) == (0, 0, 0)
    assert distilled["memories"]["added"] == report["exchanges"]["added"]
    assert cli("distill", "--json")[1]["memories"]["added"] == 0

    code, stats = cli("stats", "--json")
    assert stats["exchanges"] == report["exchanges"]["added"]
    assert stats["messages"] == report["messages"]["added"]
    assert len(stats["by_format"]) == 14


@pytest.fixture
def filled(cli: Cli) -> Cli:
    cli("ingest", str(SAMPLES), "--json")
    cli("distill", "--json")
    return cli


@pytest.mark.parametrize("mode", ["keyword", "vector", "hybrid"])
@pytest.mark.parametrize("layer", ["verbatim", "distilled", "both"])
def test_recall_fields(filled: Cli, mode: str, layer: str) -> None:
    code, hits = filled("recall", "why was the ETA test flaky", "--mode", mode, "--layer", layer, "-k", "3", "--json")
    assert code == 0
    assert 1 <= len(hits) <= 3
    for hit in hits:
        assert set(hit) >= HIT_FIELDS
        assert set(hit["source"]) == {"format", "path", "session_id"}
        assert hit["ply_start"] <= hit["ply_end"]
        assert any(layer in reason or layer == "both" for reason in hit["why"])
    scores = [hit["score"] for hit in hits]
    assert scores == sorted(scores, reverse=True)
    if mode != "vector":
        assert "flaky" in json.dumps(filled("show", hits[0]["exchange_id"], "--json")[1])


def test_drill_down_is_byte_identical_with_the_log(filled: Cli) -> None:
    """Every text that is shown for a Claude Code hit stands, JSON-encoded, in the bytes of the log."""
    hits = filled("recall", "rate limit", "--json", "-k", "20")[1]
    checked = 0
    for hit in hits:
        if hit["source"]["format"] != "claude_code":
            continue
        log = Path(hit["source"]["path"]).read_bytes()
        shown = filled("show", hit["memory_id"], "--json")[1]
        for message in shown["messages"]:
            for part in message["parts"]:
                if part["kind"] == "text":
                    assert json.dumps(part["text"], ensure_ascii=False)[1:-1].encode() in log
                    checked += 1
        assert {n["offset"] for n in shown["neighbours"]} <= {-1, 1}
    assert checked > 3


def test_filters_narrow(filled: Cli) -> None:
    everything = filled("recall", "test", "-k", "50", "--json")[1]
    by_agent = filled("recall", "test", "-k", "50", "--agent", "codex", "--json")[1]
    assert {hit["agent"] for hit in by_agent} == {"codex"}
    assert 0 < len(by_agent) < len(everything)
    by_file = filled("recall", "test", "-k", "50", "--file", "eta.py", "--json")[1]
    assert all(any("eta.py" in f["path"] for f in hit["files"]) for hit in by_file)
    assert by_file
    late = filled("recall", "test", "-k", "50", "--since", "2026-03-01", "--json")[1]
    assert all(hit["started_at"] >= "2026-03-01" for hit in late)
    assert late
    room = by_file[0]["rooms"][0]
    assert all(room in hit["rooms"] for hit in filled("recall", "test", "-k", "50", "--room", room, "--json")[1])
    assert filled("recall", "test", "--project", "no such project", "--json")[1] == []
    by_tool = {tool: filled("recall", "test", "-k", "50", "--tool", tool, "--json")[1] for tool in ("Bash", "bASH")}
    assert by_tool["Bash"] == by_tool["bASH"] != []
    assert len({hit["agent"] for hit in by_tool["Bash"]}) > 1, "what one agent calls Bash another calls bash"


def test_budget_block_is_quoted_and_within_budget(filled: Cli) -> None:
    from workbench.memory.tokens import count_tokens

    for budget in (120, 300, 1000):
        text = filled("recall", "timezone bug", "--budget", str(budget))[1].rstrip("\n")
        assert count_tokens(text) <= budget
        body = text.splitlines()[1:-1]
        assert all(line.startswith(("> ", "[", "(")) for line in body)
    assert body[1].startswith("> session ")


def test_stdin_and_zip(cli: Cli, tmp_path: Path) -> None:
    sample = next((SAMPLES / "codex").glob("*.jsonl"))
    environment = {**os.environ, "WORKBENCH_STORE": str(tmp_path / "piped.duckdb")}
    done = subprocess.run(
        [sys.executable, "-m", "workbench", "ingest", "-", "--json"], input=sample.read_bytes(), capture_output=True,
        env=environment, timeout=120,
    )  # fmt: skip
    piped = json.loads(done.stdout.splitlines()[-1])
    archive = tmp_path / "logs.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as z:
        z.write(sample, "deep/er/a.log")
    _, zipped = cli("ingest", str(archive), "--json")
    _, plain = Cli(tmp_path / "plain.duckdb", cli.capsys)("ingest", str(sample), "--json")
    for noun in ("conversations", "messages", "exchanges"):
        assert piped[noun]["added"] == zipped[noun]["added"] == plain[noun]["added"] > 0


def test_remember_is_found(cli: Cli) -> None:
    assert cli("remember", "Deploys go through deploy/push.sh", "--project", "parcel", "--json")[0] == 0
    assert cli("remember", "Deploys go through deploy/push.sh", "--project", "parcel", "--json")[0] == 0
    hits = cli("recall", "deploy push", "--json")[1]
    assert len(hits) == 1
    assert hits[0]["project"] == "parcel"
    assert cli("remember", "  ", "--json")[0] == 2


def test_what_waits_in_the_spool_makes_a_store_to_distil(cli: Cli) -> None:
    from workbench.data import spool
    from workbench.data.records import Conversation, Message, Part

    spool.append(cli.store, [Conversation("s"), Message("s", "user", [Part("text", "Deploy by hand")], "m")])
    assert cli("distill", "--json")[1]["memories"]["added"] == 1


def test_a_note_for_a_store_that_is_a_folder_is_refused(cli: Cli) -> None:
    cli.store.mkdir()
    assert cli("remember", "Deploys go through deploy/push.sh")[0] == 2
    assert "is a folder" in cli.err
    assert [path.name for path in cli.store.parent.iterdir()] == [cli.store.name]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["ingest", "/no/such/path"], 2, "does not exist"),
        (["ingest", str(SAMPLES), "--format", "nonsense"], 2, "claude_code"),
        (["recall", "x"], 16, "There is no store"),
        (["stats"], 16, "There is no store"),
        (["distill"], 16, "There is no store"),
        (["calibrate"], 16, "There is no store"),
        (["methods", "show", "structured-destillation"], 4, "structured-distillation-memory"),
        (["distill", "--distiller", "llm"], 2, "--base-url"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_errors_say_what_to_do(cli: Cli, arguments: list[str], code: int, says: str) -> None:
    assert cli(*arguments)[0] == code
    assert says in cli.err
    assert "Traceback" not in cli.err


def test_bad_queries(filled: Cli) -> None:
    for arguments, says in [
        (["recall", "  "], "empty"),
        (["recall", "x", "--mode", "telepathy"], "hybrid"),
        (["recall", "x", "--since", "yesterdayish"], "2026-01-31"),
        (["recall", "x", "--since", "1970-01-01"], "no time from 1971 to 2199"),
        (["recall", "x", "-k", "0"], "k must be"),
        (["recall", "x", "--budget", "0"], "--budget"),
        (["show", "abcdef", "--neighbours", "-1"], "--neighbours"),
        (["quarantine", "--limit", "-1"], "--limit"),
        (["distill", "--limit", "-1"], "--limit"),
        (["ingest", "x", "--every", "-1"], "--every"),
    ]:
        assert filled(*arguments)[0] == 2
        assert says in filled.err
    assert filled("show", "ffffffffff")[0] == 4
    assert filled("show", "ab")[0] == 4


@pytest.mark.parametrize("arguments", [["stats"], ["stats", "--json"], ["recall", "rate limit"]])
def test_output_that_cannot_be_written_is_said_and_a_pager_that_left_is_not(filled: Cli, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "workbench", "--store", str(filled.store), *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "workbench: The output is not complete: [Errno 28] No space left on device\n"
    readable, writable = os.pipe()
    os.close(readable)
    left = subprocess.run(command, stdout=writable, stderr=subprocess.PIPE, timeout=120)
    os.close(writable)
    assert (left.returncode, left.stderr) == (0, b"")


def test_a_folder_that_cannot_be_made_is_named(filled: Cli, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    assert filled("export", str(tmp_path / "taken"))[0] == 1
    assert f"File exists: '{tmp_path / 'taken'}'" in filled.err


def test_ctrl_c_while_an_extension_loads_is_an_interruption(cli: Cli, tmp_path: Path) -> None:
    """DuckDB's own extension turns it into an ImportError, or crashes."""
    (tmp_path / "duckdb.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    import time; time.sleep(5)\n"
        "except KeyboardInterrupt:\n    raise ImportError('error while initializing the extension')\n"
    )
    command = [sys.executable, "-m", "workbench", "--store", str(cli.store), "stats"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 130
    assert done.stderr.startswith("workbench: Interrupted.")
    assert len(done.stderr.splitlines()) == 1


NASTY = "\x1b]0;owned\x07 the \x1b[2J parser\r\nwas \x9b31m flaky\rOK"


def test_escape_sequences_of_a_log_reach_no_terminal_and_stay_in_the_json(cli: Cli) -> None:
    cli("remember", NASTY, "--project", "a\x1b[1mb")
    hit = cli("recall", "flaky parser", "--json")[1][0]
    shown = [cli(*arguments)[1] for arguments in (
        ["recall", "flaky parser"], ["recall", "flaky parser", "--budget", "500"], ["show", hit["exchange_id"]],
        ["stats"],
    )]  # fmt: skip
    for text in shown:
        assert not [character for character in text if character != "\n" and not character.isprintable()]
    assert "\\x1b[2J parser\nwas" in shown[2]
    verbatim = cli("show", hit["exchange_id"], "--json")[1]
    assert verbatim["messages"][0]["parts"][0]["text"] == NASTY


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}])
def test_colours_are_for_terminals_that_want_them(filled: Cli, environment: dict[str, str]) -> None:
    import pty

    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "workbench", "--store", str(filled.store), "recall", "rate limit", "-k", "1"]
    subprocess.run(command, stdout=end, env={**os.environ, "NO_COLOR": "", **environment}, timeout=120, check=True)
    output = os.read(terminal, 65536)
    os.close(end)
    os.close(terminal)
    assert b"rate limit" in output
    assert (b"\x1b[" in output) == (not environment)


def test_what_is_not_shown_is_said(filled: Cli) -> None:
    listed = filled("quarantine", "--limit", "2", "--json")[1]
    assert len(listed["quarantine"]) == 2
    assert f"{listed['total'] - 2} more" in filled("quarantine", "--limit", "2")[1]
    assert "more" not in filled("quarantine", "--limit", str(listed["total"]))[1].splitlines()[-1]
    assert "None of the 10 hits fits into 20 tokens" in filled("recall", "rate limit", "--budget", "20")[1]
    assert "Nothing found" in filled("recall", "zzzqqq", "--mode", "keyword", "--budget", "200")[1]


def test_methods_rows(cli: Cli) -> None:
    rows = cli("methods", "list", "--json")[1]
    fields = [
        "name", "seed", "title", "arxiv", "backend", "family", "signal", "access", "granularity", "degree", "needs",
        "evidence", "reading",
    ]  # fmt: skip
    assert all(list(row) == fields for row in rows)
    seeds = [row["seed"] for row in rows if row["seed"] is not None]
    assert seeds == sorted(seeds)
    assert {1, 151} <= set(seeds)


def test_export(filled: Cli, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    code, report = filled("export", str(tmp_path / "out"), "--json")
    assert code == 0
    stats = filled("stats", "--json")[1]
    assert (
        pq.read_table(tmp_path / "out" / "messages.parquet").num_rows == stats["messages"] == report["rows"]["messages"]
    )
