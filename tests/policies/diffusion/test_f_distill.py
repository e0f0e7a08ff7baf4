"""f-distill: the weight turns reverse KL into other divergences; without it there is DMD2, to the bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from score_made import Affine, ExactCritic, gauss8_rows, only_phase, samples, settings, sliced, train
from torch import Tensor

from workbench.errors import InputError
from workbench.policies.diffusion.adversarial import Discriminator, TellApart
from workbench.policies.diffusion.generation import TABLE, Generated, UniformTime
from workbench.policies.diffusion.methods.dmd2 import Dmd2
from workbench.policies.diffusion.methods.f_distill import (
    Divergence,
    FDistill,
    RatioWeight,
    density_ratio,
    ratio_weight,
    update_bins,
)
from workbench.policies.diffusion.networks import MLP
from workbench.policies.diffusion.oracle import GaussianMixture
from workbench.policies.diffusion.score_terms import DistributionMatching
from workbench.policies.diffusion.testbeds import Fit, fit, student_of, toy_net
from workbench.policies.loop.engine import LoopTrainer
from workbench.policies.nouns import Phase, Role, Stored

#: What one Gaussian cannot be.
TWO_MODES = GaussianMixture(torch.tensor([[-1.5], [2.0]]), torch.tensor([0.6, 0.9]), torch.tensor([0.6, 0.4]))
X = torch.linspace(-14, 16, 30001, dtype=torch.float64)


def normal(mean: float | Tensor, std: float | Tensor) -> Tensor:
    """log density on the grid."""
    return torch.distributions.Normal(mean, std).log_prob(X)


def divergence_of(name: Divergence, r: Tensor) -> Tensor:
    """f(r) whose f'' r^2 is the table's weight times `FACTOR`."""
    return {
        "reverse_kl": lambda: -r.log(),
        "forward_kl": lambda: r * r.log(),
        "js": lambda: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
        "softened_reverse_kl": lambda: (r + 1) * ((r + 1) / (2 * r)).log(),
        "neyman": lambda: 1 / r - 1,
        "hellinger": lambda: (1 - r.sqrt()).square(),
        "jeffreys": lambda: (r - 1) * r.log(),
    }[name]()


FACTOR = {"neyman": 2.0, "hellinger": 0.5}


# -- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["reverse_kl", "forward_kl", "js", "softened_reverse_kl", "neyman", "hellinger", "jeffreys"]
)
def test_the_weighted_score_difference_is_the_slope_of_the_divergence(name: Divergence) -> None:
    """d D_f / d theta = E_q h(r) (score_q - score_p) dx/dtheta, x = mean + std z, by the mean and by the std."""
    log_p, dx = TWO_MODES.log_prob(X[:, None]), X[1] - X[0]
    mean, std = 0.3, 2.2 if name != "neyman" else 1.2  # Neyman's diverges where the student's tails are the heavier
    if name == "neyman":
        log_p = torch.logaddexp(log_p, normal(0.0, 3.0) - 2.0)

    def value(theta: Tensor) -> float:
        log_q = normal(theta[0], theta[1])
        return float((log_q.exp() * divergence_of(name, (log_p - log_q).exp())).sum() * dx)

    theta = torch.tensor([mean, std], dtype=torch.float64)
    log_q = normal(mean, std)
    score_p = torch.gradient(log_p, spacing=(X,))[0]
    score_q = -(X - mean) / std**2
    h = FACTOR.get(name, 1.0) * ratio_weight((log_p - log_q).exp(), name)
    for which, direction in enumerate((torch.ones_like(X), (X - mean) / std)):
        step = torch.zeros(2, dtype=torch.float64)
        step[which] = 1e-4
        slope = (value(theta + step) - value(theta - step)) / 2e-4
        assert float((log_q.exp() * h * (score_q - score_p) * direction).sum() * dx) == pytest.approx(
            slope, rel=1e-4, abs=1e-5
        )


