"""Runs a script under `accelerate launch` in CPU processes; it writes what it found to `out.json` in its folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def launch(script: Path, folder: Path, processes: int) -> dict[str, Any]:
    """What the script, called with its folder and the number of processes, wrote to out.json."""
    folder.mkdir()
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
        # accelerate's name for "several processes on this machine"; the script itself stays on the CPU
        *(["--multi_gpu", "--main_process_port", str(_free_port())] if processes > 1 else ["--cpu"]),
        str(script), str(folder), str(processes),
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
