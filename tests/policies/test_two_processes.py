"""Under `accelerate launch`, two CPU processes give the losses of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("trl")

SCRIPT = Path(__file__).parent / "two_processes.py"


def run(folder: Path, processes: int) -> dict[str, object]:
    folder.mkdir()
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
        # accelerate's name for "several processes on this machine"; the script itself stays on the CPU
        *(["--multi_gpu", "--main_process_port", str(_free_port())] if processes > 1 else ["--cpu"]),
        str(SCRIPT), str(folder), str(4 // processes),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    one, two = run(tmp_path / "one", 1), run(tmp_path / "two", 2)
    assert two["losses"] == pytest.approx(one["losses"], abs=2e-5)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-5)