@pytest.mark.parametrize(
    ("name", "mean", "std"), [("forward_kl", -0.100, 1.865), ("js", 0.013, 1.852), ("reverse_kl", 0.385, 1.687)]
)
def test_fixed_points_of_a_gaussian_student_on_two_modes(name: Divergence, mean: float, std: float) -> None:
    """Forward KL covers (the exact moments), reverse KL takes to one mode, JS stands between."""
    log_p = TWO_MODES.log_prob(X[:, None])
    score_p = torch.gradient(log_p, spacing=(X,))[0]

    def slopes(mean: float, std: float) -> Tensor:
        log_q = normal(mean, std)
        weight = log_q.exp() * ratio_weight((log_p - log_q).exp(), name) * (-(X - mean) / std**2 - score_p)
        return torch.stack([weight.sum(), (weight * (X - mean) / std).sum()]) * (X[1] - X[0])

    here, nearby = slopes(mean, std), slopes(mean + 0.1, std + 0.1)
    assert here.abs().max() < 0.02 * nearby.abs().max()


@pytest.mark.parametrize("t", [0.05, 0.4, 0.9])
def test_the_mean_ratio_of_an_exact_discriminator_is_one_at_every_time(t: float) -> None:
    mine = GaussianMixture(torch.tensor([[0.2]]), torch.tensor([1.8]), torch.ones(1))
    times = torch.tensor([t], dtype=torch.float64).expand(len(X))
    log_p, log_q = (oracle.log_prob(X[:, None], times) for oracle in (TWO_MODES, mine))
    r = density_ratio((log_p - log_q)[:, None])
    assert float((log_q.exp() * r).sum() * (X[1] - X[0])) == pytest.approx(1.0, abs=0.03)  # clipped


@pytest.mark.parametrize(
    "name", ["reverse_kl", "forward_kl", "js", "softened_reverse_kl", "neyman", "hellinger", "jeffreys"]
)
def test_weights_of_any_logits_are_positive_and_finite(name: Divergence) -> None:
    logits = torch.tensor([[float("nan")], [float("inf")], [-float("inf")], [90.0], [0.0]])
    h = ratio_weight(density_ratio(logits), name)
    assert torch.isfinite(h).all()
    assert (h > 0).all()
    assert density_ratio(torch.tensor([[2.0, 0.0]])).item() == pytest.approx(2.718, abs=1e-3)  # mean of the heads first


def test_bins_keep_a_mean_each_and_forget() -> None:
    means = torch.tensor([1.0, 1.0, 5.0])
    update_bins(means, torch.tensor([2.0, 4.0, 8.0]), torch.tensor([0, 0, 1]), 0.5)
    torch.testing.assert_close(means, torch.tensor([2.0, 4.5, 5.0]))
    update_bins(means, torch.tensor([7.0]), torch.tensor([2]), 0.0)
    torch.testing.assert_close(means, torch.tensor([2.0, 4.5, 7.0]))


# -- reductions -------------------------------------------------------------------------------------------------------


def trained(method: Dmd2, steps: int = 16) -> Tensor:
    base = toy_net("gauss8", 16, 2, 1).requires_grad_(False)
    student = student_of(base)
    table = {TABLE: {"x0": gauss8_rows(64)}}
    train(student, only_phase(method), settings(steps=steps, batch_size=32), table, teacher=base)
    return torch.cat([p.detach().flatten() for p in student.parameters()])


@pytest.mark.parametrize("bins", [0, 10])
def test_reverse_kl_is_dmd2_to_the_bit(bins: int) -> None:
    same = trained(FDistill(divergence="reverse_kl", bins=bins, critic_gan=1.0))
    plain = trained(Dmd2(features="teacher", critic_gan=1.0))
    assert torch.equal(same, plain)
    assert not torch.equal(trained(FDistill(divergence="js", bins=bins, critic_gan=1.0)), plain)


def test_weights_have_mean_one_and_bins_are_kept_in_checkpoints(tmp_path) -> None:
    class Spied(RatioWeight):
        def __call__(self, view, x_t, t, c):
            found.append(super().__call__(view, x_t, t, c))
            return found[-1]

    found: list[Tensor] = []
    base = toy_net("gauss8", 16, 2, 1).requires_grad_(False)
    method = FDistill(critic_gan=1.0)
    phase = only_phase(method)
    matching, *others = phase.terms
    assert isinstance(matching, DistributionMatching)
    weight = Spied(discriminator=method.discriminator(), divergence="js", bins=10, decay=0.5)
    phase = replace(phase, terms=[replace(matching, weight=weight), *others])
    table = {TABLE: {"x0": gauss8_rows(64)}}

    def trainer() -> LoopTrainer:
        return LoopTrainer(student_of(base), phase, table, settings(steps=12), {"teacher": base})

    first = trainer()
    first.train()
    first.save(tmp_path)
    assert len(found) == 3
    for h in found:
        assert h.mean().item() == pytest.approx(1.0, abs=1e-5)
        assert h.std() > 0
    second = trainer()
    second.resume(tmp_path)
    means = second.modules["ratios"].means
    assert torch.equal(means, first.modules["ratios"].means)  # pyright: ignore
    assert (means != 1).any()  # pyright: ignore


