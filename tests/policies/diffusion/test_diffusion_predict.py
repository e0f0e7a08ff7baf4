"""Predictors on another schedule, guidance, solvers, re-noising and time grids, against exact oracles."""

from __future__ import annotations

import pytest
import torch

from workbench.errors import InputError
from workbench.policies.diffusion.networks import MLP
from workbench.policies.diffusion.oracle import GaussianMixture, gauss8, two_gaussians
from workbench.policies.diffusion.predict import Guided, Predictor
from workbench.policies.diffusion.samplers import (
    ddim_step,
    euler_step,
    heun_step,
    karras_times,
    ode,
    ode_path,
    prior,
    renoise_step,
    sde,
    sde_path,
    uniform_times,
)
from workbench.policies.diffusion.schedules import PREDICTIONS, Edm, RectifiedFlow, Trigonometric, VariancePreserving

SCHEDULES = [RectifiedFlow(), VariancePreserving(), Edm(), Trigonometric(), Trigonometric(sigma_data=0.5)]


def states(schedule, count=6):
    g = torch.Generator().manual_seed(3)
    t = schedule.from_snr(torch.logspace(2, -2, count, dtype=torch.float64))
    return schedule.sigma(t)[:, None] + torch.randn(count, 2, generator=g, dtype=torch.float64), t


