"""Which method wins on rooms, at equal prompts, steps and start, over several seeds.

    python benchmarks/bench_rooms.py [--seeds 0 1 2] [--out benchmarks/results]

Every method trains the same warmed-up student on the same 60 pairs of rooms for 200 steps of 32 sequences. Success: the
goal is reached within 2 x distance + 2 moves, on 600 pairs that the student never saw, sampled at temperature 1. The
control "fresh teacher rollouts" has the off-policy loss on rollouts that the teacher writes anew: what on-policy gains
beyond it comes from the student's own states. "shuffled teacher" is the negative control: a teacher of another map.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import replace
from datetime import date
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers.utils import logging as transformers_logging

from workbench.evals.arena import compare, fight
from workbench.evals.rooms_ring import SETTINGS, RoomsRing, make_ring
from workbench.policies.lm.methods.gkd import Gkd
from workbench.policies.lm.methods.paced import Paced
from workbench.policies.lm.methods.sequence_kd import SequenceKd
from workbench.policies.lm.methods.soda import Soda
from workbench.policies.lm.methods.taid import Taid
from workbench.policies.nouns import Method

RESULTS = Path(__file__).resolve().parent / "results"
BASELINE = "off-policy forward KL"
METHODS: dict[str, Method] = {
    "labels": SequenceKd(policy="labels"),
    "sequence KD": SequenceKd(),
    BASELINE: Gkd(divergence="forward_kl", on_policy=0.0),
    "TAID": Taid(),
    "SODA": Soda(),
    "fresh teacher rollouts": Gkd(divergence="forward_kl", on_policy=0.0, off_policy_source="teacher"),
    "PACED": Paced(),
    "PACED, uniform weights": Paced(alpha=0.0, beta=0.0),
    "on-policy forward KL": Gkd(divergence="forward_kl"),
    "on-policy reverse KL": Gkd(),
}
CONTROL = "on-policy, teacher of another map"


def main() -> None:
    """Prints the table and writes benchmarks/results/rooms.{md,json}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()

    def told(text: str) -> None:
        print(text, flush=True)

    rings = [make_ring(seed, RoomsRing(pass_rate_samples=16), told=told) for seed in options.seeds]
    results = fight(rings, METHODS, SETTINGS, told)
    strangers = [replace(ring, models=rings[i - 1].models) for i, ring in enumerate(rings)]
    control = fight(strangers, {CONTROL: METHODS["on-policy forward KL"]}, SETTINGS, told)[1]
    rows = compare([*results, control], BASELINE)
    seeds = " ".join(map(str, options.seeds))
    lines = [
        "# Which method wins on rooms", "",
        f"`python benchmarks/bench_rooms.py --seeds {seeds}` · {date.today()} · {platform.machine()}, one thread, "
        f"torch {torch.__version__}; difference and p (Holm) against {BASELINE}", "",
        f"| method | success, seeds {seeds} | mean [95 %] | difference [95 %] | p | CPU s |", "|---" * 6 + "|",
    ]  # fmt: skip
    for row in rows:
        by_seed = " · ".join(f"{value:.3f}" for value in row["by_seed"])
        mean = "{:.3f} [{:.3f}, {:.3f}]".format(row["mean"], *row["ci95"])
        difference, p = "baseline", ""
        if "difference" in row:
            difference = "{:+.3f} [{:+.3f}, {:+.3f}]".format(row["difference"], *row["difference_ci95"])
            p = f"{row['p_holm']:.2g}"
        lines.append(f"| {row['method']} | {by_seed} | {mean} | {difference} | {p} | {row['cpu_seconds']:.1f} |")
    print("\n".join(lines))
    (options.out / "rooms.md").write_text("\n".join(lines) + "\n")
    (options.out / "rooms.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
