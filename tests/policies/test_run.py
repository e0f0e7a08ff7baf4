"""Runs of a method: phases handed on, adapters, and going on after a stop."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from tiny_models import make_model, make_tokenizer  # noqa: E402

from workbench.errors import TrainingError  # noqa: E402
from workbench.policies.lm.methods.gkd import Gkd  # noqa: E402
from workbench.policies.lm.methods.soda import Soda  # noqa: E402
from workbench.policies.lm.rollout import Rollout  # noqa: E402
from workbench.policies.lm.run import run_method  # noqa: E402
from workbench.policies.lm.settings import Settings  # noqa: E402
from workbench.policies.running import Interrupted  # noqa: E402
from workbench.policies.tasks import Task  # noqa: E402

TOKENIZER = make_tokenizer()
TASKS = [Task(f"t{i}", {"prompt": f"w{i} w9"}) for i in range(8)]
STORED = {
    policy: {t.id: [Rollout(t.id, [3 + i, 12], [3 + (i * k) % 20, 4 + i, 1])] for i, t in enumerate(TASKS)}
    for k, policy in enumerate(("teacher", "student-base"), 2)
}
SETTINGS: dict[str, Any] = {"steps": 4, "batch_size": 4, "learning_rate": 1e-2, "max_completion_tokens": 6, "cpu": True}


def run(folder: Path, method: Any, **settings: Any) -> Any:
    return run_method(
        make_model(TOKENIZER, 1), TOKENIZER, method, TASKS, Settings(**{**SETTINGS, **settings}), folder,
        models={"teacher": make_model(TOKENIZER, 2)}, stored=STORED,
    )  # fmt: skip


def test_a_finished_run_trains_nothing_again_and_gives_the_same_student(tmp_path: Path) -> None:
    first = run(tmp_path, Soda(warm_up=0.5))
    seen: list[Any] = []
    again = run_method(
        make_model(TOKENIZER, 1), TOKENIZER, Soda(warm_up=0.5), TASKS, Settings(**SETTINGS), tmp_path, stored=STORED,
        on_metrics=lambda *args: seen.append(args),
    )  # fmt: skip
    assert not seen
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert {path.name for path in tmp_path.iterdir()} == {"1-warm-up", "2-preference"}


def test_the_second_phase_begins_with_what_the_first_left(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run(tmp_path, Soda(warm_up=0.5))
    end, start = (
        load_file(tmp_path / name) for name in ("1-warm-up/end.safetensors", "2-preference/start.safetensors")
    )
    assert all(torch.equal(end[name], start[name]) for name in end)


@pytest.mark.parametrize("on_policy", [0.0, 1.0])
def test_adapters_train_and_the_base_stays(tmp_path: Path, on_policy: float) -> None:
    base = {name: p.detach().clone() for name, p in make_model(TOKENIZER, 1).named_parameters()}
    student = run(tmp_path, Gkd(divergence="forward_kl", on_policy=on_policy), lora_rank=2)
    moved = [name for name, p in student.named_parameters() if "lora_B" in name and bool(p.abs().sum() > 0)]
    assert moved
    for name, p in student.named_parameters():
        if "lora_" not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(p, base[plain]), name


def test_ctrl_c_in_the_first_step_of_a_warm_up_is_no_failure(tmp_path: Path) -> None:
    """Its learning rate is 0, so that nothing has moved. The run that went on tells no mean loss of half of it."""
    seen: list[tuple[str, int, dict[str, float]]] = []

    def go(keep: Any = None) -> Any:
        return run_method(
            make_model(TOKENIZER, 1), TOKENIZER, Gkd(), TASKS, Settings(**SETTINGS, warmup_steps=2, log_every=1),
            tmp_path, models={"teacher": make_model(TOKENIZER, 2)}, keep=keep,
            on_metrics=lambda phase, step, numbers: seen.append((phase, step, dict(numbers))),
        )  # fmt: skip

    with pytest.raises(Interrupted, match="Stopped after step 1 of phase 'distil'"):
        go(keep=lambda *_: os.kill(os.getpid(), signal.SIGINT))
    go()
    assert [step for _, step, numbers in seen if "loss" in numbers] == [1, 2, 3, 4]
    assert not any("train_loss" in numbers for _, _, numbers in seen)


def test_metrics_are_told_to_be_kept_before_a_checkpoint_that_has_them_behind_it(tmp_path: Path) -> None:
    told: list[tuple[int, bool, list[str]]] = []

    def tell(phase: str, step: int, numbers: Any) -> None:
        there = sorted(path.name for path in (tmp_path / "1-distil").glob("checkpoint-*"))
        told.append((step, bool(numbers), there))

    run_method(
        make_model(TOKENIZER, 1), TOKENIZER, Gkd(), TASKS, Settings(**SETTINGS, save_every=2, log_every=1), tmp_path,
        models={"teacher": make_model(TOKENIZER, 2)}, on_metrics=tell,
    )  # fmt: skip
    at = told.index((2, True, []))
    assert told[at + 1] == (2, False, [])  # what step 2 told, kept before the checkpoint is begun
    assert (3, True, ["checkpoint-2"]) in told


def test_a_student_that_diverges_is_an_error_and_no_result(tmp_path: Path) -> None:
    """transformers would log a loss of 0 for one that is not a number."""
    seen: list[dict[str, float]] = []
    with pytest.raises(TrainingError, match=r"not a number: training has diverged\. Take a smaller learning rate"):
        run_method(
            make_model(TOKENIZER, 1), TOKENIZER, Gkd(divergence="forward_kl", on_policy=0.0), TASKS,
            Settings(**{**SETTINGS, "learning_rate": 1e30}, log_every=1), tmp_path, stored=STORED,
            models={"teacher": make_model(TOKENIZER, 2)}, on_metrics=lambda *args: seen.append(dict(args[2])),
        )  # fmt: skip
    assert all(numbers["loss"] != 0 for numbers in seen if "loss" in numbers)
    assert not (tmp_path / "1-distil" / "end.safetensors").exists()
    with pytest.raises(TrainingError, match="weights of the student are not finite after step 1"):
        run(tmp_path / "last", Gkd(), steps=1, learning_rate=3e38, weight_decay=10.0)
