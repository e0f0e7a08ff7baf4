"""What is measured when a run has ended: known for an exact teacher, and for a classifier that is always right."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from workbench.loop_inputs import load_data  # noqa: E402
from workbench.loop_measures import accuracies, distances, generator_samples, picture  # noqa: E402
from workbench.loop_recipes import DataChoice, EvaluationChoice  # noqa: E402
from workbench.policies.diffusion.generation import time_at  # noqa: E402
from workbench.policies.diffusion.oracle import gauss8  # noqa: E402
from workbench.policies.diffusion.schedules import Schedule, VariancePreserving, matched_time  # noqa: E402

DATA = load_data(DataChoice(name="gauss8", num=1000, classes=2), "diffusion")


def test_an_exact_teacher_is_near_the_data_at_many_steps_and_far_at_one() -> None:
    chosen = EvaluationChoice(teacher_steps=(1, 50), student_steps=(1,), sampler="ode", num=1000)
    samples = generator_samples({"teacher": gauss8(2), "student": gauss8(2)}, chosen, DATA)
    assert list(samples) == ["teacher@1", "teacher@50", "student@1"]
    assert torch.equal(samples["teacher@1"], samples["student@1"])  # one noise, one class each, for all
    found = distances(samples, DATA.test["x0"])
    assert abs(found["teacher@50/energy_distance"]) < 0.02 < 0.5 < found["teacher@1/energy_distance"]
    assert found["teacher@50/sliced_wasserstein"] < 0.3 < 1 < found["teacher@1/sliced_wasserstein"]
    assert picture(samples).shape == (360, 3 * 360 + 2 * 6)


@pytest.mark.parametrize("teacher", [None, VariancePreserving()])
def test_renoising_asks_x0_at_falling_times_from_the_start_on(teacher: Schedule | None) -> None:
    """Of the schedule that the student learned on, the teacher's, at the same signal-to-noise ratios."""
    asked: list[float] = []

    class Noted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.schedule, self.prediction, self.num_classes = gauss8().schedule, "x0", 2

        def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            asked.append(float(t[0]))
            assert set(c.tolist()) == {0, 1}
            return 0 * x + c[:, None]

    chosen = EvaluationChoice(student_steps=(2,), start=0.5, num=16)
    nets: dict[str, nn.Module] = {"teacher": gauss8(2, schedule=teacher)} if teacher else {}
    samples = generator_samples({**nets, "student": Noted()}, chosen, DATA)
    own = Noted().schedule
    times = [time_at(torch.tensor(fraction), teacher or own) for fraction in (0.5, 0.25)]
    assert asked == pytest.approx([float(matched_time(t, teacher or own, own)) for t in times])
    assert set(samples["student@2"].flatten().tolist()) == {0.0, 1.0}


def test_guidance_is_the_teachers_only() -> None:
    plain, guided = (
        generator_samples(
            {"teacher": gauss8(2), "student": gauss8(2)},
            EvaluationChoice(guidance=weight, teacher_steps=(4,), student_steps=(4,), num=64), DATA,
        )
        for weight in (1.0, 3.0)
    )  # fmt: skip
    assert not torch.allclose(plain["teacher@4"], guided["teacher@4"])
    assert torch.equal(plain["student@4"], guided["student@4"])


def test_a_classifier_is_measured_on_images_that_were_not_trained_on() -> None:
    pytest.importorskip("sklearn")
    data = load_data(DataChoice(name="digits", labels=100, noise=0.5), "vision")
    assert {name: len(table["label"]) for name, table in (("train", data.table), ("test", data.test))} == {
        "train": 100, "test": 597,
    }  # fmt: skip

    class Knows(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return 20.0 * nn.functional.one_hot(data.test["label"], 10).float()

    found = accuracies({"student": Knows()}, data.test)
    assert found == {"student/accuracy": 1.0, "student/nll": pytest.approx(0.0, abs=1e-6)}
    other = load_data(DataChoice(name="digits", labels=100, noise=0.5, seed=1), "vision")
    assert other.as_json()["digest"] != data.as_json()["digest"]


def test_shapes_of_the_test_are_others_than_those_of_the_training() -> None:
    data = load_data(DataChoice(name="shapes", num=50), "vision")
    assert (data.shape, data.num_classes, len(data.table["label"]), len(data.test["label"])) == (
        (1, 16, 16),
        8,
        50,
        1000,
    )
    assert not torch.equal(data.test["image"][:50], data.table["image"])
