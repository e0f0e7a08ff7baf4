"""What score methods share: identities of scores and directions, the student's chain, discriminators."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from score_made import (
    RF,
    Affine,
    gauss8_rows,
    normal,
    only_phase,
    settings,
    tiny_teacher,
    train,
)
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.policies.diffusion.adversarial import (
    Discriminator,
    Fool,
    TellApart,
    discriminator_loss,
    generator_loss,
    pooled,
)
from workbench.policies.diffusion.dit import DiT
from workbench.policies.diffusion.generation import Generated, simulate, step_times, time_at
from workbench.policies.diffusion.methods.dmd2 import Dmd2
from workbench.policies.diffusion.oracle import gauss8
from workbench.policies.diffusion.predict import Predictor
from workbench.policies.diffusion.samplers import karras_times, sde
from workbench.policies.diffusion.schedules import Edm, Trigonometric, VariancePreserving, expand
from workbench.policies.diffusion.score_terms import (
    Denoising,
    normalised_direction,
    per_sample,
    scale_of,
)
from workbench.policies.diffusion.testbeds import student_of
from workbench.policies.loop.engine import LoopTrainer
from workbench.policies.nouns import Phase, Role

# -- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [RF, VariancePreserving(), Edm(), Trigonometric()], ids=repr)
def test_scores_differ_as_predictions_of_x0_do(schedule) -> None:
    g = torch.Generator().manual_seed(0)
    target, mine = gauss8(schedule=schedule), gauss8(std=0.4, radius=1.2, schedule=schedule)
    x = torch.randn(64, 2, generator=g, dtype=torch.float64)
    t = time_at(0.02 + 0.96 * torch.rand(64, generator=g, dtype=torch.float64), schedule)
    factor = expand(schedule.alpha(t) / schedule.sigma(t).square(), x)
    gap = factor * (mine.x0(x, t) - target.x0(x, t))
    torch.testing.assert_close(mine.score(x, t) - target.score(x, t), gap, rtol=1e-9, atol=1e-9)


def test_the_mean_score_difference_is_the_slope_of_the_kl() -> None:
    m, s, mu, c = 0.3, 0.7, -0.4, 0.5
    t = torch.tensor([0.35], dtype=torch.float64)
    alpha, sigma = 1 - t.item(), t.item()
    spread, target = math.hypot(alpha * s, sigma), math.hypot(alpha * c, sigma)
    z = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    weights = (-z.square() / 2).exp()
    x_t = (alpha * m + spread * z)[:, None]
    times = t.expand(len(x_t))
    gap = (normal(m, s).score(x_t, times) - normal(mu, c).score(x_t, times))[:, 0]
    slope = alpha * (weights * gap).sum() / weights.sum()

    def kl(mean: float) -> float:
        return (
            math.log(target / spread) + (spread**2 + alpha**2 * (mean - mu) ** 2) / (2 * target**2) - 0.5
        )  # fmt: skip

    assert slope.item() == pytest.approx((kl(m + 1e-5) - kl(m - 1e-5)) / 2e-5, rel=1e-7)


def test_the_normalised_direction_forgets_the_scale_of_the_data() -> None:
    g = torch.Generator().manual_seed(0)
    x, teacher, critic = (torch.randn(6, 1, 4, 4, generator=g) for _ in range(3))
    direction = normalised_direction(x, teacher, critic)
    torch.testing.assert_close(normalised_direction(7 * x, 7 * teacher, 7 * critic), direction)
    torch.testing.assert_close(direction * scale_of(x, teacher)[:, None, None, None], critic - teacher)
    assert torch.isfinite(normalised_direction(x, x, critic)).all()


@pytest.mark.parametrize("steps", [1, 4])
def test_times_of_edm_are_karras_levels_and_linear_elsewhere(steps: int) -> None:
    fractions = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    torch.testing.assert_close(time_at(fractions, Edm()), karras_times(Edm(), steps + 1)[:-1])
    torch.testing.assert_close(time_at(fractions, VariancePreserving(t_min=0.2)), 0.2 + 0.8 * fractions)


@pytest.mark.parametrize("kind", ["softplus", "hinge"])
def test_the_best_logit_is_the_log_ratio_and_the_student_climbs_it(kind) -> None:
    real, fake = torch.tensor([[0.3]]), torch.tensor([[0.1]])  # densities at one point

    def mean_loss(logit: float) -> float:
        value = torch.tensor([[logit]])
        none = torch.full_like(value, -50.0 if kind == "softplus" else -1.0)  # adds nothing on the fake side
        on_fake = discriminator_loss(value, -none, kind)
        on_real = discriminator_loss(none, value, kind)
        return float((fake * on_fake + real * on_real).sum())

    grid = torch.linspace(-3, 3, 1201).tolist()
    best = min(grid, key=mean_loss)
    assert best == pytest.approx(math.log(3) if kind == "softplus" else 1.0, abs=0.006)
    logits = torch.tensor([[-2.0, 0.5], [1.0, 3.0]], requires_grad=True)
    generator_loss(logits, kind).sum().backward()
    assert logits.grad is not None
    assert (logits.grad < 0).all()  # a step down raises every logit


# -- samples ----------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Halves x; notes at which times it is asked, and if there is a graph."""

    prediction, schedule, num_classes, shape = "x0", RF, 0, (1,)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.calls: list[tuple[float, bool]] = []

    def forward(self, x: Tensor, t: Tensor, c=None, r=None) -> Tensor:
        self.calls.append((round(t[0].item(), 6), torch.is_grad_enabled()))
        return self.scale * x