def test_a_ratio_needs_a_discriminator_and_a_divergence_a_name() -> None:
    with pytest.raises(InputError, match="`gan`"):
        FDistill(gan=0.0)
    with pytest.raises(InputError, match="forward_kl"):
        FDistill(divergence="kl")  # pyright: ignore


# -- effect -----------------------------------------------------------------------------------------------------------


@cache
def features() -> MLP:
    """A network whose features a head can tell the student's samples from data by."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = MLP((1,), 48, 2)
    fit(net, lambda n, g: TWO_MODES.sample(n, g), Fit(steps=300, learning_rate=4e-3))
    return net.requires_grad_(False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shuffled(RatioWeight):
    """Every sample has the weight of another: the same weights, which say nothing."""

    def __call__(self, view, x_t, t, c):
        return RatioWeight.__call__(self, view, x_t, t, c).roll(1)


def moments(divergence: Divergence, seed: int, weighting: type[RatioWeight] = RatioWeight) -> tuple[float, float]:
    """Mean and std at which a Gaussian student ends whose scores are exact and whose ratio is learnt.

    At times in [.1, .3], weight sigma^3 / alpha, ratios clipped, quadrature gives (mean, std): reverse KL
    (.230, 1.696), JS (.024, 1.791), forward KL (-.066, 1.821).
    """
    law = UniformTime(low=0.1, high=0.3)
    head = Discriminator(role="features", head="judge", taps=("blocks.0", "blocks.1"))
    weight = weighting(discriminator=head, divergence=divergence, bins=0, decay=0.0)
    phase = Phase(
        name="p", sources={"main": Generated(), "real": Stored(TABLE)},
        terms=[DistributionMatching(times=law, normalised=False, weight=weight)],
        roles=[
            Role(name="teacher"), Role(name="critic"), Role(name="features"),
            Role(name="judge", origin="new"),
        ],
        role_terms={"judge": [TellApart(discriminator=head, times=law)]}, modules=head.modules,
        learning_rate=5.0,
    )  # fmt: skip
    student = Affine([0.0], [1.5])
    how = settings(
        steps=200, batch_size=256, learning_rate=4e-3, schedule="linear", betas=(0.5, 0.99), seed=seed, log_every=50
    )  # fmt: skip
    data = TWO_MODES.sample(8000, torch.Generator().manual_seed(3))[0]
    train(
        student, phase, how, {TABLE: {"x0": data}}, teacher=TWO_MODES, critic=ExactCritic(student), features=features()
    )
    return student.mean.item(), student.std.item()


@pytest.mark.parametrize("seed", range(3))
def test_forward_kl_leaves_the_mode_that_reverse_kl_takes_and_shuffled_ratios_do_not(seed: int) -> None:
    """On seeds 0-5 forward KL has mean -.29 to -.35, past its exact -.066: 200 steps do not make the ratio exact."""
    reverse, forward = moments("reverse_kl", seed), moments("forward_kl", seed)
    assert reverse == pytest.approx((0.230, 1.696), abs=0.1)
    assert forward[0] < reverse[0] - 0.3
    assert forward[1] > reverse[1] + 0.05
    assert moments("forward_kl", seed, Shuffled) == pytest.approx(reverse, abs=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_the_whole_method_makes_one_step_far_better_than_its_start(seed: int) -> None:
    from score_made import gauss8_teacher

    teacher, real = gauss8_teacher(), gauss8_rows(4000)
    student = student_of(teacher)
    how = settings(steps=120, learning_rate=2e-3, schedule="linear", betas=(0.0, 0.99), seed=seed, log_every=100)
    train(student, only_phase(FDistill(every=2)), how, {TABLE: {"x0": gauss8_rows(4000, 6)}}, teacher=teacher)
    assert sliced(samples(student, 4000), real) < 0.4 * sliced(samples(teacher, 4000), real)
