"""Run by `accelerate launch`: a phase with everything; the main process writes losses and weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))

import torch
from loop_made import TABLES, net, phase, settings

from workbench.policies.loop.engine import LoopTrainer

folder, processes = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
rows: list[Any] = []
trainer = LoopTrainer(net(0), phase(), TABLES, settings(batch_size=4 // processes, accumulation=2), {"teacher": net(1)})
trainer.train(on_metrics=lambda name, step, numbers: rows.append(numbers))
if trainer.accelerator.is_main_process:
    weights = {name: float(tensor.double().abs().sum()) for name, tensor in trainer._tensors().items()}
    (folder / "out.json").write_text(json.dumps({"rows": rows, "weights": weights}))
trainer.accelerator.end_training()  # a process that ends with its group open is at times aborted by gloo's threads
