"""SANA-Sprint: conversion, tangent and loss in closed form; largest times; roles that move and roles that do not."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import nn
from trajectory_made import FlowMap, Rolled, data_of, one_gaussian, one_step_distance, trained, trainer_of, view_of

from workbench.errors import InputError
from workbench.policies.diffusion.consistency import bounded, consistency_tangent, tangent_loss, total_derivative
from workbench.policies.diffusion.dit import DiT
from workbench.policies.diffusion.methods.sana_sprint import LogNormalTime, SanaSprint
from workbench.policies.diffusion.networks import MLP
from workbench.policies.diffusion.oracle import gauss8
from workbench.policies.diffusion.predict import Guided, Predictor
from workbench.policies.diffusion.samplers import ode, uniform_times
from workbench.policies.diffusion.schedules import RectifiedFlow, Trigonometric
from workbench.policies.diffusion.testbeds import Fit, fit, student_of, toy_net

SEEDS = (0, 1, 2)
TRIG = Trigonometric()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(count, low=0.05, high=1.5):
    return torch.linspace(low, high, count, dtype=torch.float64)


def net(seed=0, **options):
    return toy_net("gauss8", 16, 3, seed, **options)


def fast(**changes) -> SanaSprint:
    return SanaSprint(**{"guidance": 1.0, "sigma_data": 1.0, "warmup": 0.3, **changes})


# -- TrigFlow of a rectified flow --------------------------------------------------------------------------------------


def test_the_converted_teacher_is_the_exact_trigflow_velocity_and_the_closed_form() -> None:
    straight, trig = gauss8(), gauss8(schedule=TRIG)
    x_t, t = 1.5 * randn(64, 2), times(64, 0.0, math.pi / 2)
    found = Predictor(straight, TRIG).flow(x_t, t)
    torch.testing.assert_close(found, trig.flow(x_t, t), rtol=0, atol=1e-12)
    s = (t.sin() / (t.sin() + t.cos()))[:, None]
    n = (s**2 + (1 - s) ** 2).sqrt()
    y = n * x_t
    closed = ((1 - 2 * s) * y + (1 - 2 * s + 2 * s**2) * straight.flow(y, s[:, 0])) / n
    torch.testing.assert_close(found, closed, rtol=0, atol=1e-12)
    f = t.cos()[:, None] * x_t - t.sin()[:, None] * found
    torch.testing.assert_close(f, trig.x0(x_t, t), rtol=0, atol=1e-12)


def test_both_coordinates_lead_from_the_same_noise_to_the_same_samples() -> None:
    z, teacher = randn(50, 2), net().double()
    with torch.no_grad():
        there, back = (
            ode(Predictor(teacher, schedule), z, uniform_times(schedule, 400), solver="heun")
            for schedule in (RectifiedFlow(), TRIG)
        )
    torch.testing.assert_close(there, back, rtol=0, atol=1e-4)


# -- tangents ----------------------------------------------------------------------------------------------------------


def tangent_of(student, teacher, x_t, t, kind="jvp", ramp=1.0, step=1e-3):
    velocity, along = teacher.flow(x_t, t), t.cos() * t.sin()
    value, change = total_derivative(
        lambda x, s: student.flow(x, s), x_t, t, along.reshape(-1, *[1] * (x_t.ndim - 1)) * velocity, along, kind, step
    )
    return consistency_tangent(x_t, t, value, change, velocity, ramp)


def test_the_tangent_is_cos_t_times_the_derivative_of_the_consistency_function() -> None:
    """For any smooth network, here by a difference along the teacher's trajectory."""
    student, teacher = Predictor(net().double(), TRIG), Predictor(gauss8(), TRIG)
    x_t, t, step = 1.5 * randn(32, 2), times(32), 1e-5

    def f(x, t):
        return student.x0(x, t)

    with torch.no_grad():
        velocity = teacher.flow(x_t, t)
        change = (f(x_t + step * velocity, t + step) - f(x_t - step * velocity, t - step)) / (2 * step)
    torch.testing.assert_close(tangent_of(student, teacher, x_t, t), t.cos()[:, None] * change, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("made", [net, lambda: transformer()], ids=["MLP", "DiT"])
def test_forward_mode_and_differences_agree(made) -> None:
    network = made().double()
    student, teacher = Predictor(network, TRIG), Predictor(student_of(network), TRIG)
    x_t, t = randn(4, *network.shape), times(4)
    with torch.no_grad():
        exact = tangent_of(student, teacher, x_t, t)
        errors = [(tangent_of(student, teacher, x_t, t, "difference", step=h) - exact).norm() for h in (4e-3, 2e-3)]
    assert errors[1] < 1e-2 * exact.norm()
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)  # of second order


def transformer():
    torch.manual_seed(0)
    made = DiT(width=16, depth=2)
    for p in made.parameters():
        nn.init.normal_(p, std=0.1)  # its gates begin with 0
    return made


