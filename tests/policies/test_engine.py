"""The engine: means over the whole step, roles, resuming; tiny models, a few steps."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from tiny_models import make_args, make_model, make_tokenizer  # noqa: E402

from workbench.errors import InputError, TrainingError  # noqa: E402
from workbench.policies.lm.engine import LmTrainer  # noqa: E402
from workbench.policies.lm.rollout import Rollout  # noqa: E402
from workbench.policies.nouns import Fresh, Mixed, Phase, Role, Stored  # noqa: E402
from workbench.policies.tasks import Task  # noqa: E402
from workbench.policies.terms import CrossEntropy, TokenDivergence  # noqa: E402

TOKENIZER = make_tokenizer()
TASKS = [Task(f"t{i}", {"prompt": f"w{i} w{7 * i % 26}", "privileged": f"w1 w2 w{i} w{7 * i % 26}"}) for i in range(16)]


def rollouts(seed: int = 0, shortest: int = 2) -> dict[str, list[Rollout]]:
    """One rollout a task, of 2 to 7 tokens and the end."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for task in TASKS:
        length = int(torch.randint(shortest, 8, (), generator=generator))
        ids = torch.randint(3, 29, (length,), generator=generator).tolist()
        found[task.id] = [Rollout(task.id, TOKENIZER(task.prompts["prompt"])["input_ids"], [*ids, 1])]
    return found


STORED = {"teacher": rollouts()}


def off_policy(**options: Any) -> Phase:
    terms = [CrossEntropy(), TokenDivergence(divergence="forward_kl", coefficient=0.5)]
    roles = [Role(name="teacher", context="privileged")]
    return Phase(**{"name": "p", "sources": {"main": Stored("teacher")}, "terms": terms, "roles": roles, **options})


def on_policy(**options: Any) -> Phase:
    average = Role(name="average", origin="ema", decay=0.9)
    terms = [TokenDivergence(), TokenDivergence(teacher="average", divergence="jsd", parameter=0.5, coefficient=0.1)]
    roles = [Role(name="teacher"), average]
    return Phase(**{"name": "p", "sources": {"main": Fresh("student")}, "terms": terms, "roles": roles, **options})


def make_trainer(folder: Path, phase: Phase, tasks: list[Task] | None = None, **args: Any) -> LmTrainer:
    return LmTrainer(
        make_model(TOKENIZER, 1), make_args(folder, **args), TOKENIZER, phase, tasks or TASKS,
        models={"teacher": make_model(TOKENIZER, 2, hidden=48)}, stored=STORED,
    )  # fmt: skip


def losses(trainer: LmTrainer) -> list[float]:
    return [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]


def weights(trainer: LmTrainer) -> list[Any]:
    return [tensor.clone() for tensor in trainer.model.state_dict().values()]


