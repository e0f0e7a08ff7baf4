"""Whether a served teacher is the model that its files are: the same template, end, vocabulary and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.errors import EndpointError, InputError
from workbench.policies.lm.endpoint import Refused
from workbench.policies.lm.episodes import encode
from workbench.policies.lm.probe import EXTENSIONS, choice_of
from workbench.policies.lm.rollout import Rollout, Scores
from workbench.policies.lm.scoring import LocalTeacher
from workbench.policies.lm.served import ServedModel
from workbench.policies.lm.view import head_of
from workbench.policies.tasks import Prompt


@dataclass(frozen=True, slots=True)
class Agreement:
    """What was compared, and how far apart it was.

    Args:
        max_delta_nats, mean_delta_nats: of log-probabilities of words that both list; NaN if none were compared.
        num_tokens: tokens whose log-probabilities were compared.
        unchecked: what the server gives no way to compare: "log-probabilities", "end", "template", "vocabulary".
    """

    max_delta_nats: float
    mean_delta_nats: float
    num_tokens: int
    unchecked: tuple[str, ...]


def check_served_teacher(
    local: Any, served: ServedModel, sample: Sequence[Rollout], prompts: Sequence[Prompt] = (), *, k: int = 5,
    tolerance_nats: float = 0.25,
) -> Agreement:  # fmt: skip
    """Compares a served teacher with the same model loaded here.

    Args:
        local: the model; its tokenizer is that of `served`.
        sample: prompts and completions whose top-k is compared; a few dozen tokens are enough.
        prompts: texts and chats whose token ids are compared.
        k: words listed for each token.
        tolerance_nats: largest difference of a log-probability. The default is twice the distance of neighbouring
            bfloat16 numbers between 16 and 32, where logits may lie; float32 on both sides stays below 0.001.

    Raises: EndpointError that names all that differs; InputError if the sample has no completion tokens.
    """
    if not any(rollout.completion_ids for rollout in sample):
        raise InputError("The sample for comparing a served teacher has no completion tokens; give a few rollouts.")
    problems, unchecked = [], []
    for name, found in (
        ("vocabulary", _vocabulary(local, served)), ("end", _end(served)), ("template", _template(served, prompts)),
    ):  # fmt: skip
        if found is None:
            unchecked.append(name)
        elif found:
            problems.append(found)
    deltas = np.zeros(0)
    if served.capabilities.prompt_top_k and served.capabilities.accepts_ids:
        deltas = _deltas(local, served, sample, min(k, served.capabilities.prompt_top_k))
        if deltas.max() > tolerance_nats:
            problems.append(
                f"log-probabilities differ by up to {deltas.max():.3g} nats (allowed: {tolerance_nats:g}, mean "
                f"{deltas.mean():.3g}): other weights, another precision, or sampling settings that the server applies"
            )
    else:
        unchecked.append("log-probabilities")
    if problems:
        raise EndpointError(
            f"{served.endpoint.model!r} at {served.endpoint.base_url} is not the teacher loaded here: "
            f"{'; '.join(problems)}. Serve the same folder (weights, tokenizer, template), or use one of the two alone."
        )
    highest, mean = (float(deltas.max()), float(deltas.mean())) if len(deltas) else (float("nan"), float("nan"))
    return Agreement(highest, mean, len(deltas), tuple(unchecked))


def _vocabulary(local: Any, served: ServedModel) -> str | None:
    """What is wrong, "" if nothing, None if it cannot be known; so with the others."""
    here, there = head_of(local).weight.shape[0], served.capabilities.vocabulary
    if there is None:
        return None
    return "" if here == there else f"it predicts {there} words, here there are {here}"


def _end(served: ServedModel) -> str | None:
    """The local end-of-sequence token, forced by a bias, must end a completion."""
    end = served.tokenizer.eos_token_id
    body = {"prompt": _text(served), "max_tokens": 2, "temperature": 0.0, "logit_bias": {str(end): 100}}
    if not served.capabilities.has_completions:
        return None
    try:
        answer = served.endpoint.post("/completions", body)
        # A server that overlooks the bias writes on as it would without it.
        plain = served.endpoint.post("/completions", {**body, "logit_bias": {}})
    except Refused:
        return None
    biased, unbiased = choice_of(answer), choice_of(plain)
    if biased.get("finish_reason") == "stop":
        return ""
    if biased.get("text") == unbiased.get("text"):
        return None
    return f"a completion does not end at token {end} ({served.tokenizer.eos_token!r}), which ends it here"


def _template(served: ServedModel, prompts: Sequence[Prompt]) -> str | None:
    """Each prompt must become the same token ids there and here."""
    if not prompts or not served.capabilities.has_extensions:
        return None
    for prompt in prompts:
        is_text = isinstance(prompt, str)
        path, asked = ("/completions", {"prompt": prompt}) if is_text else ("/chat/completions", {"messages": prompt})
        try:
            answer = served.endpoint.post(path, {"max_tokens": 1, **EXTENSIONS, **asked})
        except Refused:
            return None
        there = answer.get("prompt_token_ids") or choice_of(answer).get("prompt_token_ids")
        if there is None:
            return None
        here = encode(served.tokenizer, prompt)
        if here != there:
            shorter = min(len(here), len(there))
            at = next((i for i in range(shorter) if here[i] != there[i]), shorter)
            return (
                f"the {'text' if is_text else 'chat'} {str(prompt)[:60]!r} becomes other tokens from position {at} on: "
                f"there {served.tokenizer.decode(there[at : at + 8])!r} {there[at : at + 8]}, here "
                f"{served.tokenizer.decode(here[at : at + 8])!r} {here[at : at + 8]}"
            )
    return ""


def _deltas(local: Any, served: ServedModel, sample: Sequence[Rollout], k: int) -> np.ndarray[Any, Any]:
    """For each token, the largest difference over words that both list; infinite if they list none in common."""
    prompts = [rollout.prompt_ids for rollout in sample]
    completions = [rollout.completion_ids for rollout in sample]
    pairs = zip(
        LocalTeacher(local, version="compared").top_k(prompts, completions, k),
        served.top_k(prompts, completions, k),
        strict=True,
    )
    return np.array([_delta(one, other, row) for one, other in pairs for row in range(one.ids.shape[0])])


def _delta(one: Scores, other: Scores, row: int) -> float:
    here, there = (
        dict(zip(scores.ids[row].tolist(), scores.logprobs[row].tolist(), strict=True)) for scores in (one, other)
    )
    both = [abs(value - there[word]) for word, value in here.items() if word in there]
    return max(both, default=float("inf"))


def _text(served: ServedModel) -> Any:
    """A prompt of one token."""
    first = next(i for i in range(len(served.tokenizer)) if i not in served.tokenizer.all_special_ids)
    return [first] if served.capabilities.accepts_ids else served.tokenizer.decode([first])
