"""Consistency distillation: boundary, target and reduction in closed form; one-step samples near the data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from trajectory_made import (
    FlowMap,
    Rolled,
    data_of,
    one_gaussian,
    one_step_distance,
    trained,
    trainer_of,
    transported,
    view_of,
)

from workbench.errors import InputError
from workbench.policies.diffusion.consistency import consistency_target, distance, with_boundary
from workbench.policies.diffusion.methods.consistency_distillation import ConsistencyDistillation
from workbench.policies.diffusion.oracle import gauss8
from workbench.policies.diffusion.predict import Predictor
from workbench.policies.diffusion.samplers import euler_step, uniform_times
from workbench.policies.diffusion.schedules import Edm, RectifiedFlow, Trigonometric, VariancePreserving, matched_time
from workbench.policies.diffusion.testbeds import gauss8_data, student_of, toy_net, warm_student

SEEDS = (0, 1, 2)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("schedule", [Edm(), RectifiedFlow(), VariancePreserving(), Trigonometric()])
def test_the_consistency_function_is_the_datum_at_the_start_whatever_the_network_says(schedule) -> None:
    start = 0.002
    t = matched_time(torch.full((5,), start, dtype=torch.float64), Edm(), schedule)
    ratio = float(schedule.sigma(t)[0] / schedule.alpha(t)[0])
    x_t = randn(5, 2)
    found = with_boundary(randn(5, 2, seed=1), x_t, t, schedule, ratio)
    torch.testing.assert_close(found, x_t / schedule.alpha(t)[:, None], rtol=0, atol=1e-9)


def test_the_consistency_function_is_the_papers_on_edm() -> None:
    """With the raw network of EDM's preconditioning in the paper's c_skip and c_out."""
    start, sd, t, x_t, raw = 0.002, 0.5, torch.linspace(0.002, 80, 9, dtype=torch.float64), randn(9, 2), randn(9, 2)
    rho = t[:, None]
    root = (rho**2 + sd**2).sqrt()
    x0 = sd**2 / root**2 * x_t + sd * rho / root * raw
    wanted = sd**2 / ((rho - start) ** 2 + sd**2) * x_t + sd * (rho - start) / root * raw
    torch.testing.assert_close(with_boundary(x0, x_t, t, Edm(), start, sd), wanted, rtol=0, atol=1e-12)


def test_without_a_smallest_noise_level_the_consistency_function_is_the_denoiser() -> None:
    x0 = randn(3, 2)
    assert with_boundary(x0, randn(3, 2, seed=1), torch.tensor([0.0, 0.5, 1.0]), RectifiedFlow()) is x0
    noise = with_boundary(x0, randn(3, 2, seed=1), torch.ones(3), RectifiedFlow(), 0.002)
    torch.testing.assert_close(noise, x0)  # at pure noise x_t has no share in it


def test_distances() -> None:
    a, b = randn(4, 3), randn(4, 3, seed=1)
    torch.testing.assert_close(distance(a, b, "l2"), (a - b).square().mean(1))
    torch.testing.assert_close(distance(a, b, "huber", 1e-9), (a - b).norm(dim=1))  # small c: the norm
    torch.testing.assert_close(
        distance(a, b, "huber", 1e4), (a - b).square().sum(1) / (2e4 * 3**0.5), rtol=1e-6, atol=0
    )  # large c: the square over 2 c
    assert distance(a, a, "huber").abs().max() == 0


@pytest.mark.parametrize(("solver", "order"), [("euler", 2), ("heun", 3)])
def test_for_the_exact_flow_map_the_targets_error_is_the_solvers(solver, order) -> None:
    """So the loss is 0 for a perfect solver; halving the step divides the error by 2^order."""
    oracle, schedule = one_gaussian(), RectifiedFlow()
    x0, eps, t = randn(64, 2) * 0.3 + 1, randn(64, 2, seed=1), torch.full((64,), 0.6, dtype=torch.float64)
    x_t = schedule.add_noise(x0, eps, t)

    def end(x, t, c):
        return transported(oracle, x, t, torch.zeros_like(t))

    assert (end(x_t, t, None) - end(transported(oracle, x_t, t, t / 2), t / 2, None)).abs().max() < 1e-12
    errors = [
        (consistency_target(end, oracle, x_t, t, t - step, None, solver) - end(x_t, t, None)).norm()
        for step in (0.02, 0.01)
    ]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


def test_the_loss_vanishes_at_the_exact_flow_map_and_not_at_the_denoiser() -> None:
    oracle = one_gaussian(schedule=Trigonometric())
    [phase] = ConsistencyDistillation(num_times=400, grid="uniform").phases()
    losses = []
    for student in (FlowMap(oracle), toy_net("gauss8", 16, 1, 0, schedule=Trigonometric())):
        view = view_of(trainer_of(student, phase, data_of(oracle), {"teacher": oracle}))
        losses.append(phase.terms[0](view).detach())
    assert losses[0] < 1e-9
    assert losses[1] > 1e-6


def test_with_two_times_it_is_regression_on_the_teachers_one_step_sample() -> None:
    """The boundary condition makes the target the solver's end itself, whoever the target network is."""
    oracle, student = gauss8(), toy_net("gauss8", 16, 1, 0)
    [phase] = ConsistencyDistillation(num_times=2, grid="uniform", solver="euler").phases()
    trainer = trainer_of(student, phase, data_of(oracle), {"teacher": oracle}, batch_size=32)
    loss = phase.terms[0](view_of(trainer))
    view = view_of(trainer)
    view["main"], view.randint(1)
    z, one = view.randn(2), torch.ones(32)
    wanted = (Predictor(student).x0(z, one) - euler_step(oracle, z, one, 0 * one)).square().mean()
    torch.testing.assert_close(loss, wanted)