@pytest.mark.parametrize("own", SCHEDULES, ids=str)
@pytest.mark.parametrize("other", SCHEDULES, ids=str)
def test_an_oracle_wrapped_as_another_schedule_is_that_schedule_s_oracle(own, other):
    wrapped, exact = Predictor(gauss8(2, schedule=own), schedule=other), gauss8(2, schedule=other)
    x, t = states(other)
    c = torch.arange(6) % 3
    for kind in PREDICTIONS:
        found = wrapped.predict(x, t, c, kind)
        torch.testing.assert_close(found, exact.predict(x, t, c, kind), rtol=1e-7, atol=1e-8)
    for found, wanted in zip(wrapped.pair(x, t, c), exact.pair(x, t, c), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_flow_teacher_as_trigflow_is_regular_at_both_ends(dtype):
    wrapped, exact = Predictor(gauss8(), schedule=Trigonometric()), gauss8(schedule=Trigonometric())
    x = torch.tensor([[2.0, 0.0], [0.3, -0.4]], dtype=dtype)
    t = torch.tensor([0.0, Trigonometric().t_max], dtype=dtype)
    for kind in ("x0", "eps", "v", "flow"):
        torch.testing.assert_close(wrapped.predict(x, t, None, kind), exact.predict(x, t, None, kind))


def test_the_second_time_reaches_the_network_on_its_own_schedule():
    net = MLP(hidden=8, second_time=True).double()
    torch.nn.init.normal_(net.cond.second_time.weight)
    x, t = states(RectifiedFlow())
    assert torch.equal(Predictor(net).flow(x, t, None, 0.5 * t), net(x, t, None, 0.5 * t))
    assert not torch.equal(Predictor(net).flow(x, t, None, 0.5 * t), net(x, t))
    trig = Trigonometric()
    wrapped = Predictor(net, schedule=trig)
    flat, matched = states(trig)
    r = 0.5 * matched
    _, t_net = flat, RectifiedFlow().from_snr(trig.snr(matched))
    r_net = RectifiedFlow().from_snr(trig.snr(r))
    scale = (RectifiedFlow().sigma(t_net) / trig.sigma(matched))[:, None]
    wanted = scale * flat - t_net[:, None] * net(scale * flat, t_net, None, r_net)
    torch.testing.assert_close(wrapped.x0(flat, matched, None, r), wanted)


def test_guidance_between_null_and_conditional():
    oracle = Predictor(two_gaussians())
    x, t = states(RectifiedFlow())
    c = torch.tensor([0, 1, 0, 1, 0, 2])
    for kind in PREDICTIONS:
        null, conditional = oracle.predict(x, t, None, kind), oracle.predict(x, t, c, kind)
        assert torch.equal(Guided(oracle, 1.0).predict(x, t, c, kind), conditional)
        assert torch.equal(Guided(oracle, 0.0).predict(x, t, c, kind), null)
        assert torch.equal(Guided(oracle, 3.0).predict(x, t, None, kind), null)
        wanted = null + 3 * (conditional - null)
        torch.testing.assert_close(Guided(oracle, 3.0).predict(x, t, c, kind), wanted)
        weights = torch.tensor([0.0, 1.0, 3.0, 3.0, 3.0, 3.0], dtype=torch.float64)
        by_row = Guided(oracle, weights).predict(x, t, c, kind)
        torch.testing.assert_close(by_row[2:], wanted[2:])
        torch.testing.assert_close(by_row[:2], torch.stack([null[0], conditional[1]]))
    x0, eps = Guided(oracle, 3.0).pair(x, t, c)
    torch.testing.assert_close(x0, Guided(oracle, 3.0).x0(x, t, c))
    torch.testing.assert_close(eps, Guided(oracle, 3.0).eps(x, t, c))


def test_guidance_says_the_same_in_every_parameterisation():
    oracle = two_gaussians()
    x, t = states(RectifiedFlow())
    guided, c = Guided(oracle, 4.0), torch.ones(6, dtype=torch.long)
    x0, eps = guided.x0(x, t, c), guided.eps(x, t, c)
    torch.testing.assert_close(RectifiedFlow().add_noise(x0, eps, t), x)
    torch.testing.assert_close(guided.flow(x, t, c), eps - x0)


def one_gaussian(schedule):
    """Its ODE has a closed form: (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2) stays what it is."""
    mean = torch.tensor([[0.7, -0.4]])
    return GaussianMixture(mean, torch.tensor([0.6]), torch.ones(1), None, schedule)


def carried(schedule, x, t, s):
    mean = torch.tensor([0.7, -0.4], dtype=x.dtype)
    spread = [(schedule.alpha(u) ** 2 * 0.6**2 + schedule.sigma(u) ** 2).sqrt()[:, None] for u in (t, s)]
    return schedule.alpha(s)[:, None] * mean + spread[1] / spread[0] * (x - schedule.alpha(t)[:, None] * mean)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(("step", "order"), [(euler_step, 1), (heun_step, 2), (ddim_step, 1)])
def test_solvers_converge_at_their_order(schedule, step, order):
    x, t = states(schedule, 3)
    s = 0.6 * t
    wanted = carried(schedule, x, t, s)
    errors = []
    for count in (32, 64):
        y = x
        for i in range(count):
            a, b = (t + (s - t) * j / count for j in (i, i + 1))
            y = step(one_gaussian(schedule), y, a, b)
        errors.append((y - wanted).abs().amax())
    assert 2**order * 0.8 < errors[0] / errors[1] < 2**order * 1.25


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("solver", ["euler", "heun", "ddim"])
def test_trajectories_reach_clean_data(schedule, solver):
    times = karras_times(schedule, 60)
    noise = torch.randn(50, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    start = prior(noise, schedule, times[0].item())
    found = ode(one_gaussian(schedule), start, times, solver=solver)
    wanted = carried(schedule, start, times[:1].expand(50), times[-1:].expand(50))
    assert (found - wanted).abs().max() < (0.02 if solver == "heun" else 0.2)
    path = ode_path(one_gaussian(schedule), start, times, solver=solver)
    assert path.shape == (61, 50, 2)
    assert torch.equal(path[0], start)
    assert torch.equal(path[-1], found)


def test_sde_predicts_and_renoises():
    oracle = two_gaussians()
    g = torch.Generator().manual_seed(5)
    x, *noises = torch.randn(3, 8, 2, generator=g, dtype=torch.float64)
    c = torch.arange(8) % 2
    times = torch.tensor([1.0, 0.7, 0.4, 0.0], dtype=torch.float64)
    at = [time.expand(8) for time in times]
    first = RectifiedFlow().add_noise(oracle.x0(x, at[0], c), noises[0], at[1])
    assert torch.equal(first, renoise_step(oracle, x, at[0], at[1], noises[0], c))
    second = RectifiedFlow().add_noise(oracle.x0(first, at[1], c), noises[1], at[2])
    wanted = oracle.x0(second, at[2], c)
    assert torch.equal(sde(oracle, x, times, noises, c), wanted)
    assert torch.equal(sde_path(oracle, x, times, torch.stack(noises), c), torch.stack([x, first, second, wanted]))
    one = torch.Generator().manual_seed(6)
    again = torch.Generator().manual_seed(6)
    assert torch.equal(sde(oracle, x, times, one, c), sde(oracle, x, times, again, c))
    with pytest.raises(InputError, match="re-noise 2 times"):
        sde(oracle, x, times, noises[:1], c)


def test_gradients_reach_the_start_of_a_trajectory():
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64, requires_grad=True)
    times = uniform_times(RectifiedFlow(), 3)
    assert torch.autograd.gradcheck(lambda x: ode(two_gaussians(), x, times, solver="heun"), (x,))


def test_grids():
    assert uniform_times(RectifiedFlow(), 4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert uniform_times(Edm(), 2, end=0.0).tolist() == [80.0, 40.0, 0.0]
    edm = karras_times(Edm(), 18)
    assert edm[0].item() == pytest.approx(80)
    assert edm[-2].item() == pytest.approx(0.002)
    assert edm[-1] == 0
    assert (edm.diff() < 0).all()
    torch.testing.assert_close(karras_times(RectifiedFlow(), 18), edm / (1 + edm))
    with pytest.raises(InputError, match="at least 2"):
        ode(gauss8(), torch.zeros(1, 2), torch.ones(1))
    with pytest.raises(InputError, match="rk4"):
        ode(gauss8(), torch.zeros(1, 2), torch.linspace(1, 0, 3), solver="rk4")  # type: ignore[arg-type]
