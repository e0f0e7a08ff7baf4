"""The `lm` engine: TRL's DistillationTrainer, bent at the seams that are named here and nowhere else.

TRL keeps the loop: data order, generation (also with vLLM), PEFT, FSDP and DeepSpeed, optimiser, checkpoints. Ours are:
    _generate_and_score_completions  a batch comes from the phase's sources, in segments
    compute_loss, _compute_loss      the phase's terms
    _get_train_sampler               the order of an epoch depends on its number alone (TRL's own on how many came
                                     before, so that a resumed run would see other tasks)
    training_step                    moving averages and the phase's state, after an optimiser step
    _save_checkpoint, train          what a resumed run needs besides: moving averages, state, modules
tests/policies/test_seams.py fails when TRL moves one of them. TRL is pinned at 1.16.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import Sampler
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

from workbench.errors import InputError, TrainingError
from workbench.policies.lm.episodes import encode, generate, roll_out
from workbench.policies.lm.rollout import Rollout, collate
from workbench.policies.lm.view import Reader, View
from workbench.policies.nouns import Fresh, Mixed, Phase, Role, Source, Stored, parts
from workbench.policies.running import fingerprint
from workbench.policies.tasks import Environment, Task

STATE_FILE = "workbench_state.json"


class LmTrainer(DistillationTrainer):
    """Trains a student through one phase.

    Args:
        model: the student; changed in place.
        args: TRL's; `max_completion_length` and `temperature` are those of fresh rollouts.
        phase: what to do.
        tasks: with a weight of 0 (`phase.task_weight`) or, where a segment is stored, without a rollout: left out.
        models: role name -> frozen model, for roles whose origin is "given"; not needed where stored rollouts come with
            the role's scores.
        stored: policy name -> task id -> rollouts.
        environment: for multi-turn tasks.
        keep: called with (segment, policy, rollouts) for what was freshly written (their meta says phase and step);
            None = it is not kept.

    Raises: InputError if a given role's model is missing, or nothing is left to train on.
    """

    loss_is_scaled_for_ga = True  # means are over the whole optimiser step already

    def __init__(
        self, model: nn.Module, args: DistillationConfig, tokenizer: Any, phase: Phase, tasks: Sequence[Task], *,
        models: Mapping[str, nn.Module] | None = None,
        stored: Mapping[str, Mapping[str, Sequence[Rollout]]] | None = None,
        environment: Environment | None = None, keep: Any = None, callbacks: list[Any] | None = None,
        peft_config: Any = None,
    ) -> None:  # fmt: skip
        if phase.role_terms or not all(
            isinstance(part, Stored | Fresh) for s in phase.sources.values() for part in parts(s)
        ):
            raise InputError(
                f"Phase {phase.name!r} trains roles beside the student, or makes its batches: this engine has no place "
                "for either. It is a phase of the loop engine (workbench.policies.loop)."
            )
        self.phase, self.environment, self._keep = phase, environment, keep
        self._stored, self._tokens = stored or {}, {}
        self._weights = {task.id: phase.task_weight(task) if phase.task_weight else 1.0 for task in tasks}
        usable = [task for task in tasks if self._weights[task.id] > 0 and self._has_rollouts(task.id)]
        if not usable:
            raise InputError(
                f"Phase {phase.name!r} has nothing to train on: of {len(tasks)} tasks none has a weight above 0 and a "
                f"rollout of every stored policy ({', '.join(sorted(_policies(phase))) or 'none is needed'})."
            )
        self._tasks = usable
        self._check_scores()
        step_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        if len(usable) < step_size:
            raise InputError(
                f"Phase {phase.name!r} has {len(usable)} tasks to train on, and a step takes {step_size} "
                "(per_device_train_batch_size x gradient_accumulation_steps x processes). Take a smaller batch."
            )
        args.remove_unused_columns = False
        super().__init__(
            model=cast(Any, model), args=args, processing_class=tokenizer, callbacks=callbacks, peft_config=peft_config,
            train_dataset=Dataset.from_dict({"prompt": [""] * len(usable), "task": list(range(len(usable)))}),
        )  # fmt: skip
        given = models or {}
        scored = scoring_roles(phase) - set(given)
        self._readers = {role.name: self._reader(role, given) for role in phase.roles if role.name not in scored}
        self._averages = {role.name: role.decay for role in phase.roles if role.origin == "ema"}
        self._add_modules()
        self._totals: dict[str, tuple[Tensor, Tensor]] = {}
        self._step_loss: Tensor | None = None
        self._at_start = _fingerprint(self.model)

    # -- roles -------------------------------------------------------------------------------------------------------

    def _reader(self, role: Role, models: Mapping[str, nn.Module]) -> Reader:
        if role.origin == "live":
            return Reader(self.accelerator.unwrap_model(self.model), role.context, _call)
        if role.origin != "given":
            copied = copy.deepcopy(self.accelerator.unwrap_model(self.model)).requires_grad_(False).eval()
            return Reader(copied.to(self.accelerator.device), role.context, _call)
        if role.name not in models:
            raise InputError(
                f"Phase {self.phase.name!r} needs a model for the role {role.name!r}; "
                f"given were {', '.join(models) or 'none'}."
            )
        model = models[role.name].requires_grad_(False).eval()
        wrapped = self.accelerator.prepare_model(model, evaluation_mode=True)

        def run(function: Any, unwrapped: nn.Module, *rest: Any) -> Any:
            return self._forward_redirection(wrapped, unwrapped, function, unwrapped, *rest)

        return Reader(self.accelerator.unwrap_model(wrapped), role.context, run)

    def _add_modules(self) -> None:
        if self.phase.modules is None:
            return
        student = self.accelerator.unwrap_model(self.model)
        # Modules of the student itself: so they are wrapped, synchronised and optimised with it.
        made = self.phase.modules({"student": student, **{name: r.model for name, r in self._readers.items()}})
        cast(Any, student).workbench_modules = nn.ModuleDict(dict(made)).to(self.accelerator.device)

    # -- batches -----------------------------------------------------------------------------------------------------

    def _has_rollouts(self, task_id: str) -> bool:
        for policy in _policies(self.phase):
            if policy not in self._stored:
                raise InputError(
                    f"Phase {self.phase.name!r} reads stored rollouts of the policy {policy!r}, and there are none; "
                    f"stored are those of {', '.join(self._stored) or 'nobody'}."
                )
            if not self._stored[policy].get(task_id):
                return False
        return True

    def _check_scores(self) -> None:
        """Raises InputError where a phase would learn from stored scores that are not there, or not what it takes."""
        where = f"Phase {self.phase.name!r}"
        for term in self.phase.terms:
            if getattr(term, "teacher", None) != "stored":
                continue
            segment, temperature = getattr(term, "segment", "main"), getattr(term, "temperature", 1.0)
            for part in parts(self.phase.sources[segment]):
                if not isinstance(part, Stored) or part.with_scores is None:
                    raise InputError(
                        f"{where}: a term reads stored scores, and the segment {segment!r} comes from {part}, which "
                        "has none. Take Stored(policy, with_scores=NAME), or a teacher that is a role."
                    )
            if temperature != 1:
                raise InputError(
                    f"{where}: stored scores are at temperature 1, and a term asks for {temperature:g}; a top-k cannot "
                    "be tempered, because its tail is not known. Take temperature 1, or a teacher that is a role."
                )
        for source in self.phase.sources.values():
            for part in parts(source):
                if isinstance(part, Stored) and part.with_scores is not None:
                    _check_scored(part, [r for task in self._tasks for r in self._stored[part.policy][task.id]])

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        accumulation = self.args.gradient_accumulation_steps
        step_size = self.args.per_device_train_batch_size * self.accelerator.num_processes * accumulation
        return _EpochSampler(len(self._tasks), step_size, accumulation, self.args.seed, lambda: self.state.epoch or 0.0)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        tasks = [self._tasks[row["task"]] for row in inputs]
        batch: dict[str, Tensor] = {}
        self._totals = {}
        for segment, source in self.phase.sources.items():
            rollouts = self._draw(segment, source, tasks)
            weights = [self._weights[task.id] for task in tasks]
            student_context = self.phase.contexts.get(segment, "prompt")
            contexts = {student_context, *(reader.context for reader in self._readers.values())}
            prompts = {context: [self._encode(task, context) for task in tasks] for context in contexts}
            tensors = collate(rollouts, prompts, weights, cast(int, self._tokenizer.pad_token_id))
            tensors["sequence_weights"] = torch.tensor(weights)
            sums = torch.stack([tensors["loss_weights"].sum(), tensors["sequence_weights"].sum()])
            total = cast(Tensor, self.accelerator.gather(sums.to(self.accelerator.device)[None])).sum(0)
            share = total.clamp(min=1e-12) / self.accelerator.num_processes
            self._totals[segment] = (share[0], share[1])
            batch |= {f"{segment}.{name}": tensor.to(self.accelerator.device) for name, tensor in tensors.items()}
            self._metrics["train"][f"{segment}/completion_tokens"].append(float(tensors["completion_mask"].sum()))
            rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
            if rewards:
                self._metrics["train"][f"{segment}/reward"].append(sum(rewards) / len(rewards))
        return batch

    def _encode(self, task: Task, context: str) -> list[int]:
        key = (task.id, context)
        if key not in self._tokens:
            self._tokens[key] = encode(self._tokenizer, task.prompt(context))
        return self._tokens[key]

    def _draw(self, segment: str, source: Source, tasks: list[Task]) -> list[Rollout]:
        if isinstance(source, Mixed):
            source = source.first if float(torch.rand(())) < source.fraction else source.second
        if isinstance(source, Fresh):
            rollouts = self._write(source.role, tasks)
            if self._keep:
                for rollout in rollouts:
                    rollout.meta |= {"phase": self.phase.name, "step": self.state.global_step}
                self._keep(segment, source.role, rollouts)
            return rollouts
        found = [self._stored[cast(Stored, source).policy][task.id] for task in tasks]
        return [some[0] if len(some) == 1 else some[int(torch.randint(len(some), ()))] for some in found]

    def _write(self, role: str, tasks: list[Task]) -> list[Rollout]:
        context = self.phase.contexts.get("main", "prompt") if role == "student" else self._readers[role].context
        prompts = [self._encode(task, context) for task in tasks]

        def write(ids: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
            if role == "student":
                self.generation_config.max_new_tokens = max_tokens
                return self._generate_single_turn([list(row) for row in ids], None, {})
            return generate(self._readers[role].model, self._tokenizer, ids, max_tokens, self.temperature)

        length = cast(int, self.max_completion_length)
        return roll_out(write, self._tokenizer, tasks, prompts, length, self.environment)

    # -- loss --------------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum of the terms; runs inside the wrapper of a distributed launch."""
        student = self.accelerator.unwrap_model(model)
        loss, metrics = self._forward_redirection(model, student, self._compute_loss, student, inputs, None)
        for name, values in metrics.items():
            # .item() here, after the wrapped forward: a collective inside it could hang.
            self._metrics["train"][name] += [float(value) for value in values]
        self._step_loss = loss.detach() if self._step_loss is None else self._step_loss + loss.detach()
        return (loss, None) if return_outputs else loss

    def _compute_loss(self, unwrapped_student: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        reader = Reader(unwrapped_student, "prompt", _call, is_student=True)
        readers = {"student": reader, **self._readers}
        view = View(inputs, readers, self._totals, self.phase.state, self.phase.contexts)
        loss = torch.zeros((), device=self.accelerator.device)
        for term in self.phase.terms:
            loss = loss + term.coefficient * term(view)
        return loss, view.metrics

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """TRL's step; what follows an optimiser step is done before the next one begins (`_after_step`)."""
        if self._step and self._step % self.args.gradient_accumulation_steps == 0:
            self._after_step()
        return super().training_step(model, inputs, num_items_in_batch)

    def _after_step(self) -> None:
        """Brings moving averages and the phase's state up to the optimiser step that just ended."""
        if self._step_loss is None:
            return
        student = dict(self.accelerator.unwrap_model(self.model).named_parameters())
        with torch.no_grad():
            for name, decay in self._averages.items():
                for key, averaged in self._readers[name].model.named_parameters():
                    averaged.lerp_(student[key].detach().to(averaged.dtype), 1 - decay)
        loss = float(cast(Tensor, self.accelerator.reduce(self._step_loss, "mean")))
        self._step_loss = None
        if math.isnan(loss):
            raise self._diverged(f"the loss of step {self.state.global_step} is not a number")
        if self.phase.after_step:
            self.phase.after_step(self.phase.state, loss, self.state.global_step, self.state.max_steps)
        for key, value in self.phase.state.items():
            self._metrics["train"][f"state/{key}"].append(value)

    def _diverged(self, what: str) -> TrainingError:
        return TrainingError(
            f"Phase {self.phase.name!r}: {what}: training has diverged. Take a smaller learning rate "
            f"({self.args.learning_rate:g}) or max_grad_norm ({self.args.max_grad_norm:g}), or look at the rollouts."
        )

    # -- resuming ----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._after_step()
        super()._save_checkpoint(model, trial)
        if not self.accelerator.is_main_process:
            return
        folder = Path(cast(str, self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        for name in self._averages:
            save_model(self._readers[name].model, str(folder / f"ema_{name}.safetensors"))
        if self.phase.modules:
            extra = cast(Any, self.accelerator.unwrap_model(self.model)).workbench_modules
            save_model(extra, str(folder / "modules.safetensors"))
        # Last: a checkpoint without it was cut short, and is not resumed.
        (folder / STATE_FILE).write_text(json.dumps(self.phase.state))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Written by the run, with its lineage, not by TRL."""

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trains; raises TrainingError if it diverges, or no parameter of the student has moved at the phase's end."""
        if isinstance(resume_from_checkpoint, str):
            folder = Path(resume_from_checkpoint)
            self.phase.state.update(json.loads((folder / STATE_FILE).read_text()))
            for name in self._averages:
                load_model(self._readers[name].model, str(folder / f"ema_{name}.safetensors"))
            if self.phase.modules:
                extra = cast(Any, self.accelerator.unwrap_model(self.model)).workbench_modules
                load_model(extra, str(folder / "modules.safetensors"))
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self._after_step()
        at_end = _fingerprint(self.model)
        if not all(math.isfinite(square) for _, square in at_end):
            raise self._diverged(f"weights of the student are not finite after step {self.state.global_step}")
        # not where it was stopped before: the first step of a warm-up has a learning rate of 0
        if self.state.global_step >= self.state.max_steps > 0 and at_end == self._at_start:
            raise TrainingError(
                f"Phase {self.phase.name!r}: no parameter of the student moved in {self.state.global_step} steps. The "
                "loss does not reach it: look at the loss weights (all 0?), the learning rate, and what requires grad."
            )
        return result


class _EpochSampler(Sampler[int]):
    """Each step's tasks, repeated for every accumulation step (TRL draws rollouts at the first and keeps them)."""

    def __init__(self, num_tasks: int, step_size: int, repeats: int, seed: int, epoch: Callable[[], float]) -> None:
        self.num_tasks, self.step_size, self.repeats, self.seed, self.epoch = num_tasks, step_size, repeats, seed, epoch

    def __len__(self) -> int:
        return self.num_tasks // self.step_size * self.step_size * self.repeats

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * int(self.epoch() + 1e-6))
        order = torch.randperm(self.num_tasks, generator=generator).tolist()
        for start in range(0, self.num_tasks - self.step_size + 1, self.step_size):
            for _ in range(self.repeats):
                yield from order[start : start + self.step_size]


def _call(function: Any, *arguments: Any) -> Any:
    return function(*arguments)


def _policies(phase: Phase) -> set[str]:
    return {part.policy for source in phase.sources.values() for part in parts(source) if isinstance(part, Stored)}


def scoring_roles(phase: Phase) -> set[str]:
    """Given roles whose scores come with stored rollouts: the phase needs no model of them."""
    stored = [part for source in phase.sources.values() for part in parts(source) if isinstance(part, Stored)]
    return {role.name for role in phase.roles if role.origin == "given"} & {part.with_scores for part in stored}


def asked_roles(phases: Sequence[Phase]) -> set[str]:
    """Given roles that some phase needs a model of."""
    return {
        role.name for phase in phases for role in phase.roles
        if role.origin == "given" and role.name not in scoring_roles(phase)
    }  # fmt: skip


def _check_scored(source: Stored, rollouts: Sequence[Rollout]) -> None:
    """Raises InputError unless all rollouts have scores of the teacher that the source names, of one k."""
    lacking = [r for r in rollouts if r.scores is None or r.meta.get("scores_of") != source.with_scores]
    sizes = {r.scores.ids.shape[1] for r in rollouts if r.scores is not None}
    if lacking or len(sizes) > 1:
        why = (
            f"{len(lacking)} of {len(rollouts)} stored rollouts of the policy {source.policy!r} (one is of task "
            f"{lacking[0].task_id!r}) have no scores of the teacher {source.with_scores!r}"
            if lacking
            else f"the scores of the rollouts of {source.policy!r} list {' or '.join(map(str, sorted(sizes)))} words"
        )
        raise InputError(
            f"{why[0].upper()}{why[1:]}. Make them, all with one k: "
            f"workbench.policies.lm.scoring.attach(con, teacher, {source.with_scores!r}, rollouts)."
        )


def _fingerprint(model: Any) -> list[tuple[float, float]]:
    return fingerprint(p for p in model.parameters() if p.requires_grad)
