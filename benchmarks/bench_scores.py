"""What stored rollouts and teacher scores cost beside making them again.

    python benchmarks/bench_scores.py [--out FOLDER]

Scores: top-64 over 151,936 words, of a random teacher (hidden 64, 2 layers: the cheapest to ask that has such a head).
A second objective: a student learns from a teacher's rollouts (64 tokens, batches of 64, 6 steps; setting up left out):
written again, held in memory (nothing is written or read: no replay can cost less), read from the store, and read with
stored scores instead of the live teacher. Two teachers, one little larger than the student and one much larger. Times
are CPU seconds of one thread, the least of the repeats; the arms take turns.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workbench.policies.lm.local_models import stay_offline

stay_offline()

import duckdb  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from workbench.data.store import Store  # noqa: E402
from workbench.policies.lm import tiny  # noqa: E402
from workbench.policies.lm.engine import LmTrainer  # noqa: E402
from workbench.policies.lm.episodes import local_writer, roll_out  # noqa: E402
from workbench.policies.lm.rollout import Rollout  # noqa: E402
from workbench.policies.lm.run import _arguments  # noqa: E402
from workbench.policies.lm.scoring import LocalTeacher, attach  # noqa: E402
from workbench.policies.lm.settings import Settings  # noqa: E402
from workbench.policies.nouns import Fresh, Phase, Role, Stored  # noqa: E402
from workbench.policies.store import load_rollouts, save_rollouts, score_id  # noqa: E402
from workbench.policies.tasks import Task  # noqa: E402
from workbench.policies.terms import TokenDivergence  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
K, WORDS = 64, 151_936
SEQUENCES, TOKENS = 48, 128
STEPS, BATCH, REPEATS = 6, 64, 5
STUDENT, TEACHERS = 96, (128, 320)  # hidden widths
ARMS = ("again", "memory", "stored", "scores")


def cpu_seconds(action: Callable[[], Any], repeats: int) -> float:
    """The least CPU time of several runs."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return min(times)


def bench_scores(folder: Path) -> list[str]:
    """Bytes a token in the store; reading scores beside making them."""
    tokenizer = tiny.make_tokenizer(["a"])
    model = tiny.make_model(
        tokenizer, 0, 64, 2, vocab_size=WORDS, max_position_embeddings=TOKENS + 8, initializer_range=0.2
    )
    teacher = LocalTeacher(model.eval())
    generator = torch.Generator().manual_seed(0)
    rollouts = [
        Rollout(f"t{i}", [3, 4, 5, 6], torch.randint(3, WORDS, (TOKENS,), generator=generator).tolist())
        for i in range(SEQUENCES)
    ]
    path = folder / "scores.duckdb"
    with Store(path):
        pass
    before = path.stat().st_size
    start = time.process_time()
    with Store(path) as store, store.transaction() as con:
        attach(con, teacher, "teacher", rollouts, k=K)
    made_and_kept = time.process_time() - start
    in_file = (path.stat().st_size - before) / (SEQUENCES * TOKENS)
    with Store(path, read_only=True) as store:
        raw = store.con.execute(
            "SELECT sum(octet_length(ids) + octet_length(logprobs)) FROM teacher_scores"
        ).fetchall()[0][0]
        read = cpu_seconds(lambda: attach(store.con, teacher, "teacher", rollouts, k=K), 5)
    prompts, completions = [r.prompt_ids for r in rollouts], [r.completion_ids for r in rollouts]
    scored = cpu_seconds(lambda: teacher.top_k(prompts, completions, K), 2)
    assert len({score_id(teacher.version, K, p, c) for p, c in zip(prompts, completions, strict=True)}) == SEQUENCES
    tokens = SEQUENCES * TOKENS
    return [
        f"| bytes a token at k = {K}: in the store's file (of the values alone) | {in_file:.0f} "
        f"({raw / tokens:.0f}) | ≤ 400 |",
        f"| scoring {tokens:,} tokens, CPU s | {scored:.2f} | |",
        f"| scoring and keeping them, CPU s | {made_and_kept:.2f} | |",
        f"| reading them back, CPU s | {read:.4f} | |",
        f"| reading / scoring | {read / scored:.4f} | < 1 |",
    ]


