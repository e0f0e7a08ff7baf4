"""Runs a method on the loop engine: its phases in order, each resumable, with the student handed on.

A run lives in a folder: `<number>-<phase>/` with checkpoints, and with `end.safetensors` (the student) when it is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_model
from torch import nn

from workbench.policies.loop.engine import LoopTrainer
from workbench.policies.loop.settings import LoopSettings
from workbench.policies.loop.view import Table
from workbench.policies.nouns import Method
from workbench.policies.running import Interrupted, OnMetrics, StopRequest, save_weights


def run_method(
    student: nn.Module | None, method: Method, tables: Mapping[str, Table], settings: LoopSettings, folder: Path, *,
    models: Mapping[str, nn.Module] | None = None, on_metrics: OnMetrics | None = None,
) -> nn.Module:  # fmt: skip
    """Trains the student through all phases of a method and returns it; called again with the folder, it goes on.

    Args: as in `LoopTrainer`; folder: of the run, made if it is not there.

    Raises: InputError for what cannot be trained, TrainingError if something did not move, Interrupted after Ctrl-C.
    """
    phases = method.phases()
    for number, phase in enumerate(phases, 1):
        home = folder / f"{number}-{phase.name}"
        trainer = LoopTrainer(student, phase, tables, settings, models or {})
        student = trainer.student
        if (home / "end.safetensors").exists():
            load_model(student, str(home / "end.safetensors"))
            continue
        home.mkdir(parents=True, exist_ok=True)
        trainer.resume(home)
        with StopRequest() as stop:
            trainer.train(home, on_metrics, stop)
        if trainer.step < trainer.steps:
            raise Interrupted(f"Stopped after step {trainer.step} of phase {phase.name!r}; it is saved.")
        if trainer.accelerator.is_main_process:
            save_weights(student, home / "end.safetensors")
        trainer.accelerator.wait_for_everyone()
        if stop.is_asked and number < len(phases):
            raise Interrupted(f"Stopped after the last step of phase {phase.name!r}; it is saved.")
    assert student is not None
    return student
