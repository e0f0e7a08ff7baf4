"""A ring of the arena on the rooms game: a teacher that learnt the map, a student that was warmed up, and rollouts.

The teacher learns from walks with 30 % random moves between all pairs of rooms; the student's warm-up and every method
see the same few pairs; the test pairs are in neither the student's prompts nor its warm-up.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from workbench.evals.arena import Ring, judge, play, train
from workbench.evals.environments.rooms import Rooms
from workbench.policies.lm.methods.sequence_kd import SequenceKd
from workbench.policies.lm.settings import Settings
from workbench.policies.lm.tiny import make_model, make_tokenizer
from workbench.policies.tasks import pass_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class RoomsRing:
    """Sizes; the defaults are those of benchmarks/bench_rooms.py.

    Args:
        size: rooms a side of the map.
        num_train, num_test: pairs of rooms that methods train on, and that they are judged on.
        teacher_steps, warm_up_steps: of the teacher's and the student's own training.
        pass_rate_samples: rollouts of the student for each training task; 0 = pass rates are not measured.
    """

    size: int = 6
    num_train: int = 60
    num_test: int = 600
    teacher_hidden: int = 64
    student_hidden: int = 32
    teacher_steps: int = 400
    warm_up_steps: int = 60
    pass_rate_samples: int = 0


#: 200 steps of 32 sequences on one thread of a CPU.
SETTINGS = Settings(
    steps=200,
    batch_size=32,
    learning_rate=2e-3,
    max_completion_tokens=32,
    save_every=10_000,
    log_every=10_000,
    cpu=True,
)


def make_ring(
    seed: int,
    sizes: RoomsRing | None = None,
    settings: Settings = SETTINGS,
    told: Callable[[str], None] = lambda _: None,
) -> Ring:
    """Trains the teacher, warms the student up and writes the rollouts that methods read, all by the seed."""
    sizes = sizes or RoomsRing()
    game = Rooms(sizes.size, seed)
    tokenizer, tasks, rng = make_tokenizer(game.words()), game.tasks(), random.Random(seed)
    known, test = tasks[: sizes.num_train], tasks[-sizes.num_test :]
    walks = {"labels": game.walks(tokenizer, tasks, rng, noise=0.3, each=8)}
    teacher = make_model(tokenizer, 100 + seed, hidden=sizes.teacher_hidden)
    student = make_model(tokenizer, 200 + seed, hidden=sizes.student_hidden)
    told(f"seed {seed}: teacher, {teacher.num_parameters():,} parameters")
    # Labels of all pairs are the teacher's own: to the arena it is a model that somebody has.
    school = Ring(seed, teacher, {}, walks, tokenizer, tasks, test, game)
    large = replace(settings, steps=sizes.teacher_steps, batch_size=min(64, 2 * settings.batch_size))
    teacher = train(school, SequenceKd(policy="labels"), large)
    told(f"seed {seed}: teacher {float(judge(teacher, school, settings.max_completion_tokens).mean()):.3f}")
    stored: dict[str, Any] = {"labels": game.walks(tokenizer, known, rng)}
    nursery = Ring(seed, student, {}, stored, tokenizer, known, test, game)
    start = train(nursery, SequenceKd(policy="labels"), replace(settings, steps=sizes.warm_up_steps))
    length = settings.max_completion_tokens
    stored["teacher"] = {r.task_id: [r] for r in play(teacher, nursery, known, length, seed)}
    stored["student-base"] = {r.task_id: [r] for r in play(start, nursery, known, length, seed + 1)}
    tries = [play(start, nursery, known, length, 1000 * (seed + 1) + n) for n in range(sizes.pass_rate_samples)]
    if tries:
        rewards = zip(*([rollout.reward or 0.0 for rollout in sample] for sample in tries), strict=True)
        known = [replace(task, pass_rate=pass_rate(each)) for task, each in zip(known, rewards, strict=True)]
    return Ring(seed, start, {"teacher": teacher}, stored, tokenizer, known, test, game)
