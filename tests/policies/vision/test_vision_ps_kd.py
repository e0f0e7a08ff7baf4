"""PS-KD (card 67): targets, memory, schedule, and calibration under label noise against plain cross-entropy."""

from __future__ import annotations

from statistics import mean
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

import torch.nn.functional as F  # noqa: E402
from vision_made import made, step_of, trained  # noqa: E402

from workbench.errors import InputError  # noqa: E402
from workbench.evals.calibration_error import calibration_error  # noqa: E402
from workbench.policies.loop.engine import LoopTrainer  # noqa: E402
from workbench.policies.loop.settings import LoopSettings  # noqa: E402
from workbench.policies.vision.memory import ProbabilityMemory  # noqa: E402
from workbench.policies.vision.methods.ps_kd import PsKd  # noqa: E402
from workbench.policies.vision.networks import MLP  # noqa: E402
from workbench.policies.vision.testbeds import digits, measure  # noqa: E402


def small(num: int = 20) -> dict[str, Any]:
    return {key: value[:num] for key, value in digits(0).pool.items()}


def weights(net: Any) -> Any:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def trainer_of(method: PsKd, table: Any, **settings: Any) -> LoopTrainer:
    chosen = {"batch_size": 10, "learning_rate": 0.05, "optimizer": "sgd", "cpu": True, "log_every": 1, **settings}
    return LoopTrainer(made(MLP, 1), method.phases()[0], {"train": table}, LoopSettings(**chosen), {})


def test_a_row_is_read_from_the_next_epoch_on() -> None:
    memory = ProbabilityMemory(4, 3)
    index, otherwise = torch.tensor([2, 0]), torch.eye(3)[:2]
    first, second = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]), torch.full((2, 3), 1 / 3)
    assert torch.equal(memory.read(index, 0, otherwise), otherwise)
    memory.write(index, first)
    assert torch.equal(memory.read(index, 0, otherwise), otherwise)  # visited twice in an epoch: still the old row
    assert torch.equal(memory.read(index, 1, otherwise), first)
    memory.write(index[:1], second[:1])
    assert torch.equal(memory.read(index, 1, otherwise), first)
    both = memory.read(index, 2, otherwise)
    assert torch.equal(both, torch.stack([second[0], first[1]]))  # not visited in epoch 1: what it was before
    assert torch.equal(memory.read(torch.tensor([1]), 2, otherwise[:1]), otherwise[:1])


