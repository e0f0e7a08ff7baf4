"""What a step of our engine costs beside one of TRL's own DistillationTrainer on the same work.

    python benchmarks/bench_engine_step.py [--rounds 7] [--steps 8] [--out FOLDER]

The same student, teacher, batches, divergence, optimiser and seeds. Off-policy: the completions are given (TRL always
generates, so there its `_generate_single_turn` hands out the stored ones); on-policy: both generate. First all train
four steps by SGD with every loss logged: losses, lengths of completions and the changes of the weights must be equal,
else nothing is timed. Then they take turns in one process and one thread, by AdamW. CPU seconds a step: from the end of
the first step to the end of the last, with batches, generation, optimiser and logging. "TRL, our divergence" is TRL's
trainer with our kernel in the place of its own: what is left between it and ours is the engine. Memory: each in a
process of its own, peak during training less what it held before.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workbench.policies.lm.local_models import stay_offline

stay_offline()

import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch import Tensor  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402
from trl.trainer.distillation_config import DistillationConfig  # noqa: E402
from trl.trainer.distillation_trainer import DistillationTrainer  # noqa: E402

from workbench.kernels.divergences import Divergence, Kind  # noqa: E402
from workbench.kernels.linear_divergence import LinearLogits, linear_divergence  # noqa: E402
from workbench.policies.lm import tiny  # noqa: E402
from workbench.policies.lm.engine import LmTrainer, _EpochSampler  # noqa: E402
from workbench.policies.lm.methods.gkd import Gkd  # noqa: E402
from workbench.policies.lm.rollout import Rollout  # noqa: E402
from workbench.policies.tasks import Task  # noqa: E402

THEIRS = distillation_trainer._chunked_divergence_loss
RESULTS = Path(__file__).resolve().parent / "results"
KINDS: dict[float, Kind] = {0.0: "forward_kl", 1.0: "reverse_kl", 0.5: "jsd"}
BETAS = {kind: beta for beta, kind in KINDS.items()}
STUDENT, TEACHER, PROMPT_WORDS = 2, 1, 6
ARMS = ("trl", "mixed", "ours")
#: Relative differences of losses, and of the changes of all weights, that count as equal: float32 sums in another
#: order. By SGD: AdamW's first steps magnify rounding where a gradient is next to 0, until a sampled token turns over.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-4, 1e-2
CHECKED_STEPS = 4


@dataclass(frozen=True, slots=True)
class Case:
    """One piece of work; `batch` x `accumulation` sequences a step, `tokens` the longest completion."""

    name: str
    hidden: int
    words: int
    batch: int
    tokens: int
    divergence: Kind = "forward_kl"
    accumulation: int = 1
    on_policy: bool = False


CASES = [
    Case("35 thousand weights", 32, 40, 64, 24),
    Case("35 thousand weights, reverse KL", 32, 40, 64, 24, "reverse_kl"),
    Case("35 thousand weights, JSD", 32, 40, 64, 24, "jsd"),
    Case("35 thousand weights, 4 micro-batches", 32, 40, 16, 24, accumulation=4),
    Case("35 thousand weights", 32, 40, 64, 24, on_policy=True),
    Case("35 thousand weights, reverse KL", 32, 40, 64, 24, "reverse_kl", on_policy=True),
    Case("2.6 million weights", 128, 8000, 16, 48),
    Case("2.6 million weights, JSD", 128, 8000, 16, 48, "jsd"),
    Case("2.6 million weights", 128, 8000, 16, 48, on_policy=True),
]


class Watch(transformers.TrainerCallback):
    """CPU time and wall time at the end of every step, and what was logged."""

    def __init__(self) -> None:
        self.cpu: list[float] = []
        self.logs: list[dict[str, Any]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Notes the time."""
        self.cpu.append(time.process_time())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keeps the numbers."""
        self.logs.append(dict(logs or {}))


class TrlTrainer(DistillationTrainer):
    """TRL's own trainer; the order of tasks is ours, and completions are handed out if there are some."""

    given: dict[tuple[int, ...], list[int]] | None = None

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        accumulation = self.args.gradient_accumulation_steps
        size = self.args.per_device_train_batch_size * accumulation
        rows: Any = dataset or self.train_dataset
        return _EpochSampler(len(rows), size, accumulation, self.args.seed, lambda: self.state.epoch or 0)

    def _generate_single_turn(self, prompt_ids: Any, *rest: Any, **options: Any) -> Any:
        if self.given is None:
            return super()._generate_single_turn(prompt_ids, *rest, **options)
        return [self.given[tuple(ids)] for ids in prompt_ids]


