"""Schedules: conversions of predictions both ways, derivatives, end points, translation by signal-to-noise ratio."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.policies.diffusion.schedules import (
    PREDICTIONS,
    Edm,
    RectifiedFlow,
    Trigonometric,
    VariancePreserving,
    combine,
    convert,
    index_of_time,
    matched_time,
    time_of_index,
    translate,
)

SCHEDULES = [RectifiedFlow(), VariancePreserving(), Edm(), Trigonometric(), Trigonometric(sigma_data=0.5)]
PAIRS = list(product(SCHEDULES, SCHEDULES))
#: Both ends belong to the process: t = 0 is clean data, t_max pure noise.
EXACT_ENDS = [RectifiedFlow(), Trigonometric(), Trigonometric(sigma_data=0.5)]

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def between(schedule, fraction):
    """Times inside the range, evenly in sigma/alpha's angle."""
    angle = torch.as_tensor(fraction, dtype=torch.float64) * math.pi / 2
    return matched_time(angle, Trigonometric(), schedule)


def drawn(seed, *shape):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, generator=g, dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), fractions=st.lists(st.floats(0.02, 0.98), min_size=1, max_size=4))
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_prediction_gives_every_other(schedule, seed, fractions):
    x0, eps = drawn(seed, len(fractions), 2, 3)
    t = between(schedule, fractions)
    x_t = schedule.add_noise(x0, eps, t)
    truth = {kind: combine(x0, eps, t, schedule, kind) for kind in PREDICTIONS}
    for source, target in product(PREDICTIONS, PREDICTIONS):
        found = convert(truth[source], x_t, t, schedule, source, target)
        torch.testing.assert_close(found, truth[target], rtol=1e-10, atol=1e-10)
        back = convert(found, x_t, t, schedule, target, source)
        torch.testing.assert_close(back, truth[source], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_derivatives_are_those_of_the_levels(schedule):
    t = between(schedule, torch.linspace(0.02, 0.98, 9))
    for level, slope in ((schedule.alpha, schedule.d_alpha), (schedule.sigma, schedule.d_sigma)):
        _, tangent = torch.func.jvp(level, (t,), (torch.ones_like(t),))
        torch.testing.assert_close(slope(t), tangent, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_time_of_a_signal_to_noise_ratio(schedule):
    t = between(schedule, torch.linspace(0.02, 0.98, 9))
    torch.testing.assert_close(schedule.from_snr(schedule.snr(t)), t, rtol=1e-11, atol=0)
    ends = schedule.from_snr(torch.tensor([torch.inf, 0.0], dtype=torch.float64))
    assert ends[0] == 0
    assert ends[1] >= schedule.t_max - 1e-9
    assert ends.isfinite().all()


def test_a_variance_preserving_schedule_preserves_variance_and_is_the_paper_s():
    schedule, t = VariancePreserving(), torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t))
    # The integral of beta(t) = 0.1 + 19.9 t from 0 to 1 is 10.05; alpha is exp of minus half of it.
    assert schedule.alpha(t)[-1].item() == pytest.approx(math.exp(-10.05 / 2), rel=1e-12)


