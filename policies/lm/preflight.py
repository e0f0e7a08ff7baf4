"""Checks before any training: each refuses what would train on nonsense, or on nothing, and says what to do.

The last one runs the real thing on a few sequences: the loss of every term must reach the student.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from workbench.errors import InputError, TrainingError
from workbench.policies.lm.engine import LmTrainer, asked_roles, scoring_roles
from workbench.policies.lm.episodes import encode
from workbench.policies.lm.rollout import Rollout
from workbench.policies.lm.run import Settings, _arguments, _with_lora
from workbench.policies.nouns import Fresh, Method, Mixed, Phase, Source, Stored, Term
from workbench.policies.tasks import Environment, Task
from workbench.policies.terms import CrossEntropy

SAMPLE_TOKENS = 256
SAMPLE_PROMPTS = 32
BATCHES, BATCH_SIZE = 3, 4
#: A gradient below this share of cross-entropy's on the same tokens is rounding.
ROUNDING = 1e-5


@dataclass(frozen=True, slots=True)
class Job:
    """What is about to be trained.

    Args: models, tokenizers: of the roles that are given, by name, with no model of those whose stored scores are read;
        stored: policy -> task id -> rollouts.
    """

    student: Any
    tokenizer: Any
    method: Method
    tasks: Sequence[Task]
    settings: Settings
    models: Mapping[str, Any]
    tokenizers: Mapping[str, Any]
    stored: Mapping[str, Mapping[str, Sequence[Rollout]]]
    environment: Environment | None = None

    def given_roles(self) -> list[str]:
        """Names of the frozen models that the phases ask for, or whose scores they read, sorted."""
        return sorted({r.name for phase in self.method.phases() for r in phase.roles if r.origin == "given"})


def check(job: Job) -> None:
    """Runs every check; raises InputError for what does not fit together, TrainingError for a loss without effect."""
    check_models(job)
    check_tokenizer(job.tokenizer, "student")
    check_scores(job)
    for name in (role for role in job.given_roles() if role in job.tokenizers):
        check_tokenizer(job.tokenizers[name], name)
        check_same_vocabulary(job, name)
        check_same_template(job, name)
    check_temperatures(job)
    check_lengths(job)
    check_signal(job)


def check_models(job: Job) -> None:
    """Every given role that is asked has a model."""
    for name in sorted(asked_roles(job.method.phases())):
        if name not in job.models or name not in job.tokenizers:
            raise InputError(
                f"The method needs a model for the role {name!r}; given were {', '.join(job.models) or 'none'}. "
                f"Add models.{name} to the recipe."
            )


def check_scores(job: Job) -> None:
    """Stored scores are of words that the student predicts."""
    words = job.student.get_output_embeddings().weight.shape[0]
    for policy, stock in job.stored.items():
        scored = [r for rollouts in stock.values() for r in rollouts if r.scores is not None and r.scores.ids.size]
        largest = max((int(rollout.scores.ids.max()) for rollout in scored if rollout.scores is not None), default=-1)
        if largest >= words:
            raise InputError(
                f"The stored scores of the rollouts of {policy!r} list word {largest}, and the student predicts "
                f"{words}: they are a teacher's with another vocabulary. Score with one of the student's."
            )


def check_tokenizer(tokenizer: Any, role: str) -> None:
    """There is an end-of-sequence token, and padding is another one."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"The tokenizer of {role!r} has no end-of-sequence token: no completion would ever end. Set eos_token in "
            "its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise InputError(
            f"The tokenizer of {role!r} pads with {tokenizer.pad_token!r} and ends with {tokenizer.eos_token!r}: they "
            "must be two tokens, else the end is masked like padding, never learnt. Set pad_token to an unused token."
        )