def our_divergence(
    hidden: Tensor, teacher_hidden: Tensor, head: Tensor, teacher_head: Tensor, mask: Tensor, beta: float, *,
    num_items_in_batch: Any, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Our kernel behind the signature of TRL's `_chunked_divergence_loss` (for models without caps and scales)."""
    kind = KINDS[beta]
    weights = mask.flatten() / num_items_in_batch
    found = linear_divergence(
        LinearLogits(hidden.flatten(0, 1), head), LinearLogits(teacher_hidden.flatten(0, 1), teacher_head),
        Divergence(kind, 0.5 if kind == "jsd" else None), token_weights_T=weights, reduction="sum",
    )  # fmt: skip
    return found.loss, found.student_entropy_T.sum(), mask.sum()


class Work:
    """Models, tasks and completions of a case."""

    def __init__(self, case: Case, steps: int, folder: Path) -> None:
        self.case, self.folder, self.steps = case, folder, steps
        self.tokenizer = tiny.make_tokenizer([f"w{i}" for i in range(case.words - 3)])
        generator = torch.Generator().manual_seed(0)
        count = case.batch * case.accumulation * steps
        prompts = torch.randint(3, case.words, (count, PROMPT_WORDS), generator=generator).tolist()
        # of different lengths: prompts are padded on the left in both
        prompts = [ids[: 3 + i % (PROMPT_WORDS - 2)] for i, ids in enumerate(prompts)]
        self.texts = [" ".join(self.tokenizer.convert_ids_to_tokens(ids)) for ids in prompts]
        assert len(set(self.texts)) == count, "every prompt has completions of its own"
        self.tasks = [Task(f"t{i}", {"prompt": text}) for i, text in enumerate(self.texts)]
        half = case.tokens // 2
        lengths = [half + i % half for i in range(count)]
        self.completions = [[*torch.randint(3, case.words, (n,), generator=generator).tolist(), 1] for n in lengths]
        self.prompts = prompts

    def _model(self, seed: int, hidden: int) -> Any:
        return tiny.make_model(self.tokenizer, seed, hidden, 2, initializer_range=0.2)

    def _args(self, logging_steps: int) -> DistillationConfig:
        is_check = logging_steps == 1
        return DistillationConfig(
            output_dir=str(self.folder), max_steps=self.steps, per_device_train_batch_size=self.case.batch,
            gradient_accumulation_steps=self.case.accumulation, lr_scheduler_type="constant",
            learning_rate=0.1 if is_check else 1e-3, optim="sgd" if is_check else "adamw_torch",
            max_completion_length=self.case.tokens, top_k=0, beta=BETAS[self.case.divergence], save_strategy="no",
            logging_steps=logging_steps, use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none",
            disable_tqdm=True, seed=0,
        )  # fmt: skip

    def trainer(self, who: str, watch: Watch, logging_steps: int = 10) -> Any:
        """`who`: one of ARMS."""
        distillation_trainer._chunked_divergence_loss = our_divergence if who == "mixed" else THEIRS
        student, teacher = self._model(STUDENT, self.case.hidden), self._model(TEACHER, 2 * self.case.hidden)
        args = self._args(logging_steps)
        if who == "ours":
            trainer = self._ours(student, teacher, args, watch)
        else:
            rows = Dataset.from_dict({"prompt": self.texts})
            trainer = TrlTrainer(student, teacher, args, rows, processing_class=self.tokenizer, callbacks=[watch])
            if not self.case.on_policy:
                trainer.given = {tuple(p): c for p, c in zip(self.prompts, self.completions, strict=True)}
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    def _ours(self, student: Any, teacher: Any, args: DistillationConfig, watch: Watch) -> LmTrainer:
        options = {"parameter": 0.5} if self.case.divergence == "jsd" else {}
        method = Gkd(divergence=self.case.divergence, on_policy=float(self.case.on_policy), **options)  # type: ignore[arg-type]
        stored = {
            task.id: [Rollout(task.id, prompt, completion)]
            for task, prompt, completion in zip(self.tasks, self.prompts, self.completions, strict=True)
        }
        return LmTrainer(
            student, args, self.tokenizer, method.phases()[0], self.tasks, models={"teacher": teacher},
            stored={"teacher": stored}, callbacks=[watch],
        )  # fmt: skip


def check_equal(work: Work) -> float:
    """Trains with all; returns the largest relative difference of a loss from TRL's, or ends the process."""
    found = {who: trained(work, who) for who in ARMS}
    losses, lengths, change = found["trl"]
    worst = 0.0
    for who in ARMS[1:]:
        off = max(abs(a - b) / abs(b) for a, b in zip(found[who][0], losses, strict=True))
        same = all(abs(a - b) < 1e-2 for a, b in zip(found[who][1], lengths, strict=True))
        apart = float((found[who][2] - change).norm() / change.norm())
        if off > LOSS_TOLERANCE or apart > WEIGHT_TOLERANCE or not same:
            raise SystemExit(f"{who}, {work.case}: losses {off:.1e}, weights {apart:.1e}, lengths equal: {same}")
        worst = max(worst, off)
    return worst


def trained(work: Work, who: str) -> tuple[list[float], list[float], Tensor]:
    """Losses and numbers of completion tokens by step, and the change of all weights."""
    watch = Watch()
    trainer = work.trainer(who, watch, logging_steps=1)
    before = weights_of(trainer)
    trainer.train()
    rows = [row for row in watch.logs if "loss" in row]
    if who == "ours":
        lengths = [row["main/completion_tokens"] for row in rows]
    else:
        lengths = [row["completions/mean_length"] * work.case.batch * work.case.accumulation for row in rows]
    return [float(row["loss"]) for row in rows], lengths, weights_of(trainer) - before


def weights_of(trainer: Any) -> Tensor:
    """All weights of the student, copied."""
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def seconds_a_step(work: Work, who: str) -> float:
    """CPU seconds from the end of the first step to the end of the last, divided by the steps between."""
    watch = Watch()
    trainer = work.trainer(who, watch)
    trainer.train()
    return (watch.cpu[-1] - watch.cpu[0]) / (len(watch.cpu) - 1)


def extra_peak_mb(index: int, who: str) -> float:
    """Measured in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", str(index), who]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return float(done.stdout.strip().splitlines()[-1])


def print_memory(index: int, who: str) -> None:
    """What the other process does: the peak of four steps, less what was held before them."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Work(CASES[index], 4, Path(folder)).trainer(who, Watch())
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
        before = resident_kb("VmRSS")
        trainer.train()
    print((resident_kb("VmHWM") - before) / 1024)


def resident_kb(name: str) -> int:
    """VmRSS (held now) or VmHWM (the peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure(case: Case, index: int, rounds: int, steps: int) -> str:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        off = check_equal(Work(case, CHECKED_STEPS, Path(folder)))
        work = Work(case, steps, Path(folder))
        found: dict[str, list[float]] = {who: [] for who in ARMS}
        for number in range(rounds):
            for who in ARMS if number % 2 else reversed(ARMS):
                found[who].append(1000 * seconds_a_step(work, who))
    times = [f"{min(found[who]):.1f} ({statistics.median(found[who]):.1f})" for who in ARMS]
    ratios = []
    for other in ("trl", "mixed"):
        by_round = [ours / theirs for ours, theirs in zip(found["ours"], found[other], strict=True)]
        ratios.append(
            f"{min(found['ours']) / min(found[other]):.2f}; {statistics.median(by_round):.2f} "
            f"[{min(by_round):.2f}, {max(by_round):.2f}]"
        )
    memory = [f"{min(extra_peak_mb(index, who) for _ in range(2)):.0f}" for who in ("trl", "ours")]
    cells = ["on" if case.on_policy else "off", case.name, f"{off:.0e}", *times, *ratios, *memory]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))), help="numbers, from 0")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "WHO"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    if options.memory_of:
        print_memory(int(options.memory_of[0]), options.memory_of[1])
        return
    start = os.getloadavg()[0]
    rows = []
    for index in options.cases:
        rows.append(measure(CASES[index], index, options.rounds, options.steps))
        print(rows[-1], flush=True)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}"
    lines = [
        "# A step of our engine beside TRL's own", "",
        f"- date: {datetime.now(UTC).isoformat(timespec='seconds')}",
        f"- command: {' '.join(['python', 'benchmarks/bench_engine_step.py', *sys.argv[1:]])}",
        f"- machine: {platform.machine()}, {os.cpu_count()} cores, one thread, Python {platform.python_version()}, "
        f"{versions}",
        f"- load (1 minute) at the start {start:.1f}, at the end {os.getloadavg()[0]:.1f}",
        f"- {options.rounds} rounds of {options.steps} steps of 64 or 16 sequences; the teacher is twice as wide as "
        "the student; forward KL unless said. CPU ms a step: least (median) of the rounds. Ratios: of the least; "
        "median [range] of the rounds. Memory: peak during training less what was held before it, MB, less of 2 "
        "processes.", "",
        "| policy | work | losses differ | TRL, ms | TRL, our divergence, ms | ours, ms | ours / TRL | ours / TRL, our "
        "divergence | TRL, MB | ours, MB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|", *rows,
    ]  # fmt: skip
    (options.out / "engine_step.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
