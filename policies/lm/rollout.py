"""A rollout: a prompt and what a policy wrote after it, as token ids, with what is known of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.errors import InputError


@dataclass(slots=True)
class Scores:
    """A teacher's top-k for each token of a completion, natural logs at temperature 1.

    Args: ids: int32 [T, K]; logprobs: float [T, K].
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.floating]


@dataclass(slots=True)
class Rollout:
    """One completion of one task's prompt.

    Args:
        prompt_ids: what the policy read.
        completion_ids: what followed, in a multi-turn episode with the environment's words in between.
        mask: 1 = written by the policy, 0 = by the environment (context only); None = all 1.
        logprobs: of the policy itself, natural log, one for each completion token; None = unknown.
        reward: what the environment or a verifier gave; None = not judged.
    """

    task_id: str
    prompt_ids: list[int]
    completion_ids: list[int]
    mask: list[int] | None = None
    logprobs: list[float] | None = None
    reward: float | None = None
    scores: Scores | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise InputError(f"A rollout of task {self.task_id!r} has an empty prompt.")
        for name, values in (("mask", self.mask), ("logprobs", self.logprobs)):
            if values is not None and len(values) != len(self.completion_ids):
                raise InputError(
                    f"A rollout of task {self.task_id!r} has {len(self.completion_ids)} completion tokens, but "
                    f"{len(values)} values in {name}."
                )


def collate(
    rollouts: Sequence[Rollout], prompts: Mapping[str, Sequence[Sequence[int]]], weights: Sequence[float], pad_id: int
) -> dict[str, Tensor]:
    """Tensors of a segment; prompts are padded on the left, completions on the right.

    Args:
        prompts: context -> the prompt ids that roles of this context read, one for each rollout. "prompt" is needed.
        weights: one for each rollout, multiplied into its tokens' weights.

    Returns: completion_ids, completion_mask (1 = a token, int), loss_weights (float: 0 for padding and for the
        environment's words), all [B, T]; for every context, `<context>_ids` and `<context>_mask` [B, P]; with scores
        also top_ids (int) and top_logprobs (float) [B, T, K].
    """
    length = max((len(rollout.completion_ids) for rollout in rollouts), default=0)
    size = (len(rollouts), max(length, 1))
    batch = {
        "completion_ids": torch.full(size, pad_id),
        "completion_mask": torch.zeros(size, dtype=torch.long),
        "loss_weights": torch.zeros(size),
    }
    for row, (rollout, weight) in enumerate(zip(rollouts, weights, strict=True)):
        n = len(rollout.completion_ids)
        batch["completion_ids"][row, :n] = torch.tensor(rollout.completion_ids, dtype=torch.long)
        batch["completion_mask"][row, :n] = 1
        mask = torch.ones(n) if rollout.mask is None else torch.tensor(rollout.mask, dtype=torch.float32)
        batch["loss_weights"][row, :n] = mask * weight
    for context, ids in prompts.items():
        width = max(map(len, ids))
        batch[f"{context}_ids"] = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in ids])
        batch[f"{context}_mask"] = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    if all(rollout.scores for rollout in rollouts):
        batch |= _collate_scores(rollouts, size)
    return batch


def _collate_scores(rollouts: Sequence[Rollout], size: tuple[int, int]) -> dict[str, Tensor]:
    scores = [rollout.scores for rollout in rollouts if rollout.scores]
    widest = max(score.ids.shape[1] for score in scores)
    ids = torch.full((*size, widest), -1)
    logprobs = torch.full((*size, widest), float("-inf"))
    for row, score in enumerate(scores):
        tokens, k = score.ids.shape
        ids[row, :tokens, :k] = torch.from_numpy(score.ids.astype(np.int64))
        logprobs[row, :tokens, :k] = torch.from_numpy(score.logprobs.astype(np.float32))
    return {"top_ids": ids, "top_logprobs": logprobs}