def check_same_vocabulary(job: Job, role: str) -> None:
    """Student and role mean the same by every token id: end, number of logits, and a sample of the strings."""
    ours, theirs = job.tokenizer, job.tokenizers[role]
    advice = f"Take a {role} with the student's tokenizer, or a method that needs only its text (sequence-kd)."
    if ours.eos_token_id != theirs.eos_token_id:
        raise InputError(
            f"The student ends with token {ours.eos_token_id} ({ours.eos_token!r}), {role!r} with "
            f"{theirs.eos_token_id} ({theirs.eos_token!r}): one would be taught never to stop. {advice}"
        )
    if len(ours) != len(theirs):
        raise InputError(f"The student's tokenizer has {len(ours)} tokens, that of {role!r} {len(theirs)}. {advice}")
    step = max(1, len(ours) // SAMPLE_TOKENS)
    ids = [*range(0, len(ours), step), *ours.all_special_ids]
    pairs = zip(ids, ours.convert_ids_to_tokens(ids), theirs.convert_ids_to_tokens(ids), strict=True)
    for token, mine, other in pairs:
        if mine != other:
            raise InputError(f"Token {token} is {mine!r} for the student and {other!r} for {role!r}. {advice}")
    models = [job.student, *([job.models[role]] if role in job.models else [])]
    sizes = [model.get_output_embeddings().weight.shape[0] for model in models]
    if sizes[0] != sizes[-1]:
        raise InputError(
            f"The student predicts {sizes[0]} logits, {role!r} {sizes[-1]}, with the same tokens: one is padded. Call "
            f"resize_token_embeddings({min(sizes)}) on the larger one and save it."
        )


def check_same_template(job: Job, role: str) -> None:
    """Chat prompts become the same token ids in both; plain text has no template."""
    chats = [task for task in job.tasks if not isinstance(task.prompts["prompt"], str)][:SAMPLE_PROMPTS]
    for name, tokenizer in (("student", job.tokenizer), (role, job.tokenizers[role])):
        if chats and not tokenizer.chat_template:
            raise InputError(
                f"The tasks' prompts are chat messages, and the tokenizer of {name!r} has no chat template: give it "
                "the one that its model was trained with (tokenizer.chat_template), or write the prompts as text."
            )
    for task in chats:
        ours, theirs = (encode(t, task.prompts["prompt"]) for t in (job.tokenizer, job.tokenizers[role]))
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), -1)
            raise InputError(
                f"The chat templates of the student and of {role!r} differ: the prompt of task {task.id!r} becomes "
                f"other tokens from position {at} on. Copy the chat_template that both shall read into both folders."
            )


def check_temperatures(job: Job) -> None:
    """No temperature is 0 or below, neither of fresh rollouts nor of a term."""
    for phase in job.method.phases():
        for term in phase.terms:
            if not getattr(term, "temperature", 1.0) > 0:
                raise InputError(
                    f"Phase {phase.name!r}: the temperature of {term} must be above 0: logits are divided by it."
                )


def check_lengths(job: Job) -> None:
    """Prompt and completion fit into the positions of everybody who reads them, and ids into the embeddings."""
    for phase in job.method.phases():
        longest = max(_completion_tokens(job, source) for source in phase.sources.values())
        readers = {"student": (job.student, {*(phase.contexts.get(name, "prompt") for name in phase.sources)})}
        for role in phase.roles:
            if role.name in scoring_roles(phase) and role.name not in job.models:
                continue
            readers[role.name] = (job.models.get(role.name, job.student), {role.context})
        for name, (model, contexts) in readers.items():
            _check_reader(job, phase, name, model, contexts, longest)


