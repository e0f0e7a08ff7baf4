"""LoRA-guided distillation: initial loss, adapters on and off, merged weights, sizes, and one pass for two."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from score_made import sliced
from torch import nn
from trajectory_made import data_of, trained, trainer_of, view_of

from workbench.errors import TrainingError
from workbench.policies.diffusion.dit import DiT
from workbench.policies.diffusion.methods.lora_guidance import LoraGuidance
from workbench.policies.diffusion.oracle import gauss8
from workbench.policies.diffusion.predict import Guided, Predictor
from workbench.policies.diffusion.samplers import ode, uniform_times
from workbench.policies.diffusion.schedules import RectifiedFlow
from workbench.policies.diffusion.testbeds import Fit, fit, toy_net

SEEDS = (0, 1, 2)
ORACLE = gauss8(num_classes=2, std=0.3)
FAST = {"steps": 200, "batch_size": 128, "learning_rate": 4e-3}


@cache
def fitted() -> nn.Module:
    """A network that has learned the oracle's velocities, all classes and none."""
    net = toy_net("gauss8", 64, 3, 0, num_classes=2)
    return fit(net, lambda n, g: ORACLE.sample(n, g), Fit(steps=400, learning_rate=4e-3), ORACLE).requires_grad_(False)


def teacher():
    return copy.deepcopy(fitted())  # adapters are injected into the module itself


def adapted(seed=0, settings=None, **method):
    """(student, the teacher it sits on)."""
    base, [phase] = teacher(), LoraGuidance(**method).phases()
    return trained(None, phase, data_of(ORACLE), {"teacher": base}, **{**FAST, "seed": seed, **(settings or {})}), base


def noised(count=2000):
    g = torch.Generator().manual_seed(5)
    x0, c = ORACLE.sample(count, g)
    t = torch.rand(count, generator=g)
    return RectifiedFlow().add_noise(x0, torch.randn(count, 2, generator=g), t), t, c


def gap(student, weight):
    """Mean squared error to the guided teacher's velocity at fresh data."""
    x_t, t, c = noised()
    with torch.no_grad():
        return (student(x_t, t, c) - Guided(Predictor(fitted()), weight).flow(x_t, t, c)).square().mean().item()


@pytest.mark.parametrize(("weight", "prediction"), [(3.0, "flow"), (7.5, "eps"), (1.0, "flow"), (0.0, "flow")])
def test_the_first_loss_is_that_of_the_conditional_teacher(weight, prediction) -> None:
    """(w - 1)^2 E |e_c - e_null|^2, in the network's own parameterisation; 0 for w = 1."""
    base = teacher()
    base.prediction = prediction
    [phase] = LoraGuidance(weight=weight, rank=2).phases()
    trainer = trainer_of(None, phase, data_of(ORACLE), {"teacher": base}, batch_size=64)
    found = phase.terms[0](view_of(trainer)).detach()
    view = view_of(trainer)
    rows = view["main"]
    eps, t = view.randn(2), view.rand()
    x_t = RectifiedFlow().add_noise(rows["x0"], eps, t)
    difference = base(x_t, t, rows["c"]) - base(x_t, t, torch.full_like(rows["c"], 2))
    torch.testing.assert_close(found, (weight - 1) ** 2 * difference.square().mean(), rtol=1e-4, atol=0)


def test_without_guidance_there_is_nothing_to_learn_and_the_run_says_so() -> None:
    with pytest.raises(TrainingError, match="no weight of 'student' moved"):
        adapted(weight=1.0, rank=2, settings={"steps": 3})


def test_adapters_off_is_the_teacher_to_the_bit_and_on_is_not() -> None:
    student, base = adapted(weight=3.0, rank=4, settings={"steps": 10})
    x_t, t, c = noised(100)
    untouched = fitted()(x_t, t, c)
    assert torch.equal(base(x_t, t, c), untouched)
    assert not torch.equal(student(x_t, t, c), untouched)
    assert torch.equal(base(x_t, t, c), untouched)  # and off again afterwards


