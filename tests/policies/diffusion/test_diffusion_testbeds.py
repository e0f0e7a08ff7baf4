"""Toys: many-step samples of oracles and trained teachers are close to the data, one-step ones are not."""

from __future__ import annotations

import pytest
import torch

from workbench.errors import InputError
from workbench.policies.diffusion.dit import DiT
from workbench.policies.diffusion.oracle import checkerboard, gauss8
from workbench.policies.diffusion.predict import Predictor
from workbench.policies.diffusion.samplers import ode, uniform_times
from workbench.policies.diffusion.testbeds import (
    Fit,
    checkerboard_data,
    fit,
    gauss8_data,
    rows,
    student_of,
    toy_data,
    toy_net,
    toy_teacher,
    warm_student,
)
from workbench.policies.digits import digits


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sliced(x, y, projections=128):
    """Sliced Wasserstein-2 distance of equally many samples."""
    directions = torch.randn(x[0].numel(), projections, generator=torch.Generator().manual_seed(0))
    directions /= directions.norm(dim=0)
    a, b = ((z.flatten(1).float() @ directions).sort(0).values for z in (x, y))
    return (a - b).square().mean().sqrt().item()


def distances(predictor, data, steps, count=4000):
    """Of samples of so many Euler steps from the data."""
    g = torch.Generator().manual_seed(1)
    real, _ = data(count, g)
    noise = torch.randn(real.shape, generator=g)
    with torch.no_grad():
        return [sliced(real, ode(predictor, noise, uniform_times(predictor.schedule, k))) for k in steps]


def energy(x, y):
    """Energy distance of two samples, unbiased."""
    x, y = x.flatten(1), y.flatten(1)
    within = [torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return (2 * torch.cdist(x, y).mean() - sum(within)).item()


@pytest.mark.parametrize(("oracle", "one_step"), [(gauss8(), 1.2), (checkerboard(), 0.9)])
def test_the_ode_of_an_oracle_reaches_its_mixture(oracle, one_step):
    """One Euler step lands on the mean; 50 land near the distance of two draws (0.08 to 0.14 at 4,000, gauss8)."""
    one, fifty = distances(oracle, oracle.sample, (1, 50), count=2000)
    assert one > one_step
    assert fifty < 0.25


def test_a_learned_teacher_needs_many_steps():
    teacher = toy_teacher("checkerboard", fast=True)
    one, four, fifty = distances(Predictor(teacher), checkerboard_data, (1, 4, 50))
    assert one > 0.9
    assert 0.15 < four < 0.5
    assert fifty < 0.12  # two draws of the data are 0.04 apart
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_warm_student_of_an_oracle():
    student = warm_student(gauss8(), gauss8_data, steps=400)
    one, fifty = distances(Predictor(student), gauss8_data, (1, 50))
    assert one > 1.2
    assert fifty < 0.25
    assert all(p.requires_grad for p in student.parameters())
    assert student.training


def test_digits_are_learned_by_class():
    teacher = toy_teacher("digits", fast=True)
    x, c = digits()
    x, c = x[:1000], c[:1000]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        one, many = (ode(Predictor(teacher), noise, uniform_times(teacher.schedule, k), c) for k in (1, 20))
    assert energy(one, x) > 0.1  # one step of a class is close to the mean of the class
    assert energy(many, x) < 0.03  # the other 797 digits: 0.031
    means = torch.stack([x[c == k].mean(0) for k in range(10)]).flatten(1)
    nearest = torch.cdist(many.flatten(1), means).argmin(1)
    assert (nearest == c).float().mean() > 0.8  # 0.1 by chance


def test_the_dit_learns_digits():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = DiT(width=32, depth=2, heads=2, num_classes=10)
    x, c = digits()
    g = torch.Generator().manual_seed(3)
    eps, t = torch.randn(x.shape, generator=g), torch.rand(len(x), generator=g)
    x_t = net.schedule.add_noise(x, eps, t)

    def loss():
        with torch.no_grad():
            return (net(x_t, t, c) - (eps - x)).square().mean().item()

    before = loss()
    fit(net, rows(x, c), Fit(steps=100, batch_size=64, learning_rate=5e-3))
    assert before == pytest.approx((eps - x).square().mean().item())  # the output starts at 0
    assert loss() < 0.5 * before


def test_the_same_seed_gives_the_same_network():
    nets = [fit(toy_net("gauss8", 16, 1, seed), gauss8_data, Fit(steps=5, seed=seed)) for seed in (0, 0, 1)]
    weights = [torch.cat([p.flatten() for p in net.parameters()]) for net in nets]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_student_of_a_frozen_net_is_trainable():
    teacher = toy_net("gauss8", 16, 1, 0).requires_grad_(False)
    student = student_of(teacher)
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        student.output.weight += 1
    assert not torch.equal(student.output.weight, teacher.output.weight)


def test_data():
    images, labels = digits()
    assert images.shape == (1797, 1, 8, 8)
    assert (images.min().item(), images.max().item()) == (-1, 1)
    assert sorted(labels.unique().tolist()) == list(range(10))
    board, _ = checkerboard_data(4000, torch.Generator().manual_seed(0))
    assert (board.floor().sum(1) % 2 == 0).all()
    assert len({tuple(corner) for corner in board.floor().tolist()}) == 8
    with pytest.raises(InputError, match="moons"):
        toy_data("moons")  # type: ignore[arg-type]