def test_a_step_goes_down_the_gradient_with_the_target_held() -> None:
    oracle, student = gauss8(), toy_net("gauss8", 16, 1, 0)
    method = ConsistencyDistillation(grid="uniform", num_times=9)
    [phase] = method.phases()
    plain = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.1, "max_grad_norm": 0.0, "schedule": "constant"}
    trainer = trainer_of(student, phase, data_of(oracle), {"teacher": oracle}, steps=1, batch_size=64, **plain)
    view, held = view_of(trainer), student_of(student)
    x0, later = view["main"]["x0"], view.randint(8)
    times = uniform_times(RectifiedFlow(), 8).float()
    t, s = times[later], times[later + 1]
    x_t = RectifiedFlow().add_noise(x0, view.randn(2), t)
    goal = consistency_target(Predictor(held).x0, oracle, x_t, t, s)
    assert not goal.requires_grad
    loss = (Predictor(student).x0(x_t, t) - goal).square().mean()
    before = [p.detach().clone() for p in student.parameters()]
    gradients = torch.autograd.grad(loss, list(student.parameters()))
    trainer.train()
    for old, new, gradient in zip(before, student.parameters(), gradients, strict=True):
        torch.testing.assert_close(new, old - 0.1 * gradient)


def test_the_target_follows_by_its_decay() -> None:
    oracle, student = gauss8(), toy_net("gauss8", 16, 1, 0)
    start = student_of(student)
    [phase] = ConsistencyDistillation(target_decay=0.75, grid="uniform").phases()
    trainer = trainer_of(student, phase, data_of(oracle), {"teacher": oracle}, steps=1)
    trainer.train()
    for old, new, target in zip(*(m.parameters() for m in (start, student, trainer.roles["target"])), strict=True):
        torch.testing.assert_close(target, 0.75 * old + 0.25 * new)
    [phase] = ConsistencyDistillation().phases()
    trainer = trainer_of(student, phase, data_of(oracle), {"teacher": oracle})
    assert trainer.roles["target"] is student  # decay 0: the student itself, without gradient


@pytest.mark.parametrize("seed", SEEDS)
def test_one_step_samples_come_near_the_data_but_not_with_a_teacher_that_answers_for_other_rows(seed) -> None:
    oracle = gauss8()
    warm = warm_student(oracle, gauss8_data, 200, seed=seed)
    [phase] = ConsistencyDistillation(grid="uniform", target_decay=0.9).phases()
    found = {}
    for name, teacher in {"teacher": oracle, "control": Rolled(oracle)}.items():
        student = trained(
            student_of(warm), phase, data_of(oracle), {"teacher": teacher}, steps=250, batch_size=256, seed=seed
        )
        found[name] = one_step_distance(student, oracle)
    before = one_step_distance(warm, oracle)
    assert before > 1.2
    assert found["teacher"] < 0.2 * before, found
    assert found["control"] > 2 * found["teacher"], found


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(InputError, match="num_times"):
        ConsistencyDistillation(num_times=1)
    oracle, student = gauss8(), toy_net("gauss8", 16, 1, 0, prediction="x0")
    [phase] = ConsistencyDistillation(grid="uniform").phases()
    trainer = trainer_of(student, phase, data_of(oracle), {"teacher": oracle})
    with pytest.raises(InputError, match="karras"):
        phase.terms[0](view_of(trainer))
    [phase] = replace(ConsistencyDistillation(), distance="huber").phases()
    trainer = trainer_of(student, phase, data_of(oracle), {"teacher": oracle})
    assert phase.terms[0](view_of(trainer)).detach() > 0
