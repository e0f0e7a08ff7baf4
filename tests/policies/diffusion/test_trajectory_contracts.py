"""What all methods of the trajectory family keep: accumulation changes nothing, runs resume, no heavy import."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from torch import nn
from trajectory_made import data_of, trained

from workbench.policies.diffusion.methods import consistency_distillation, lora_guidance, sana_sprint, slimflow
from workbench.policies.diffusion.oracle import gauss8
from workbench.policies.diffusion.pairs import make_pairs
from workbench.policies.diffusion.testbeds import student_of, toy_net
from workbench.policies.loop.run import run_method
from workbench.policies.loop.settings import LoopSettings
from workbench.policies.running import Interrupted

METHODS = {
    "cd": consistency_distillation.ConsistencyDistillation(guidance=2.0, target_decay=0.9),
    "slimflow": slimflow.SlimFlow(warmup=0.5, flip=True),
    "lora": lora_guidance.LoraGuidance(weight=3.0, rank=2),
    "sana": sana_sprint.SanaSprint(warmup=0.5),
}
ORACLE = gauss8(num_classes=2)
TABLES = {**data_of(ORACLE, 50), "pairs": make_pairs(ORACLE, 50, (2,), steps=5)}


def parts(method):
    """(student, models): a teacher with blocks to tap, frozen, and a copy of it that trains."""
    torch.manual_seed(0)
    teacher = toy_net("gauss8", 16, 3, 0, num_classes=2).requires_grad_(False)
    is_adapter = any(role.name == "student" for role in method.phases()[0].roles)
    return None if is_adapter else student_of(teacher), {"teacher": copy.deepcopy(teacher)}


def assert_alike(a: nn.Module, b: nn.Module, **tolerance) -> None:
    for left, right in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(left, right, **tolerance)


@pytest.mark.parametrize("name", METHODS)
def test_four_micro_batches_are_one_batch(name) -> None:
    found = []
    for size, accumulation in ((16, 1), (4, 4)):
        student, models = parts(METHODS[name])
        for phase in METHODS[name].phases():
            student = trained(
                student, phase, TABLES, models, steps=3, batch_size=size, accumulation=accumulation, optimizer="sgd",
                learning_rate=0.05,
            )  # fmt: skip
        found.append(student)
    assert_alike(*found, rtol=1e-3, atol=1e-6)


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_was_cut_goes_on_to_the_same_weights(name, tmp_path) -> None:
    settings = LoopSettings(steps=6, batch_size=8, learning_rate=1e-2, save_every=2, log_every=1, cpu=True)

    def cut(phase, step, values):
        if step == 5:
            raise Stop

    student, models = parts(METHODS[name])
    whole = run_method(student, METHODS[name], TABLES, settings, tmp_path / "whole", models=models)
    student, models = parts(METHODS[name])
    with pytest.raises((Stop, Interrupted)):
        run_method(student, METHODS[name], TABLES, settings, tmp_path / "cut", models=models, on_metrics=cut)
    student, models = parts(METHODS[name])
    resumed = run_method(student, METHODS[name], TABLES, settings, tmp_path / "cut", models=models)
    assert_alike(whole, resumed, rtol=0, atol=0)


@pytest.mark.parametrize("module", [consistency_distillation, lora_guidance, sana_sprint, slimflow])
def test_the_catalog_row_is_complete(module) -> None:
    row = module.ENTRY.as_json()
    assert all(value not in ("", "TODO") for value in row.values())
    assert row["backend"] == "diffusion"
    assert row["degree"] == "off-policy"
    assert all(field.kw_only for field in fields(module.METHOD))
    assert module.METHOD().phases()[-1].name == "distil"


def test_phases_are_listed_without_torch() -> None:
    names = ("consistency_distillation", "lora_guidance", "sana_sprint", "slimflow")
    code = f"""
import json, sys
from importlib import import_module
for name in {names!r}:
    import_module("workbench.policies.diffusion.methods." + name).METHOD().phases()
print(json.dumps(sorted(set(sys.modules) & {{"torch", "transformers", "numpy", "peft"}})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
