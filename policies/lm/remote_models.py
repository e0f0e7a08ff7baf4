"""Models behind a server, as a training run reads them: before training they write rollouts and score them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from workbench.data.redact import redact
from workbench.errors import InputError
from workbench.model_server import is_loopback
from workbench.policies.lm.endpoint import Endpoint
from workbench.policies.lm.episodes import encode, roll_out
from workbench.policies.lm.local_models import load_tokenizer, vocabulary_version
from workbench.policies.lm.rollout import Rollout, Scores
from workbench.policies.lm.served import ServedModel
from workbench.policies.tasks import Environment, Task

_TEXT = "Tokenizers differ in: naïve café, 日本語, foo_bar(x)[-1] != 3.14; it's 1,234,567!"


@dataclass(frozen=True)
class RemoteModel:
    """A model on a server; it is asked nothing until something has to be written or scored.

    Args:
        tokenizer: the model's; where `is_text_only`, the student's, which cuts its text into tokens.
        version: under which rollouts and scores are kept.
        tokens: digest of the tokenizer's vocabulary.
        is_text_only: token ids mean nothing to it: it gets text and gives text.
    """

    endpoint: Endpoint
    tokenizer: Any
    version: str
    tokens: str
    is_text_only: bool

    @property
    def source(self) -> str:
        """What people call it."""
        return f"{self.endpoint.model}@{self.endpoint.base_url}"

    @property
    def model(self) -> Any:
        """Raises InputError: it cannot be asked for its distribution while a student trains."""
        raise InputError(
            f"{self.source} is behind a server: it writes rollouts and scores them before training, and the method "
            "asks it at every step. Take a method that learns from stored rollouts (sequence-kd, soda, step-by-step; "
            "gkd and taid with config: {teacher_scores: stored}, gkd with on_policy: 0), or a model folder."
        )

    @cached_property
    def served(self) -> ServedModel:
        """With what a probe found; raises EndpointError, and InputError if the server cuts text into other tokens."""
        served = ServedModel(self.endpoint, self.tokenizer, version=self.version)
        if self.is_text_only:
            text_only = replace(
                served.capabilities, accepts_ids=False, returns_ids=False, has_extensions=False, prompt_top_k=0,
                generated_top_k=0,
            )  # fmt: skip
            return ServedModel(self.endpoint, self.tokenizer, text_only, self.version)
        self._check_tokenizer(served)
        return served

    def _check_tokenizer(self, served: ServedModel) -> None:
        if not served.capabilities.has_completions:
            return
        answer = self.endpoint.post("/completions", {"prompt": _TEXT, "max_tokens": 1})
        used, own = (answer.get("usage") or {}).get("prompt_tokens"), len(encode(self.tokenizer, _TEXT))
        if used is not None and used != own:
            raise InputError(
                f"{self.source} cuts a sentence into {used} tokens, and the tokenizer that the recipe names for it "
                f"into {own}: it is another model's. Leave `tokenizer` out to learn from the text alone."
            )

    def roll_out(
        self, tasks: Sequence[Task], *, context: str, max_tokens: int, temperature: float, seed: int,
        environment: Environment | None = None,
    ) -> list[Rollout]:  # fmt: skip
        """One rollout of each task, in order; whether the same seed gives the same is the server's matter.

        Args: context: which of the tasks' prompts is read; environment: answers after each turn.

        Raises: EndpointError; InputError for a prompt that must not leave the machine, and for an environment where
            the server takes no token ids.
        """
        seed %= 2**31  # some servers take no longer numbers
        self._refuse_secrets([(task.id, str(task.prompt(context))) for task in tasks])
        if environment is None:
            return self.served.roll_out(
                tasks, context=context, max_tokens=max_tokens, temperature=temperature, seed=seed
            )  # fmt: skip
        self._needs_tokenizer("an environment's turns follow token ids")
        prompts = [encode(self.tokenizer, task.prompt(context)) for task in tasks]
        write = self.served.writer(temperature, seed)
        return roll_out(write, self.tokenizer, tasks, prompts, max_tokens, environment)

    def scorer(self) -> RemoteModel:
        """Who gives the model's top-k of given completions."""
        return self

    def top_k(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], k: int) -> list[Scores]:
        """See ServedModel.top_k; InputError also for a text that must not leave the machine."""
        self._needs_tokenizer("scores are of token ids")
        texts = [self.tokenizer.decode([*p, *c]) for p, c in zip(prompts, completions, strict=True)]
        self._refuse_secrets([("", text) for text in texts])
        return self.served.top_k(prompts, completions, k)

    def _needs_tokenizer(self, why: str) -> None:
        if self.is_text_only:
            raise InputError(
                f"{self.source} is used for its text alone, and {why}: name the folder of its tokenizer (served: "
                "{tokenizer: FOLDER}), or take a method that needs no more than text (sequence-kd, soda, step-by-step)."
            )

    def _refuse_secrets(self, texts: Sequence[tuple[str, str]]) -> None:
        """Nothing is redacted here: the student would be trained on other words than the teacher answered.

        Args: texts: (task id, or "" for a completion, which has no name; text).
        """
        if is_loopback(self.endpoint.base_url):
            return
        for name, text in texts:
            found = redact(text)
            if found.findings:
                named, kinds = name or f"a completion ({found.text[:40]!r} …)", ", ".join(found.findings)
                raise InputError(
                    f"{named} holds what looks like a secret ({kinds}), and {self.endpoint.base_url} is not "
                    "on this machine: nothing of this batch was sent. Take the secret out of the task, or serve the "
                    "model here."
                )


def remote(
    url: str, model: str, student_tokenizer: Any, *, tokenizer: str | Path | None = None,
    api_key_env: str | None = None, version: str | None = None,
) -> RemoteModel:  # fmt: skip
    """A model on a server that speaks OpenAI's API.

    Args:
        tokenizer: folder of the model's tokenizer; None = its text alone is used, cut by the student's.
        version: None = the server's name for the model: give another when other weights are served under it.

    Raises: InputError, MissingExtra without httpx.
    """
    words = student_tokenizer if tokenizer is None else load_tokenizer(tokenizer)
    endpoint = Endpoint(url, model, api_key_env=api_key_env)
    return RemoteModel(endpoint, words, version or model, vocabulary_version(words), tokenizer is None)
