"""The four vision methods on digits, each against its own baselines and with its own part switched off.

    python benchmarks/bench_vision.py [--seeds 0 1 2] [--only ps-kd ofa-kd] [--out benchmarks/results]

One split, teacher and start a seed; rows of a section share them. Accuracy, expected calibration error (15 bins) and
negative log-likelihood are of 597 images that nothing was trained on; the sections' rows must not be compared with
other sections', whose tasks differ.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from vision_made import Rolled, Scaled, made, rank_agreement, trained  # noqa: E402

from workbench.evals.calibration_error import calibration_error  # noqa: E402
from workbench.policies.nouns import Phase, Role, Stored, Term  # noqa: E402
from workbench.policies.vision.losses import soft_cross_entropy  # noqa: E402
from workbench.policies.vision.methods.logit_standardization import LogitStandardization  # noqa: E402
from workbench.policies.vision.methods.meal_v2 import MealV2  # noqa: E402
from workbench.policies.vision.methods.ofa_kd import OfaKd  # noqa: E402
from workbench.policies.vision.methods.ps_kd import PsKd, RefinedTargets  # noqa: E402
from workbench.policies.vision.networks import MLP, ResNet  # noqa: E402
from workbench.policies.vision.terms import Distillation, FeatureMatch, Labels, logits  # noqa: E402
from workbench.policies.vision.testbeds import digits, fit, measure  # noqa: E402

#: (row, student, what else the section shows of it)
Run = tuple[str, nn.Module, dict[str, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SmoothedLabels:
    """Cross-entropy with (1 - share) of the label and `share` spread evenly."""

    share: float = 0.1
    coefficient: float = 1.0

    def __call__(self, view: Any) -> Tensor:
        """The share of the micro-batch."""
        student = logits(view, "student")
        label = nn.functional.one_hot(view["main"]["label"], student.shape[-1]).float()
        return view.mean(soft_cross_entropy(student, (1 - self.share) * label + self.share / student.shape[-1]))


class ConstantTargets(RefinedTargets):
    """PS-KD's targets with one weight of the past from the second epoch on."""

    def alpha(self, epoch: int, epochs: int) -> float:
        """The final weight."""
        return self.final_alpha


def phase(*terms: Term, modules: Any = None) -> Phase:
    """A phase with a teacher and these terms."""
    return Phase(
        name="train", sources={"main": Stored("train")}, terms=terms, roles=[Role(name="teacher")], modules=modules
    )


def logit_standardization(seed: int) -> Iterable[Run]:
    """An MLP of 8 units on 1,200 unlabelled images; the teacher's logits are multiplied."""
    split = digits(seed)
    teacher = fit(made(MLP, seed, width=128), split.pool, steps=600, seed=seed)
    for name, is_standard in (("standardised", True), ("plain", False)):
        for factor in (0.2, 1.0, 5.0):
            student = made(MLP, seed + 10, width=8)
            method = LogitStandardization(ce_weight=0.0, kd_weight=1.0, standardise=is_standard)
            trained(student, method.phases()[0], split.pool, {"teacher": Scaled(teacher, factor)}, steps=400, seed=seed)
            with torch.no_grad():
                agreement = rank_agreement(student(split.test["image"]), teacher(split.test["image"]))
            yield f"{name}, teacher's logits x {factor:g}", student, {"rank agreement": agreement}


def ps_kd(seed: int) -> Iterable[Run]:
    """An MLP of 128 units on 300 digits with 15 % wrong labels, 60 epochs at a constant rate."""
    split = digits(seed, num_labels=300, noise=0.15)
    method = PsKd(num_images=300)
    constant = replace(method.phases()[0], terms=[ConstantTargets(final_alpha=0.8, num_images=300)])
    runs = {
        "labels": phase(Labels()),
        "label smoothing .1": phase(SmoothedLabels()),
        "PS-KD": method.phases()[0],
        "PS-KD, α .8 from the second epoch": constant,
    }
    for name, one in runs.items():
        student = made(MLP, seed, width=128)
        models = {"teacher": made(MLP, 0)} if one.roles else {}
        trained(student, one, split.train, models, steps=360, schedule="constant", max_grad_norm=0.0, seed=seed)
        yield name, student, {}


def meal_v2(seed: int) -> Iterable[Run]:
    """600 digits with 10 % wrong labels; teachers MLP(256), student MLP(64), trained on labels before."""
    split = digits(seed, num_labels=600, noise=0.1)
    models = {
        f"teacher{n}": fit(made(MLP, 100 * seed + n, width=256), split.train, steps=150, seed=n, learning_rate=1e-3)
        for n in (1, 2, 3)
    }
    yield "one teacher", models["teacher1"], {}
    start = fit(made(MLP, seed + 50), split.train, steps=600, seed=seed + 50).state_dict()

    def student(is_trained: bool = True) -> nn.Module:
        net = made(MLP, seed + 50)
        if is_trained:
            net.load_state_dict(start)
        return net

    yield "start", student(), {}
    meal = MealV2(num_teachers=3).phases()[0]
    rolled = {name: Rolled(model) for name, model in models.items()}
    runs: dict[str, tuple[Phase, dict[str, Any], bool]] = {
        "more training on labels": (replace(phase(Labels()), roles=[]), {}, True),
        "MEAL V2, three teachers": (meal, models, True),
        "one teacher only": (MealV2(num_teachers=1).phases()[0], models, True),
        "random start": (meal, models, False),
        "labels beside": (replace(meal, terms=[*meal.terms, Labels()]), models, True),
        "discriminator reversed": (MealV2(num_teachers=3, adversarial="reversal").phases()[0], models, True),
        "discriminator detached": (MealV2(num_teachers=3, adversarial="detached").phases()[0], models, True),
        "control: teachers of other images": (meal, rolled, True),
    }
    for name, (one, given, is_trained) in runs.items():
        net = student(is_trained)
        trained(net, one, split.train, given, steps=200, learning_rate=1e-3, seed=seed)
        yield name, net, {}


