"""Writes rollouts: single completions, or episodes in which an environment answers, many at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from workbench.errors import InputError
from workbench.policies.lm.rollout import Rollout
from workbench.policies.tasks import Environment, Prompt, Task

#: Prompts' token ids, and how many tokens at most -> what the policy writes after each.
Write = Callable[[Sequence[Sequence[int]], int], list[list[int]]]


def encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; chat messages go through the tokenizer's template, opened for the assistant's turn.

    Raises: InputError for chat messages and a tokenizer without a template.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if not tokenizer.chat_template:
        name = getattr(tokenizer, "name_or_path", "") or "the model"
        raise InputError(
            f"A task's prompt is chat messages, and the tokenizer of {name} has no "
            "chat template: give it the one that its model was trained with (tokenizer.chat_template), or write the "
            "prompts as text."
        )
    return list(tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=False))


def roll_out(
    write: Write, tokenizer: Any, tasks: Sequence[Task], prompt_ids: Sequence[list[int]], max_tokens: int,
    environment: Environment | None = None,
) -> list[Rollout]:  # fmt: skip
    """One rollout for each task, in order.

    Args:
        write: the policy.
        prompt_ids: what it reads, one for each task.
        max_tokens: of a completion, the environment's words included.
        environment: answers after each turn; None = a single completion.
    """
    if environment is None:
        written = write(prompt_ids, max_tokens)
        return [Rollout(task.id, ids, out) for task, ids, out in zip(tasks, prompt_ids, written, strict=True)]
    rollouts = [Rollout(task.id, ids, [], []) for task, ids in zip(tasks, prompt_ids, strict=True)]
    states = [environment.reset(task) for task in tasks]
    active = list(range(len(tasks)))
    for _ in range(environment.max_turns):
        if not active:
            break
        turns = write(
            [rollouts[i].prompt_ids + rollouts[i].completion_ids for i in active], environment.max_turn_tokens
        )
        active = [
            i for i, said in zip(active, turns, strict=True)
            if _take_turn(rollouts[i], said, states[i], environment, tokenizer, max_tokens)
        ]  # fmt: skip
    for rollout, state in zip(rollouts, states, strict=True):
        rollout.reward = environment.reward(state)
    return rollouts


def _take_turn(
    rollout: Rollout, said: list[int], state: Any, environment: Environment, tokenizer: Any, max_tokens: int
) -> bool:
    """Adds the policy's turn and the answer to the rollout; False if the episode is over."""
    mask = rollout.mask if rollout.mask is not None else []
    rollout.completion_ids += said
    mask += [1] * len(said)
    answer, is_over = environment.step(state, tokenizer.decode(said, skip_special_tokens=True))
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"] if answer else []
    has_room = len(rollout.completion_ids) + len(answer_ids) + environment.max_turn_tokens <= max_tokens
    if is_over or not has_room:
        return False
    rollout.completion_ids += answer_ids
    mask += [0] * len(answer_ids)
    return True


def local_writer(model: nn.Module, tokenizer: Any, temperature: float = 1.0, batch_size: int = 256) -> Write:
    """A policy that is a local model; temperature 0 = greedy. Uses torch's global random state."""

    def write(prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        out: list[list[int]] = []
        for start in range(0, len(prompts), batch_size):
            out += generate(model, tokenizer, prompts[start : start + batch_size], max_tokens, temperature)
        return out

    return write


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float
) -> list[list[int]]:
    """What a model writes after each prompt, up to and with the end-of-sequence token."""
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    was_training = model.training
    model.eval()
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id, **(sampling or {"do_sample": False}),
    )  # fmt: skip
    model.train(was_training)
    return [until_eos(row, tokenizer.eos_token_id) for row in cast(Any, output)[:, width:].tolist()]


def until_eos(ids: list[int], eos_id: int) -> list[int]:
    """Up to and with the first end-of-sequence token; what follows is padding."""
    return ids[: ids.index(eos_id) + 1] if eos_id in ids else ids
