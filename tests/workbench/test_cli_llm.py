"""`workbench distill --distiller llm` against a real local server process: cached, resumable, accounted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_llm_server import FakeServer

from workbench.cli.app import run

ROOT = Path(__file__).resolve().parents[2]


def test_distil_with_a_model_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ["--store", str(tmp_path / "s.duckdb")]
    run([*store, "ingest", str(ROOT / "data" / "samples" / "codex"), "--json"])
    with FakeServer() as server:
        command = [*store, "distill", "--distiller", "llm", "--base-url", server.url, "--model", "tiny", "--json"]
        capsys.readouterr()
        assert run([*command, "--limit", "1"]) == 0
        first = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert first["memories"]["added"] == 1
        assert first["memories"]["pending"] > 0
        assert first["usage"]["num_requests"] >= 1
        assert run(command) == 0
        second = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert second["memories"]["pending"] == 0
        assert second["memories"]["added"] == first["memories"]["pending"]
    assert run([*store, "distill", "--json"]) == 0, "both distillers live side by side"
    capsys.readouterr()
    assert run([*store, "stats", "--json"]) == 0
    stats = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {d["distiller"] for d in stats["distillers"]} == {"extractive/1", "llm/1:tiny"}
    assert run([*store, "recall", "delivery date", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])


def test_exchanges_that_failed_are_said_and_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ["--store", str(tmp_path / "s.duckdb")]
    run([*store, "ingest", str(ROOT / "data" / "samples" / "codex"), "--json"])
    with FakeServer() as server:
        command = [*store, "distill", "--distiller", "llm", "--base-url", server.url, "--model", "tiny"]
        server.plan([{"match": "", "faults": ["400"] * 200}])
        capsys.readouterr()
        assert run([*command, "--json"]) == 3
        failed = json.loads(capsys.readouterr().out.splitlines()[-1])["memories"]["failed"]
        assert failed > 0
        assert run(command) == 3
        assert f"still pending: {failed}. The same command tries them again." in capsys.readouterr().out
        server.plan()
        assert run(command) == 0
    capsys.readouterr()
    assert run(["--help"]) == 0
    assert "not distilled" in " ".join(capsys.readouterr().out.split())


def test_unreachable_server_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ["--store", str(tmp_path / "s.duckdb")]
    run([*store, "ingest", str(ROOT / "data" / "samples" / "codex"), "--json"])
    capsys.readouterr()
    code = run([*store, "distill", "--distiller", "llm", "--base-url", "http://127.0.0.1:9/v1", "--model", "x"])
    assert code == 6
    assert "127.0.0.1:9" in capsys.readouterr().err
