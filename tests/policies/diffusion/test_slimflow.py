"""SlimFlow: annealed couplings, the flow-guided gradient in closed form, and what both gain where pairs are scarce."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from trajectory_made import Rolled, one_gaussian, one_step_distance, trained, trainer_of, transported, view_of

from workbench.errors import InputError
from workbench.policies.diffusion.methods.slimflow import SlimFlow
from workbench.policies.diffusion.oracle import gauss8, two_gaussians
from workbench.policies.diffusion.pairs import AnnealedPairs, make_pairs
from workbench.policies.diffusion.regression import FlowGuidedRegression, VelocityRegression, two_legs
from workbench.policies.diffusion.schedules import RectifiedFlow, Trigonometric
from workbench.policies.diffusion.score_terms import squared_error
from workbench.policies.diffusion.testbeds import student_of, toy_net
from workbench.policies.nouns import Phase, Stored

SEEDS = (0, 1, 2)


def pool(count, seed=0):
    return {"pairs": make_pairs(gauss8(), count, (2,), steps=30, seed=seed)}


def net(seed=0, hidden=16, depth=1):
    return toy_net("gauss8", hidden, depth, seed)


def reflow(**source):
    return Phase(name="reflow", sources={"main": AnnealedPairs(**source)}, terms=[VelocityRegression()])


def drawn(phase, table, steps, size=64):
    """The rows of each step, and the losses of an untrained student."""
    trainer = trainer_of(net(), phase, table, batch_size=size, steps=steps)
    views = [replace_steps(view_of(trainer, step=step), steps) for step in range(steps)]
    return [view["main"] for view in views], [phase.terms[0](view).detach() for view in views]


def replace_steps(view, steps):
    view.place = replace(view.place, steps=steps)
    return view


class Constant(nn.Module):
    """A straight flow: the same velocity everywhere."""

    prediction, num_classes, shape, schedule = "flow", 0, (2,), RectifiedFlow()

    def __init__(self, *velocity) -> None:
        super().__init__()
        self.velocity = nn.Parameter(torch.tensor(velocity))

    def forward(self, x, t, c=None, r=None):
        return self.velocity.expand(len(x), 2)


# -- pools -------------------------------------------------------------------------------------------------------------


def test_pairs_are_the_ends_of_the_teachers_trajectories() -> None:
    """Exact for one Gaussian: as many standard deviations from the mean at both ends."""
    oracle = one_gaussian()
    made = make_pairs(oracle, 100, (2,), steps=100)
    one = torch.ones(100)
    torch.testing.assert_close(made["x0"], transported(oracle, made["z"], one, 0 * one), rtol=0, atol=2e-4)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), Trigonometric()])
def test_a_pool_does_not_depend_on_its_batches(schedule) -> None:
    seen = []
    whole = make_pairs(two_gaussians(schedule=schedule), 50, (2,), steps=5, seed=3)
    parts = make_pairs(
        two_gaussians(schedule=schedule), 50, (2,), steps=5, seed=3, batch_size=20,
        on_progress=lambda done, count: seen.append((done, count)),
    )  # fmt: skip
    assert seen == [(20, 50), (40, 50), (50, 50)]
    assert whole["c"].unique().tolist() == [0, 1]
    for key in ("z", "c", "x0"):
        torch.testing.assert_close(whole[key], parts[key])
    with pytest.raises(InputError, match="count 0"):
        make_pairs(gauss8(), 0, (2,))


# -- annealing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "beta"), [(0, 1.0), (7, 0.3), (10, 0.0), (12, 0.0)])
def test_annealed_noise_stays_standard_normal_with_its_stated_correlation(step, beta) -> None:
    table = {"pairs": {"z": torch.randn(20000, 2, generator=torch.Generator().manual_seed(1))}}
    table["pairs"]["x0"] = table["pairs"]["z"]
    source = AnnealedPairs(warmup=0.5)
    assert source.beta(step, 20) == pytest.approx(beta)
    trainer = trainer_of(net(), reflow(warmup=0.5), table, batch_size=20000, steps=20)
    rows = replace_steps(view_of(trainer, step=step), 20)["main"]
    z, original = rows["z"], rows["x0"]
    assert z.mean().abs() < 0.02
    assert z.var().item() == pytest.approx(1, abs=0.03)
    correlation = torch.corrcoef(torch.stack([z.flatten(), original.flatten()]))[0, 1]
    assert correlation.item() == pytest.approx((1 - beta**2) ** 0.5, abs=0.02)
    assert torch.equal(z, original) == (beta == 0)


def test_without_annealing_it_is_reflow_to_the_bit() -> None:
    table = pool(100)
    plain = Phase(name="reflow", sources={"main": Stored("pairs")}, terms=[VelocityRegression()])
    for a, b in zip(drawn(reflow(warmup=0.0), table, 4)[1], drawn(plain, table, 4)[1], strict=True):
        assert torch.equal(a, b)


def test_at_first_it_is_flow_matching_on_shuffled_pairs() -> None:
    """beta = 1: the expected loss is that of the same samples with any independent noise; with the pairs it is not."""
    table = pool(20000)
    order = torch.randperm(20000, generator=torch.Generator().manual_seed(2))
    shuffled = {"pairs": {**table["pairs"], "z": table["pairs"]["z"][order]}}
    annealed, independent, paired = (
        drawn(reflow(warmup=warmup), rows, 1, size=20000)[1][0]
        for warmup, rows in ((1.0, table), (0.0, shuffled), (0.0, table))
    )
    assert abs(annealed - independent) < 0.03 * independent
    assert paired < 0.9 * independent


def test_flips_take_both_members() -> None:
    z = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    rows, _ = drawn(reflow(warmup=0.0, flip=True), {"pairs": {"z": z, "x0": 2 * z}}, 12)
    flipped = []
    for row in rows:
        assert torch.equal(row["x0"], 2 * row["z"])
        flipped.append(torch.equal(row["z"], z[row["index"]].flip(-1)))
        assert flipped[-1] != torch.equal(row["z"], z[row["index"]])
    assert 2 <= sum(flipped) <= 10


# -- flow guidance -----------------------------------------------------------------------------------------------------


def test_the_flow_guided_gradient_is_2t_times_the_difference_of_velocities() -> None:
    g = torch.Generator().manual_seed(0)
    z, velocity = torch.randn(2, 8, 2, generator=g, dtype=torch.float64)
    t, guide = 0.2 + 0.6 * torch.rand(8, generator=g, dtype=torch.float64), gauss8()
    velocity.requires_grad_()
    target = two_legs(guide, z, velocity.detach(), t, None)
    (found,) = torch.autograd.grad(squared_error(z - velocity, target).sum(), velocity)
    x_t = z - (1 - t)[:, None] * velocity.detach()
    wanted = 2 * t[:, None] * (velocity - guide.flow(x_t, t)) / 2  # over the two elements
    torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=1e-12)


def test_the_term_has_that_gradient_and_goes_down_it() -> None:
    table, teacher = pool(64), gauss8()
    student = Constant(0.3, -0.2)
    phase = Phase(
        name="p", sources={"main": Stored("pairs")}, terms=[FlowGuidedRegression()], roles=SlimFlow().phases()[1].roles
    )
    phase = replace(phase, roles=[replace(phase.roles[0], origin="given")])
    plain = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.5, "max_grad_norm": 0.0, "schedule": "constant"}
    trainer = trainer_of(student, phase, table, {"teacher": teacher}, steps=1, batch_size=64, **plain)
    view = view_of(trainer)
    view["main"]
    z, t, velocity = view.randn(2), 0.2 + 0.6 * view.rand(), student.velocity.detach().clone()
    gap = velocity - teacher.flow(z - (1 - t)[:, None] * velocity, t)
    trainer.train()
    torch.testing.assert_close(student.velocity.detach(), velocity - 0.5 * (2 * t[:, None] * gap / 2).mean(0))


def test_two_legs_of_a_straight_teacher_end_where_one_does() -> None:
    z, teacher = torch.randn(8, 2), Constant(0.5, 1.0)
    phase = Phase(
        name="p", sources={"main": Stored("pairs")}, terms=[FlowGuidedRegression(first_leg="guide")],
        roles=SlimFlow(guide="teacher").phases()[1].roles,
    )  # fmt: skip
    table = {"pairs": {"z": z, "x0": z}}
    losses = []
    for student in (Constant(0.5, 1.0), Constant(1.5, 1.0)):
        trainer = trainer_of(student, phase, table, {"teacher": teacher}, batch_size=8)
        losses.append(float(phase.terms[0](view_of(trainer)).detach()))
    assert losses == pytest.approx([0, 0.5], abs=1e-12)  # |(1, 0)|^2 over two elements


def test_the_guide_is_the_small_flow_as_phase_1_left_it() -> None:
    student, table = net(), pool(64)
    first, second = SlimFlow().phases()
    trained(student, first, table, steps=5)
    held = student_of(student)
    trainer = trainer_of(student, second, table, steps=5)
    trainer.train()
    for old, new, guide in zip(*(m.parameters() for m in (held, student, trainer.roles["teacher"])), strict=True):
        assert torch.equal(old, guide)
        assert guide.grad is None
        assert not torch.equal(old, new)


def test_without_guidance_phase_2_is_regression_on_the_pairs() -> None:
    table, student = pool(64), net()
    _, phase = SlimFlow(guidance=0.0).phases()
    trainer = trainer_of(student, phase, table, batch_size=64)
    assert [type(term).__name__ for term in phase.terms] == ["EndpointRegression"]
    z, x0 = (table["pairs"][key] for key in ("z", "x0"))
    wanted = (z - student(z, torch.ones(64)) - x0).square().mean()
    torch.testing.assert_close(phase.terms[0](view_of(trainer)), wanted)  # one batch is the whole table
    with pytest.raises(InputError, match="guidance"):
        SlimFlow(guidance=-1)


# -- effect ------------------------------------------------------------------------------------------------------------

FAST = {"steps": 300, "batch_size": 64, "learning_rate": 4e-3}


def off_by(student, table):
    """Mean squared error of one step from the teacher's end, on pairs that were not trained on."""
    z, x0 = table["pairs"]["z"], table["pairs"]["x0"]
    with torch.no_grad():
        return (z - student(z, torch.ones(len(z))) - x0).square().mean().item()


