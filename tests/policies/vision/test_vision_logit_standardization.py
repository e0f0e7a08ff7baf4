"""Logit standardisation (card 54): identities of Z, special cases, a student that does not see the teacher's scale."""

from __future__ import annotations

import math
from statistics import mean
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from vision_made import Scaled, made, rank_agreement, step_of, trained  # noqa: E402

from workbench.errors import InputError  # noqa: E402
from workbench.kernels.divergences import standardise  # noqa: E402
from workbench.policies.vision.losses import distillation  # noqa: E402
from workbench.policies.vision.methods.logit_standardization import LogitStandardization  # noqa: E402
from workbench.policies.vision.networks import MLP  # noqa: E402
from workbench.policies.vision.testbeds import digits, fit, measure  # noqa: E402


def drawn(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 10**6), st.floats(0.05, 20), st.floats(-50, 50))
@settings(max_examples=25, deadline=None)
def test_the_loss_is_zero_for_the_same_line_with_a_rise_and_only_then(seed: int, scale: float, shift: float) -> None:
    teacher = drawn(3, 10, seed=seed)
    assert distillation(scale * teacher + shift, teacher, 2.0, True).abs().max() < 1e-7
    assert distillation(-scale * teacher + shift, teacher, 2.0, True).min() > 1e-3
    other = drawn(3, 10, seed=seed + 1)
    assert distillation(other, teacher, 2.0, True).min() > 1e-4
    same = distillation(other, scale * teacher + shift, 2.0, True)
    torch.testing.assert_close(same, distillation(other, teacher, 2.0, True), rtol=1e-4, atol=1e-7)


def test_rows_of_unit_spread_give_plain_distillation() -> None:
    student, teacher = (z / z.std(-1, keepdim=True) for z in (drawn(4, 10), drawn(4, 10, seed=1)))
    torch.testing.assert_close(
        distillation(student, teacher, 3.0, True), distillation(student, teacher, 3.0), atol=1e-6, rtol=1e-5
    )


def test_the_highest_score_is_bounded() -> None:
    peak = torch.zeros(1, 10, dtype=torch.float64)
    peak[0, 3] = 1e6
    assert standardise(peak).max().item() == pytest.approx(9 / math.sqrt(10), abs=1e-6)
    assert standardise(drawn(200, 10)).max() < 9 / math.sqrt(10)
    bound = math.exp(9 / math.sqrt(10) / 2) / (math.exp(9 / math.sqrt(10) / 2) + 9 * math.exp(-1 / math.sqrt(10) / 2))
    assert (standardise(peak) / 2).softmax(-1).max().item() == pytest.approx(bound, abs=1e-6)


def test_the_gradient_neither_shifts_nor_scales() -> None:
    student = (3 * drawn(5, 10)).requires_grad_()
    distillation(student, drawn(5, 10, seed=1), 2.0, True).sum().backward()
    gradient, centred = student.grad, (student - student.mean(-1, keepdim=True)).detach()
    assert gradient.abs().max() > 1e-3
    assert gradient.sum(-1).abs().max() < 1e-6
    assert (gradient * centred).sum(-1).abs().max() < 1e-6


def test_constant_logits_have_a_finite_gradient() -> None:
    student = torch.full((2, 10), 4.0, requires_grad=True)
    loss = distillation(student, torch.randn(2, 10), 2.0, True)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(student.grad).all()


def test_a_step_has_the_losses_of_the_equation() -> None:
    table = {key: value[:16] for key, value in digits(0).pool.items()}
    teacher, student = made(MLP, 2), made(MLP, 1)
    with torch.no_grad():
        z_s, z_t = student(table["image"]), teacher(table["image"])
    _, seen = step_of(LogitStandardization().phases()[0], table, {"teacher": teacher}, student)
    p, q = (torch.distributions.Categorical(
        logits=(z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True) + 1e-7) / 2) for z in (z_t, z_s))  # fmt: skip
    kd = 9 * 4 * torch.distributions.kl_divergence(p, q).mean().item()
    ce = torch.nn.functional.cross_entropy(z_s, table["label"]).item()
    assert seen["loss/student/Distillation"] == pytest.approx(kd, rel=1e-4)
    assert seen["loss"] == pytest.approx(kd + ce, rel=1e-4)


def test_without_labels_none_are_read() -> None:
    table = {"image": digits(0).pool["image"][:16]}
    step_of(LogitStandardization(ce_weight=0.0).phases()[0], table, {"teacher": made(MLP, 2)})
    with pytest.raises(KeyError, match="label"):
        step_of(LogitStandardization().phases()[0], table, {"teacher": made(MLP, 2)})


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="temperature"):
        LogitStandardization(temperature=0)
    with pytest.raises(InputError, match="Weights"):
        LogitStandardization(kd_weight=-1)


def test_the_student_does_not_see_the_teachers_scale_and_keeps_its_order() -> None:
    """A student of 8 units, unlabelled images, 3 seeds; the baseline is plain distillation at the same temperature."""
    accuracy: dict[tuple[bool, float], list[float]] = {}
    order: dict[tuple[bool, float], list[float]] = {}
    for seed in range(3):
        split = digits(seed)
        teacher = fit(made(MLP, seed, width=128), split.pool, steps=200, seed=seed)
        for is_standard in (True, False):
            for factor in (0.2, 5.0):
                student = made(MLP, seed + 10, width=8)
                method = LogitStandardization(ce_weight=0.0, kd_weight=1.0, standardise=is_standard)
                trained(
                    student, method.phases()[0], split.pool, {"teacher": Scaled(teacher, factor)}, steps=200, seed=seed
                )
                key = (is_standard, factor)
                accuracy.setdefault(key, []).append(measure(student, split.test).accuracy)
                with torch.no_grad():
                    z_s, z_t = student(split.test["image"]), teacher(split.test["image"])
                order.setdefault(key, []).append(rank_agreement(z_s, z_t))
    for small, large in zip(accuracy[True, 0.2], accuracy[True, 5.0], strict=True):
        assert abs(small - large) < 0.01
    assert all(small - large > 0.05 for small, large in zip(order[False, 0.2], order[False, 5.0], strict=True))
    assert mean(order[True, 5.0]) > mean(order[False, 5.0]) + 0.1
    assert mean(accuracy[True, 5.0]) > mean(accuracy[False, 5.0]) + 0.02