@pytest.mark.parametrize("last", range(4))
def test_only_the_exit_of_a_backward_simulation_carries_a_graph(last: int) -> None:
    net = Counting()
    z = torch.randn(5, 1)
    times = step_times(RF, 4, 1.0, 5)
    simulate(Predictor(net), z, times, [torch.ones(5, 1)] * last).sum().backward()
    assert net.calls == [(1 - k / 4, k == last) for k in range(last + 1)]
    x_t = z
    for k in range(last):
        after = 1 - (k + 1) / 4
        x_t = (1 - after) * 0.5 * x_t + after
    torch.testing.assert_close(net.scale.grad, x_t.sum())  # the last call's input is a constant


def test_the_whole_chain_is_the_stochastic_sampler() -> None:
    oracle, g = gauss8(), torch.Generator().manual_seed(0)
    z, *noises = (torch.randn(20, 2, generator=g) for _ in range(4))
    times = step_times(RF, 4, 1.0, 20)
    grid = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    torch.testing.assert_close(simulate(oracle, z, times, noises), sde(oracle, z, grid, noises))


def test_every_exit_has_its_turn_and_is_the_same_for_the_critic_and_all_micro_batches() -> None:
    class CriticsTurn(Denoising):
        def __call__(self, view):
            exits.append(len(student.calls))
            value = super().__call__(view)
            calls = student.calls[exits.pop() :]
            exits.append(len(calls))
            assert not any(has_graph for _, has_graph in calls)
            return value

    exits: list[int] = []
    student = Counting()
    phase = replace(
        only_phase(Dmd2(steps=4, gan=0.0, every=1)),
        roles=[Role(name="teacher"), Role(name="critic", origin="new")],
        role_terms={"critic": [CriticsTurn()]},
        modules=lambda models: {"critic": Affine([0.1], [0.2])},
    )
    train(student, phase, settings(steps=40, batch_size=4, accumulation=2), teacher=normal(0.0, 1.0))
    assert set(exits) == {1, 2, 3, 4}
    assert exits[::2] == exits[1::2]  # two micro-batches of a step
    graphs = [time for time, has_graph in student.calls if has_graph]
    assert len(graphs) == 80
    assert set(graphs) == {1.0, 0.75, 0.5, 0.25}