def test_a_network_without_forward_mode_is_refused_with_the_way_out() -> None:
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

    x, t = randn(3, 2), times(3)
    with pytest.raises(InputError, match="difference"):
        total_derivative(lambda x, t: Opaque.apply(x), x, t, x, t)
    value, change = total_derivative(lambda x, t: Opaque.apply(x), x, t, x, t, "difference")
    torch.testing.assert_close((value, change), (x, x))


def test_derivatives_are_as_good_under_autocast() -> None:
    """Of the difference, bfloat16's round-off left a third wrong."""
    network, x, t = net(), randn(64, 2).float(), times(64, 0.1, 0.9).float()
    along = randn(64, 2, seed=1).float()
    exact = total_derivative(network, x, t, along, torch.ones(64))[1]
    with torch.autocast("cpu", torch.bfloat16):
        jvp = total_derivative(network, x, t, along, torch.ones(64))[1]
        difference = total_derivative(network, x, t, along, torch.ones(64), "difference")[1]
    for change in (jvp, difference):
        assert (change - exact).norm() < 0.05 * exact.norm()


def test_at_the_exact_flow_map_the_tangent_and_the_gradient_are_0() -> None:
    oracle = one_gaussian(schedule=TRIG)
    student = FlowMap(oracle).double()
    x_t, t = randn(32, 2) + 0.5, times(32)
    tangent = tangent_of(Predictor(student), oracle, x_t, t)
    assert tangent.abs().max() < 1e-12
    value = student(x_t, t)
    tangent_loss(value, value.detach() + tangent, t, torch.zeros(32)).sum().backward()
    assert student.scale.grad is not None
    assert student.scale.grad.abs() < 1e-10


def test_before_the_ramp_it_distils_the_teachers_velocity() -> None:
    value, velocity, t = randn(8, 2), randn(8, 2, seed=1), times(8)
    at_start = consistency_tangent(randn(8, 2, seed=2), t, value, randn(8, 2, seed=3), velocity, 0.0)
    torch.testing.assert_close(at_start, t.cos().square()[:, None] * (velocity - value))
    method = SanaSprint()
    assert [method.ramp(step, 30_000) for step in (0, 1000, 4000, 9000)] == pytest.approx([0, 0.25, 1, 1])
    assert fast(warmup=0).ramp(0, 10) == 1


def test_a_bounded_tangent_cannot_outgrow_the_loss() -> None:
    g = randn(4, 3, 2) * torch.tensor([1e-3, 1, 1e3, 1e30], dtype=torch.float64)[:, None, None]
    norms = bounded(g).flatten(1).norm(dim=1)
    before = g.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, before / (before + 0.1))
    assert torch.equal(bounded(g, "clamp"), g.clamp(-1, 1))
    g[1, 0, 0], g[2, 1, 1] = math.nan, math.inf
    for kind in ("norm", "clamp"):
        found = bounded(g, kind)
        assert found[1:3].abs().max() == 0
        assert found[0].abs().max() > 0


def test_the_loss_and_its_learned_variance() -> None:
    value, target, t = randn(6, 4), randn(6, 4, seed=1), times(6)
    weighted = (value - target).square().mean(1) / (0.5 * t.tan())
    for u in (torch.zeros(6, dtype=torch.float64), randn(6, seed=2)):
        torch.testing.assert_close(tangent_loss(value, target, t, u), weighted * (-u).exp() + u)
    u = weighted.log().requires_grad_()  # there e^u is the weighted error, and the derivative is 0
    (slope,) = torch.autograd.grad(tangent_loss(value, target, t, u).sum(), u)
    assert slope.abs().max() < 1e-12
    last = tangent_loss(value[:1].float(), target[:1].float(), torch.tensor([math.pi / 2]), torch.zeros(1))
    assert 0 <= last.item() < 1e-6  # float32's pi/2 lies beyond pi/2


# -- the method --------------------------------------------------------------------------------------------------------


def started(method=None, student=None, teacher=None, **settings):
    [phase] = (method or fast()).phases()
    teacher = teacher or net(1).requires_grad_(False)
    return trainer_of(student or student_of(teacher), phase, data_of(gauss8()), {"teacher": teacher}, **settings)


@pytest.mark.parametrize("weight", [1.0, 4.5])
def test_the_terms_value_is_the_pure_functions(weight) -> None:
    oracle = gauss8(num_classes=2)
    trainer = trainer_of(
        net(num_classes=2), SanaSprint(guidance=weight, warmup=0.0, adversarial=0.0).phases()[0], data_of(oracle),
        {"teacher": oracle}, batch_size=32,
    )  # fmt: skip
    found = trainer.phase.terms[0](view_of(trainer)).detach()
    view = view_of(trainer)
    rows, student = view["main"], Predictor(trainer.student, TRIG)
    t = LogNormalTime(0.2, 1.6, 0.5)(view, TRIG)
    x_t, c = TRIG.add_noise(rows["x0"], view.randn(2), t), rows["c"]
    velocity = Guided(Predictor(oracle, TRIG), weight).flow(x_t, t, c)
    along = t.cos() * t.sin()
    value, change = total_derivative(lambda x, s: student.flow(x, s, c), x_t, t, along[:, None] * velocity, along)
    tangent = bounded(0.5 * consistency_tangent(x_t, t, value, change, velocity))
    wanted = (tangent.square().mean(1) / (0.5 * t.tan())).mean()  # u = 0; F - F^- is 0, only its gradient is not
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)


