"""The loop engine: a phase's roles take turns, each with its own optimiser, on batches that its sources make.

For what TRL's loop cannot host: several roles that train, discriminators, samples that carry a gradient. A step:
    for each role whose turn it is (the student first, then `role_terms` in their order; `every` thins them out):
        for each micro-batch: a backward pass for each term; gradients of what terms share flow on afterwards
        gradients are summed over processes, clipped, applied; moving averages follow the student
In a turn only what trains requires gradients. Weights and optimisers are in float32; forward passes may be in bfloat16.
Models are replicated on every process, not sharded.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from workbench.errors import InputError, TrainingError
from workbench.policies.loop.roles import average_into, frozen_copy, make_roles, owner
from workbench.policies.loop.settings import LoopSettings
from workbench.policies.loop.view import Place, Table, View, seed_of
from workbench.policies.nouns import Phase, Term
from workbench.policies.running import OnMetrics, StopRequest, fingerprint

#: Steps in which every role has moved: the first gradients of an adapter, or against an equal critic, may be 0.
MOVED_BY = 20
AVERAGE = "average"  # of the student, where the settings ask for one


class LoopTrainer:
    """Trains the roles of one phase.

    Args:
        student: changed in place; None where the phase's student is an adapter.
        tables: name -> rows for `Stored` sources: tensors of equal first dimension.
        models: role name -> frozen model, for roles whose origin is "given".

    Raises: InputError for what is missing, and for a role that shall train and has nothing to train.
    """

    def __init__(
        self, student: nn.Module | None, phase: Phase, tables: Mapping[str, Table], settings: LoopSettings,
        models: Mapping[str, nn.Module],
    ) -> None:  # fmt: skip
        _check_tables(tables)
        self.phase, self.settings, self.tables = phase, settings, tables
        self.accelerator = Accelerator(cpu=settings.cpu)
        torch.manual_seed(seed_of(settings.seed, phase.name))  # modules and adapters begin with random weights
        self.roles, self.modules = make_roles(phase, student, models, self.accelerator.device)
        self.student = self.roles["student"]
        self.step, self.steps = 0, max(1, round(settings.steps * phase.share))
        self.turns: dict[str, Sequence[Term]] = {"student": phase.terms, **phase.role_terms}
        self.trained = {name: self._parameters(name) for name in self.turns}
        self.optimizers = {name: _optimizer(self.trained[name].values(), settings) for name in self.turns}
        factors = {role.name: role.learning_rate for role in phase.roles} | {"student": phase.learning_rate}
        self.rates = {name: settings.learning_rate * factors[name] for name in self.turns}
        self.averages = {role.name: role.decay for role in phase.roles if role.origin == "ema"}
        if settings.ema_decay:
            self.roles[AVERAGE] = frozen_copy(self.student)
            self.averages[AVERAGE] = settings.ema_decay
        self._at_start = self._fingerprints()
        self._metrics: dict[str, list[float]] = {}
        self._loss = math.nan  # of the student's last turn

    def _owned(self, role: str) -> dict[str, nn.Module]:
        """What trains with a role: itself, and the phase's modules that are its own."""
        return {"": self.roles[role], **{f"{k}/": m for k, m in self.modules.items() if owner(k) == role}}

    def _parameters(self, role: str) -> dict[str, nn.Parameter]:
        return {
            prefix + name: parameter
            for prefix, module in self._owned(role).items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def _fingerprints(self) -> dict[str, list[tuple[float, float]]]:
        return {name: fingerprint(self.roles[name].parameters()) for name in self.turns}

    # -- training ----------------------------------------------------------------------------------------------------

    def train(
        self, folder: Path | None = None, on_metrics: OnMetrics | None = None, stop: StopRequest | None = None
    ) -> None:
        """Trains from the step it is at; ends early, saved, when asked to stop.

        Args: folder: for checkpoints; None = there are none.

        Raises: TrainingError for a loss that is not finite or reaches nobody, and if a trained role did not move.
        """
        while self.step < self.steps:
            self._train_step()
            self.step += 1
            is_last = self.step == self.steps
            if is_last or self.step == MOVED_BY:
                self._check_moved()
            if is_last or self.step % self.settings.log_every == 0:
                self._report(on_metrics)
            is_asked = stop is not None and stop.is_asked
            if folder and not is_last and (is_asked or self.step % self.settings.save_every == 0):
                if on_metrics and self.accelerator.is_main_process:
                    on_metrics(self.phase.name, self.step, {})
                self.save(folder)
            if is_asked:
                break
        if self.step == self.steps and AVERAGE in self.roles:
            average_into(self.student, self.roles[AVERAGE], 0.0)

    def _train_step(self) -> None:
        for name in self.turns:
            if self.step % self.phase.every.get(name, 1) == 0:
                loss = self._turn(name)
                if name == "student":
                    self._loss = loss
                    for average, decay in self.averages.items():
                        average_into(self.roles[average], self.student, decay)
        if self.phase.after_step:
            self.phase.after_step(self.phase.state, self._loss, self.step, self.steps)
        for key, value in self.phase.state.items():
            self._log(f"state/{key}", value)

    def _turn(self, name: str) -> float:
        for role, parameters in self.trained.items():
            for parameter in parameters.values():
                parameter.requires_grad_(role == name)
        losses = torch.zeros(len(self.turns[name]), device=self.accelerator.device)
        for place in self._places():
            torch.manual_seed(seed_of(self.settings.seed, self.phase.name, self.step, name, place.offset))  # dropout
            view = View(
                place, name, self.roles, self.modules, self.phase.sources, self.tables, self.phase.state,
                self.accelerator,
            )  # fmt: skip
            for number, term in enumerate(self.turns[name]):
                losses[number] += self._backward(view, name, term)
            view.flow_back()
            for key, value in view.metrics.items():
                self._log(key, value)
        losses = cast(Tensor, self.accelerator.reduce(losses, "sum"))
        for term, value in zip(self.turns[name], losses.tolist(), strict=True):
            if not math.isfinite(value):
                raise TrainingError(
                    f"Phase {self.phase.name!r}, step {self.step}: the loss {type(term).__name__} of {name!r} is "
                    f"{value}. Take a smaller learning rate, or look at the batch."
                )
            self._log(f"loss/{name}/{type(term).__name__}", value)
        self._log(f"loss/{name}" if name != "student" else "loss", float(losses.sum()))
        self._update(name)
        return float(losses.sum())

    def _places(self) -> list[Place]:
        size, processes = self.settings.batch_size, self.accelerator.num_processes
        rows = size * self.settings.accumulation * processes
        offsets = [(m * processes + self.accelerator.process_index) * size for m in range(self.settings.accumulation)]
        seed, name = self.settings.seed, self.phase.name
        return [Place(seed, name, self.step, self.steps, rows, offset, size) for offset in offsets]

    def _backward(self, view: View, name: str, term: Term) -> Tensor:
        if term.coefficient == 0:
            return torch.zeros((), device=self.accelerator.device)
        device = self.accelerator.device.type  # not by accelerate, whose precision is one for the whole process
        with torch.autocast(device, torch.bfloat16, enabled=self.settings.bf16):
            value = term.coefficient * term(view)
        if not value.requires_grad:
            raise TrainingError(
                f"Phase {self.phase.name!r}: the loss {type(term).__name__} does not depend on any weight of {name!r}, "
                "which it shall train (a frozen copy, a detached input?)."
            )
        value.backward()
        return value.detach()

    def _update(self, name: str) -> None:
        optimizer, parameters = self.optimizers[name], list(self.trained[name].values())
        if self.accelerator.num_processes > 1:
            for parameter in parameters:
                if parameter.grad is not None:  # then it is on every process: they all draw the same
                    parameter.grad = cast(Tensor, self.accelerator.reduce(parameter.grad, "sum"))
        most = self.settings.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, most)
        self._log(f"grad_norm/{name}", float(norm))
        for group in optimizer.param_groups:
            group["lr"] = self.rates[name] * self._schedule()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _schedule(self) -> float:
        done, warmup = self.step, self.settings.warmup_steps
        if done < warmup:
            return (done + 1) / warmup
        share = (done - warmup) / max(1, self.steps - warmup)
        return {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}[
            self.settings.schedule
        ]

    def _check_moved(self) -> None:
        now = self._fingerprints()
        for name, before in self._at_start.items():
            if now[name] == before:
                raise TrainingError(
                    f"Phase {self.phase.name!r}: no weight of {name!r} moved in {self.step} steps. Its loss does not "
                    "reach it: look at the coefficients (all 0?), the learning rate, and what its terms detach."
                )

    # -- metrics and checkpoints ---------------------------------------------------------------------------------------

    def _log(self, name: str, value: float) -> None:
        self._metrics.setdefault(name, []).append(value)

    def _report(self, on_metrics: OnMetrics | None) -> None:
        means = {name: sum(values) / len(values) for name, values in self._metrics.items()}
        self._metrics = {}
        if on_metrics and self.accelerator.is_main_process:
            on_metrics(self.phase.name, self.step, means)

    def _tensors(self) -> dict[str, Tensor]:
        """All that a resumed run needs, by name; the tensors are the live ones."""
        found: dict[str, Tensor] = {}
        for role in self.turns:
            for prefix, module in self._owned(role).items():
                found |= {f"role/{role}/{prefix}{name}": tensor for name, tensor in _live(module).items()}
            for name, parameter in self.trained[role].items():
                state = self.optimizers[role].state.get(parameter, {})
                found |= {
                    f"optimizer/{role}/{name}/{key}": one for key, one in state.items() if isinstance(one, Tensor)
                }
        for name in self.averages:
            found |= {f"average/{name}/{key}": tensor for key, tensor in _live(self.roles[name]).items()}
        return found

    def save(self, folder: Path) -> None:
        """Writes `checkpoint-STEP`, whole or not at all; the two newest stay."""
        if self.accelerator.is_main_process:
            unfinished, home = folder / "checkpoint.part", folder / f"checkpoint-{self.step}"
            for old in (unfinished, home):
                shutil.rmtree(old, ignore_errors=True)
            unfinished.mkdir(parents=True)
            tensors = {name: tensor.detach().contiguous() for name, tensor in self._tensors().items()}
            save_file(tensors, unfinished / "tensors.safetensors")
            state = {"step": self.step, "state": self.phase.state, "metrics": self._metrics, "loss": self._loss}
            (unfinished / "state.json").write_text(json.dumps(state))
            unfinished.rename(home)
            for old in _checkpoints(folder)[:-2]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def resume(self, folder: Path) -> None:
        """Takes up the newest checkpoint of a folder, if it has one."""
        found = _checkpoints(folder)
        if not found:
            return
        saved = json.loads((found[-1] / "state.json").read_text())
        self.step, self._metrics, self._loss = saved["step"], saved["metrics"], saved["loss"]
        self.phase.state.update(saved["state"])
        tensors = load_file(found[-1] / "tensors.safetensors", device=str(self.accelerator.device))
        with torch.no_grad():
            for name, live in self._tensors().items():
                live.copy_(tensors[name])
        for role, optimizer in self.optimizers.items():
            for name, parameter in self.trained[role].items():
                prefix = f"optimizer/{role}/{name}/"
                state = {key[len(prefix) :]: one for key, one in tensors.items() if key.startswith(prefix)}
                if state:
                    optimizer.state[parameter] = state


def _optimizer(parameters: Any, settings: LoopSettings) -> torch.optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        momentum = settings.momentum
        return torch.optim.SGD(parameters, rate, momentum=momentum, nesterov=momentum > 0, weight_decay=decay)
    return torch.optim.AdamW(parameters, rate, betas=settings.betas, weight_decay=decay)


def _live(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))


def _check_tables(tables: Mapping[str, Table]) -> None:
    for name, table in tables.items():
        lengths = {key: len(value) for key, value in table.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise InputError(f"The table {name!r} must have columns of one length above 0, not {lengths}.")