@pytest.mark.parametrize("seed", SEEDS)
def test_where_pairs_are_scarce_annealing_and_guidance_both_help(seed) -> None:
    """16 pairs; each against the same run with it switched off. With 64 pairs or more annealing does not help here."""
    few, fresh = pool(16), pool(2000, seed=7)
    annealed, naive = (
        trained(net(seed, 64, 3), SlimFlow(warmup=warmup).phases()[0], few, seed=seed, **FAST) for warmup in (0.5, 0.0)
    )
    assert off_by(annealed, fresh) < 0.8 * off_by(naive, fresh)
    plain, guided = (
        trained(
            student_of(naive),
            SlimFlow(guidance=weight, guide="teacher").phases()[1],
            few,
            {"teacher": gauss8()},
            seed=seed,
            **{**FAST, "learning_rate": 2e-3},
        )
        for weight in (0.0, 1.0)
    )
    assert off_by(guided, fresh) < 0.6 * off_by(plain, fresh)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_small_student_learns_to_sample_in_one_step_but_not_from_pairs_that_do_not_belong_together(seed) -> None:
    oracle, table = gauss8(), pool(4096)
    wrong = {"pairs": {"z": table["pairs"]["z"], "x0": table["pairs"]["x0"].roll(1, 0)}}
    student, control = net(seed, 32, 2), net(seed, 32, 2)
    for phase in SlimFlow(guide="own").phases():
        settings = {"steps": 250, "batch_size": 128, "learning_rate": 4e-3, "seed": seed}
        trained(student, phase, table, **settings)
        trained(control, phase, wrong, **settings)
    assert one_step_distance(student, oracle) < 0.2
    assert one_step_distance(control, oracle) > 0.8
    assert one_step_distance(Rolled(student), oracle) > 0.3  # the measure sees a broken student
