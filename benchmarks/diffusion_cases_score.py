"""Benchmark cases of the score family: SwiftBrush, DMD2, f-distill, few-step SiD, each by itself.

A case is (seed) -> rows (name, measures); `bench_diffusion.py` runs them. Rows of a case share teacher, data and start;
each method stands against its own baselines and with its own part switched off, never against another method.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from diffusion_cases_trajectory import Rows, by_ode, in_plane  # noqa: E402
from score_made import gauss8_rows, only_phase, samples, settings, train  # noqa: E402

from workbench.evals.generation import sliced_wasserstein  # noqa: E402
from workbench.policies.diffusion.methods.dmd2 import Dmd2  # noqa: E402
from workbench.policies.diffusion.methods.f_distill import FDistill  # noqa: E402
from workbench.policies.diffusion.methods.sid import Sid  # noqa: E402
from workbench.policies.diffusion.methods.swiftbrush import SwiftBrush  # noqa: E402
from workbench.policies.diffusion.networks import MLP  # noqa: E402
from workbench.policies.diffusion.oracle import GaussianMixture, gauss8, two_gaussians  # noqa: E402
from workbench.policies.diffusion.predict import Predictor  # noqa: E402
from workbench.policies.diffusion.testbeds import Fit, fit, student_of, toy_net, toy_teacher  # noqa: E402
from workbench.policies.nouns import Method, Phase  # noqa: E402

PLAIN: dict[str, Any] = {"guidance": 1.0, "critic_guidance": 1.0, "critic_training_guidance": 1.0}


@cache
def teacher() -> MLP:
    """Of gauss8, the full profile."""
    return toy_teacher("gauss8")


def run(net: nn.Module, start: nn.Module, work: Method | Phase, updates: int, seed: int) -> tuple[Any, float]:
    """A student that begins as `start`, after so many steps of 256 rows of the critic; and the CPU seconds."""
    phase = work if isinstance(work, Phase) else only_phase(work)
    how = settings(
        steps=updates, batch_size=256, learning_rate=1e-3, schedule="linear", betas=(0.0, 0.99), seed=seed,
        log_every=1000,
    )  # fmt: skip
    student, begun = student_of(start), time.process_time()
    train(student, phase, how, {"data": {"x0": gauss8_rows(16000, 6)}}, teacher=net)
    return student, time.process_time() - begun


def plane(net: Any, seconds: float | None = None, **how: Any) -> dict[str, float]:
    """Measures of a student on gauss8."""
    return in_plane(samples(net, 4000, **how), gauss8()) | ({} if seconds is None else {"cpu s": seconds})


def dmd2(seed: int) -> Rows:
    """gauss8, learnt teacher, 1,500 steps of the critic, two for one of the student."""
    net = teacher()
    for steps in (1, 4, 50):
        yield f"teacher, {steps} steps", in_plane(by_ode(Predictor(net), steps, (2,)), gauss8())
    for name, method in {"DMD2": Dmd2(every=2), "without GAN": Dmd2(every=2, gan=0.0)}.items():
        yield f"{name}, 1 step", plane(*run(net, net, method, 1500, seed))
    student, seconds = run(net, net, Dmd2(every=2, steps=4), 1500, seed)
    for steps in (1, 2, 4):
        yield f"DMD2 of 4 steps, {steps} steps", plane(student, seconds, steps=steps)


def dmd2_bias(seed: int) -> Rows:
    """A teacher of gauss8 that is .3 off: the student's distance from the data by the GAN's coefficient."""
    off = torch.tensor([0.3, 0.0])
    biased = fit(toy_net("gauss8", 96, 3, 0), lambda n, g: (gauss8().sample(n, g)[0] + off, torch.zeros(n)), Fit())
    biased.requires_grad_(False)
    yield "teacher, 50 steps", in_plane(by_ode(Predictor(biased), 50, (2,)), gauss8())  # pyright: ignore
    for gan in (0.0, 3e-3, 0.3, 2.0):
        method = Dmd2(every=2, gan=gan, critic_gan=1.0)
        yield f"gan {gan}", plane(*run(biased, biased, method, 1500, seed))


def f_distill(seed: int) -> Rows:
    """gauss8 from a hard start (a student of a teacher of one mode): the share of the smallest mode by divergence."""
    net, modes = teacher(), gauss8()
    one = GaussianMixture(modes.means[:1], modes.stds[:1], torch.ones(1))
    narrow = toy_net("gauss8", 96, 3, 0)
    fit(narrow, lambda n, g: one.sample(n, g), Fit(steps=800, learning_rate=4e-3))
    yield "start", plane(narrow)
    for divergence in ("reverse_kl", "js", "forward_kl"):
        method = FDistill(every=2, divergence=divergence, critic_gan=1.0)
        yield divergence, plane(*run(net, narrow, method, 1500, seed))


def sid(seed: int) -> Rows:
    """gauss8, learnt teacher, 800 steps of the critic, two for one of the student."""
    net = teacher()
    yield "teacher, 1 step", plane(net)
    for alpha in (0.5, 1.0, 1.2):
        student, seconds = run(net, net, Sid(steps=1, start=1.0, every=2, alpha=alpha, **PLAIN), 800, seed)
        yield f"alpha {alpha}, 1 step", plane(student, seconds)
    for start in (0.625, 1.0):
        student, seconds = run(net, net, Sid(start=start, every=2, **PLAIN), 800, seed)
        yield f"4 steps from {start}", plane(student, seconds, steps=4, start=start)
    yield "teacher by the same 4 steps", plane(net, steps=4)


def swiftbrush(seed: int) -> Rows:
    """Two classes in the plane, learnt teacher, scale 4.5, adapters of rank 8, 1,000 steps: by class, one step."""
    oracle, c = two_gaussians(), torch.arange(2).repeat_interleave(2000)

    def data(count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        return oracle.sample(count, g, c=torch.randint(2, (count,), generator=g))

    net = fit(toy_net("gauss8", 96, 3, 0, num_classes=2), data, Fit()).requires_grad_(False)
    real = oracle.sample(4000, torch.Generator().manual_seed(7), c=c)[0]

    def classes(student: Any, seconds: float = 0.0) -> dict[str, float]:
        x = samples(student, 4000, c=c)
        distances = [sliced_wasserstein(real[c == k], x[c == k]) for k in (0, 1)]
        means = [x[c == k][:, 0].mean().item() for k in (0, 1)]
        return {
            "sliced W2": sum(distances) / 2,
            "distance of the means (true 3)": means[1] - means[0],
            "cpu s": seconds,
        }

    yield "teacher, 1 step", classes(net)
    both = only_phase(SwiftBrush(rank=8, critic_learning_rate=5.0))
    [term] = both.terms
    one = replace(both, terms=[replace(term, critic_guidance=1.0)])  # pyright: ignore
    for name, phase in {"the same scale on both": both, "on the teacher only": one}.items():
        yield name, classes(*run(net, net, phase, 1000, seed))


CASES: dict[str, Callable[[int], Rows]] = {
    "dmd2": dmd2,
    "dmd2-bias": dmd2_bias,
    "f-distill": f_distill,
    "sid": sid,
    "swiftbrush": swiftbrush,
}
