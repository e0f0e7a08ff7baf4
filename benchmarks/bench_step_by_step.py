"""Distilling step-by-step beside labels alone, at equal steps, over several seeds; with shuffled rationales as control.

    python benchmarks/bench_step_by_step.py [--seeds 0 1 2] [--labelled 200 1000] [--steps 600] [--out FOLDER]

Task: the sum of four digits modulo 3 (evals/running_states.py; chance 1/3); 200 (as in card 128) and 1,000 labelled
examples; rationales = the running sum's states; 1,000 test tasks, greedy. Students of 0.1 million weights from random
weights; a step has 32 tasks. Only the answer's prompt is read at test time.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
import warnings
from datetime import date
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers.utils import logging as transformers_logging

from workbench.evals.arena import Result, compare
from workbench.evals.running_states import Sizes, graduate, make_school
from workbench.policies.lm.methods.step_by_step import StepByStep
from workbench.policies.lm.settings import Settings

RESULTS = Path(__file__).resolve().parent / "results"
BASELINE = "labels alone"
METHODS = {
    BASELINE: StepByStep(alpha=1.0),
    "step-by-step": StepByStep(),
    "step-by-step, shuffled rationales": StepByStep(rationales="shuffled"),
}


def fight(labelled: int, seeds: list[int], settings: Settings) -> list[Result]:
    """Trains and judges every method with every seed."""
    results = {name: Result(name) for name in METHODS}
    for seed in seeds:
        school = make_school(seed, Sizes(num_train=labelled))
        for name, method in METHODS.items():
            before = time.process_time()
            results[name].rewards.append(graduate(school, method, settings))
            results[name].cpu_seconds.append(time.process_time() - before)
            print(f"{labelled} labelled, seed {seed}: {name} {results[name].by_seed[-1]:.3f}", flush=True)
    return list(results.values())


def main() -> None:
    """Prints the table and writes benchmarks/results/step_by_step.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--labelled", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    settings = Settings(
        steps=options.steps, batch_size=32, learning_rate=2e-3, max_completion_tokens=8, save_every=10_000,
        log_every=10_000, cpu=True,
    )  # fmt: skip
    seeds, sizes = " ".join(map(str, options.seeds)), " ".join(map(str, options.labelled))
    lines = [
        "# Distilling step-by-step beside labels alone", "",
        f"`python benchmarks/bench_step_by_step.py --seeds {seeds} --labelled {sizes} --steps {options.steps}` · "
        f"{date.today()} · {platform.machine()}, one thread, torch {torch.__version__}; accuracy on 1,000 tasks, "
        f"chance .333; difference and p (Holm) against {BASELINE}", "",
        f"| labelled | method | accuracy, seeds {seeds} | mean [95 %] | difference [95 %] | p | CPU s |",
        "|---" * 7 + "|",
    ]  # fmt: skip
    for labelled in options.labelled:
        for row in compare(fight(labelled, options.seeds, settings), BASELINE):
            by_seed = " · ".join(f"{value:.3f}" for value in row["by_seed"])
            mean = "{:.3f} [{:.3f}, {:.3f}]".format(row["mean"], *row["ci95"])
            difference, p = "baseline", ""
            if "difference" in row:
                difference = "{:+.3f} [{:+.3f}, {:+.3f}]".format(row["difference"], *row["difference_ci95"])
                p = f"{row['p_holm']:.2g}"
            cells = [str(labelled), row["method"], by_seed, mean, difference, p, f"{row['cpu_seconds']:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    print("\n".join(lines))
    (options.out / "step_by_step.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
