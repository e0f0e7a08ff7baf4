"""Asks a chat model many prompts: cached, within a budget, resumable, each answer checked before it counts.

An accepted answer goes to the cache at once, so an interrupted run, and one that its budget stopped, resume where they
stopped. The key of the cache is the whole request with the model, endpoint and parameters; nothing is found by name.
What is not accepted is told to the model once more and then has a status.

Verified by: tests/evals/test_judge.py, tests/evals/test_pair_judge.py, tests/evals/test_generated_questions.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Generic, TypedDict, TypeVar

from workbench.data.records import digest
from workbench.errors import InputError
from workbench.evals.graders import Status
from workbench.memory.distillers.llm import ChatClient, ChatReply, ResponseCache
from workbench.memory.llm_requests import Requests

T = TypeVar("T")
Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a prompt came to: `text` (as `read` gave it) with status ok, else `explanation` says why there is none."""

    text: str = ""
    status: Status = "ok"
    explanation: str = ""


@dataclass
class Usage:
    """What was used since the asker was made; cost in the unit of the prices, None without prices."""

    num_requests: int = 0
    num_cached: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    num_redacted: int = 0
    cost: float | None = None

    def as_json(self) -> dict[str, Any]:
        """All fields by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of a run: tokens in and out together, and cost at prices per million tokens, in one currency.

    Raises: InputError for one price without the other, and a cost without prices.
    """

    max_tokens: int | None = None
    max_cost: float | None = None
    price_in: float | None = None
    price_out: float | None = None

    def __post_init__(self) -> None:
        if (self.price_in is None) != (self.price_out is None) or min(self.price_in or 0, self.price_out or 0) < 0:
            raise InputError("Give both prices (per million tokens in and out), not negative, or neither.")
        if min(self.max_tokens or 0, self.max_cost or 0) < 0:
            raise InputError(f"A limit must not be negative: {self.max_tokens} tokens, {self.max_cost} in cost.")
        if self.max_cost is not None and self.price_in is None:
            raise InputError(f"A limit of the cost ({self.max_cost}) needs the prices per million tokens in and out.")

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """What so many tokens cost; None without prices."""
        if self.price_in is None or self.price_out is None:
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def allows(self, tokens_in: int, tokens_out: int) -> bool:
        """Whether so many tokens in all are within the limits."""
        if self.max_tokens is not None and tokens_in + tokens_out > self.max_tokens:
            return False
        return self.max_cost is None or (self.cost(tokens_in, tokens_out) or 0.0) <= self.max_cost

    def minus(self, usage: Usage) -> Budget:
        """What is left of it after this use; limits do not fall below 0."""
        tokens = None if self.max_tokens is None else max(0, self.max_tokens - usage.tokens_in - usage.tokens_out)
        cost = None if self.max_cost is None else max(0.0, self.max_cost - (usage.cost or 0.0))
        return replace(self, max_tokens=tokens, max_cost=cost)


@dataclass(frozen=True, slots=True)
class _Outcome:
    key: str
    answer: Answer
    replies: tuple[ChatReply, ...]


class AskerOptions(TypedDict, total=False):
    """What every asker can be told, as of Asker."""

    cache: ResponseCache | None
    budget: Budget | None
    concurrency: int
    num_repairs: int


