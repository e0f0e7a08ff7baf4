"""Runs a method: its phases in order, each resumable, with the student handed from one to the next.

A run lives in a folder: `<number>-<phase>/start.safetensors` (the student as the phase found it), TRL's checkpoints,
and `end.safetensors` when the phase is done. Called again with the same folder, it goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_model
from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl.trainer.distillation_config import DistillationConfig

from workbench.policies.lm.engine import STATE_FILE, LmTrainer
from workbench.policies.lm.rollout import Rollout
from workbench.policies.lm.settings import Settings
from workbench.policies.nouns import Method, Phase
from workbench.policies.running import Interrupted, OnMetrics, StopRequest, save_weights
from workbench.policies.tasks import Environment, Task


def run_method(
    student: nn.Module, tokenizer: Any, method: Method, tasks: Sequence[Task], settings: Settings, folder: Path, *,
    models: Mapping[str, nn.Module] | None = None,
    stored: Mapping[str, Mapping[str, Sequence[Rollout]]] | None = None,
    environment: Environment | None = None, keep: Any = None, on_metrics: OnMetrics | None = None,
) -> nn.Module:  # fmt: skip
    """Trains the student through all phases of a method; returns it (an adapter-wrapped one with LoRA).

    Args: as in `LmTrainer`; folder: of the run, made if it is not there.

    Raises: InputError for what cannot be trained, TrainingError if nothing moved, Interrupted after Ctrl-C.
    """
    student = _with_lora(student, settings)
    phases = method.phases()
    for number, phase in enumerate(phases, 1):
        home = folder / f"{number}-{phase.name}"
        if (home / "end.safetensors").exists():
            load_model(student, str(home / "end.safetensors"))
            continue
        home.mkdir(parents=True, exist_ok=True)
        if (home / "start.safetensors").exists():
            load_model(student, str(home / "start.safetensors"))
        else:
            save_weights(student, home / "start.safetensors")
        stop, checkpoint = StopRequest(), _last_checkpoint(home)
        watch = _Watch(phase.name, on_metrics, stop, checkpoint is not None)
        trainer = LmTrainer(
            student, _arguments(settings, phase, home), tokenizer, phase, tasks, models=models, stored=stored,
            environment=environment, keep=keep, callbacks=[watch],
        )  # fmt: skip
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        with stop:
            trainer.train(checkpoint)
        if stop.is_asked and trainer.state.global_step < trainer.state.max_steps:
            raise Interrupted(f"Stopped after step {trainer.state.global_step} of phase {phase.name!r}; it is saved.")
        trained = trainer.accelerator.unwrap_model(trainer.model)
        if hasattr(trained, "workbench_modules"):
            del trained.workbench_modules  # they belong to the phase, not to the student
        if trainer.accelerator.is_main_process:
            save_weights(trained, home / "end.safetensors")
        trainer.accelerator.wait_for_everyone()
        if stop.is_asked and number < len(phases):
            raise Interrupted(f"Stopped after the last step of phase {phase.name!r}; it is saved.")
    return student


def _with_lora(student: nn.Module, settings: Settings) -> Any:
    if not settings.lora_rank:
        return student
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear")
    return get_peft_model(student, config)  # pyright: ignore


def _arguments(settings: Settings, phase: Phase, home: Path) -> DistillationConfig:
    return DistillationConfig(
        output_dir=str(home), max_steps=max(1, round(settings.steps * phase.share)),
        per_device_train_batch_size=settings.batch_size, gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate * phase.learning_rate, lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps, weight_decay=settings.weight_decay, max_grad_norm=settings.max_grad_norm,
        max_completion_length=settings.max_completion_tokens, temperature=settings.temperature, top_k=0,
        save_strategy="steps", save_steps=settings.save_every, save_total_limit=2, logging_steps=settings.log_every,
        bf16=settings.bf16, use_cpu=settings.cpu, activation_checkpointing=settings.activation_checkpointing,
        seed=settings.seed, report_to="none", disable_tqdm=True, logging_nan_inf_filter=False,
    )  # fmt: skip


def _last_checkpoint(home: Path) -> str | None:
    """The newest checkpoint that is whole: its last file was written."""
    whole = [path for path in home.glob("checkpoint-*") if (path / STATE_FILE).exists()]
    return str(max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]))) if whole else None


class _Watch(TrainerCallback):
    """Hands metrics on, and stops the run after the current step when asked to.

    Args: is_resumed: the phase goes on from a checkpoint.
    """

    def __init__(self, phase: str, on_metrics: OnMetrics | None, stop: StopRequest, is_resumed: bool) -> None:
        self.phase, self.on_metrics, self.stop, self.is_resumed = phase, on_metrics, stop, is_resumed

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "train_loss" in (logs or {}) and (self.is_resumed or self.stop.is_asked):
            return  # transformers' summary knows only the steps since the run was taken up
        numbers = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)}
        self._hand_on(state, numbers)
        if control.should_save:
            self._hand_on(state, {})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.stop.is_asked:
            control.should_save = control.should_training_stop = True
        if control.should_save:
            self._hand_on(state, {})
        return control

    def _hand_on(self, state: Any, numbers: dict[str, float]) -> None:
        if self.on_metrics and state.is_world_process_zero:
            self.on_metrics(self.phase, state.global_step, numbers)