@pytest.mark.parametrize("schedule", EXACT_ENDS, ids=str)
@pytest.mark.parametrize("source", ["v", "flow"])
def test_v_and_flow_determine_everything_at_both_ends(schedule, source):
    x0, eps = drawn(1, 2, 3)
    t = torch.tensor([0.0, schedule.t_max], dtype=torch.float64)
    x_t = schedule.add_noise(x0, eps, t)
    value = combine(x0, eps, t, schedule, source)
    for target in ("x0", "eps", "v", "flow"):
        found = convert(value, x_t, t, schedule, source, target)
        torch.testing.assert_close(found, combine(x0, eps, t, schedule, target), rtol=1e-9, atol=1e-9)
    assert convert(value, x_t, t, schedule, source, "score")[1].isfinite().all()


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VariancePreserving(), Edm(), Trigonometric()], ids=str)
def test_clean_data_is_its_own_x0_whatever_was_predicted(schedule):
    x_t, value = drawn(2, 2, 3)
    t = torch.zeros(2, dtype=torch.float64)
    for source in ("eps", "v", "flow", "score"):
        torch.testing.assert_close(convert(value, x_t, t, schedule, source, "x0"), x_t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", EXACT_ENDS, ids=str)
def test_pure_noise_is_its_own_eps(schedule):
    eps, value = drawn(3, 2, 3)
    t = torch.full((2,), schedule.t_max, dtype=torch.float64)
    x_t = schedule.add_noise(torch.zeros_like(eps), eps, t)
    for source in ("x0", "v", "flow"):
        torch.testing.assert_close(convert(value, x_t, t, schedule, source, "eps"), eps, rtol=1e-9, atol=1e-9)


def test_what_is_not_determined_is_not_made_up():
    x_t, value = drawn(4, 1, 3)
    schedule, ones = RectifiedFlow(), torch.ones(1, dtype=torch.float64)
    assert not convert(value, x_t, ones, schedule, "eps", "x0").isfinite().any()
    assert not convert(value, x_t, 0 * ones, schedule, "x0", "eps").isfinite().any()
    assert not convert(value, x_t, 0 * ones, schedule, "flow", "score").isfinite().any()


def test_an_unknown_prediction_is_refused():
    x, t = torch.zeros(1, 2), torch.ones(1)
    with pytest.raises(InputError, match="epsilon"):
        convert(x, x, t, RectifiedFlow(), "x0", "epsilon")  # type: ignore[arg-type]


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_translation_keeps_the_sample_and_the_ratio(source, target):
    x0, eps = drawn(5, 7, 2)
    t = between(source, torch.linspace(0.02, 0.98, 7))
    x, matched = translate(source.add_noise(x0, eps, t), t, source, target)
    torch.testing.assert_close(target.snr(matched), source.snr(t), rtol=1e-10, atol=0)
    torch.testing.assert_close(x, target.add_noise(x0, eps, matched), rtol=1e-10, atol=1e-10)
    back, again = translate(x, matched, target, source)
    torch.testing.assert_close(again, t, rtol=1e-10, atol=0)
    torch.testing.assert_close(back, source.add_noise(x0, eps, t), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_translation_is_regular_at_the_ends_with_its_derivative(source, target, dtype):
    t = torch.tensor([source.t_min, source.t_max], dtype=dtype)
    x = torch.ones(2, 3, dtype=dtype)
    found, slope = torch.func.jvp(lambda t: translate(x, t, source, target), (t,), (torch.ones_like(t),))
    for tensor in (*found, *slope):
        assert tensor.isfinite().all()
    low, high = (torch.tensor(end, dtype=dtype) for end in (target.t_min, target.t_max))
    assert (found[1] >= low).all()
    assert (found[1] <= high).all()


def test_rectified_flow_to_trigflow_in_closed_form():
    # tan t' = t / (1 - t) and the scale is 1 / sqrt(t^2 + (1 - t)^2): SANA-Sprint, arXiv 2503.09641.
    t = torch.tensor([0.0, 0.3, 0.5, 1.0], dtype=torch.float64)
    x, matched = translate(torch.ones(4, 1, dtype=torch.float64), t, RectifiedFlow(), Trigonometric())
    torch.testing.assert_close(matched, torch.atan2(t, 1 - t))
    torch.testing.assert_close(x[:, 0], (t**2 + (1 - t) ** 2).rsqrt())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_noising_in_two_steps_is_noising_in_one(schedule):
    s, t = between(schedule, [0.1, 0.4, 0.7]), between(schedule, [0.3, 0.4, 0.9])
    one, none = torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    # The map is linear in (x0, first noise, second noise): its coefficients one by one.
    of_x0 = schedule.renoise(schedule.add_noise(one, none, s), none, s, t)[:, 0]
    of_first = schedule.renoise(schedule.add_noise(none, one, s), none, s, t)[:, 0]
    of_second = schedule.renoise(none, one, s, t)[:, 0]
    torch.testing.assert_close(of_x0, schedule.alpha(t))
    torch.testing.assert_close(of_first**2 + of_second**2, schedule.sigma(t) ** 2)
    assert of_second[1] == pytest.approx(0, abs=1e-7)


def test_pure_noise_stays_itself():
    x, one = drawn(6, 1, 2)[0], torch.ones(1, dtype=torch.float64)
    assert torch.equal(RectifiedFlow().renoise(x, x, one, one), x)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_steps_of_a_discrete_process(schedule):
    alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)  # DDPM's
    index = torch.tensor([0, 1, 20, 500, 980, 999])
    t = time_of_index(index, alphas_cumprod, schedule)
    torch.testing.assert_close(schedule.snr(t), (alphas_cumprod / (1 - alphas_cumprod))[index], rtol=1e-9, atol=0)
    assert torch.equal(index_of_time(t, alphas_cumprod, schedule), index)


def test_data_keep_their_dtype_and_times_theirs():
    x = torch.ones(2, 3)
    t = torch.tensor([0.2, 0.5], dtype=torch.float64)
    assert RectifiedFlow().add_noise(x, x, t).dtype == torch.float32
    found, matched = translate(x, t, RectifiedFlow(), Edm())
    assert (found.dtype, matched.dtype) == (torch.float32, torch.float64)
    assert convert(x, x, t, RectifiedFlow(), "flow", "x0").dtype == torch.float32
