"""Run by `accelerate launch`: three steps on stored rollouts; the main process prints the losses as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import torch
from tiny_models import make_args, make_model, make_tokenizer

from workbench.policies.lm.engine import LmTrainer
from workbench.policies.lm.rollout import Rollout
from workbench.policies.nouns import Phase, Role, Stored
from workbench.policies.tasks import Task
from workbench.policies.terms import CrossEntropy, TokenDivergence

folder, per_process = Path(sys.argv[1]), 4 // int(sys.argv[2])
torch.set_num_threads(1)
tokenizer = make_tokenizer()
tasks = [Task(f"t{i}", {"prompt": f"w{i} w{7 * i % 26}"}) for i in range(16)]
kept = {task.id: [Rollout(task.id, [5], [3 + (i + j) % 26 for j in range(1 + i % 7)])] for i, task in enumerate(tasks)}
phase = Phase(
    name="p", sources={"main": Stored("x")}, roles=[Role(name="teacher")],
    terms=[CrossEntropy(), TokenDivergence(divergence="forward_kl", by_sequence=True)],
)  # fmt: skip
trainer = LmTrainer(
    make_model(tokenizer, 1), make_args(folder, per_device_train_batch_size=per_process, gradient_accumulation_steps=2),
    tokenizer, phase, tasks, models={"teacher": make_model(tokenizer, 2)}, stored={"x": kept},
)  # fmt: skip
trainer.train()
if trainer.accelerator.is_main_process:
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    total = sum(float(p.detach().abs().sum()) for p in trainer.accelerator.unwrap_model(trainer.model).parameters())
    (folder / "out.json").write_text(json.dumps({"losses": [float(x) for x in losses], "weights": total}))
trainer.accelerator.end_training()  # a process that ends with its group open is at times aborted by gloo's threads
