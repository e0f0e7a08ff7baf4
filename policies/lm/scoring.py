"""A teacher's top-k scores of stored rollouts, made once: kept in the store by teacher, k and token ids.

Training reads them with `Stored(policy, with_scores=NAME)` and `TokenDivergence(teacher="stored")`: what is not among
the k words is one further outcome, so that forward and reverse KL are lower bounds of those over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import duckdb
import numpy as np
import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels.linear_divergence import LinearLogits
from workbench.policies.lm.episodes import encode
from workbench.policies.lm.local_models import weights_version
from workbench.policies.lm.rollout import Rollout, Scores
from workbench.policies.lm.view import backbone, head_of
from workbench.policies.store import load_scores, save_scores, score_id
from workbench.policies.tasks import Task

#: Token ids of what the teacher reads, and of what it scores after it.
Pair = tuple[Sequence[int], Sequence[int]]
#: Rows of logits held at once.
_LOGIT_ROWS = 512


class Scorer(Protocol):
    """Who scores: `LocalTeacher`, or `served.ServedModel`."""

    @property
    def version(self) -> str:
        """Digest of the weights, or a served model's own name."""
        ...

    def top_k(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], k: int) -> list[Scores]:
        """The k likeliest words of each completion token, at temperature 1, in order."""
        ...


