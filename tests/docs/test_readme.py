"""The README shows only what runs: every command of its tour, in order, in an empty home."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_tour_runs_as_shown(tmp_path: Path) -> None:
    """One shell runs all bash blocks as they stand, then the Python block; only the tour's folder is replaced."""
    assert len(blocks("bash")) >= 5
    for name in ("README.md", "data", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    command = bin_folder / "workbench"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m workbench "$@"\n')
    command.chmod(0o755)
    script = "\n".join(blocks("bash")).replace("/tmp/tour", str(tmp_path / "tour"))
    python = "\n".join(blocks("python"))
    full = f"set -e\n{script}\n{sys.executable} - <<'END_OF_PYTHON'\n{python}\nEND_OF_PYTHON\n"
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "COLUMNS": "120"}
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        ["bash", "-c", full], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    assert "Traceback" not in done.stderr
    # The last is of the Python block: what the user had asked.
    shown = (
        "conversations",
        "memories added",
        "deploy/push.sh",
        "mcpServers",
        "quoted data",
        "user  SQLite or Postgres",
    )
    for expected in shown:
        assert expected in done.stdout, expected


def test_two_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"^    make ([\w-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_ci_calls_make_test() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text("utf-8")


def test_files_named_in_the_readme_exist() -> None:
    named = re.findall(r"`((?:benchmarks|docs|memory|data|policies|evals)/[\w./-]*)`", README)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
