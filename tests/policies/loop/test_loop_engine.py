"""The loop engine: exact accumulation, processes and resume; who trains when; what is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
from launched import launch  # noqa: E402
from loop_made import TABLES, Push, Samples, Towards, net, phase, settings  # noqa: E402

from workbench.errors import InputError, TrainingError  # noqa: E402
from workbench.policies.loop.engine import LoopTrainer  # noqa: E402
from workbench.policies.loop.run import run_method  # noqa: E402
from workbench.policies.nouns import Phase, Role, Stored  # noqa: E402
from workbench.policies.running import StopRequest  # noqa: E402

SCRIPT = Path(__file__).parent / "loop_processes.py"


def trainer(made: Phase | None = None, **changes: Any) -> LoopTrainer:
    return LoopTrainer(net(0), made or phase(), TABLES, settings(**changes), {"teacher": net(1)})


def tensors(one: LoopTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in one._tensors().items()}


def losses(one: LoopTrainer, **options: Any) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    one.train(on_metrics=lambda name, step, numbers: rows.append(dict(numbers)), **options)
    return [row for row in rows if row]  # none before a checkpoint


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=atol, msg=name)


def test_accumulation_is_one_large_batch() -> None:
    whole, parts = trainer(batch_size=8), trainer(batch_size=2, accumulation=4)
    first, second = losses(whole), losses(parts)
    for a, b in zip(first, second, strict=True):
        assert {k: v for k, v in a.items() if "noise" not in k} == pytest.approx(
            {k: v for k, v in b.items() if "noise" not in k}, abs=1e-5
        )
    assert_close(tensors(whole), tensors(parts), 1e-5)


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    one, two = launch(SCRIPT, tmp_path / "one", 1), launch(SCRIPT, tmp_path / "two", 2)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-5)
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert {k: v for k, v in a.items() if "noise" not in k} == pytest.approx(
            {k: v for k, v in b.items() if "noise" not in k}, abs=1e-5
        )


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_resumed_run_equals_an_undisturbed_one(tmp_path: Path, optimizer: str) -> None:
    options: dict[str, Any] = {"optimizer": optimizer, "ema_decay": 0.8, "schedule": "cosine", "warmup_steps": 2}
    whole = trainer(**options)
    expected = losses(whole)
    stopped, stop = trainer(**options), StopRequest()
    rows: list[dict[str, float]] = []

    def note(name: str, step: int, numbers: Any) -> None:
        rows.extend([dict(numbers)] if numbers else [])
        stop.is_asked = step == 3

    stopped.train(tmp_path, note, stop)
    assert stopped.step == 3
    resumed = trainer(**options)
    resumed.resume(tmp_path)
    assert rows + losses(resumed) == expected
    assert_close(tensors(resumed), tensors(whole))


def test_checkpoints_are_whole_and_the_two_newest_stay(tmp_path: Path) -> None:
    one = trainer(save_every=1)
    one.train(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-5"]
    (tmp_path / "checkpoint.part").mkdir()  # of a run that was killed while it wrote
    again = trainer()
    again.resume(tmp_path)
    assert again.step == 5


def test_turns_and_who_moves_when() -> None:
    one = trainer(steps=1)
    before = tensors(one)
    one.train()
    after = tensors(one)
    for role in ("student", "critic", "judge", "adapted"):
        assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith(f"role/{role}/")), role
    one = trainer(steps=2)
    one._train_step()
    middle = {k: v for k, v in tensors(one).items() if k.startswith("role/")}
    one.step = 1
    one._train_step()
    after = tensors(one)
    assert all(torch.equal(middle[k], after[k]) for k in middle if k.startswith("role/student/"))  # every second step
    assert any(not torch.equal(middle[k], after[k]) for k in middle if k.startswith("role/critic/"))


def test_adapters_leave_the_weights_under_them_alone() -> None:
    one = trainer()
    x = TABLES["data"]["x"]
    expected = net(1)(x)
    one.train()
    assert torch.equal(one.roles["teacher"](x), expected)
    assert not torch.equal(one.roles["adapted"](x), expected)
    assert sum(p.numel() for p in one.trained["adapted"].values()) == 2 * (3 + 8) + 2 * (8 + 3)


def test_shared_things_get_the_gradients_of_all_terms() -> None:
    made = Phase(
        name="p", sources={"main": Samples()}, roles=[Role(name="teacher"), Role(name="critic", origin="copy")],
        modules=lambda models: {"scale": torch.nn.Linear(3, 1)}, state={"weight": 0.5},
        terms=[Push(), Towards(to="teacher"), Push(coefficient=0.5)], role_terms={"critic": [Towards("critic")]},
    )  # fmt: skip
    apart = LoopTrainer(net(0), made, {}, settings(steps=1, max_grad_norm=0.0, optimizer="sgd"), {"teacher": net(1)})
    grads: list[dict[str, torch.Tensor]] = []
    apart._update = lambda name: grads.append(  # type: ignore[method-assign]
        {key: p.grad.clone() for key, p in apart.trained[name].items() if p.grad is not None}
    )
    apart._turn("student")
    from workbench.policies.loop.view import View

    for parameter in apart.trained["student"].values():
        parameter.grad = None
    view = View(
        apart._places()[0], "student", apart.roles, apart.modules, made.sources, {}, made.state, apart.accelerator
    )
    view.shared = lambda key, make, kept={}: kept.setdefault(key, make())  # type: ignore
    total = sum(term.coefficient * term(view) for term in made.terms)
    names = list(apart.trained["student"])
    expected = torch.autograd.grad(total, [apart.trained["student"][name] for name in names])
    for name, grad in zip(names, expected, strict=True):
        torch.testing.assert_close(grads[0][name], grad)


def test_a_run_goes_through_its_phases_and_returns_when_done(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Two:
        def phases(self) -> list[Phase]:
            first = Phase(name="a", sources={"main": Stored("data")}, terms=[Towards()], share=0.5)
            second = replace(
                first, name="b", roles=[Role(name="before", origin="snapshot")], terms=[Towards(), Towards(to="before")]
            )
            return [first, second]

    seen: list[tuple[str, int]] = []
    student = run_method(
        net(0), Two(), TABLES, settings(), tmp_path, on_metrics=lambda name, step, _: seen.append((name, step))
    )
    assert seen == [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2), ("b", 3)]
    again = run_method(net(0), Two(), TABLES, settings(), tmp_path, on_metrics=lambda *_: pytest.fail("trained again"))
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))


def test_the_returned_student_is_the_average() -> None:
    made = Phase(name="p", sources={"main": Stored("data")}, terms=[Towards()])
    one, weights = trainer(made, ema_decay=0.5, steps=3), []
    start = [p.detach().clone() for p in one.student.parameters()]
    update = one._update

    def note(name: str) -> None:
        update(name)
        weights.append([p.detach().clone() for p in one.student.parameters()])

    one._update = note  # type: ignore[method-assign]
    one.train()
    for i, parameter in enumerate(one.student.parameters()):
        expected = 0.125 * start[i] + 0.125 * weights[0][i] + 0.25 * weights[1][i] + 0.5 * weights[2][i]
        torch.testing.assert_close(parameter.detach(), expected)


def test_every_epoch_shows_every_row_once_in_another_order() -> None:
    orders: list[list[int]] = []

    @dataclass(frozen=True)
    class Look:
        coefficient: float = 1.0

        def __call__(self, view: Any) -> torch.Tensor:
            orders.append(view["main"]["index"].tolist())
            return view.mean(view.role("student")(view["main"]["x"]).square().sum(1))

    trainer(Phase(name="p", sources={"main": Stored("data")}, terms=[Look()]), steps=10).train()
    epochs = [[row for rows in orders[i : i + 5] for row in rows] for i in (0, 5)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(40))] * 2
    assert epochs[0] != epochs[1]


@dataclass(frozen=True)
class Still:
    """A loss that has a graph, and no weight of the student in it."""

    coefficient: float = 1.0

    def __call__(self, view: Any) -> torch.Tensor:
        return view.mean(view.role("student")(view["main"]["x"]).sum(1) * 0)


@dataclass(frozen=True)
class Cut(Still):
    def __call__(self, view: Any) -> torch.Tensor:
        return view.mean(view.role("student")(view["main"]["x"]).sum(1).detach())


@dataclass(frozen=True)
class Broken(Still):
    def __call__(self, view: Any) -> torch.Tensor:
        return view.mean(view.role("student")(view["main"]["x"]).sum(1) * float("nan"))


@pytest.mark.parametrize(
    ("term", "said"), [(Still(), "moved"), (Cut(), "does not depend on"), (Broken(), "the loss Broken .* is nan")]
)
def test_a_loss_that_trains_nothing_is_an_error(term: Any, said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        trainer(Phase(name="p", sources={"main": Stored("data")}, terms=[term])).train()


def test_what_cannot_train_is_refused() -> None:
    one = Phase(name="p", sources={"main": Stored("data")}, terms=[Towards()])
    with pytest.raises(InputError, match="'student' shall train and has no parameter"):
        LoopTrainer(net(0).requires_grad_(False), one, TABLES, settings(), {})
    with pytest.raises(InputError, match="needs a model for the role 'teacher'"):
        LoopTrainer(net(0), phase(), TABLES, settings(), {})
    with pytest.raises(InputError, match="no role before it"):
        trainer(replace(one, roles=[Role(name="c", origin="copy", of="nobody")], role_terms={"c": [Towards("c")]}))
    adapter = Role(name="c", origin="adapter", rank=1, of="student")
    with pytest.raises(InputError, match="trains itself"):
        trainer(replace(one, roles=[adapter], role_terms={"c": [Towards("c")]}))
    with pytest.raises(InputError, match="columns of one length"):
        LoopTrainer(net(0), one, {"data": {"x": torch.zeros(3), "y": torch.zeros(4)}}, settings(), {})
    with pytest.raises(InputError, match="reads the table 'other'"):
        trainer(replace(one, sources={"main": Stored("other")})).train()
    with pytest.raises(InputError, match="must be the same"):
        replace(one, roles=[Role(name="c", origin="copy")])
    with pytest.raises(InputError, match="`every` must give"):
        replace(one, every={"student": 0})


def test_a_copy_of_a_frozen_teacher_trains() -> None:
    """A deep copy of a frozen model keeps requires_grad=False and would never move, while the loss looks alive."""
    one = trainer()
    under = [p for name, p in one.roles["teacher"].named_parameters() if "lora_" not in name]
    assert not any(p.requires_grad for p in under)
    assert len(one.trained["critic"]) == 4 + 2  # with its module


def test_bfloat16_keeps_weights_in_float32() -> None:
    one = trainer(Phase(name="p", sources={"main": Stored("data")}, terms=[Towards()]), bf16=True)
    one.train()
    assert {p.dtype for p in one.student.parameters()} == {torch.float32}
