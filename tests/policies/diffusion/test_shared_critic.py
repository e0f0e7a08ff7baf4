"""A student that is its own critic: one network, asked with another second time."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
from score_made import gauss8_rows, samples, settings, sliced, train  # noqa: E402

from workbench.policies.diffusion.generation import Generated, UniformTime  # noqa: E402
from workbench.policies.diffusion.networks import MLP  # noqa: E402
from workbench.policies.diffusion.score_terms import Denoising, DistributionMatching, critic_flag  # noqa: E402
from workbench.policies.diffusion.testbeds import student_of, toy_teacher  # noqa: E402
from workbench.policies.nouns import Phase, Role  # noqa: E402

torch.set_num_threads(1)
LAW = UniformTime(low=0.02, high=0.98)


def phase(learns: float = 1.0) -> Phase:
    terms: list[Any] = [
        DistributionMatching(times=LAW, critic="student"), Denoising(role="student", times=LAW, coefficient=learns)
    ]  # fmt: skip
    return Phase(name="distil", sources={"main": Generated()}, terms=terms, roles=[Role(name="teacher")])


@cache
def teacher() -> MLP:
    return toy_teacher("gauss8", fast=True, second_time=True)


def test_only_the_student_is_marked() -> None:
    view: Any = SimpleNamespace(role=lambda name: teacher())
    t = torch.rand(5)
    assert critic_flag(view, "critic", t) is None
    assert torch.equal(critic_flag(view, "student", t), torch.ones(5))  # pyright: ignore


@pytest.mark.parametrize("seed", range(3))
def test_one_step_of_it_is_far_better_than_one_of_the_teacher(seed: int) -> None:
    """Control: one that never learns what its samples look like."""
    real, how = gauss8_rows(4000), settings(steps=400, learning_rate=2e-3, seed=seed, log_every=400)

    def reached(learns: float) -> float:
        student = student_of(teacher())
        train(student, phase(learns), how, teacher=teacher())
        return sliced(samples(student, 4000), real)

    assert sliced(samples(teacher(), 4000), real) > 1.2
    learnt = reached(1.0)
    assert learnt < 0.75
    assert learnt < 0.7 * reached(0.0)
