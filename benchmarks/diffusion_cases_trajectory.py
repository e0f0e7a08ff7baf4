"""Benchmark cases of the trajectory family: consistency, SlimFlow, guidance by adapters, SANA-Sprint, each by itself.

A case is (seed) -> rows (name, measures); `bench_diffusion.py` runs them. Rows of a case share teacher, data and start;
each method stands against its own baselines and with its own part switched off, never against another method.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from trajectory_made import Rolled, data_of, trained  # noqa: E402

from workbench.evals.generation import energy_distance, frechet_distance, mode_coverage, sliced_wasserstein  # noqa: E402
from workbench.evals.generation_features import digits_network  # noqa: E402
from workbench.policies.diffusion.methods.consistency_distillation import ConsistencyDistillation  # noqa: E402
from workbench.policies.diffusion.methods.lora_guidance import LoraGuidance  # noqa: E402
from workbench.policies.diffusion.methods.sana_sprint import SanaSprint  # noqa: E402
from workbench.policies.diffusion.methods.slimflow import SlimFlow  # noqa: E402
from workbench.policies.diffusion.oracle import GaussianMixture, gauss8  # noqa: E402
from workbench.policies.diffusion.pairs import make_pairs  # noqa: E402
from workbench.policies.diffusion.predict import Guided, Predictions, Predictor  # noqa: E402
from workbench.policies.diffusion.samplers import ode, prior, sde, uniform_times  # noqa: E402
from workbench.policies.diffusion.schedules import Schedule, Trigonometric  # noqa: E402
from workbench.policies.diffusion.testbeds import (  # noqa: E402
    Fit,
    fit,
    gauss8_data,
    student_of,
    toy_net,
    toy_teacher,
    warm_student,
)
from workbench.policies.digits import digits  # noqa: E402
from workbench.policies.nouns import Method, Role  # noqa: E402

Rows = Iterable[tuple[str, dict[str, float]]]
TRIG = Trigonometric()


# -- measures ----------------------------------------------------------------------------------------------------------


def in_plane(made: Tensor, oracle: GaussianMixture, std: float = 0.08) -> dict[str, float]:
    """Distances of samples from an oracle's, and the share near its modes."""
    real = oracle.sample(len(made), torch.Generator().manual_seed(11))[0]
    modes = mode_coverage(made, oracle.means, std)
    return {
        "sliced W2": sliced_wasserstein(real, made),
        "energy distance": energy_distance(real[:2000], made[:2000]),
        "near a mode": modes.hq_share,
        "smallest mode x 8": modes.smallest_share,
    }


@cache
def _features() -> Any:
    return digits_network(value_range=(-1.0, 1.0))


def on_digits(made: Tensor) -> dict[str, float]:
    """Frechet distance from the 1,797 images in the features of a network that reads digits."""
    real = digits()[0]
    return {"Frechet distance": frechet_distance(real.numpy(), made.numpy(), features=_features().features)}


def few_steps(
    net: Any, steps: int, count: int = 4000, schedule: Schedule | None = None, c: Tensor | None = None
) -> Tensor:
    """Samples by predicting x0 and re-noising, at equal times from pure noise."""
    g, predictor = torch.Generator().manual_seed(9), Predictor(net, schedule)
    z = prior(torch.randn(count, *net.shape, generator=g), predictor.schedule)
    with torch.no_grad():
        return sde(predictor, z, uniform_times(predictor.schedule, steps), g, c)