class Replay:
    """A second objective on rollouts of a teacher: stored ones, or written again.

    Args: folder: of the store; hidden: width of the teacher.
    """

    def __init__(self, folder: Path, hidden: int) -> None:
        self.folder, self.path = folder, folder / f"replay-{hidden}.duckdb"
        self.tokenizer = tiny.make_tokenizer([f"w{i}" for i in range(997)])
        self.teacher = tiny.make_model(self.tokenizer, 1, hidden, 2, initializer_range=0.2)
        with torch.no_grad():  # an unlikely end: nearly all rollouts have full length
            self.teacher.lm_head.weight[self.tokenizer.eos_token_id] = 0
        self.tasks = [Task(f"t{i}", {"prompt": f"w{i % 997} w{7 * i % 997} w5"}) for i in range(STEPS * BATCH)]
        self.scorer = LocalTeacher(self.teacher)
        rollouts = self.generate()
        self.num_tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
        with Store(self.path) as store, store.transaction() as con:
            texts = [""] * len(rollouts)
            save_rollouts(con, "teacher", rollouts, texts, model_version="v", tokenizer="t", sampling={})
            attach(con, self.scorer, "teacher", rollouts, k=K)
        self.held = self.read(scores=False)

    def generate(self) -> list[Rollout]:
        """Writes the rollouts."""
        prompts = [self.tokenizer(task.prompts["prompt"])["input_ids"] for task in self.tasks]
        return roll_out(local_writer(self.teacher, self.tokenizer, 1.0, BATCH), self.tokenizer, self.tasks, prompts, 64)

    def read(self, *, scores: bool) -> dict[str, list[Rollout]]:
        """Reads them, with the teacher's scores if wanted."""
        with Store(self.path, read_only=True) as store:
            found = load_rollouts(store.con, "teacher", [task.id for task in self.tasks], "t")
            if not scores:
                return found
            flat = attach(store.con, self.scorer, "teacher", [one for some in found.values() for one in some], k=K)
            return {rollout.task_id: [rollout] for rollout in flat}

    def train(self, arm: str) -> float:
        """CPU seconds of reading what is stored and training on it; setting the trainer up is left out.

        Args: arm: "again" (the live teacher writes and judges), "memory" and "stored" (judges only), "scores" (is not
            asked).
        """
        term = TokenDivergence(divergence="forward_kl", teacher="stored" if arm == "scores" else "teacher")
        source = Fresh("teacher") if arm == "again" else Stored("teacher", "teacher" if arm == "scores" else None)
        roles = [] if arm == "scores" else [Role(name="teacher")]
        phase = Phase(name="p", sources={"main": source}, terms=[term], roles=roles)
        settings = Settings(steps=STEPS, batch_size=BATCH, max_completion_tokens=64, cpu=True)
        args = _arguments(settings, phase, self.folder / "run")
        args.save_strategy = "no"  # type: ignore[assignment]
        start = time.process_time()
        stored = {}
        if arm != "again":
            stored = {"teacher": self.held if arm == "memory" else self.read(scores=arm == "scores")}
        reading = time.process_time() - start
        student = tiny.make_model(self.tokenizer, 2, STUDENT, 2, initializer_range=0.2)
        trainer = LmTrainer(
            student, args, self.tokenizer, phase, self.tasks, models={"teacher": self.teacher}, stored=stored
        )
        trainer.remove_callback(transformers.PrinterCallback)
        start = time.process_time()
        trainer.train()
        return reading + time.process_time() - start


def bench_replay(folder: Path, hidden: int) -> list[str]:
    """A second objective on stored rollouts beside one that writes them again; the arms take turns."""
    replay = Replay(folder, hidden)
    rounds = [{arm: replay.train(arm) for arm in ARMS} for _ in range(REPEATS)]
    least = {arm: min(one[arm] for one in rounds) for arm in ARMS}
    write, read = cpu_seconds(replay.generate, 3), cpu_seconds(lambda: replay.read(scores=False), REPEATS)
    size = replay.teacher.num_parameters() / 1e6
    rows = [
        f"| teacher of {size:.1f} million weights: writing {len(replay.tasks)} rollouts of {replay.num_tokens:,} "
        f"tokens, CPU s | {write:.2f} | |",
        f"| reading them back / writing them again | {read / write:.4f} | ≤ 0.5 |",
        f"| second objective ({STEPS} steps), rollouts written again, live teacher, CPU s | {least['again']:.2f} | |",
    ]
    labels = {
        "memory": "the same with rollouts in memory, the floor of any replay: CPU s, ratio, ratio of each of "
        f"{REPEATS} rounds",
        "stored": "the same with stored rollouts",
        "scores": "the same with stored rollouts and scores",
    }
    for arm, label in labels.items():
        ratios = sorted(one[arm] / one["again"] for one in rounds)
        aim = "" if arm == "memory" else "≤ 0.5"
        rows.append(
            f"| {label} | {least[arm]:.2f}, {least[arm] / least['again']:.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f} | "
            f"{aim} |"
        )
    return rows


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        rows = bench_scores(Path(folder))
        for hidden in TEACHERS:
            rows += bench_replay(Path(folder), hidden)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, duckdb {duckdb.__version__}"
    lines = [
        "# Stored rollouts and teacher scores", "",
        f"- date: {datetime.now(UTC).isoformat(timespec='seconds')}",
        f"- command: {' '.join(['python', 'benchmarks/bench_scores.py', *sys.argv[1:]])}",
        f"- machine: {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}",
        f"- load (1 minute) at the start {start:.1f}, at the end {os.getloadavg()[0]:.1f}", "",
        "| measure | found | aim |", "|---|---:|---|", *rows,
    ]  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "scores.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
