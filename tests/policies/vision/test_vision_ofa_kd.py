"""OFA-KD (card 77): targets and branches, any pair of architectures, and what a teacher of another one is worth."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

import torch.nn.functional as F  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import settings as chosen  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from vision_made import Rolled, made, step_of, trained  # noqa: E402

from workbench.errors import InputError  # noqa: E402
from workbench.policies.nouns import Phase, Stored  # noqa: E402
from workbench.policies.taps import Taps  # noqa: E402
from workbench.policies.vision.losses import enhanced_target, soft_cross_entropy  # noqa: E402
from workbench.policies.vision.methods.ofa_kd import OfaKd, branch_name  # noqa: E402
from workbench.policies.vision.networks import MLP, ResNet, ViT  # noqa: E402
from workbench.policies.vision.terms import Labels  # noqa: E402
from workbench.policies.vision.testbeds import digits, fit, measure  # noqa: E402


def small(num: int = 12) -> dict[str, Any]:
    return {key: value[:num] for key, value in digits(0).pool.items()}


@given(st.floats(1, 3), st.floats(0.01, 1), st.integers(0, 10**6))
@chosen(max_examples=25, deadline=None)
def test_a_larger_gamma_gives_to_the_label_and_takes_from_the_others(gamma: float, more: float, seed: int) -> None:
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    label = torch.tensor([0, 3, 5])
    low, high = (enhanced_target(logits, label, value) for value in (gamma, gamma + more))
    own = F.one_hot(label, 6).bool()
    assert (high[own] > low[own]).all()
    assert (high[~own] < low[~own]).all()
    p = logits.softmax(-1)
    assert (low[own] >= gamma * p[own] - 1e-12).all()
    torch.testing.assert_close(enhanced_target(logits, label, 1.0), p)


def test_the_gradient_is_the_sum_of_weights_times_q_less_the_weights() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    w = enhanced_target(torch.randn(4, 6, dtype=torch.float64), torch.tensor([1, 2, 3, 0]), 1.5)
    soft_cross_entropy(logits, w).sum().backward()
    torch.testing.assert_close(logits.grad, (w.sum(-1, keepdim=True) * logits.softmax(-1) - w).detach())


def test_a_step_has_the_loss_of_the_equation() -> None:
    table, teacher, student = small(), made(MLP, 2), made(ResNet, 1)
    branches: dict[str, Any] = {}
    method = OfaKd(gamma=1.5, stages=(1, 3))

    def modules(roles: Any) -> Any:
        made_here = method.modules(roles)
        branches.update(made_here)
        features = {}
        with torch.no_grad(), Taps(student, student.stages) as taps:
            logits = student(table["image"])
            features = taps.outputs()
            w = enhanced_target(teacher(table["image"]), table["label"], 1.5)
            found = F.cross_entropy(logits, table["label"]) + soft_cross_entropy(logits, w).mean()
            for path in ("body.0", "body.2"):
                found = found + soft_cross_entropy(made_here[branch_name(path)](features[path]), w).mean()
        expected.append(found.item())
        return made_here

    expected: list[float] = []
    _, seen = step_of(replace(method.phases()[0], modules=modules), table, {"teacher": teacher}, student)
    assert set(branches) == {"branch-body/0", "branch-body/2"}
    assert seen["loss"] == pytest.approx(expected[0], rel=1e-5)


def test_gamma_one_without_branches_is_labels_and_plain_soft_labels() -> None:
    table, teacher = small(), made(MLP, 2)
    with torch.no_grad():
        z_s, z_t = made(ResNet, 1)(table["image"]), teacher(table["image"])
    _, seen = step_of(OfaKd(stages=()).phases()[0], table, {"teacher": teacher}, made(ResNet, 1))
    plain = F.cross_entropy(z_s, table["label"]) + F.cross_entropy(z_s, z_t.softmax(-1))
    assert seen["loss"] == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.parametrize(("student", "teacher"), [(ResNet, ViT), (ViT, MLP), (MLP, ResNet)])
def test_any_pair_trains_student_and_branches_and_leaves_teacher_and_student_plain(student: Any, teacher: Any) -> None:
    frozen, net = made(teacher, 2), made(student, 1)
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    names = list(net.state_dict())
    start = {name: value.clone() for name, value in net.state_dict().items()}
    trainer, _ = step_of(OfaKd().phases()[0], small(), {"teacher": frozen}, net)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert list(net.state_dict()) == names
    assert not any(module._forward_hooks for module in net.modules())
    assert sum(not torch.equal(value, start[name]) for name, value in net.state_dict().items()) > 0.8 * len(names)
    assert set(trainer.modules) == {branch_name(path) for path in net.stages}
    fresh = {name: p.detach().clone() for name, p in _branches(student).items()}
    moved = [not torch.equal(p, fresh[name]) for name, p in trainer.trained["student"].items() if name in fresh]
    assert len(moved) == len(fresh)
    assert sum(moved) > 0.8 * len(moved)


def _branches(student: Any) -> dict[str, Any]:
    """The parameters of the branches as the engine draws them, before a step."""
    from workbench.policies.loop.engine import LoopTrainer
    from workbench.policies.loop.settings import LoopSettings

    trainer = LoopTrainer(
        made(student, 1), OfaKd().phases()[0], {"train": small()}, LoopSettings(cpu=True), {"teacher": made(MLP, 2)}
    )
    return {name: p for name, p in trainer.trained["student"].items() if "/" in name}


def test_settings_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(InputError, match="stages 1 to 3, no stage 4"):
        step_of(OfaKd(stages=(1, 4)).phases()[0], small(), {"teacher": made(MLP, 2)}, made(ResNet, 1))
    with pytest.raises(InputError, match="gamma"):
        OfaKd(gamma=0)


def test_a_cnn_learns_from_an_mlp_teacher_what_wrong_labels_hide() -> None:
    """300 digits, 30 % wrong labels, CNN of 4 channels, MLP teacher that saw clean ones; 3 seeds.

    Against labels alone; with a teacher that speaks of another image the gain is gone. That branches are better than
    soft labels of the same weight on the logits alone is not claimed: here they are not (benchmarks/results/vision.md).
    """
    found: dict[str, list[float]] = {}
    labels = Phase(name="labels", sources={"main": Stored("train")}, terms=[Labels()])
    for seed in range(3):
        split = digits(seed, num_labels=300, noise=0.3)
        teacher = fit(made(MLP, seed, width=128), split.pool, steps=300, seed=seed)
        runs = {
            "labels": (labels, {}),
            "ofa": (OfaKd().phases()[0], {"teacher": teacher}),
            "other images": (OfaKd().phases()[0], {"teacher": Rolled(teacher)}),
        }
        for name, (phase, models) in runs.items():
            student = made(ResNet, seed + 9, width=4)
            trained(student, phase, split.train, models, steps=100, seed=seed)
            found.setdefault(name, []).append(measure(student, split.test).accuracy)
    assert all(with_ > without + 0.05 for with_, without in zip(found["ofa"], found["labels"], strict=True))
    assert mean(found["ofa"]) > mean(found["labels"]) + 0.1
    assert mean(found["other images"]) < mean(found["labels"]) + 0.03