def _check_reader(job: Job, phase: Phase, name: str, model: Any, contexts: set[str], longest: int) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(job.tokenizer) > rows:
        raise InputError(
            f"The tokenizer has {len(job.tokenizer)} tokens, and the model of {name!r} knows {rows}: call "
            f"resize_token_embeddings({len(job.tokenizer)}) on it, train it so, and save it."
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return
    for context in contexts:
        for task in job.tasks:
            prompt = len(encode(job.tokenizer, task.prompt(context)))
            if prompt + longest > positions:
                raise InputError(
                    f"Phase {phase.name!r}: the prompt {context!r} of task {task.id!r} has {prompt} tokens and a "
                    f"completion up to {longest}; the model of {name!r} has {positions} positions. Lower "
                    "settings.max_completion_tokens, or leave out long tasks and rollouts."
                )


def _completion_tokens(job: Job, source: Source) -> int:
    if isinstance(source, Mixed):
        return max(_completion_tokens(job, source.first), _completion_tokens(job, source.second))
    if isinstance(source, Fresh):
        return job.settings.max_completion_tokens
    stock = job.stored.get(cast(Stored, source).policy, {})
    return max((len(r.completion_ids) for task in job.tasks for r in stock.get(task.id, [])), default=0)


# -- the signal ----------------------------------------------------------------------------------------------------


def check_signal(job: Job) -> None:
    """On a few sequences, the gradient of every term reaches the student; nothing is changed by it.

    Raises: TrainingError if a term's gradient is no more than rounding in each of several batches.
    """
    small = replace(job.settings, batch_size=1, accumulation=1, save_every=10**9)
    # later phases read the student as an earlier one leaves it; here all begin with the student as it is
    for phase in job.method.phases():
        student = _with_lora(job.student, small)
        try:
            with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
                trainer = LmTrainer(
                    student, _arguments(small, phase, Path(folder)), job.tokenizer, phase, job.tasks,
                    models=job.models, stored=job.stored, environment=job.environment,
                )  # fmt: skip
                _check_phase(trainer, phase)
        finally:
            if small.lora_rank:
                student.unload()
            elif hasattr(job.student, "workbench_modules"):
                del job.student.workbench_modules


def _check_phase(trainer: LmTrainer, phase: Phase) -> None:
    silent = [term for term in phase.terms if term.coefficient]
    state = dict(phase.state)
    for number in range(BATCHES):
        count = min(BATCH_SIZE, len(trainer._tasks))
        rows = [{"prompt": "", "task": (number * count + i) % len(trainer._tasks)} for i in range(count)]
        batch = trainer._generate_and_score_completions(rows)
        silent = [term for term in silent if not _reaches(trainer, phase, term, batch)]
        if not silent:
            break
        if phase.after_step:  # a signal that the phase's numbers turn on later: look at the middle of the phase
            steps = trainer.args.max_steps
            phase.after_step(phase.state, 1.0, max(1, steps // 2), steps)
    phase.state.update(state)
    if silent:
        raise TrainingError(
            f"Phase {phase.name!r}: the gradient of {silent[0]} is zero in {BATCHES} batches: {_why(phase, silent[0])}"
        )


def _reaches(trainer: LmTrainer, phase: Phase, term: Term, batch: dict[str, Any]) -> bool:
    """Whether the term's gradient is more than rounding; cross-entropy on the same tokens is the yardstick."""
    segment = getattr(term, "segment", next(iter(phase.sources)))
    found, yardstick = (_gradient(trainer, phase, one, batch) for one in (term, CrossEntropy(segment=segment)))
    return found > ROUNDING * abs(term.coefficient) * yardstick


def _gradient(trainer: LmTrainer, phase: Phase, term: Term, batch: dict[str, Any]) -> float:
    """The largest absolute derivative of one term by a parameter of the student."""
    student = trainer.accelerator.unwrap_model(trainer.model)
    trainer.phase = replace(phase, terms=[term])
    try:
        loss: Tensor = trainer._compute_loss(student, batch, None)[0]
    finally:
        trainer.phase = phase
    trained = [p for p in student.parameters() if p.requires_grad]
    if not trained or not loss.requires_grad:
        return 0.0
    grads = torch.autograd.grad(loss, trained, allow_unused=True)
    return max(float(grad.abs().max()) for grad in grads if grad is not None)


def _why(phase: Phase, term: Term) -> str:
    named = [getattr(term, f.name) for f in fields(term)] if is_dataclass(term) else []
    selves = [r for r in phase.roles if r.name in named and r.origin != "given"]
    if selves:
        return (
            f"the role {selves[0].name!r} is the student itself and reads the prompt {selves[0].context!r}, so that it "
            "says what the student says. Give it another prompt (teacher_context: privileged), or a model of its own."
        )
    return (
        "the teacher's signal does not reach the student. Are teacher and student the same model, are all loss weights "
        "0, or are all parameters frozen?"
    )
