"""Under `accelerate launch`, two CPU processes give the losses of one."""

from __future__ import annotations

from pathlib import Path

import pytest
from launched import launch

pytest.importorskip("torch")
pytest.importorskip("trl")

SCRIPT = Path(__file__).parent / "two_processes.py"


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    one, two = launch(SCRIPT, tmp_path / "one", 1), launch(SCRIPT, tmp_path / "two", 2)
    assert two["losses"] == pytest.approx(one["losses"], abs=2e-5)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-5)