def _ofa(seed: int, num_labels: int, noise: float, width: int) -> Iterable[Run]:
    split = digits(seed, num_labels=num_labels, noise=noise)
    teacher = fit(made(MLP, seed, width=128), split.pool, steps=400, seed=seed)
    yield "teacher", teacher, {}
    hint = FeatureMatch(student="body.2", teacher="layers.1")
    runs = {
        "labels": (phase(Labels()), teacher),
        "labels and KD, temperature 4": (phase(Labels(), Distillation(temperature=4.0)), teacher),
        "labels and hint (FitNets)": (phase(Labels(), hint, modules=hint.modules), teacher),
        "no branches": (OfaKd(stages=()).phases()[0], teacher),
        "no branches, soft labels x 4": (phase(Labels(), Distillation(temperature=1.0, coefficient=4.0)), teacher),
        "branch at the last stage": (OfaKd(stages=(3,)).phases()[0], teacher),
        "OFA-KD": (OfaKd().phases()[0], teacher),
        "γ 1.5": (OfaKd(gamma=1.5).phases()[0], teacher),
        "γ 2": (OfaKd(gamma=2.0).phases()[0], teacher),
        "control: teacher of other images": (OfaKd().phases()[0], Rolled(teacher)),
    }
    for name, (one, given) in runs.items():
        student = made(ResNet, seed + 9, width=width)
        trained(student, one, split.train, {"teacher": given}, steps=200, seed=seed)
        yield name, student, {}


def ofa_kd(seed: int) -> Iterable[Run]:
    """CNN of 4 channels, MLP teacher that saw 1,200 clean labels; 300 digits, 30 % wrong labels."""
    return _ofa(seed, 300, 0.3, 4)


def ofa_kd_clean(seed: int) -> Iterable[Run]:
    """CNN of 8 channels, the same teacher; 120 digits, labels right."""
    return _ofa(seed, 120, 0.0, 8)


SECTIONS: dict[str, Callable[[int], Iterable[Run]]] = {
    "logit-standardization": logit_standardization,
    "ps-kd": ps_kd,
    "meal-v2": meal_v2,
    "ofa-kd": ofa_kd,
    "ofa-kd, clean labels": ofa_kd_clean,
}


def measured(section: Callable[[int], Iterable[Run]], seeds: list[int]) -> dict[str, list[dict[str, float]]]:
    """Row -> what was measured for each seed."""
    found: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        test = digits(seed).test
        for name, student, others in section(seed):
            result = measure(student, test)
            confidence, answer = result.probs.max(-1)
            error = calibration_error(confidence.numpy(), (answer == test["label"]).float().numpy())
            row = {"accuracy": result.accuracy, "ECE": error.ece, "NLL, nats": result.nll, **others}
            found.setdefault(name, []).append(row)
    return found


def table_of(name: str, section: Callable[[int], Iterable[Run]], seeds: list[int]) -> str:
    """A section as Markdown."""
    began = time.process_time()
    found = measured(section, seeds)
    columns = list(next(iter(found.values()))[0])
    lines = [
        f"## {name}",
        "",
        section.__doc__ or "",
        "",
        f"| run | {' | '.join(columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for row, values in found.items():
        cells = [[one[column] for one in values] for column in columns]
        texts = [f"{mean(cell):.3f}" + (f" ± {stdev(cell):.3f}" if len(cell) > 1 else "") for cell in cells]
        lines.append(f"| {row} | {' | '.join(texts)} |")
    return "\n".join([*lines, "", f"{time.process_time() - began:.0f} CPU s.", ""])


def main() -> None:
    """Prints the tables and writes benchmarks/results/vision.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = f"python benchmarks/bench_vision.py --seeds {' '.join(map(str, options.seeds))}"
    machine = f"{platform.machine()}, one thread, torch {torch.__version__}"
    head = f"# Vision methods on digits\n\n`{command}` · {date.today()} · {machine}; mean ± sd over seeds\n"
    parts = [head]
    for name in options.only:
        parts.append(table_of(name, SECTIONS[name], options.seeds))
        print(parts[-1], flush=True)
    if list(options.only) == list(SECTIONS):
        (options.out / "vision.md").write_text("\n".join(parts), "utf-8")


if __name__ == "__main__":
    main()