def test_times_are_log_normal_in_the_tangent_on_every_schedule() -> None:
    view = view_of(started(batch_size=4000))
    t = LogNormalTime(0.2, 1.6, 0.5)(view, TRIG)
    logs = (0.5 * t.tan()).log()
    assert logs.mean().item() == pytest.approx(0.2, abs=0.1)
    assert logs.std().item() == pytest.approx(1.6, abs=0.1)
    straight = LogNormalTime(0.2, 1.6, 0.5)(view_of(started(batch_size=4000)), RectifiedFlow())
    torch.testing.assert_close(straight / (1 - straight), t.tan(), rtol=2e-3, atol=0)


@pytest.mark.parametrize(("share", "low", "high"), [(1.0, 1, 1), (0.5, 0.45, 0.55), (0.0, 0, 0)])
def test_a_share_of_the_samples_is_asked_for_at_pure_noise_in_both_turns(share, low, high) -> None:
    """One released trainer sets the discriminator's largest time to the probability instead of pi/2."""
    trainer = started(fast(max_time=share), batch_size=2000)
    seen = []
    for turn in ("student", "discriminator"):
        rows = view_of(trainer, turn)["samples"]
        largest = rows["t"] == torch.tensor(math.pi / 2)
        assert low <= largest.float().mean() <= high
        assert (rows["t"] == share).float().mean() == 0 or share == 0
        assert rows["x"].requires_grad == (turn == "student")
        seen.append(rows["x"].detach())
    assert torch.equal(*seen)


def test_student_heads_and_variance_move_and_the_teacher_does_not() -> None:
    teacher = net(1).requires_grad_(False)
    held = student_of(teacher)
    trainer = started(teacher=teacher, steps=3, batch_size=32)
    owned = {name: {k: p.detach().clone() for k, p in of.items()} for name, of in trainer.trained.items()}
    metrics: list = []
    trainer.train(on_metrics=lambda name, step, values: metrics.append(values))
    for name, before in owned.items():
        still = {key for key, p in trainer.trained[name].items() if torch.equal(p, before[key])}
        # the variance has no use for these; within the margins both sides pull equally at the heads' last bias
        spared = {
            "student": {"logvar/time.weight", "logvar/time.bias"},
            "discriminator": {"blocks/0.2.bias", "blocks/2.2.bias"},
        }
        assert still <= spared[name]
        assert metrics[-1][f"grad_norm/{name}"] > 0
    for old, now in zip(held.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(old, now)
        assert now.grad is None


def test_a_student_that_was_left_frozen_is_refused() -> None:
    """Else the variance alone would train, and the loss would fall."""
    teacher = net(1).requires_grad_(False)
    with pytest.raises(InputError, match="student"):
        started(student=student_of(teacher).requires_grad_(False), teacher=teacher)


def test_without_the_adversarial_term_the_rest_is_the_same() -> None:
    plain, full = (started(fast(adversarial=weight), batch_size=32) for weight in (0.0, 0.5))
    assert list(plain.turns) == ["student"]
    assert list(full.turns) == ["student", "discriminator"]
    first, second = (trainer.phase.terms[0](view_of(trainer)).detach() for trainer in (plain, full))
    assert torch.equal(first, second)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="probability"):
        SanaSprint(max_time=1.5)


# -- effect ------------------------------------------------------------------------------------------------------------

ROUND = gauss8(std=0.4)  # a smooth flow map: what a tangent can follow in few steps


@cache
def flow_teacher() -> MLP:
    made = toy_net("gauss8", 48, 3, 0)
    fit(made, lambda n, g: ROUND.sample(n, g), Fit(steps=400, learning_rate=4e-3), ROUND)
    return made.requires_grad_(False)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_step_samples_come_near_the_data_and_nearer_with_the_heads(seed) -> None:
    """The teacher is under-trained on purpose: the heads see data, and have something to add."""
    found: dict[float, float] = {}
    for weight in (0.0, 0.5):
        student = trained(
            student_of(flow_teacher()), fast(adversarial=weight).phases()[0], data_of(ROUND),
            {"teacher": flow_teacher()}, steps=250, learning_rate=1e-3, seed=seed,
        )  # fmt: skip
        found[weight] = one_step_distance(student, ROUND, TRIG)
    before = one_step_distance(flow_teacher(), ROUND, TRIG)
    assert before > 1.2
    assert found[0.5] < 0.3 * before, found
    assert found[0.5] < 0.95 * found[0.0], found


def test_not_with_a_teacher_that_answers_for_other_rows() -> None:
    student = trained(
        student_of(flow_teacher()), fast(adversarial=0.0).phases()[0], data_of(ROUND),
        {"teacher": Rolled(flow_teacher())}, steps=250, learning_rate=1e-3,
    )  # fmt: skip
    assert one_step_distance(student, ROUND, TRIG) > 0.3 * one_step_distance(flow_teacher(), ROUND, TRIG)
