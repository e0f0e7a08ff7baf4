"""DMD2: who trains, its reductions, two time scales in closed form, and its effect."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from score_made import (
    FAST,
    RF,
    Affine,
    ExactCritic,
    exact,
    gauss8_rows,
    gauss8_teacher,
    normal,
    only_phase,
    samples,
    settings,
    sliced,
    tiny_teacher,
    train,
)
from torch import Tensor, nn

from workbench.errors import InputError, TrainingError
from workbench.policies.diffusion.generation import Generated, UniformTime
from workbench.policies.diffusion.methods.dmd2 import Dmd2
from workbench.policies.diffusion.oracle import GaussianMixture
from workbench.policies.diffusion.schedules import expand
from workbench.policies.diffusion.score_terms import (
    Denoising,
    DistributionMatching,
    normalised_direction,
    plain_direction,
    scale_of,
)
from workbench.policies.diffusion.testbeds import Fit, fit, student_of, toy_net
from workbench.policies.loop.engine import LoopTrainer
from workbench.policies.nouns import Phase, Role

# -- who trains, and where to -----------------------------------------------------------------------------------------


def test_the_student_moves_towards_the_teacher() -> None:
    student = Affine([1.0], [0.5])
    phase = exact(only_phase(Dmd2(gan=0.0)))
    how = settings(steps=1, optimizer="sgd", momentum=0.0, learning_rate=0.1, batch_size=512)
    train(student, phase, how, teacher=normal(0.0, 0.5), critic=ExactCritic(student))
    assert student.mean.item() < 0.99


def test_a_frozen_student_and_a_critic_that_never_trains_are_refused() -> None:
    base = tiny_teacher()
    table = {"data": {"x0": gauss8_rows(64)}}
    with pytest.raises(InputError, match="no parameter"):  # the copy that hides behind the critic's graph
        train(tiny_teacher(), only_phase(Dmd2()), settings(steps=2), table, teacher=base)
    student = student_of(base)
    with pytest.raises(TrainingError, match="no weight of 'student' moved"):  # critic = teacher: nothing to learn
        train(student, exact(only_phase(Dmd2(gan=0.0))), settings(steps=5), teacher=base, critic=tiny_teacher())


def test_each_turn_moves_its_own_role_only() -> None:
    base = tiny_teacher()
    student = student_of(base)
    table = {"data": {"x0": gauss8_rows(64)}}
    trainer = LoopTrainer(student, only_phase(Dmd2(every=3)), table, settings(steps=3), {"teacher": base})
    roles = {
        "student": student,
        "critic": trainer.roles["critic"],
        "head": trainer.modules["critic.head"],
        "teacher": base,
    }

    def state() -> dict[str, Tensor]:
        return {k: torch.cat([p.detach().flatten() for p in m.parameters()]) for k, m in roles.items()}

    start = state()
    trainer._turn("student")
    first = state()
    trainer._turn("critic")
    second = state()
    assert {k for k in roles if not torch.equal(start[k], first[k])} == {"student"}
    assert {k for k in roles if not torch.equal(first[k], second[k])} == {"critic", "head"}


def test_the_student_has_its_turn_at_every_fifth_step() -> None:
    found = train(
        student_of(tiny_teacher()), only_phase(Dmd2()), settings(steps=11, batch_size=16),
        {"data": {"x0": gauss8_rows(64)}}, teacher=tiny_teacher(),
    )  # fmt: skip
    assert [step for step, metrics in enumerate(found) if "grad_norm/student" in metrics] == [0, 5, 10]
    assert all("grad_norm/critic" in metrics for metrics in found)


# -- reductions -------------------------------------------------------------------------------------------------------


def test_one_step_without_a_gan_is_vsd_to_the_bit() -> None:
    def weights(phase: Phase) -> Tensor:
        base = tiny_teacher()
        student = student_of(base)
        train(student, phase, settings(steps=12, batch_size=32), teacher=base)  # and no data
        return torch.cat([p.detach().flatten() for p in student.parameters()])

    vsd = Phase(
        name="distil", sources={"main": Generated()}, terms=[DistributionMatching()],
        roles=[Role(name="teacher"), Role(name="critic", origin="copy")],
        role_terms={"critic": [Denoising()]}, every={"student": 5},
    )  # fmt: skip
    assert torch.equal(weights(only_phase(Dmd2(gan=0.0))), weights(vsd))


def test_the_two_directions_differ_by_a_factor_of_each_sample() -> None:
    g = torch.Generator().manual_seed(0)
    x, teacher, critic = (torch.randn(6, 2, generator=g) for _ in range(3))
    t = torch.rand(6, generator=g)
    factor = (RF.alpha(t) * RF.sigma(t) * scale_of(x, teacher))[:, None]
    plain = plain_direction(teacher, critic, t, RF)
    torch.testing.assert_close(plain, factor * normalised_direction(x, teacher, critic))


@pytest.mark.parametrize(("kind", "factor"), [("eps", lambda t: ((1 - t) / t) ** 2), ("flow", lambda t: t**-2)])
def test_critics_losses_are_errors_of_x0_with_a_weight(kind, factor) -> None:
    """On rectified flow: eps = SNR, flow = 1 / t^2, x0 = SNR + 1 / sigma_data^2 times the error of x0."""

    class Denoiser(Affine):
        prediction = "x0"

    class AsKind(Denoiser):
        prediction = kind

        def forward(self, x, t, c=None, r=None):
            from workbench.policies.diffusion.schedules import convert

            return convert(super().forward(x, t), x, t, RF, "x0", self.prediction)

    def loss(net: type[Affine], at: float) -> float:
        law = UniformTime(low=at, high=at)
        phase = Phase(
            name="p", sources={"main": Generated()}, terms=[DistributionMatching()],
            roles=[Role(name="teacher"), Role(name="critic", origin="new")],
            role_terms={"critic": [Denoising(times=law)]}, modules=lambda models: {"critic": net([0.3], [0.2])},
        )  # fmt: skip
        how = settings(steps=1, batch_size=64)
        return train(Affine([0.0], [1.0]), phase, how, teacher=normal(0.5, 0.5))[0]["loss/critic"]

    for at in (0.2, 0.7):
        unweighted = loss(Denoiser, at) / (((1 - at) / at) ** 2 + 4)
        assert loss(AsKind, at) == pytest.approx(factor(at) * unweighted, rel=1e-4)


# -- two time scales --------------------------------------------------------------------------------------------------


class Location(nn.Module):
    """The exact denoiser of N(mean, std^2), std known; the mean is learnt."""

    prediction, schedule, num_classes, shape = "x0", RF, 0, (1,)

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(mean)), std

    def forward(self, x: Tensor, t: Tensor, c=None, r=None) -> Tensor:
        alpha, sigma = expand(1 - t, x), expand(t, x)
        gain = alpha * self.std**2 / ((alpha * self.std) ** 2 + sigma**2)
        return self.mean + gain * (x - alpha * self.mean)


class Shift(Location):
    """As a student: x = mean + std z."""

    def forward(self, x: Tensor, t: Tensor, c=None, r=None) -> Tensor:
        return self.mean + self.std * x


def predicted_overshoot(k: float, rate: float, turns: int = 200, every: int = 1) -> float:
    """Of theta -= k b, then `every` times b += rate (theta - b), from theta = b = 1: oscillates where rate < 4 k."""
    theta = b = lowest = 1.0
    for _ in range(turns):
        theta -= k * b
        for _ in range(every):
            b += rate * (theta - b)
        lowest = min(lowest, theta)
    return -min(lowest, 0.0)


def test_the_rule_of_the_two_time_scales() -> None:
    found = [predicted_overshoot(0.0374, rate, 2000) for rate in (0.01, 0.05, 0.16, 0.3)]
    assert found == pytest.approx([1.18, 0.18, 0.0, 0.0], abs=0.03)


def overshoots(every: int, damping: float) -> tuple[float, float]:
    """How far beyond the teacher's mean a student gets, as a share of the distance at the start: measured, predicted.

    The student feels the critic's mean only: theta' = -k (b_critic - b_teacher), b_critic' = rate (theta - b_critic),
    with a damping ratio of sqrt(rate / k) / 2; n turns of the critic are n times the rate.
    """
    std, size, turns = 0.5, 1.0, 150
    t = 0.02 + 0.96 * (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    share = t.square() / (((1 - t) * std).square() + t.square())  # of the difference of means in that of x0
    k = size * ((1 - t) * t * share).mean().item()
    slope = 2 * ((((1 - t) / t) ** 2 + std**-2) * share.square()).mean().item()  # of the critic's loss, by b - theta
    rate = 4 * damping**2 * k
    student, law = Shift(1.0, std), UniformTime(low=0.02, high=0.98)
    means: list[float] = []
    phase = replace(
        only_phase(Dmd2(gan=0.0, every=every)),
        terms=[DistributionMatching(times=law, normalised=False)],
        roles=[Role(name="teacher"), Role(name="critic", origin="new", learning_rate=rate / slope / size)],
        role_terms={"critic": [Denoising(times=law, sigma_data=std)]},
        modules=lambda models: {"critic": Location(1.0, std)},
        after_step=lambda state, loss, step, steps: means.append(student.mean.item()),
    )
    how = settings(
        steps=turns * every, optimizer="sgd", momentum=0.0, learning_rate=size, max_grad_norm=0.0, batch_size=512
    )  # fmt: skip
    train(student, phase, how, teacher=Location(0.0, std))
    return -min(0.0, *means), predicted_overshoot(k, rate, turns, every)


def test_a_slow_critic_makes_the_student_overshoot_as_predicted_and_five_turns_cure_it() -> None:
    measured, predicted = overshoots(1, 0.45)
    assert predicted > 0.2
    assert measured == pytest.approx(predicted, abs=0.1)
    measured, predicted = overshoots(5, 0.45)  # sqrt(5) x .45 = 1.006
    assert predicted < 0.01
    assert measured < 0.03


# -- effects ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_one_step_of_the_student_is_far_better_than_one_of_the_teacher(seed: int) -> None:
    teacher, real = gauss8_teacher(), gauss8_rows(4000)
    student = student_of(teacher)
    how = settings(steps=150, learning_rate=2e-3, seed=seed, log_every=100, **FAST)
    train(student, only_phase(Dmd2(every=2)), how, {"data": {"x0": gauss8_rows(4000, 6)}}, teacher=teacher)
    assert sliced(samples(teacher, 4000), real) > 1.2
    assert sliced(samples(student, 4000), real) < 0.5


@pytest.mark.parametrize("seed", range(3))
def test_only_the_gan_takes_back_a_bias_of_the_teacher(seed: int) -> None:
    shifted = GaussianMixture(torch.tensor([[0.5, 0.0]]), torch.tensor([0.5]), torch.ones(1))
    biased = toy_net("gauss8", 32, 2, 0)
    fit(biased, lambda n, g: shifted.sample(n, g), Fit(steps=200, learning_rate=4e-3)).requires_grad_(False)
    real = shifted.sample(4000, torch.Generator().manual_seed(3))[0] - torch.tensor([0.5, 0.0])

    def bias(gan: float) -> float:
        student = student_of(biased)
        how = settings(steps=150, learning_rate=2e-3, seed=seed, log_every=100, **FAST)
        phase = only_phase(Dmd2(every=2, gan=gan, critic_gan=1.0))
        train(student, phase, how, {"data": {"x0": real}}, teacher=biased)
        return samples(student, 2000)[:, 0].mean().item()

    without = bias(0.0)
    assert without == pytest.approx(0.5, abs=0.1)
    assert bias(2.0) < 0.6 * without
