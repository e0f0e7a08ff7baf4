"""Runs without workbench: every case's exported model on its inputs, and its scheduler's K steps from noise.

Called with a JSON list of cases: folder, part, model, scheduler, steps, sigmas, draws, pipeline. Reads
FOLDER-given.safetensors (x, timestep, noise, c), writes FOLDER-found.safetensors (answer, sampleK, images).
"""

from __future__ import annotations

import json
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

warnings.simplefilter("error")

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def answers(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the case's model, scheduler and pipeline make of its inputs."""
    folder, stock = case["folder"], import_module("diffusers")
    given = load_file(f"{folder}-given.safetensors")
    model = getattr(stock, case["model"]).from_pretrained(folder, subfolder=case["part"], use_safetensors=True)
    scheduler = getattr(stock, case["scheduler"]).from_pretrained(folder, subfolder="scheduler")
    labels = {"class_labels": given["c"]} if "c" in given else {}
    found = {"answer": model(given["x"], given["timestep"], **labels).sample}
    for steps in case["steps"]:
        options = {"generator": torch.Generator().manual_seed(5)} if case["draws"] else {}
        if case["sigmas"]:
            scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
        else:
            scheduler.set_timesteps(steps)
        x = given["noise"] * (80.0 if case["scheduler"].startswith("EDM") else 1.0)
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            answer = model(scaled, t.expand(len(x)), **labels).sample
            x = scheduler.step(answer, t, x, **options).prev_sample
        found[f"sample{steps}"] = x
    if case["pipeline"]:
        pipe = stock.DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
        assert (type(pipe).__name__, type(pipe.scheduler).__name__) == (case["pipeline"], case["scheduler"])
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(6)
        found["images"] = pipe(batch_size=2, generator=generator, num_inference_steps=1, output_type="pt").images
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for one in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        with torch.no_grad():
            save_file(answers(one), one["folder"] + "-found.safetensors")
    assert not any(name.split(".")[0] == "workbench" for name in sys.modules)
