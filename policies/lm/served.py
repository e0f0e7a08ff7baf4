"""A policy or teacher behind an OpenAI-compatible server: writes rollouts, and scores given token ids.

docs/serving.md has the command for vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from workbench.errors import EndpointError, InputError
from workbench.policies.lm.endpoint import Endpoint
from workbench.policies.lm.episodes import Write, encode
from workbench.policies.lm.probe import (
    EXTENSIONS,
    Capabilities,
    choice_of,
    completion_ids,
    generated_rows,
    probe,
    prompt_rows,
    reading,
    token_id,
)
from workbench.policies.lm.rollout import Rollout, Scores
from workbench.policies.tasks import Prompt, Task


@dataclass(frozen=True, slots=True)
class Written:
    """One completion.

    Args:
        logprobs: of each token, natural log; None = not given.
        scores: top-k of each token at temperature 1; None = not asked for, or not for every token.
        meta: `ids` "served" or "encoded" (from the text, by the tokenizer given: may differ from what was sampled),
            `eos` "served", "appended" or "none" (cut), `logprobs_temperature`.
    """

    ids: list[int]
    text: str
    logprobs: list[float] | None = None
    scores: Scores | None = None
    meta: dict[str, Any] = field(default_factory=dict)


class ServedModel:
    """A model on a server.

    Args:
        tokenizer: the model's; for a text-only server, the student's.
        capabilities: None = they are probed.
        version: under which rollouts and scores are kept; None = the server's name for the model. Give another when
            other weights are served under the same name.
    """

    def __init__(
        self, endpoint: Endpoint, tokenizer: Any, capabilities: Capabilities | None = None, version: str | None = None
    ) -> None:
        self.endpoint, self.tokenizer, self.version = endpoint, tokenizer, version or endpoint.model
        self.capabilities = capabilities or probe(endpoint, tokenizer)

    # -- writing -----------------------------------------------------------------------------------------------------

    def roll_out(
        self, tasks: Sequence[Task], *, context: str = "prompt", num_samples: int = 1, max_tokens: int = 256,
        temperature: float = 1.0, k: int = 0, seed: int | None = None,
    ) -> list[Rollout]:  # fmt: skip
        """Rollouts of the tasks, a task's samples one after another, in the order of the tasks.

        Args:
            context: which of the tasks' prompts is read.
            k: top-k of each generated token as the rollout's scores; 0 = none.
            seed: of the first request; each further one has the next number. None = the server's own.

        Raises: InputError for what the server cannot do, EndpointError where it fails.
        """
        owners = [task for task in tasks for _ in range(num_samples)]
        prompts = [task.prompt(context) for task in owners]
        encoded = [encode(self.tokenizer, prompt) for prompt in prompts]  # first: what fails here costs no request
        written = self.write(prompts, max_tokens, temperature, k=k, seed=seed)
        return [
            Rollout(task.id, ids, one.ids, None, one.logprobs, None, one.scores, one.meta)
            for task, ids, one in zip(owners, encoded, written, strict=True)
        ]

    def writer(self, temperature: float = 1.0, seed: int | None = None) -> Write:
        """The model as a policy for `episodes.roll_out`, turn by turn.

        Args: seed: of the first request; each further one has the next number. None = the server's own. Whether the
            same seed gives the same text is the server's matter.

        Raises: InputError if it takes no token ids.
        """
        self._needs_ids("an episode's turns follow token ids")
        num_asked = 0

        def write(prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
            nonlocal num_asked
            first = None if seed is None else seed + num_asked
            num_asked += len(prompts)
            asked = [{"prompt": list(ids)} for ids in prompts]
            return [one.ids for one in self._write(asked, max_tokens, temperature, seed=first)]

        return write

    def write(
        self, prompts: Sequence[Prompt], max_tokens: int, temperature: float, *, k: int = 0, seed: int | None = None
    ) -> list[Written]:
        """A completion of each prompt, in order; arguments as in `roll_out`."""
        return self._write([self._asked(prompt) for prompt in prompts], max_tokens, temperature, k, seed)

    def sampling(self, max_tokens: int, temperature: float) -> dict[str, Any]:
        """What `save_rollouts` should keep of how completions were written."""
        ids = "served" if self.capabilities.returns_ids else "encoded"
        return {"max_tokens": max_tokens, "temperature": temperature, "top_p": 1.0, "token_ids": ids}

    def _asked(self, prompt: Prompt) -> dict[str, Any]:
        """The prompt as ids where the server takes them, so that nobody's template comes between; else as it is."""
        if self.capabilities.accepts_ids:
            return {"prompt": encode(self.tokenizer, prompt)}
        if isinstance(prompt, str):
            if self.capabilities.has_completions:
                return {"prompt": prompt}
            return {"messages": [{"role": "user", "content": prompt}]}
        if not self.capabilities.has_chat:
            raise InputError(
                f"The prompts are chat messages, and {self.endpoint.base_url} neither chats nor takes token ids. "
                "Write the prompts as text, or take another server."
            )
        return {"messages": [dict(message) for message in prompt]}

    def _write(
        self, asked: Sequence[dict[str, Any]], max_tokens: int, temperature: float, k: int = 0, seed: int | None = None
    ) -> list[Written]:
        able = self.capabilities
        if k:
            self._check_generated_k(k, temperature)
        body: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": 1.0}
        body |= EXTENSIONS if able.has_extensions else {}
        chats = [{**body, **one} for one in asked if "messages" in one]
        texts = [{**body, **one} for one in asked if "messages" not in one]
        if chats and texts:
            raise InputError("The prompts are partly text, partly chat messages; ask for them separately.")
        for number, one in enumerate(chats or texts):
            if able.generated_top_k:
                one |= {"logprobs": True, "top_logprobs": k} if chats else {"logprobs": k}
            if seed is not None:
                one["seed"] = seed + number
        answers = self.endpoint.map("/chat/completions" if chats else "/completions", chats or texts)
        return [self._read(answer, temperature, k) for answer in answers]

    def _read(self, answer: Mapping[str, Any], temperature: float, k: int) -> Written:
        choice, end = choice_of(answer), self.tokenizer.eos_token_id
        with reading():
            text = str((choice["message"]["content"] if "message" in choice else choice["text"]) or "")
        ids, rows = completion_ids(choice), generated_rows(choice)
        meta: dict[str, Any] = {"ids": "encoded" if ids is None else "served"}
        if ids is None:
            ids, rows = list(self.tokenizer(text, add_special_tokens=False)["input_ids"]), None
        is_ended = choice.get("finish_reason") == "stop"
        has_end = bool(ids) and ids[-1] == end
        meta["eos"] = "none" if not is_ended else "served" if has_end else "appended"
        if is_ended and not has_end:
            ids = [*ids, end]
        # One row short where the end was appended: then nothing is known of the last token.
        if rows is None or len(rows[0]) != len(ids):
            return Written(ids, text, None, None, meta)
        meta["logprobs_temperature"] = temperature if self.capabilities.generated_temperature == "honoured" else 1.0
        scores = None
        if k and len(rows[1]) == len(ids):
            named = [{token_id(name): value for name, value in row.items()} for row in rows[1]]
            scores = _scores([{i: v for i, v in row.items() if i is not None} for row in named], k)
        return Written(ids, text, rows[0], scores, meta)

    def _check_generated_k(self, k: int, temperature: float) -> None:
        able = self.capabilities
        if k > able.generated_top_k or not able.returns_ids:
            raise InputError(
                f"{self.endpoint.base_url} lists {able.generated_top_k} words for a generated token"
                f"{'' if able.returns_ids else ', by their text and not by id'}; asked was for {k}. "
                "vLLM gives more with --max-logprobs; else take k = 0."
            )
        if temperature != 1 and able.generated_temperature != "ignored":
            raise InputError(
                f"Scores are kept at temperature 1, and this server's log-probabilities follow the temperature "
                f"({temperature:g}). Write at temperature 1, or take k = 0 and score afterwards."
            )

    # -- scoring -----------------------------------------------------------------------------------------------------

    def top_k(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], k: int, temperature: float = 1.0
    ) -> list[Scores]:
        """The model's k likeliest words for each token of given completions, by prompt_logprobs.

        Args: prompts, completions: token ids, as many of one as of the other; temperature: divides the logits.

        Raises: InputError where the server cannot do it (or would ignore the temperature), EndpointError where it
            fails or describes other tokens than those that were sent.
        """
        able = self.capabilities
        self._needs_ids("scoring is of token ids")
        if k > able.prompt_top_k:
            raise InputError(
                f"{self.endpoint.base_url} lists {able.prompt_top_k} words for a token of a prompt; asked was for {k}. "
                "Ask for fewer; vLLM gives more with --max-logprobs, other servers often none (then only the text and "
                "the top-k of what the teacher itself writes can be learnt from)."
            )
        if temperature != 1 and able.prompt_temperature != "honoured":
            raise InputError(
                f"{self.endpoint.base_url} ignores the temperature of prompt_logprobs (the same prompt at temperature "
                f"1 and 2 gave equal numbers), so that {temperature:g} would silently be 1. Score at temperature 1; a "
                "top-k cannot be tempered afterwards, because its tail is not known."
                if able.prompt_temperature == "ignored"
                else f"Whether {self.endpoint.base_url} applies a temperature to prompt_logprobs is not known; only 1 "
                f"is safe, not {temperature:g}."
            )
        pairs = [(list(p), list(c)) for p, c in zip(prompts, completions, strict=True)]
        bodies = [
            {"prompt": p + c, "max_tokens": 1, "temperature": temperature, "top_p": 1.0, "prompt_logprobs": k}
            for p, c in pairs if c
        ]  # fmt: skip
        answers = iter(self.endpoint.map("/completions", bodies))
        return [self._scored(next(answers), p, c, k) if c else _scores([], k) for p, c in pairs]

    def _scored(self, answer: Mapping[str, Any], prompt: list[int], completion: list[int], k: int) -> Scores:
        rows = prompt_rows(answer) or []
        wrong = len(rows) != len(prompt) + len(completion)
        # Each row holds the token itself, likely or not: one that does not is of another place or tokenizer.
        wrong = wrong or any(token not in row for token, row in zip(completion, rows[len(prompt) :], strict=True))
        if wrong:
            raise EndpointError(
                f"{self.endpoint.base_url} was sent {len(prompt)} + {len(completion)} tokens and described "
                f"{len(rows)}, or others: its scores belong to something else. Does the server add a token in front "
                "of a prompt, or serve a model with another tokenizer?"
            )
        return _scores(rows[len(prompt) :], k)

    def _needs_ids(self, why: str) -> None:
        if not self.capabilities.accepts_ids:
            raise InputError(
                f"{self.endpoint.base_url} takes no token ids as a prompt, and {why}. vLLM does at /v1/completions; "
                "otherwise use this server for text alone."
            )


def _scores(rows: Sequence[Mapping[int, float]], k: int) -> Scores:
    """The k likeliest of each row; id -1 fills rows that have fewer."""
    ids = np.full((len(rows), k), -1, np.int32)
    logprobs = np.full((len(rows), k), -np.inf, np.float32)
    for at, row in enumerate(rows):
        best = sorted(row.items(), key=lambda item: -item[1])[:k]
        ids[at, : len(best)] = [word for word, _ in best]
        logprobs[at, : len(best)] = [value for _, value in best]
    return Scores(ids, logprobs)