@pytest.mark.parametrize("by_sequence", [False, True])
def test_accumulation_gives_what_one_batch_gives(tmp_path: Path, by_sequence: bool) -> None:
    """Means are over the step: however it is cut, losses and weights are the same, with sequences of any length."""
    found = []
    for batch, accumulation in ((8, 1), (1, 8), (4, 2)):
        term = TokenDivergence(divergence="forward_kl", by_sequence=by_sequence)
        trainer = make_trainer(
            tmp_path / f"{batch}", off_policy(terms=[CrossEntropy(), term]), per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        found.append((losses(trainer), weights(trainer)))
    for other_losses, other_weights in found[1:]:
        assert other_losses == pytest.approx(found[0][0], abs=2e-5)
        for one, other in zip(found[0][1], other_weights, strict=True):
            # Adam divides by the root of the squared gradient: rounding in a gradient near 0 shows in the weight
            assert (one - other).abs().max() < 2e-3


@pytest.mark.parametrize("make_phase", [off_policy, on_policy])
def test_a_resumed_run_equals_an_undisturbed_one(tmp_path: Path, make_phase: Any) -> None:
    """Rollouts, moving averages, the order of tasks, the phase's numbers and the optimiser all go on to the bit."""

    def count(state: dict[str, float], loss: float, step: int, steps: int) -> None:
        state["sum"] += loss * step

    args = {"max_steps": 7, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "whole", make_phase(state={"sum": 0.0}, after_step=count), **args)
    whole.train()
    first = make_trainer(tmp_path / "cut", make_phase(state={"sum": 0.0}, after_step=count), **args)
    first.train()
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-7", ignore_errors=True)
    resumed = make_trainer(tmp_path / "cut", make_phase(state={"sum": 0.0}, after_step=count), **args)
    torch.manual_seed(999)  # whatever happened in between
    resumed.train(str(tmp_path / "cut" / "checkpoint-3"))
    assert losses(resumed)[-4:] == losses(whole)[-4:]
    assert resumed.phase.state == whole.phase.state
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    for name in whole._averages:
        pairs = zip(whole._readers[name].model.parameters(), resumed._readers[name].model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_moving_average_follows_the_student(tmp_path: Path) -> None:
    """average = decay x average + (1 - decay) x student after every step; decay 0 is the student itself."""
    roles = [Role(name="teacher"), Role(name="average", origin="ema", decay=0.75), Role(name="copy", origin="ema")]
    trainer = make_trainer(tmp_path, off_policy(roles=roles), max_steps=1)
    start = next(trainer.model.parameters()).detach().clone()
    trainer.train()
    end = next(trainer.model.parameters()).detach()
    assert not torch.equal(start, end)
    average = next(trainer._readers["average"].model.parameters())
    torch.testing.assert_close(average, 0.75 * start + 0.25 * end)
    torch.testing.assert_close(next(trainer._readers["copy"].model.parameters()), end)


def test_a_snapshot_stays_and_a_live_teacher_moves(tmp_path: Path) -> None:
    roles = [Role(name="teacher"), Role(name="before", origin="snapshot"), Role(name="self", origin="live")]
    trainer = make_trainer(tmp_path, off_policy(roles=roles))
    start = next(trainer.model.parameters()).detach().clone()
    trainer.train()
    assert torch.equal(next(trainer._readers["before"].model.parameters()), start)
    assert trainer._readers["self"].model is trainer.model


def test_the_teacher_reads_its_own_prompt(tmp_path: Path) -> None:
    """The student's ids never hold the privileged prompt; the teacher's do, and its predictions change with it."""
    seen = []

    @dataclass(frozen=True)
    class Look:
        coefficient: float = 1.0

        def __call__(self, view: Any) -> Any:
            seen.append((view.get("prompt_ids"), view.get("privileged_ids"), view.hidden("teacher"), view.hidden()))
            return view.mean(-view.logprobs())

    make_trainer(tmp_path, off_policy(terms=[Look()]), max_steps=1).train()
    prompt, privileged, _, _ = seen[0]
    marks = set(TOKENIZER("w1 w2")["input_ids"])
    assert all(marks <= set(row.tolist()) for row in privileged)
    assert prompt.shape[1] + 2 == privileged.shape[1]
    plain = make_trainer(tmp_path / "plain", off_policy(terms=[Look()], roles=[Role(name="teacher")]), max_steps=1)
    with pytest.raises(InputError, match="privileged_ids"):
        plain.train()


def test_padding_and_masked_tokens_change_nothing(tmp_path: Path) -> None:
    """Left padding of prompts moves no position, and what has no weight has no gradient: not even infinite losses."""
    from workbench.policies.lm.view import last_hidden

    model = make_model(TOKENIZER, 3).eval()
    ids, pad = torch.tensor([[5, 6, 7, 8, 9]]), torch.zeros((1, 3), dtype=torch.long)
    alone = last_hidden(model, ids, torch.ones_like(ids), 2)
    padded = last_hidden(model, torch.cat([pad, ids], 1), torch.cat([pad, torch.ones_like(ids)], 1), 2)
    torch.testing.assert_close(alone, padded)

    @dataclass(frozen=True)
    class Infinite:
        coefficient: float = 1.0

        def __call__(self, view: Any) -> Any:
            values = -view.logprobs()
            return view.mean(torch.where(view.get("loss_weights") == 0, torch.inf, values))

    trainer = make_trainer(tmp_path, off_policy(terms=[Infinite()]))
    trainer.train()
    assert all(torch.isfinite(tensor).all() for tensor in weights(trainer))


def test_the_environments_words_are_no_target(tmp_path: Path) -> None:
    """Masked tokens are read but not learnt: other ids there change no weight of the head's row, only the context."""
    found = {}
    for name, mask in (("all", None), ("half", [1, 0, 1, 0])):
        kept = {t.id: [Rollout(t.id, [5], [6, 7, 8, 9], mask)] for t in TASKS}
        trainer = LmTrainer(
            make_model(TOKENIZER, 1), make_args(tmp_path / name, max_steps=1, learning_rate=1e-1), TOKENIZER,
            Phase(name="p", sources={"main": Stored("x")}, terms=[CrossEntropy()]), TASKS, stored={"x": kept},
        )  # fmt: skip
        before = trainer.model.lm_head.weight.detach().clone()
        trainer.train()
        found[name] = (trainer.model.lm_head.weight.detach() - before, trainer)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        logprobs = [t.model(ids).logits.log_softmax(-1)[0, range(4), ids[0, 1:]] for _, t in found.values()]
    assert logprobs[0][1] > logprobs[1][1] + 0.1  # token 7 was learnt only where it was a target
    assert logprobs[0][3] > logprobs[1][3] + 0.1


def test_a_mixture_draws_both_and_a_fraction_of_one_or_zero_only_one(tmp_path: Path) -> None:
    drawn: dict[float, list[str]] = {}
    for fraction in (0.0, 0.5, 1.0):
        drawn[fraction] = []
        phase = on_policy(sources={"main": Mixed(Fresh("student"), Stored("teacher"), fraction)})
        trainer = make_trainer(tmp_path / f"{fraction}", phase, max_steps=12)
        trainer._keep = lambda segment, policy, written, to=drawn[fraction]: to.append(policy)
        trainer.train()
    assert not drawn[0.0]
    assert drawn[1.0] == ["student"] * 12
    assert 1 <= len(drawn[0.5]) <= 11


def test_weights_of_tasks_weigh_their_sequences(tmp_path: Path) -> None:
    """Weight 0 leaves a task out; the same weight for all is no weight."""
    plain = make_trainer(tmp_path / "plain", off_policy())
    same = make_trainer(tmp_path / "same", off_policy(task_weight=lambda task: 3.0))
    for trainer in (plain, same):
        trainer.train()
    assert losses(plain) == pytest.approx(losses(same), abs=1e-5)
    some = make_trainer(tmp_path / "some", off_policy(task_weight=lambda task: float(int(task.id[1:]) < 4)))
    assert [task.id for task in some._tasks] == ["t0", "t1", "t2", "t3"]


def test_modules_of_the_phase_train_with_the_student_and_resume(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Project:
        coefficient: float = 1.0

        def __call__(self, view: Any) -> Any:
            projected = view.module("projector")(view.hidden())
            return view.mean((projected - view.hidden("teacher")).square().mean(-1))

    def make_modules(models: Any) -> dict[str, Any]:
        torch.manual_seed(5)
        widths = [models[name].config.hidden_size for name in ("student", "teacher")]
        return {"projector": torch.nn.Linear(*widths)}

    def build(name: str) -> LmTrainer:
        phase = off_policy(terms=[Project()], roles=[Role(name="teacher")], modules=make_modules)
        return make_trainer(tmp_path / name, phase, max_steps=4, save_strategy="steps", save_steps=2)

    whole = build("whole")
    before = whole.model.workbench_modules["projector"].weight.detach().clone()
    whole.train()
    after = whole.model.workbench_modules["projector"].weight
    assert not torch.equal(before, after)
    resumed = build("whole")
    resumed.train(str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(resumed.model.workbench_modules["projector"].weight, after)


def test_a_loss_that_moves_nothing_is_an_error(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Constant:
        coefficient: float = 1.0

        def __call__(self, view: Any) -> Any:
            return 0.0 * view.hidden().sum()

    with pytest.raises(TrainingError, match="no parameter of the student moved"):
        make_trainer(tmp_path, off_policy(terms=[Constant()])).train()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a model for the role 'oracle'"):
        make_trainer(tmp_path, off_policy(roles=[Role(name="oracle")]))
    with pytest.raises(InputError, match="stored rollouts of the policy 'nobody'"):
        make_trainer(tmp_path, off_policy(sources={"main": Stored("nobody")}))
    with pytest.raises(InputError, match="nothing to train on"):
        make_trainer(tmp_path, off_policy(task_weight=lambda task: 0.0))
    with pytest.raises(InputError, match="a step takes 64"):
        make_trainer(tmp_path, off_policy(), per_device_train_batch_size=64)