class LocalTeacher:
    """A model of this machine that scores.

    Args: version: digest of its weights; None = computed; batch_tokens: of one forward pass, padding included.
    """

    def __init__(self, model: Any, version: str | None = None, batch_tokens: int = 8192) -> None:
        self.model, self.version, self._batch_tokens = model, version or weights_version(model), batch_tokens

    @torch.no_grad()
    def top_k(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], k: int) -> list[Scores]:
        """The k likeliest words of each completion token, at temperature 1, in order.

        Args: prompts, completions: token ids, as many of one as of the other.

        Raises: InputError for an empty prompt, or a k beyond the vocabulary.
        """
        words = head_of(self.model).weight.shape[0]
        if not 1 <= k <= words:
            raise InputError(f"k must be between 1 and the teacher's {words} words, not {k}.")
        pairs = [(list(p), list(c)) for p, c in zip(prompts, completions, strict=True)]
        if not all(p for p, _ in pairs):
            raise InputError("A prompt without tokens cannot be scored after: nothing predicts the first token.")
        nothing = Scores(np.zeros((0, k), np.int32), np.zeros((0, k), np.float32))
        found = {at: nothing for at, (_, c) in enumerate(pairs) if not c}
        lengths = {at: len(p) + len(c) for at, (p, c) in enumerate(pairs) if c}
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in _batches(lengths, self._batch_tokens):
                found |= dict(zip(batch, self._score([pairs[i] for i in batch], k), strict=True))
        finally:
            self.model.train(was_training)
        return [found[i] for i in range(len(pairs))]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], k: int) -> list[Scores]:
        device = next(self.model.parameters()).device
        # The last token predicts nothing that is asked for. Padding on the right: no token sees it.
        rows = [(p + c)[:-1] for p, c in pairs]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        hidden = backbone(self.model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        wanted = [hidden[at, len(p) - 1 : len(p) - 1 + len(c)] for at, (p, c) in enumerate(pairs)]
        top_ids, top_logprobs = self._top(torch.cat(wanted), k)
        lengths = [len(c) for _, c in pairs]
        parts = zip(top_ids.split(lengths), top_logprobs.split(lengths), strict=True)
        return [Scores(one.numpy().astype(np.int32), other.numpy()) for one, other in parts]

    def _top(self, hidden_TD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities [T, K], the likeliest first."""
        head = head_of(self.model)
        ids, logprobs = [], []
        for part in hidden_TD.split(_LOGIT_ROWS):
            logits = LinearLogits(part, head.weight, head.bias, head.scale, head.softcap).logits()
            best = logits.topk(k)
            ids.append(best.indices.cpu())
            logprobs.append((best.values - logits.logsumexp(-1, keepdim=True)).float().cpu())
        return torch.cat(ids), torch.cat(logprobs)


def prompts_of(tokenizer: Any, tasks: Sequence[Task], context: str) -> dict[str, list[int]]:
    """Task id -> the token ids of its prompt in a teacher's context, for `attach`."""
    return {task.id: encode(tokenizer, task.prompt(context)) for task in tasks}


def attach(
    con: duckdb.DuckDBPyConnection, teacher: Scorer, name: str, rollouts: Sequence[Rollout], *, k: int = 64,
    prompts: Mapping[str, Sequence[int]] | None = None, chunk: int = 256,
) -> list[Rollout]:  # fmt: skip
    """The rollouts with the teacher's scores; only those that the store lacks are made, and kept in it.

    Args:
        name: under which `Stored(with_scores=…)` asks for them.
        prompts: task id -> what the teacher reads instead of the rollout's own prompt (`prompts_of`).
        chunk: rollouts that are scored and kept at a time; what an interruption loses.

    Raises: InputError if a task has no prompt in `prompts`, or k cannot be had.
    """
    keys, pairs = keyed(teacher.version, rollouts, k, prompts)
    found = load_scores(con, list(pairs))
    missing = [key for key in pairs if key not in found]
    for start in range(0, len(missing), chunk):
        fresh = score(teacher, {key: pairs[key] for key in missing[start : start + chunk]}, k)
        save_scores(con, teacher.version, fresh)
        found |= fresh
    return with_scores(rollouts, [found[key] for key in keys], name, teacher.version)


def keyed(
    version: str, rollouts: Sequence[Rollout], k: int, prompts: Mapping[str, Sequence[int]] | None = None
) -> tuple[list[str], dict[str, Pair]]:
    """The key of each rollout's scores, and what is scored by key; arguments as in `attach`."""
    pairs: dict[str, Pair] = {}
    keys = []
    for rollout in rollouts:
        prompt = _prompt(rollout, prompts)
        keys.append(score_id(version, k, prompt, rollout.completion_ids))
        pairs[keys[-1]] = (prompt, rollout.completion_ids)
    return keys, pairs


def score(teacher: Scorer, pairs: Mapping[str, Pair], k: int) -> dict[str, Scores]:
    """New scores by key, in the store's precision, so that they train like those that are read back."""
    made = teacher.top_k([prompt for prompt, _ in pairs.values()], [ids for _, ids in pairs.values()], k)
    return {key: _as_stored(scores) for key, scores in zip(pairs, made, strict=True)}


def with_scores(rollouts: Sequence[Rollout], scores: Sequence[Scores], name: str, version: str) -> list[Rollout]:
    """The rollouts with their scores, known as those of the teacher `name`."""
    return [
        replace(rollout, scores=one, meta={**rollout.meta, "scores_of": name, "scores_version": version})
        for rollout, one in zip(rollouts, scores, strict=True)
    ]


def keep(con: duckdb.DuckDBPyConnection, version: str, rollouts: Sequence[Rollout]) -> int:
    """Keeps scores that came along with a served teacher's own rollouts, for `attach`; returns how many were new.

    Args: version: the teacher's.
    """
    came = {
        score_id(version, rollout.scores.ids.shape[1], rollout.prompt_ids, rollout.completion_ids): rollout.scores
        for rollout in rollouts if rollout.scores is not None
    }  # fmt: skip
    return save_scores(con, version, {key: _as_stored(scores) for key, scores in came.items()})


def _prompt(rollout: Rollout, prompts: Mapping[str, Sequence[int]] | None) -> Sequence[int]:
    if prompts is None:
        return rollout.prompt_ids
    if rollout.task_id not in prompts:
        raise InputError(f"There is no prompt for the teacher to read for task {rollout.task_id!r}; add its task.")
    return prompts[rollout.task_id]


def _as_stored(scores: Scores) -> Scores:
    """In the store's precision."""
    return Scores(scores.ids.astype("<i4"), scores.logprobs.astype("<f2"))


def _batches(lengths: Mapping[int, int], batch_tokens: int) -> list[list[int]]:
    """Keys of sequences of similar length, at most so many tokens a batch when padded (or one sequence)."""
    batches: list[list[int]] = []
    for at in sorted(lengths, key=lengths.__getitem__):
        if batches and (len(batches[-1]) + 1) * lengths[at] <= batch_tokens:
            batches[-1].append(at)
        else:
            batches.append([at])
    return batches
