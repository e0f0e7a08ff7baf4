"""SwiftBrush: VSD with a LoRA critic; the same guidance on both scores keeps the teacher's law as the fixed point."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from score_made import Affine, ExactCritic, exact, only_phase, samples, settings, sliced, train
from torch import nn

from workbench.errors import InputError
from workbench.policies.diffusion.generation import Generated, UniformTime, simulate, step_times, time_at
from workbench.policies.diffusion.methods.swiftbrush import SwiftBrush
from workbench.policies.diffusion.networks import MLP
from workbench.policies.diffusion.oracle import GaussianMixture, gauss8, two_gaussians
from workbench.policies.diffusion.predict import Predictor
from workbench.policies.diffusion.schedules import Edm, RectifiedFlow, Trigonometric, VariancePreserving, expand
from workbench.policies.diffusion.score_terms import (
    Denoising,
    DistributionMatching,
    alpha_squared,
    per_sample,
    plain_direction,
    surrogate,
)
from workbench.policies.diffusion.testbeds import Fit, fit, student_of, toy_net
from workbench.policies.loop.engine import LoopTrainer
from workbench.policies.nouns import Phase, Role

CLASSES = GaussianMixture(torch.tensor([[-1.0], [1.0]]), torch.tensor([0.5, 0.5]), torch.ones(2), torch.arange(2))


def one_sided(phase: Phase) -> Phase:
    """Guidance on the teacher only."""
    [term] = phase.terms
    assert isinstance(term, DistributionMatching)
    return replace(phase, terms=[replace(term, critic_guidance=1.0)])


def conditional_teacher() -> MLP:
    oracle = two_gaussians()

    def data(count: int, g: torch.Generator):
        return oracle.sample(count, g, c=torch.randint(2, (count,), generator=g))

    net = toy_net("gauss8", 48, 2, 0, num_classes=2)
    fit(net, data, Fit(steps=600, learning_rate=4e-3, label_drop=0.15))
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def teacher() -> MLP:
    torch.set_num_threads(1)
    return conditional_teacher()


# -- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VariancePreserving(), Edm(), Trigonometric()], ids=repr)
def test_the_direction_is_sigma_squared_times_the_difference_of_noises(schedule) -> None:
    g = torch.Generator().manual_seed(0)
    target, mine = gauss8(schedule=schedule), gauss8(std=0.4, radius=1.2, schedule=schedule)
    x = torch.randn(64, 2, generator=g, dtype=torch.float64)
    t = time_at(0.02 + 0.96 * torch.rand(64, generator=g, dtype=torch.float64), schedule)
    sigma = expand(schedule.sigma(t), x)
    by_noise = sigma.square() * (target.eps(x, t) - mine.eps(x, t))
    by_x0 = plain_direction(target.x0(x, t), mine.x0(x, t), t, schedule)
    torch.testing.assert_close(by_x0, by_noise, rtol=1e-9, atol=1e-9)


def test_the_surrogate_has_the_direction_over_numel_as_its_gradient() -> None:
    x = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(5, 3, 2, dtype=torch.float64)
    values = surrogate(x, direction)
    torch.testing.assert_close(values, per_sample(direction.square()) / 2)
    values.mean().backward()
    torch.testing.assert_close(x.grad, direction / direction.numel())


def test_the_students_first_gradient_is_zero_because_the_critic_is_still_the_teacher() -> None:
    base = toy_net("gauss8", 16, 2, 1, num_classes=2).requires_grad_(False)
    student = student_of(base)
    how = settings(steps=3, batch_size=32, optimizer="sgd", momentum=0.0, learning_rate=1e-3)
    found = train(student, only_phase(SwiftBrush(rank=4, critic_learning_rate=10.0)), how, teacher=base)
    assert found[0]["grad_norm/student"] == 0.0
    assert found[1]["grad_norm/student"] > 0


def test_training_the_critic_leaves_the_teacher_as_it_was_to_the_bit() -> None:
    base = toy_net("gauss8", 16, 2, 1, num_classes=2).requires_grad_(False)
    before, x, t = student_of(base), torch.randn(9, 2), torch.rand(9)
    trainer = LoopTrainer(student_of(base), only_phase(SwiftBrush(rank=4)), {}, settings(steps=3), {"teacher": base})
    critic, c = trainer.roles["critic"], torch.tensor([0, 1, 2] * 3)
    assert torch.equal(critic(x, t, c), before(x, t, c))  # B = 0
    trainer.train()
    assert torch.equal(trainer.roles["teacher"](x, t, c), before(x, t, c))
    assert not torch.equal(critic(x, t, c), before(x, t, c))


class Watched(MLP):
    """Notes the classes it is asked for."""

    def forward(self, x, t, c=None, r=None):
        self.__dict__.setdefault("asked", []).append(c)
        return super().forward(x, t, c, r)


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_the_critic_loses_the_classes_of_whole_batches(drop: float) -> None:
    base = toy_net("gauss8", 16, 2, 1, num_classes=2).requires_grad_(False)
    [term] = only_phase(SwiftBrush()).terms
    assert isinstance(term, DistributionMatching)
    phase = replace(
        only_phase(SwiftBrush()),
        terms=[replace(term, guidance=2.0)],  # the copy differs from the teacher: the student moves at once
        roles=[Role(name="teacher"), Role(name="watched"), Role(name="critic", origin="copy", of="watched")],
        role_terms={"critic": [Denoising(drop=drop)]},
    )
    models = {"teacher": base, "watched": Watched(num_classes=2)}
    trainer = LoopTrainer(student_of(base), phase, {}, settings(steps=2), models)
    trainer.train()
    asked = [c for c in trainer.roles["critic"].__dict__["asked"] if len(c) == 128]
    assert len(asked) == 2
    assert all((c == 2).all() if drop else (c < 2).all() for c in asked)


def test_the_critics_weight_silences_pure_noise() -> None:
    t = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(alpha_squared(t, RectifiedFlow()), torch.tensor([1.0, 0.25, 0.0]))


def test_a_half_precision_network_gives_samples_in_single_precision_that_do_not_overflow() -> None:
    class Half(nn.Module):
        prediction, schedule, num_classes, shape = "eps", VariancePreserving(t_max=1.0, beta_max=45.0), 0, (2,)

        def forward(self, x, t, c=None, r=None):
            return (0.9 * x).half()

    net = Half()
    z = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    times = step_times(net.schedule, 1, 1.0, 256)
    x = simulate(Predictor(net), z, times, [])
    alpha = net.schedule.alpha(times[0][:1])
    assert 1 / alpha > 5e4  # 0.1 x this is within half's range, its square and twice its largest value are not
    assert x.dtype == torch.float32
    rounding = 2**-11 * z.abs().max() / alpha  # of the network's answer, amplified by 1/alpha
    assert ((x - 0.1 * z / alpha).abs() <= rounding).all()
    assert not torch.isfinite(((z - 0.9 * z) / alpha).half().square()).all()


# -- fixed points, with exact scores ----------------------------------------------------------------------------------


def reached(phase: Phase, seed: int = 0, steps: int = 250) -> tuple[list[float], list[float]]:
    student = Affine([-0.5, 0.5], [0.8, 0.8])
    how = settings(
        steps=steps, batch_size=256, learning_rate=2e-2, schedule="cosine", betas=(0.5, 0.99), seed=seed
    )  # fmt: skip
    train(student, exact(phase), how, teacher=CLASSES, critic=ExactCritic(student))
    return student.mean.flatten().tolist(), student.std.abs().flatten().tolist()


@pytest.mark.parametrize("seed", range(3))
def test_the_same_guidance_on_both_scores_ends_at_the_teachers_law_on_the_teacher_only_it_does_not(seed: int) -> None:
    mean, std = reached(only_phase(SwiftBrush()), seed)
    assert mean == pytest.approx([-1.0, 1.0], abs=0.02)
    assert std == pytest.approx([0.5, 0.5], abs=0.02)
    mean, std = reached(one_sided(only_phase(SwiftBrush())), seed)
    assert mean[0] < -1.8
    assert mean[1] > 1.8  # and narrower than the teacher's class
    assert max(std) < 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreDistillationSampling:
    """The baseline: the noise that was added in place of the critic's answer, that is, x in place of its x0."""

    coefficient: float = 1.0

    def __call__(self, view):
        rows, schedule = view["main"], view.role("teacher").schedule
        x, t = rows["x"], UniformTime(low=0.02, high=0.98)(view, view.role("teacher").schedule)
        with torch.no_grad():
            x_t = schedule.add_noise(x, view.randn_like(x), t)
            direction = plain_direction(view.role("teacher").x0(x_t, t, rows["c"]), x, t, schedule)
        return view.mean(surrogate(x, direction))


