"""The training half in one command: a teacher is trained, its rollouts are stored, three methods train a student."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from workbench.data.store import Store
from workbench.policies.store import save_rollouts, save_tasks

BASELINE = "sequence-kd"


def run(
    store: Path, seeds: Sequence[int] = (0, 1, 2), told: Callable[[str], None] = lambda _: None, steps: int = 200,
    teacher_steps: int = 400,
) -> dict[str, Any]:  # fmt: skip
    """Trains and compares; tasks and rollouts go into the store; returns the table's rows."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before trl: it would send telemetry
    from dataclasses import replace

    import torch
    from transformers.utils import logging

    from workbench.evals.arena import compare, fight
    from workbench.evals.rooms_ring import SETTINGS, RoomsRing, make_ring
    from workbench.policies.lm.methods.gkd import Gkd
    from workbench.policies.lm.methods.sequence_kd import SequenceKd
    from workbench.train_run import quiet

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    sizes, settings = RoomsRing(teacher_steps=teacher_steps), replace(SETTINGS, steps=steps)
    with quiet():
        rings = [make_ring(seed, sizes, settings, told) for seed in seeds]
    num_rollouts = 0
    with Store(store) as opened, opened.transaction() as con:
        for ring in rings:
            save_tasks(con, f"rooms-{sizes.size}-{ring.seed}", "train", ring.train)
            save_tasks(con, f"rooms-{sizes.size}-{ring.seed}", "test", ring.test)
            for policy, by_task in ring.stored.items():
                rollouts = [rollout for some in by_task.values() for rollout in some]
                texts = ring.tokenizer.batch_decode([rollout.completion_ids for rollout in rollouts])
                num_rollouts += save_rollouts(
                    con, f"{policy}-{ring.seed}", rollouts, texts, model_version=f"demo-{ring.seed}",
                    tokenizer=f"rooms-{sizes.size}", sampling={"temperature": 1.0},
                )  # fmt: skip
    methods = {
        BASELINE: SequenceKd(),
        "gkd off-policy": Gkd(divergence="forward_kl", on_policy=0.0),
        "gkd on-policy": Gkd(divergence="forward_kl"),
    }
    with quiet():
        rows = compare(fight(rings, methods, settings, told), BASELINE)
    return {
        "store": str(store), "seeds": list(seeds), "sizes": asdict(sizes), "settings": asdict(settings),
        "rollouts_stored": num_rollouts, "baseline": BASELINE, "rows": rows, "winner": max(rows, key=_mean)["method"],
    }  # fmt: skip


def _mean(row: dict[str, Any]) -> float:
    return row["mean"]