def by_ode(predictor: Predictions, steps: int, shape: tuple[int, ...], count: int = 4000, c: Any = None) -> Tensor:
    """Samples of the teacher."""
    z = torch.randn(count, *shape, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return ode(predictor, prior(z, predictor.schedule), uniform_times(predictor.schedule, steps), c)


def run(student: Any, method: Method, tables: Any, models: dict[str, nn.Module], **settings: Any) -> tuple[Any, dict]:
    """The student after all phases, and the CPU seconds."""
    start = time.process_time()
    for phase in method.phases():
        student = trained(student, phase, tables, models, **settings)
    return student, {"cpu s": time.process_time() - start}


# -- cases -------------------------------------------------------------------------------------------------------------


def consistency_distillation(seed: int) -> Rows:
    """gauss8, exact teacher, student warmed up for 600 steps, 800 updates of 256; one step unless named."""
    oracle = gauss8()
    start = warm_student(oracle, gauss8_data, 600, seed=seed)
    for steps in (1, 4, 50):
        yield f"teacher, {steps} steps", in_plane(by_ode(oracle, steps, (2,)), oracle)
    yield "start, 1 step", in_plane(few_steps(start, 1), oracle)
    fast = ConsistencyDistillation(grid="uniform", target_decay=0.95)
    arms: dict[str, tuple[Method, nn.Module]] = {
        "uniform grid of 18, decay .95": (fast, oracle),
        "  2 steps": (fast, oracle),
        "paper's grid of 18 (Karras), decay .95": (replace(fast, grid="karras"), oracle),
        "paper's grid, decay 0": (ConsistencyDistillation(), oracle),
        "pseudo-Huber": (replace(fast, distance="huber"), oracle),
        "control: teacher answers for other rows": (fast, Rolled(oracle)),
    }
    settings = {"steps": 800, "batch_size": 256, "learning_rate": 2e-3, "seed": seed}
    student: Any = None
    for name, (method, teacher) in arms.items():
        if name.startswith("  "):
            yield name, in_plane(few_steps(student, 2), oracle)
            continue
        student, cost = run(student_of(start), method, data_of(oracle, 16384, seed), {"teacher": teacher}, **settings)
        yield name, in_plane(few_steps(student, 1), oracle) | cost


def slimflow(seed: int) -> Rows:
    """gauss8, exact teacher, an untrained student 32 wide, 500 steps of 128 a phase."""
    oracle = gauss8()
    fresh = make_pairs(oracle, 4000, (2,), seed=77)
    for count in (16, 64, 8192):
        table = {"pairs": make_pairs(oracle, count, (2,), seed=seed)}
        arms: dict[str, Method] = {
            "annealed, guided by itself": SlimFlow(warmup=0.5),
            "annealed, guided by the teacher": SlimFlow(warmup=0.5, guide="teacher"),
            "annealed, not guided": SlimFlow(warmup=0.5, guidance=0.0),
            "not annealed, guided by itself": SlimFlow(warmup=0.0),
            "not annealed, not guided": SlimFlow(warmup=0.0, guidance=0.0),
        }
        for name, method in arms.items():
            settings = {"steps": 500, "batch_size": 128, "learning_rate": 4e-3, "seed": seed}
            student, cost = run(toy_net("gauss8", 32, 3, seed), method, table, {"teacher": oracle}, **settings)
            with torch.no_grad():
                made = fresh["z"] - student(fresh["z"], torch.ones(4000))
            error = {"error on fresh pairs": float((made - fresh["x0"]).square().mean())}
            yield f"{count} pairs: {name}", in_plane(made, oracle) | error | cost


def guided_gap(student: Any, teacher: Any, weight: float, oracle: GaussianMixture) -> float:
    """Mean squared error of a student to the guided teacher at noised data."""
    g = torch.Generator().manual_seed(5)
    x0, c = oracle.sample(4000, g)
    t = torch.rand(4000, generator=g)
    x_t = teacher.schedule.add_noise(x0, torch.randn(4000, 2, generator=g), t)
    with torch.no_grad():
        goal = Guided(Predictor(teacher), weight).predict(x_t, t, c, teacher.prediction)
        return float((student(x_t, t, c) - goal).square().mean())


def lora_guidance(seed: int) -> Rows:
    """Two classes of gauss8 modes (std .3), w = 3, a fitted teacher 64 wide; 500 steps of 128; 30 sampling steps."""
    oracle = gauss8(num_classes=2, std=0.3)
    net = toy_net("gauss8", 64, 3, seed, num_classes=2)
    fit(net, lambda n, g: oracle.sample(n, g), Fit(steps=1500, learning_rate=4e-3, seed=seed), oracle)
    net.requires_grad_(False)
    c = torch.arange(4000) % 2
    goal = by_ode(Guided(Predictor(net), 3.0), 30, (2,), c=c)

    def measured(student: Any) -> dict[str, float]:
        return {
            "error to the guided teacher": guided_gap(student, net, 3.0, oracle),
            "sliced W2 to two-pass samples": sliced_wasserstein(goal, by_ode(Predictor(student), 30, (2,), c=c)),
        }

    yield "conditional teacher, one pass", measured(net)
    settings = {"steps": 500, "batch_size": 128, "learning_rate": 4e-3, "seed": seed}
    tables = data_of(oracle, 8192, seed)
    for rank in (1, 4, 16):
        base = copy.deepcopy(net)
        student, cost = run(None, LoraGuidance(weight=3.0, rank=rank), tables, {"teacher": base}, **settings)
        size = sum(p.numel() for p in student.parameters())
        yield f"rank {rank}", measured(student) | {"trained parameters": size} | cost
    [phase] = LoraGuidance(weight=3.0).phases()
    full = student_of(net)
    trained(full, replace(phase, roles=[Role(name="teacher")]), tables, {"teacher": net}, **settings)
    yield "all weights", measured(full) | {"trained parameters": sum(p.numel() for p in full.parameters())}


def sana_sprint(seed: int) -> Rows:
    """gauss8 with modes of std .4, a fitted teacher 48 wide, w = 1; 400 steps of 128; one step and (at 1.3) two."""
    oracle = gauss8(std=0.4)
    net = toy_net("gauss8", 48, 3, seed)
    fit(net, lambda n, g: oracle.sample(n, g), Fit(steps=1500, learning_rate=4e-3, seed=seed), oracle)
    net.requires_grad_(False)

    def measured(student: Any) -> dict[str, float]:
        g = torch.Generator().manual_seed(9)
        with torch.no_grad():
            z = torch.randn(4000, 2, generator=g)
            two = sde(Predictor(student, TRIG), z, torch.tensor([math.pi / 2, 1.3, 0.0]), g)
        real = oracle.sample(4000, torch.Generator().manual_seed(11))[0]
        return in_plane(few_steps(student, 1, schedule=TRIG), oracle, 0.4) | {
            "sliced W2, 2 steps": sliced_wasserstein(real, two)
        }

    yield "teacher, 50 steps", in_plane(by_ode(Predictor(net), 50, (2,)), oracle, 0.4)
    yield "start", measured(net)
    base = SanaSprint(guidance=1.0, sigma_data=1.0, warmup=0.3)
    arms: dict[str, tuple[Method, nn.Module]] = {
        "sCM + adversarial, max-time mix": (base, net),
        "sCM + adversarial, no max-time": (replace(base, max_time=0.0), net),
        "sCM alone": (replace(base, adversarial=0.0), net),
        "sCM alone, clamped tangent": (replace(base, adversarial=0.0, bound="clamp"), net),
        "sCM alone, difference for the tangent": (replace(base, adversarial=0.0, derivative="difference"), net),
        "sCM alone, no tangent warm-up": (replace(base, adversarial=0.0, warmup=0.0), net),
        "control: sCM alone, teacher answers for other rows": (replace(base, adversarial=0.0), Rolled(net)),
    }
    settings = {"steps": 400, "learning_rate": 1e-3, "seed": seed}
    for name, (method, teacher) in arms.items():
        student, cost = run(student_of(net), method, data_of(oracle, 8192, seed), {"teacher": teacher}, **settings)
        yield name, measured(student) | cost
    [phase] = base.phases()
    adversarial = trained(
        student_of(net),
        replace(phase, terms=phase.terms[1:]),
        data_of(oracle, 8192, seed),
        {"teacher": net},
        **settings,
    )
    yield "adversarial alone", measured(adversarial)


@cache
def _digits_teacher() -> nn.Module:
    return toy_teacher("digits")


def trajectory_digits(seed: int) -> Rows:
    """Digits with classes, one teacher for all seeds; students start from it, or smaller and untrained."""
    teacher, (x0, labels) = _digits_teacher(), digits()
    c = torch.arange(2000) % 10
    tables = {"data": {"x0": x0, "c": labels}}
    for steps in (1, 4, 50):
        yield f"teacher, {steps} steps", on_digits(by_ode(Predictor(teacher), steps, (1, 8, 8), 2000, c))
    fast = ConsistencyDistillation(grid="uniform", target_decay=0.95)
    student, cost = run(
        student_of(teacher), fast, tables, {"teacher": teacher}, steps=600, learning_rate=1e-3, seed=seed
    )
    yield "consistency distillation, 1 step", on_digits(few_steps(student, 1, 2000, c=c)) | cost
    pairs = {"pairs": make_pairs(Predictor(teacher), 8192, (1, 8, 8), steps=25, seed=seed)}
    for name, method in {"SlimFlow": SlimFlow(), "reflow and distillation": SlimFlow(warmup=0.0, guidance=0.0)}.items():
        small = toy_net("digits", 128, 3, seed, num_classes=10)
        small, cost = run(small, method, pairs, {}, steps=600, learning_rate=2e-3, seed=seed)
        yield f"{name}, half as wide, 1 step", on_digits(few_steps(small, 1, 2000, c=c)) | cost
    spread = SanaSprint(guidance=1.0, sigma_data=1.0, warmup=0.3)
    for name, weight in {"SANA-Sprint": 0.5, "sCM alone": 0.0}.items():
        student, cost = run(
            student_of(teacher), replace(spread, adversarial=weight), tables, {"teacher": teacher}, steps=400,
            learning_rate=5e-4, seed=seed,
        )  # fmt: skip
        yield f"{name}, 1 step", on_digits(few_steps(student, 1, 2000, TRIG, c)) | cost


CASES: dict[str, Callable[[int], Rows]] = {
    "consistency-distillation": consistency_distillation,
    "slimflow": slimflow,
    "lora-guidance": lora_guidance,
    "sana-sprint": sana_sprint,
    "trajectory-digits": trajectory_digits,
}