def test_without_a_critic_the_students_variance_collapses() -> None:
    phase = replace(only_phase(SwiftBrush()), terms=[ScoreDistillationSampling()])
    mean, std = reached(phase)
    assert mean == pytest.approx([-1.0, 1.0], abs=0.05)
    assert max(std) < 0.05


# -- effect, with networks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_one_step_of_the_student_beats_one_of_the_teacher_and_guidance_on_the_teacher_only_does_not(
    seed: int, teacher: MLP
) -> None:
    c = torch.arange(2).repeat_interleave(2000)
    real = two_gaussians().sample(4000, torch.Generator().manual_seed(7), c=c)[0]

    def distance(net) -> float:
        x = samples(net, 4000, c=c)
        return sum(sliced(x[c == k], real[c == k]) for k in (0, 1)) / 2

    how = settings(steps=200, learning_rate=1e-3, schedule="linear", betas=(0.0, 0.99), seed=seed)
    phase = only_phase(SwiftBrush(rank=8, critic_learning_rate=5.0))
    student, control = student_of(teacher), student_of(teacher)
    train(student, phase, how, teacher=teacher)
    train(control, one_sided(phase), how, teacher=teacher)
    start = distance(teacher)
    assert start > 0.42
    assert distance(student) < 0.85 * start  # of seeds 0-7: .14 to .36, start .47
    assert distance(control) > 2 * start


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="rank"):
        SwiftBrush(rank=0).phases()
    with pytest.raises(InputError, match="fraction"):
        Generated(start=0.0)
    with pytest.raises(InputError, match="1 step"):
        Generated(steps=0)
