"""Which method wins on rooms, at equal prompts, steps and start: the order that the field knows, over several seeds.

    python benchmarks/bench_rooms.py [--seeds 0 1 2] [--out benchmarks/results]

A teacher learns a map of 36 rooms from walks with 30 % random moves; a student is warmed up on shortest walks of 60
pairs of rooms, and every method trains that student on the same 60 pairs for 200 steps of 32 sequences. Success: the
goal is reached within 2 x distance + 2 moves, on 600 pairs that were never trained on, sampled at temperature 1.
The control "fresh teacher rollouts" has the off-policy loss on rollouts that the teacher writes anew: what on-policy
gains beyond it comes from the student's own states. `--methods` runs some of them only.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers.utils import logging as transformers_logging

from workbench.evals.environments.rooms import Rooms
from workbench.policies.lm.episodes import encode, local_writer, roll_out
from workbench.policies.lm.methods.gkd import Gkd
from workbench.policies.lm.methods.paced import Paced
from workbench.policies.lm.methods.sequence_kd import SequenceKd
from workbench.policies.lm.methods.soda import Soda
from workbench.policies.lm.methods.taid import Taid
from workbench.policies.lm.rollout import Rollout
from workbench.policies.lm.run import Settings, run_method
from workbench.policies.lm.tiny import make_model, make_tokenizer
from workbench.policies.nouns import Method
from workbench.policies.tasks import Task

RESULTS = Path(__file__).resolve().parent / "results"
TRAIN, TEST, MAX_TOKENS = 60, 600, 32
METHODS: dict[str, Method] = {
    "labels": SequenceKd(policy="labels"),
    "sequence KD": SequenceKd(),
    "off-policy forward KL": Gkd(divergence="forward_kl", on_policy=0.0),
    "TAID": Taid(),
    "SODA": Soda(),
    "fresh teacher rollouts, forward KL": Gkd(divergence="forward_kl", on_policy=0.0, off_policy_source="teacher"),
    "on-policy forward KL": Gkd(divergence="forward_kl"),
    "on-policy reverse KL": Gkd(),
    "PACED (weights by pass rate)": Paced(),
    "PACED, uniform weights": Paced(alpha=0.0, beta=0.0),
}


def worked(game: Rooms, tokenizer: Any, tasks: list[Task], rng: random.Random, noise: float, each: int) -> Any:
    """Walks by the game's own expert; a random move is context, not a target."""
    found: dict[str, list[Rollout]] = {}
    for task in tasks:
        for _ in range(each):
            ids, mask = [], []
            turns = list(game.expert(task, rng, noise))
            for number, (best, made, answer) in enumerate(turns, 1):
                ids += tokenizer.encode(made)
                mask.append(int(best == made))
                if number < len(turns):
                    words = tokenizer.encode(answer)
                    ids += words
                    mask += [0] * len(words)
            if any(mask):
                found.setdefault(task.id, []).append(
                    Rollout(task.id, encode(tokenizer, task.prompt("prompt")), ids, mask)
                )
    return found


def play(model: Any, tokenizer: Any, game: Rooms, tasks: list[Task], seed: int) -> list[Rollout]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prompts = [encode(tokenizer, task.prompt("prompt")) for task in tasks]
        return roll_out(local_writer(model, tokenizer, batch_size=1000), tokenizer, tasks, prompts, MAX_TOKENS, game)


def success(model: Any, tokenizer: Any, game: Rooms, tasks: list[Task]) -> float:
    return statistics.fmean(r.reward or 0.0 for r in play(model, tokenizer, game, tasks, 12345))


def train(
    student: Any, method: Method, tasks: list[Task], seed: int, steps: int = 200, batch: int = 32, **kwargs: Any
) -> Any:
    settings = Settings(
        steps=steps, batch_size=batch, learning_rate=2e-3, max_completion_tokens=MAX_TOKENS, save_every=10_000,
        log_every=10_000, cpu=True, seed=seed,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        return run_method(
            copy.deepcopy(student), kwargs.pop("tokenizer"), method, tasks, settings, Path(folder), **kwargs
        )


def one_seed(seed: int, names: list[str]) -> dict[str, dict[str, float]]:
    game = Rooms(seed=seed)
    tokenizer, tasks = make_tokenizer(game.words()), game.tasks()
    known, test = tasks[:TRAIN], tasks[-TEST:]
    rng = random.Random(seed)
    common: dict[str, Any] = {"tokenizer": tokenizer, "environment": game}
    found: dict[str, dict[str, float]] = {}

    def measured(name: str, make: Any) -> Any:
        start = time.process_time()
        model = make()
        seconds = time.process_time() - start
        found[name] = {"success": success(model, tokenizer, game, test), "cpu_seconds": seconds}
        print(f"seed {seed}  {name:36s} {found[name]['success']:.3f}  {seconds:6.1f} s", flush=True)
        return model

    walks = {"labels": worked(game, tokenizer, tasks, rng, 0.3, 8)}
    big, small = make_model(tokenizer, 100 + seed, hidden=64), make_model(tokenizer, 200 + seed, hidden=32)
    print(f"teacher {big.num_parameters():,} parameters, student {small.num_parameters():,}")
    teacher = measured(
        "teacher",
        lambda: train(big, SequenceKd(policy="labels"), tasks, seed, 400, 64, stored=walks, **common),
    )
    stored = {"labels": worked(game, tokenizer, known, rng, 0.0, 1)}
    start = measured(
        "warm start", lambda: train(small, SequenceKd(policy="labels"), known, seed, 60, stored=stored, **common)
    )
    stored["teacher"] = {r.task_id: [r] for r in play(teacher, tokenizer, game, known, seed)}
    stored["student-base"] = {r.task_id: [r] for r in play(start, tokenizer, game, known, seed + 1)}
    tries = [play(start, tokenizer, game, known, 1000 * seed + n) for n in range(16)]
    rates = [statistics.fmean(sample[i].reward or 0.0 for sample in tries) for i in range(len(known))]
    # 0 and 1 of 16 tries are pulled in: a weight of exactly 0 would leave too few tasks for a batch
    paced = [
        Task(t.id, t.prompts, pass_rate=(rate * 16 + 0.5) / 17, meta=t.meta)
        for t, rate in zip(known, rates, strict=True)
    ]
    for name in names:
        measured(
            name,
            lambda name=name: train(
                start, METHODS[name], paced, seed, stored=stored, models={"teacher": teacher}, **common
            ),
        )
    return found


def main() -> None:
    """Prints the table and writes benchmarks/results/rooms.{md,json}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    rows = {seed: one_seed(seed, options.methods) for seed in options.seeds}
    seeds = " · ".join(map(str, options.seeds))
    command = f"python benchmarks/bench_rooms.py --seeds {' '.join(map(str, options.seeds))}"
    lines = [
        "# Which method wins on rooms", "",
        f"`{command}` · {date.today()} · {platform.machine()}, one thread, torch {torch.__version__}", "",
        f"| method | success, seeds {seeds} | mean | s.d. | CPU s |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name in rows[options.seeds[0]]:
        values = [rows[seed][name]["success"] for seed in options.seeds]
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        seconds = statistics.fmean(rows[seed][name]["cpu_seconds"] for seed in options.seeds)
        shown = " · ".join(f"{value:.3f}" for value in values)
        lines.append(f"| {name} | {shown} | {statistics.fmean(values):.3f} | {spread:.3f} | {seconds:.1f} |")
    print("\n".join(lines))
    (options.out / "rooms.md").write_text("\n".join(lines) + "\n")
    (options.out / "rooms.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