def test_accumulation_changes_nothing() -> None:
    def weights(batch: int, accumulation: int) -> Tensor:
        base = tiny_teacher()
        student = student_of(base)
        how = settings(steps=6, batch_size=batch, accumulation=accumulation, optimizer="sgd", learning_rate=0.02)
        table = {"data": {"x0": gauss8_rows(64)}}
        train(student, only_phase(Dmd2(steps=3, every=2, taps=("blocks.0", "blocks.1"))), how, table, teacher=base)
        return torch.cat([p.detach().flatten() for p in student.parameters()])

    torch.testing.assert_close(weights(16, 1), weights(4, 4), rtol=1e-4, atol=1e-6)


# -- discriminators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["critic", "teacher"])
def test_heads_read_the_network_they_name_and_the_student_learns_through_it(role) -> None:
    base = tiny_teacher(num_classes=2)
    table = {"data": {"x0": gauss8_rows(64), "c": torch.arange(64) % 2}}
    phase = only_phase(Dmd2(features=role, taps=("blocks.0", "blocks.1"), every=1))
    _, fool = phase.terms
    trainer = LoopTrainer(
        student_of(base), replace(phase, terms=[fool]), table, settings(steps=2, batch_size=32), {"teacher": base}
    )
    trainer.train()  # moved by the GAN alone
    assert len(trainer.modules["critic.head"]) == 2  # pyright: ignore


def test_heads_may_be_a_role_of_their_own_with_the_hinge() -> None:
    base = tiny_teacher()
    head = Discriminator(role="teacher", head="judge", taps=("blocks.1",))
    phase = Phase(
        name="p", sources={"main": Generated(), "real": only_phase(Dmd2()).sources["real"]},
        terms=[Fool(discriminator=head, loss="hinge")],
        roles=[Role(name="teacher"), Role(name="judge", origin="new", learning_rate=3.0)],
        role_terms={"judge": [TellApart(discriminator=head, loss="hinge")]}, modules=head.modules,
    )  # fmt: skip
    table = {"data": {"x0": gauss8_rows(64)}}
    found = train(student_of(base), phase, settings(steps=30, batch_size=64), table, teacher=base)
    assert found[-1]["loss/judge"] < found[0]["loss/judge"]
    with pytest.raises(InputError, match="one module"):
        Discriminator(taps=())


def test_real_and_fake_are_noised_alike() -> None:
    class Seen(Discriminator):
        def logits(self, view, x_t, t, c):
            seen.append((x_t, t))
            return super().logits(view, x_t, t, c)

    seen: list[tuple[Tensor, Tensor]] = []
    base = tiny_teacher()
    head = Seen(role="critic")
    phase = only_phase(Dmd2())
    phase = replace(phase, role_terms={"critic": [TellApart(discriminator=head)]})
    x0 = gauss8_rows(1).expand(64, 2).contiguous()
    train(student_of(base), phase, settings(steps=1, batch_size=8), {"data": {"x0": x0}}, teacher=base)
    (fake_t, t), (real_t, again) = seen
    assert torch.equal(t, again)
    eps = (real_t - (1 - t)[:, None] * x0[:8]) / t[:, None]
    samples_of_student = (fake_t - t[:, None] * eps) / (1 - t)[:, None]
    assert samples_of_student.std() > 0
    assert per_sample(eps.square()).mean() == pytest.approx(1.0, abs=0.8)  # the noise of the fake is the real one's


def test_features_of_tokens_and_maps_are_pooled_over_positions() -> None:
    maps = torch.randn(3, 5, 2, 4)
    torch.testing.assert_close(pooled(maps), maps.mean((2, 3)))
    torch.testing.assert_close(pooled(maps.flatten(2).transpose(1, 2)), maps.mean((2, 3)))
    assert pooled(maps[:, :, 0, 0]).shape == (3, 5)
    heads = Discriminator(taps=("blocks.2",)).modules({"critic": DiT(width=16, heads=2)})["critic.head"]
    assert heads["blocks/2"][0].in_features == 16  # pyright: ignore


def test_coefficients_that_switch_off_one_side_only_are_refused() -> None:
    with pytest.raises(InputError, match="both sides"):
        Dmd2(critic_gan=0.0)