def object_schema(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON schema of an object with just these fields."""
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def delimited(names: Sequence[str], texts: Sequence[str]) -> list[str]:
    """The texts as quoted material; a text cannot hold its own digest, so it cannot close its own quotation."""
    mark = digest(*texts)[:12]
    return [f"BEGIN {name} {mark}\n{text}\nEND {name} {mark}" for name, text in zip(names, texts, strict=True)]


class Asker(Generic[T]):
    """Asks one kind of prompt.

    Args:
        purpose: name and version of the prompt; part of the cache's key.
        schema: of the answer; read: the model's words -> what is kept and cached, "" if they cannot be used.
        wrong: what a model is told whose words cannot be used.
        cache: where accepted answers are kept; None keeps none.
        concurrency: requests in flight at most; num_repairs: how often a model is told.
    Raises: InputError for numbers that cannot be meant.
    """

    def __init__(
        self,
        client: ChatClient,
        *,
        purpose: str,
        schema: dict[str, Any],
        read: Callable[[str], str],
        wrong: str,
        cache: ResponseCache | None = None,
        budget: Budget | None = None,
        concurrency: int = 8,
        num_repairs: int = 1,
    ) -> None:
        if concurrency < 1 or num_repairs < 0:
            raise InputError(f"concurrency ({concurrency}) must be 1 or more, num_repairs ({num_repairs}) 0 or more.")
        self.usage = Usage()
        self._client, self._cache, self._budget = client, cache, budget or Budget()
        self._purpose, self._schema, self._read, self._wrong = purpose, schema, read, wrong
        self._concurrency, self._num_repairs = concurrency, num_repairs
        self._reserved: dict[str, tuple[int, int]] = {}

    def ask(self, prompts: Iterable[tuple[T, Messages | Answer]]) -> Iterator[tuple[T, Answer]]:
        """Yields every item with its answer, as answers arrive; leaving the loop cancels what is in flight.

        Args: prompts: an item and its messages, or its answer where there is nothing to ask.
        Raises: EndpointError as soon as the endpoint can do no request at all.
        """
        waiting: dict[str, list[T]] = {}
        with Requests[_Outcome](self._client.aclose) as requests:
            try:
                for item, messages in prompts:
                    if isinstance(messages, Answer):
                        yield item, messages
                        continue
                    key = self._key(messages)
                    if key in waiting:  # an equal prompt is being asked
                        waiting[key].append(item)
                        continue
                    if cached := self._cached(key):
                        yield item, cached
                        continue
                    while len(waiting) >= self._concurrency or (waiting and not self._fits(messages)):
                        yield from self._take(requests, waiting)
                    if not self._fits(messages):
                        yield item, Answer(status="skipped", explanation="the budget is spent")
                        continue
                    waiting[key] = [item]
                    self._reserved[key] = self._worst_case(messages)
                    requests.start(partial(self._request, key, messages))
                while waiting:
                    yield from self._take(requests, waiting)
            finally:
                requests.stop()
                for outcome in requests.arrived():  # paid for, though nobody waits any more
                    self._book(outcome)
                self._reserved.clear()

    def _take(self, requests: Requests[_Outcome], waiting: dict[str, list[T]]) -> Iterator[tuple[T, Answer]]:
        outcome = requests.next()
        self._book(outcome)
        for item in waiting.pop(outcome.key):
            yield item, outcome.answer

    def _book(self, outcome: _Outcome) -> None:
        self._reserved.pop(outcome.key, None)
        tokens_in = sum(reply.tokens_in for reply in outcome.replies)
        tokens_out = sum(reply.tokens_out for reply in outcome.replies)
        usage = self.usage
        usage.num_requests += sum(reply.num_requests for reply in outcome.replies)
        usage.tokens_in += tokens_in
        usage.tokens_out += tokens_out
        usage.cost = self._budget.cost(usage.tokens_in, usage.tokens_out)
        if self._cache is not None and outcome.answer.text:
            self._cache.put(outcome.key, outcome.answer.text, tokens_in, tokens_out)

    def _key(self, messages: Messages) -> str:
        client = self._client
        settings = json.dumps([client.parameters, self._schema], sort_keys=True)
        return digest(self._purpose, client.model, client.endpoint, settings, json.dumps(messages))

    def _cached(self, key: str) -> Answer | None:
        stored = self._cache.get(key) if self._cache is not None else None
        text = self._read(stored) if stored else ""
        if not text:
            return None
        self.usage.num_cached += 1
        return Answer(text)

    def _fits(self, messages: Messages) -> bool:
        worst_in, worst_out = self._worst_case(messages)
        tokens_in = self.usage.tokens_in + sum(reserved[0] for reserved in self._reserved.values())
        tokens_out = self.usage.tokens_out + sum(reserved[1] for reserved in self._reserved.values())
        return self._budget.allows(tokens_in + worst_in, tokens_out + worst_out)

    def _worst_case(self, messages: Sequence[dict[str, str]]) -> tuple[int, int]:
        # 2.5 characters a token is the dense end; a repair sends the prompt and the first answer again.
        tokens_in = int(sum(len(message["content"]) for message in messages) / 2.5) + 20
        tokens_out = int(self._client.parameters["max_output_tokens"])
        repairs = self._num_repairs
        return tokens_in * (repairs + 1) + (tokens_out + 100) * repairs, tokens_out * (repairs + 1)

    async def _request(self, key: str, messages: Messages) -> _Outcome:
        replies: list[ChatReply] = []
        asked = list(messages)
        for _ in range(self._num_repairs + 1):
            reply = await self._client.complete(asked, self._schema)
            replies.append(reply)
            if reply.failure:
                status: Status = "timeout" if reply.failure.startswith("no answer within") else "grader_error"
                return _Outcome(key, Answer(status=status, explanation=reply.failure), tuple(replies))
            if not reply.is_cut and (text := self._read(reply.text)):
                return _Outcome(key, Answer(text), tuple(replies))
            asked = [*messages, {"role": "assistant", "content": reply.text[:1000] or "(nothing)"}]
            asked.append({"role": "user", "content": self._wrong})
        explanation = f"no readable answer in {len(replies)} attempts; the last: {replies[-1].text[:200]!r}"
        return _Outcome(key, Answer(status="grader_error", explanation=explanation), tuple(replies))
