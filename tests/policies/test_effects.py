"""Effects at the smallest scale, over three seeds, with negative controls; benchmarks/bench_rooms.py has the rest.

A random teacher over 26 words wrote one rollout for each of 96 prompts, or writes anew for every batch. Judged is
KL(teacher‖student), in nats a token, on the teacher's rollouts of prompts that no method saw.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from tiny_models import make_model, make_tokenizer  # noqa: E402

from workbench.kernels.divergences import forward_kl  # noqa: E402
from workbench.policies.lm.episodes import local_writer, roll_out  # noqa: E402
from workbench.policies.lm.methods.gkd import Gkd  # noqa: E402
from workbench.policies.lm.methods.sequence_kd import SequenceKd  # noqa: E402
from workbench.policies.lm.rollout import Rollout  # noqa: E402
from workbench.policies.lm.run import run_method  # noqa: E402
from workbench.policies.lm.settings import Settings  # noqa: E402
from workbench.policies.nouns import Method  # noqa: E402
from workbench.policies.tasks import Task  # noqa: E402

TOKENIZER = make_tokenizer()
TASKS = [Task(f"t{i}", {"prompt": f"w{i % 26} w{7 * i % 26} w{i // 26}"}) for i in range(128)]
TRAIN, TEST = TASKS[:96], TASKS[96:]
SETTINGS = Settings(
    steps=60, batch_size=32, learning_rate=5e-3, max_completion_tokens=8, save_every=10_000, log_every=10_000, cpu=True
)
SEEDS = (0, 1, 2)


class School:
    """A teacher, its rollouts, a stranger's rollouts, and a student, by a seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.teacher, self.stranger = (make_model(TOKENIZER, 10 * seed + n).eval() for n in (1, 2))
        self.student = make_model(TOKENIZER, 10 * seed + 3)
        self.stored = {name: self._written(getattr(self, name)) for name in ("teacher", "stranger")}

    def _written(self, model: Any) -> dict[str, list[Rollout]]:
        prompts = [TOKENIZER(task.prompts["prompt"])["input_ids"] for task in TASKS]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            found = roll_out(local_writer(model, TOKENIZER), TOKENIZER, TASKS, prompts, 8)
        return {rollout.task_id: [rollout] for rollout in found}

    def distance(self, method: Method | None, teacher: str = "teacher") -> float:
        """Of the student after training by the method; None = as it is."""
        student = copy.deepcopy(self.student)
        if method is not None:
            with tempfile.TemporaryDirectory() as folder:
                run_method(
                    student, TOKENIZER, method, TRAIN, SETTINGS, Path(folder),
                    models={"teacher": getattr(self, teacher)}, stored=self.stored,
                )  # fmt: skip
        losses = []
        for task in TEST:
            (rollout,) = self.stored["teacher"][task.id]
            ids, start = torch.tensor([rollout.prompt_ids + rollout.completion_ids]), len(rollout.prompt_ids)
            with torch.no_grad():
                sides = [model.eval()(input_ids=ids).logits[0, start - 1 : -1] for model in (student, self.teacher)]
            losses.append(forward_kl(*sides))
        return float(torch.cat(losses).mean())


def test_a_teacher_is_approached_by_its_distributions_and_by_its_fresh_text_and_not_by_a_strangers() -> None:
    """On every seed. One stored rollout a task is memorised as hard labels, and serves soft ones.

    A stranger brings the student a little nearer, too: away from its own random certainties. Hence the ratio.
    """
    soft, hard, fresh = Gkd(divergence="forward_kl", on_policy=0.0), SequenceKd(), SequenceKd(fresh=True)
    strange = Gkd(divergence="forward_kl", on_policy=0.0, policy="stranger")
    rows = []
    for seed in SEEDS:
        school = School(seed)
        rows.append({
            "start": school.distance(None), "soft": school.distance(soft), "hard": school.distance(hard),
            "fresh": school.distance(fresh), "soft, stranger": school.distance(strange, "stranger"),
            "fresh, stranger": school.distance(fresh, "stranger"),
        })  # fmt: skip
    for found in rows:
        assert found["soft"] < 0.8 * found["start"], rows
        assert found["soft"] < 0.8 * found["hard"], rows
        assert found["fresh"] < 0.9 * found["start"], rows
        assert found["soft, stranger"] > 1.2 * found["soft"], rows
        assert found["fresh, stranger"] > 1.2 * found["fresh"], rows
