"""The demo of the image half, as short as it can be: a table, a picture, and the same answer again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("sklearn")

from workbench.cli import app  # noqa: E402


def test_it_distils_draws_and_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["demo-diffusion", "--folder", str(tmp_path), "--steps", "3", "--teacher-steps", "2"]
    assert app.run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["generator"]: row for row in found["rows"]}
    assert list(rows) == ["teacher, 1 step", "teacher, 50 steps", "student, 1 step"]
    assert rows["student, 1 step"]["energy_distance"] == found["student"]["metrics"]["student@1/energy_distance"]
    # two updates have hardly moved the copy of the teacher, whose one step is the same
    first = rows["teacher, 1 step"]["sliced_wasserstein"]
    assert rows["student, 1 step"]["sliced_wasserstein"] == pytest.approx(first, rel=0.2)
    assert Path(found["picture"]).read_bytes().startswith(b"\x89PNG")
    assert app.run(arguments) == 0
    said = capsys.readouterr().out
    assert f"{rows['teacher, 50 steps']['energy_distance']:.4f}" in said
    assert "from left to right: teacher, 1 step, teacher, 50 steps, student, 1 step" in " ".join(said.split())