def test_merged_and_unmerged_answer_alike() -> None:
    student, base = adapted(weight=3.0, rank=4, settings={"steps": 20})
    student.double(), base.double()
    merged = teacher().double()
    for path, layer in base.named_modules():
        if hasattr(layer, "lora_A"):
            [up], [down] = (list(getattr(layer, matrix).values()) for matrix in ("lora_B", "lora_A"))
            weight: Any = merged.get_submodule(path).weight
            weight.data += layer.scaling["student"] * up.weight.detach() @ down.weight.detach()
    x_t, t, c = (x.double() if x.is_floating_point() else x for x in noised(100))
    torch.testing.assert_close(merged(x_t, t, c), student(x_t, t, c), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 5])
def test_only_the_adapters_train_on_one_instance_of_the_base(rank) -> None:
    base, [phase] = teacher(), LoraGuidance(rank=rank).phases()
    linear = [layer for layer in base.modules() if isinstance(layer, nn.Linear)]
    wanted = sum(rank * (layer.in_features + layer.out_features) for layer in linear)
    weights = {p.data_ptr() for p in base.parameters()}
    trainer = trainer_of(None, phase, data_of(ORACLE), {"teacher": base}, steps=2)
    assert sum(p.numel() for p in trainer.trained["student"].values()) == wanted
    assert sum(p.numel() for p in trainer.student.parameters()) == wanted  # the base's weights are the teacher's
    assert weights <= {p.data_ptr() for p in base.parameters()}
    trainer.train()
    held = sum(one.numel() for state in trainer.optimizers["student"].state.values() for one in state.values())
    assert held == 2 * wanted + len(trainer.trained["student"])  # two moments, and a count each
    assert all(p.grad is None for p in base.parameters())


def test_it_adapts_a_transformer() -> None:
    torch.manual_seed(0)
    base = DiT(width=16, depth=1, num_classes=2)
    for p in base.parameters():
        nn.init.normal_(p, std=0.05)  # the output layer begins with 0, which would hide everything
    g = torch.Generator().manual_seed(0)
    table = {"data": {"x0": torch.randn(32, 1, 8, 8, generator=g), "c": torch.randint(2, (32,), generator=g)}}
    found: list[float] = []
    [phase] = LoraGuidance(weight=4.0, rank=4).phases()
    trainer = trainer_of(None, phase, table, {"teacher": base}, batch_size=32, steps=20, learning_rate=1e-2)
    trainer.train(on_metrics=lambda name, step, values: found.append(values["loss"]))
    assert found[-1] < found[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_one_pass_replaces_two_and_more_rank_more_exactly(seed) -> None:
    before = gap(fitted(), 3.0)
    high, low = (adapted(seed, weight=3.0, rank=rank)[0] for rank in (8, 1))
    assert gap(high, 3.0) < 0.1 * before
    assert gap(high, 3.0) < 0.7 * gap(low, 3.0)
    z, c = torch.randn(1500, 2, generator=torch.Generator().manual_seed(3)), torch.arange(1500) % 2
    times = uniform_times(RectifiedFlow(), 20)
    plain = Predictor(fitted())
    with torch.no_grad():
        two_passes = ode(Guided(plain, 3.0), z, times, c)
        one_pass, unguided = ode(Predictor(high), z, times, c), ode(plain, z, times, c)
    assert sliced(one_pass, two_passes) < 0.6 * sliced(unguided, two_passes)


@pytest.mark.parametrize("seed", SEEDS)
def test_towards_the_opposite_guidance_it_moves_away(seed) -> None:
    """Negative control: w = -1 lies on the other side of the conditional teacher (w = 1) than w = 3."""
    away, _ = adapted(seed, weight=-1.0, rank=8)
    assert gap(away, 3.0) > 2 * gap(fitted(), 3.0)
