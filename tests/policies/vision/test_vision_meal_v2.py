"""MEAL V2 (card 21): what is averaged where, the discriminator's three modes, and a trained student that gains."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import mean
from typing import Any, get_args

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from vision_made import Rolled, made, step_of, trained  # noqa: E402

from workbench.errors import InputError, TrainingError  # noqa: E402
from workbench.policies.nouns import Phase, Stored  # noqa: E402
from workbench.policies.vision.losses import mean_probabilities, soft_cross_entropy  # noqa: E402
from workbench.policies.vision.methods.meal_v2 import Adversarial, MealV2, make_discriminator  # noqa: E402
from workbench.policies.vision.networks import MLP  # noqa: E402
from workbench.policies.vision.terms import Labels  # noqa: E402
from workbench.policies.vision.testbeds import digits, fit, measure  # noqa: E402

IMAGES = {"image": digits(0).pool["image"][:20]}


def teachers(num: int) -> dict[str, Any]:
    return {f"teacher{number}": made(MLP, 10 + number) for number in range(1, num + 1)}


def flat(net: Any) -> Any:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_the_mean_of_cross_entropies_is_that_of_the_mean_and_entropy_plus_kl() -> None:
    student, logits = torch.randn(5, 8, dtype=torch.float64), torch.randn(3, 5, 8, dtype=torch.float64)
    p = mean_probabilities(list(logits))
    each = torch.stack([soft_cross_entropy(student, z.softmax(-1)) for z in logits]).mean(0)
    torch.testing.assert_close(soft_cross_entropy(student, p), each)
    of_p, of_q = torch.distributions.Categorical(probs=p), torch.distributions.Categorical(logits=student)
    torch.testing.assert_close(each, of_p.entropy() + torch.distributions.kl_divergence(of_p, of_q))


def test_a_step_averages_probabilities_for_the_student_and_logits_for_the_discriminator() -> None:
    models, seen_by_discriminator = teachers(3), []
    phase = MealV2(num_teachers=3).phases()[0]

    def modules(roles: Any) -> dict[str, nn.Module]:
        found = MealV2().modules(roles)["discriminator"]
        found.register_forward_hook(lambda m, inputs, output: seen_by_discriminator.append((inputs[0], output)))
        return {"discriminator": found}

    with torch.no_grad():
        z_s = made(MLP, 1)(IMAGES["image"])
        z_t = torch.stack([model(IMAGES["image"]) for model in models.values()])
    _, seen = step_of(replace(phase, modules=modules), IMAGES, models)
    order = [int((z_s - row).abs().sum(-1).argmin()) for row in seen_by_discriminator[0][0].detach()]
    assert sorted(order) == list(range(20))  # the rows of the step, in the run's order
    torch.testing.assert_close(seen_by_discriminator[1][0], z_t.mean(0)[order])
    expected = F.cross_entropy(z_s, z_t.softmax(-1).mean(0)).item()
    assert seen["loss/student/EnsembleCrossEntropy"] == pytest.approx(expected, rel=1e-5)
    judged = torch.cat([output for _, output in seen_by_discriminator]).detach()
    targets = torch.tensor([[1.0, 0.0]] * 20 + [[0.0, 1.0]] * 20)
    both = F.binary_cross_entropy_with_logits(judged, targets).item()
    assert seen["loss/student/LogitDiscriminator"] == pytest.approx(both, rel=1e-5)


def test_the_students_share_of_the_discriminators_loss_in_the_three_modes() -> None:
    moves: dict[str, Any] = {}
    phases = {mode: MealV2(num_teachers=1, adversarial=mode).phases()[0] for mode in get_args(Adversarial)}
    alone = {mode: replace(phase, terms=phase.terms[1:]) for mode, phase in phases.items()}
    for mode in ("released", "reversal"):
        student = made(MLP, 1)
        trainer, _ = step_of(alone[mode], IMAGES, teachers(1), student)
        moves[mode] = (flat(student) - flat(made(MLP, 1)), flat(trainer.modules["discriminator"]))
    assert moves["released"][0].abs().max() > 1e-6
    torch.testing.assert_close(moves["reversal"][0], -moves["released"][0], atol=1e-7, rtol=1e-3)
    torch.testing.assert_close(moves["reversal"][1], moves["released"][1])
    with pytest.raises(TrainingError, match="no weight of 'student' moved"):
        step_of(alone["detached"], IMAGES, teachers(1))


def test_the_discriminator_is_the_released_one_and_its_loss_is_bounded() -> None:
    widths = [layer.out_features for layer in make_discriminator(1000) if isinstance(layer, nn.Linear)]  # pyright: ignore
    assert widths == [125, 15, 2]
    small = make_discriminator(10)
    assert (small(100 * torch.randn(50, 10)) >= 0).all()
    assert [type(layer) for layer in small][-1] is nn.ReLU  # pyright: ignore
    best = F.binary_cross_entropy_with_logits(torch.tensor([[50.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    assert best.item() == pytest.approx(math.log(2) / 2, abs=1e-6)


def test_no_weight_decays_by_default_and_the_labels_are_not_read() -> None:
    trainer, _ = step_of(MealV2(num_teachers=1).phases()[0], IMAGES, teachers(1))
    assert [group["weight_decay"] for group in trainer.optimizers["student"].param_groups] == [0.0]
    with pytest.raises(InputError, match="teacher2"):
        step_of(MealV2().phases()[0], IMAGES, teachers(1))
    with pytest.raises(InputError, match="one teacher or more"):
        MealV2(num_teachers=0)


def test_a_trained_student_gains_where_more_training_on_labels_loses() -> None:
    """600 digits, 10 % wrong labels, three teachers; 3 seeds. The control's teachers speak of another image."""
    found: dict[str, list[float]] = {}
    labels = Phase(name="labels", sources={"main": Stored("train")}, terms=[Labels()])
    for seed in range(3):
        split = digits(seed, num_labels=600, noise=0.1)
        models = {
            f"teacher{n}": fit(made(MLP, 100 * seed + n, width=256), split.train, steps=150, seed=n, learning_rate=1e-3)
            for n in (1, 2, 3)
        }
        start = fit(made(MLP, seed + 50), split.train, steps=400, seed=seed + 50).state_dict()
        others = {name: Rolled(model) for name, model in models.items()}
        meal = MealV2(num_teachers=3).phases()[0]
        for name, phase, given in (
            ("start", None, {}), ("meal", meal, models), ("labels", labels, {}), ("other images", meal, others)
        ):  # fmt: skip
            student = made(MLP, seed + 50)
            student.load_state_dict(start)
            if phase:
                trained(student, phase, split.train, given, steps=150, learning_rate=1e-3, seed=seed)
            found.setdefault(name, []).append(measure(student, split.test).accuracy)
    accuracy = {name: mean(values) for name, values in found.items()}
    assert accuracy["meal"] > accuracy["start"] + 0.005
    assert accuracy["meal"] > accuracy["labels"] + 0.01
    assert accuracy["other images"] < accuracy["start"] - 0.05