def test_first_epoch_is_cross_entropy_to_the_bit_and_later_ones_are_not() -> None:
    ends = {}
    for steps in (2, 4):
        for alpha in (0.0, 0.8):
            trainer = trainer_of(PsKd(final_alpha=alpha, num_images=20), small(), steps=steps)
            trainer.train()
            ends[steps, alpha] = weights(trainer.student)
    assert torch.equal(ends[2, 0.0], ends[2, 0.8])
    assert not torch.equal(ends[4, 0.0], ends[4, 0.8])
    trainer, seen = step_of(PsKd(num_images=20).phases()[0], small(), {})
    expected = F.cross_entropy(made(MLP, 1)(small()["image"]), small()["label"])
    assert seen["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_second_epoch_has_the_gradient_of_the_equation() -> None:
    table = small()
    # two epochs of one step each, α_T 0.8: α is 0.4, then 0.8; P is what the student said before its first step
    trainer = trainer_of(
        PsKd(final_alpha=0.8, num_images=20), table, steps=2, batch_size=20, momentum=0.0, max_grad_norm=0.0
    )
    student = trainer.student
    past = student(table["image"]).softmax(-1).detach()
    trainer._train_step()
    trainer.step = 1
    before = weights(student)
    label = F.one_hot(table["label"], 10).float()
    logits = student(table["image"])
    by_hand = (logits.softmax(-1) - 0.2 * label - 0.8 * past).detach() / 20
    gradients = torch.autograd.grad(logits, list(student.parameters()), by_hand)
    trainer._train_step()
    torch.testing.assert_close(
        before - weights(student), 0.05 * torch.cat([g.flatten() for g in gradients]), atol=1e-6, rtol=1e-3
    )


def test_when_the_past_is_the_present_the_gradient_is_that_of_labels_scaled() -> None:
    from workbench.policies.vision.losses import soft_cross_entropy

    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    label, alpha = torch.eye(5, dtype=torch.float64)[torch.randint(5, (6,))], 0.3
    target = label.lerp(logits.softmax(-1).detach(), alpha)
    torch.testing.assert_close(target.sum(-1), torch.ones(6, dtype=torch.float64))
    soft_cross_entropy(logits, target).sum().backward()
    torch.testing.assert_close(logits.grad, (1 - alpha) * (logits.softmax(-1) - label).detach())


def test_alpha_rises_by_epochs_to_its_end() -> None:
    seen: list[float] = []
    trainer = trainer_of(PsKd(final_alpha=0.8, num_images=20), small(), steps=8)
    trainer.train(on_metrics=lambda name, step, values: seen.append(values["ps_kd/alpha"]))
    assert seen == pytest.approx([0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8])


def test_a_wrong_number_of_images_is_noticed() -> None:
    for num in (10, 19, 21, 50_000):
        with pytest.raises(InputError, match="num_images"):
            trainer_of(PsKd(num_images=num), small(), steps=5).train()
    with pytest.raises(InputError, match="final_alpha"):
        PsKd(final_alpha=1.5)
    with pytest.raises(InputError, match="num_images"):
        PsKd(num_images=0)


def test_accumulation_and_a_resumed_run_change_nothing(tmp_path: Any) -> None:
    table, method = small(), PsKd(num_images=20)
    ends = []
    for size, accumulation in ((10, 1), (5, 2)):
        trainer = trainer_of(method, table, steps=6, batch_size=size, accumulation=accumulation, momentum=0.0)
        trainer.train()
        ends.append(trainer)
    torch.testing.assert_close(weights(ends[0].student), weights(ends[1].student), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ends[0].modules["memory"].latest, ends[1].modules["memory"].latest, atol=1e-6, rtol=1e-5)

    class After:
        is_asked = True

    stopped = trainer_of(method, table, steps=6, momentum=0.0)
    for _ in range(3):  # stops, saved, after each step: the last in the middle of the second epoch
        stopped.train(tmp_path, stop=After())  # pyright: ignore
    resumed = trainer_of(method, table, steps=6, momentum=0.0)
    resumed.resume(tmp_path)
    assert resumed.step == 3
    resumed.train()
    assert torch.equal(weights(resumed.student), weights(ends[0].student))


def calibration(student: Any, table: Any) -> tuple[float, float, float]:
    """Accuracy, expected calibration error (15 bins), negative log-likelihood."""
    found = measure(student, table)
    confidence, answer = found.probs.max(-1)
    error = calibration_error(confidence.numpy(), (answer == table["label"]).float().numpy())
    return found.accuracy, error.ece, found.nll


def test_calibration_under_label_noise() -> None:
    """300 digits with 15 % wrong labels, 50 epochs, 3 seeds; against α = 0, and α without a past of its own.

    The control blends the label with the memory of another image: neither accuracy nor likelihood gains by that.
    """
    found: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(3):
        split = digits(seed, num_labels=300, noise=0.15)
        for name, alpha in (("labels", 0.0), ("ps-kd", 0.8), ("others' past", 0.8)):
            student = made(MLP, seed, width=128)
            phase = PsKd(final_alpha=alpha, num_images=300).phases()[0]
            with pytest.MonkeyPatch.context() as patch:
                if name == "others' past":
                    write = ProbabilityMemory.write
                    patch.setattr(ProbabilityMemory, "write", lambda m, i, p, w=write: w(m, (i + 1) % 300, p))
                trained(student, phase, split.train, steps=300, schedule="constant", max_grad_norm=0.0, seed=seed)
            found.setdefault(name, []).append(calibration(student, split.test))
    accuracy, ece, nll = ({name: mean(row[at] for row in rows) for name, rows in found.items()} for at in range(3))
    assert ece["ps-kd"] < ece["labels"] - 0.02
    assert nll["ps-kd"] < nll["labels"] - 0.1
    assert accuracy["ps-kd"] >= accuracy["labels"] - 0.005
    assert nll["others' past"] > nll["ps-kd"] + 0.1
    assert accuracy["others' past"] < accuracy["ps-kd"] - 0.02
