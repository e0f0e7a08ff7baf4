"""The mixture oracle against autograd, quadrature, the continuity equation and its own samples."""

from __future__ import annotations

import pytest
import torch

from workbench.errors import InputError
from workbench.policies.diffusion.oracle import GaussianMixture, checkerboard, gauss8, two_gaussians
from workbench.policies.diffusion.predict import Guided, Predictor
from workbench.policies.diffusion.schedules import PREDICTIONS, Edm, RectifiedFlow, Trigonometric, VariancePreserving

SCHEDULES = [RectifiedFlow(), VariancePreserving(), Edm(), Trigonometric()]
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def mixture(schedule=None, prediction="flow", width=2, labels=True):
    """Three unequal components; the third shares a class with the first."""
    g = torch.Generator().manual_seed(7)
    means = torch.randn(3, width, generator=g, dtype=torch.float64)
    classes = torch.tensor([0, 1, 0]) if labels else None
    stds, weights = torch.tensor([0.3, 0.6, 1.1]), torch.tensor([0.2, 0.5, 0.3])
    return GaussianMixture(means, stds, weights, classes, schedule, prediction)


def states(schedule, count=5, width=2):
    g = torch.Generator().manual_seed(8)
    t = schedule.from_snr(torch.logspace(2, -2, count, dtype=torch.float64))
    return schedule.sigma(t)[:, None] + torch.randn(count, width, generator=g, dtype=torch.float64), t


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("labels", [False, True])
def test_score_is_the_gradient_of_the_log_density(schedule, labels):
    oracle = mixture(schedule, labels=labels)
    x, t = states(schedule)
    c = torch.tensor([0, 1, 2, 0, 1]) if labels else None  # 2 is the null label
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(oracle.log_prob(x, t, c).sum(), x)
    torch.testing.assert_close(oracle.score(x, t, c), gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_predictions_are_posterior_means_by_quadrature(schedule):
    """In one dimension: integrals over x0 of p(x0) p(x_t | x0), with eps = (x_t - alpha x0) / sigma."""
    oracle = mixture(schedule, width=1, labels=False)
    x, t = states(schedule, width=1)
    x0 = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    eps = (x - alpha * x0) / sigma
    posterior = (oracle.log_prob(x0[:, None])[None] - eps**2 / 2).softmax(1)
    d_alpha, d_sigma = schedule.d_alpha(t)[:, None], schedule.d_sigma(t)[:, None]
    for found, value in (
        (oracle.x0(x, t), x0.expand_as(eps)),
        (oracle.eps(x, t), eps),
        (oracle.flow(x, t), d_alpha * x0 + d_sigma * eps),
        (oracle.v(x, t), alpha * eps - sigma * x0),
    ):
        torch.testing.assert_close(found[:, 0], (posterior * value).sum(1), rtol=1e-8, atol=1e-8)


def test_the_density_integrates_to_one():
    x = torch.linspace(-15, 15, 6001, dtype=torch.float64)[:, None]
    for t in (None, torch.full((6001,), 0.4, dtype=torch.float64)):
        for c in (None, torch.zeros(6001, dtype=torch.long), torch.ones(6001, dtype=torch.long)):
            density = mixture(width=1).log_prob(x, t, c).exp()
            assert torch.trapezoid(density, x[:, 0]).item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_flow_carries_the_density(schedule):
    """The continuity equation: d/dt log p + flow . grad log p + div flow = 0."""
    oracle = mixture(schedule)
    x, t = states(schedule)
    c = torch.tensor([0, 1, 2, 0, 1])
    _, change = torch.func.jvp(lambda t: oracle.log_prob(x, t, c), (t,), (torch.ones_like(t),))
    flow = oracle.flow(x, t, c)
    divergence = torch.zeros_like(t)
    for i in range(2):
        along = torch.zeros_like(x)
        along[:, i] = 1
        divergence += torch.func.jvp(lambda x: oracle.flow(x, t, c), (x,), (along,))[1][:, i]
    terms = torch.stack([change, (flow * oracle.score(x, t, c)).sum(1), divergence])
    residual = terms.sum(0).abs() / terms.abs().sum(0).clamp_min(1)
    assert residual.max() < 1e-10


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_predictor_of_an_oracle_is_the_oracle(schedule, kind):
    oracle = mixture(schedule, kind)
    x, t = states(schedule)
    c = torch.tensor([0, 1, 2, 0, 1])
    predictor = Predictor(oracle)
    for target in PREDICTIONS:
        torch.testing.assert_close(
            predictor.predict(x, t, c, target), oracle.predict(x, t, c, target), rtol=1e-8, atol=1e-8
        )
    torch.testing.assert_close(predictor.x0(x, t), oracle.x0(x, t), rtol=1e-8, atol=1e-8)


def test_forward_mode_agrees_with_central_differences():
    oracle = mixture(Trigonometric())
    x, t = states(Trigonometric())
    along, h = torch.flip(x, [0]), 1e-5
    _, tangent = torch.func.jvp(oracle, (x, t), (along, torch.ones_like(t)))
    difference = (oracle(x + h * along, t + h) - oracle(x - h * along, t - h)) / (2 * h)
    torch.testing.assert_close(tangent, difference, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_ends_are_regular(schedule):
    oracle = mixture(schedule)
    x = states(schedule, 2)[0]
    t = torch.tensor([0.0, schedule.t_max], dtype=torch.float64)
    for kind in ("x0", "eps", "v", "score"):
        assert oracle.predict(x, t, None, kind).isfinite().all()
    torch.testing.assert_close(oracle.x0(x, t)[0], x[0])
    if schedule in (RectifiedFlow(), Trigonometric()):
        mean = (oracle.log_weights.exp()[:, None] * oracle.means).sum(0)
        torch.testing.assert_close(oracle.x0(x, t)[1], mean)


def test_a_class_is_its_own_mixture_and_null_is_all():
    oracle = mixture()
    x, t = states(RectifiedFlow())
    alone = GaussianMixture(oracle.means[[0, 2]], oracle.stds[[0, 2]], torch.tensor([0.2, 0.3]))
    everything = mixture(labels=False)
    torch.testing.assert_close(oracle(x, t, torch.zeros(5, dtype=torch.long)), alone(x, t))
    torch.testing.assert_close(oracle(x, t, torch.full((5,), 2)), everything(x, t))
    assert torch.equal(oracle(x, t), oracle(x, t, torch.full((5,), 2)))


def test_guidance_of_two_gaussians_in_closed_form():
    """A class has the score -(x - alpha m) / V; in the null one 2 share - 1, a tanh, stands for m = +-1."""
    oracle = two_gaussians(distance=2.0, std=0.5)
    x, t = states(RectifiedFlow())
    c = torch.ones(5, dtype=torch.long)
    alpha = RectifiedFlow().alpha(t)
    variance = alpha**2 * 0.25 + t**2
    share = torch.sigmoid(2 * alpha * x[:, 0] / variance)  # posterior of class 1, at +1 on the first axis
    weight = torch.tensor([0.0, 0.5, 1.0, 2.0, 7.0], dtype=torch.float64)
    wanted = -x / variance[:, None]
    wanted[:, 0] += alpha / variance * ((2 * share - 1) + weight * (1 - (2 * share - 1)))
    torch.testing.assert_close(Guided(oracle, weight).score(x, t, c), wanted)


def test_samples_have_the_moments_of_the_mixture():
    oracle = mixture(width=1)
    x, labels = oracle.sample(40_000, torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = oracle.log_weights.exp()
    mean = (weights * oracle.means[:, 0]).sum()
    variance = (weights * (oracle.stds**2 + oracle.means[:, 0] ** 2)).sum() - mean**2
    assert x.mean().item() == pytest.approx(mean.item(), abs=4 * (variance.item() / 40_000) ** 0.5)
    assert x.var().item() == pytest.approx(variance.item(), rel=0.05)
    assert (labels == 1).double().mean().item() == pytest.approx(0.5, abs=0.01)
    asked = torch.arange(40_000) % 2
    _, labels = oracle.sample(40_000, torch.Generator().manual_seed(1), asked)
    assert torch.equal(labels, asked)


def test_constructors():
    eight = gauss8(num_classes=2)
    assert (eight.num_classes, eight.labels.tolist()) == (2, [0, 1] * 4)
    torch.testing.assert_close(eight.means.norm(dim=1), torch.full((8,), 2.0, dtype=torch.float64))
    board, _ = checkerboard().sample(4000, torch.Generator().manual_seed(2))
    dark = (board.floor().sum(1) % 2 == 0) & (board.abs() < 2).all(1)
    assert dark.float().mean() > 0.75  # the narrow modes of the fields' rims reach over the edge
    assert [*eight.parameters()] == []


def test_images_and_float32():
    oracle = GaussianMixture(torch.zeros(2, 1, 4, 4), torch.ones(2), torch.ones(2))
    found = oracle(torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.full((3,), 0.5))
    assert (found.shape, found.dtype) == ((3, 1, 4, 4), torch.float32)


@pytest.mark.parametrize(
    ("stds", "weights", "labels"),
    [([1.0], [1.0, 1.0], None), ([1.0, 0.0], [1.0, 1.0], None), ([1.0, 1.0], [1.0, -1.0], None),
     ([1.0, 1.0], [1.0, 1.0], [0, 2])],
)  # fmt: skip
def test_mixtures_that_cannot_be_meant(stds, weights, labels):
    with pytest.raises(InputError):
        GaussianMixture(
            torch.zeros(2, 2),
            torch.tensor(stds),
            torch.tensor(weights),
            None if labels is None else torch.tensor(labels),
        )
