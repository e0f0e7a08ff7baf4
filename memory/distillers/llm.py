"""The llm distiller: any chat model behind a small protocol writes the record; what it writes is checked.

Paper: Structured Distillation for Personalized Agent Memory, arXiv 2603.13017, seed id 1 (card 001, step 3).
Deviations: sides of an exchange are cut to their head and tail, not only their head; prompt in our own words; secrets
    are redacted before anything is sent and restored nowhere; the core may only name identifiers of the exchange.
Verified by: tests/memory/test_llm_distiller.py (against a real server process, faults included).

Requests run in one background thread; the caller's thread redacts, reads and writes the cache, and gets results as they
arrive. Leaving the loop over `distil` (break, exception, Ctrl-C) cancels all requests in flight.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from workbench.data.records import digest
from workbench.errors import InputError
from workbench.memory.distillers._llm_record import (
    MAX_SIDE_CHARS,
    SCHEMA,
    BadReply,
    Prompt,
    build_prompt,
    read_reply,
    redact_like,
    write_reply,
)
from workbench.memory.llm_requests import Requests
from workbench.memory.types import Distilled, Exchange, Failed

if TYPE_CHECKING:
    import duckdb


class ChatReply(Protocol):
    """One answer; `failure` says why there is no text, `is_estimated` that the server did not count tokens."""

    @property
    def text(self) -> str: ...
    @property
    def failure(self) -> str: ...
    @property
    def is_cut(self) -> bool: ...
    @property
    def tokens_in(self) -> int: ...
    @property
    def tokens_out(self) -> int: ...
    @property
    def is_estimated(self) -> bool: ...
    @property
    def num_requests(self) -> int: ...


class ChatClient(Protocol):
    """What the distiller needs of a client; workbench.llm_client.OpenAIChat is one.

    `parameters` is JSON-able, has `max_output_tokens`, and goes into the key of the cache.
    """

    model: str
    endpoint: str
    parameters: dict[str, Any]

    async def complete(self, messages: Sequence[dict[str, str]], schema: dict[str, Any]) -> ChatReply: ...
    async def aclose(self) -> None: ...


class ResponseCache(Protocol):
    """Accepted answers by request; only used from the thread that iterates."""

    def get(self, request_hash: str) -> str | None: ...
    def put(self, request_hash: str, response: str, tokens_in: int, tokens_out: int) -> None: ...


class DuckDBCache:
    """A ResponseCache in the store's table llm_cache; holds redacted answers only.

    Args: connection: gives the open connection; asked each time, because a store that was handed over has a new one.
    """

    def __init__(self, connection: Callable[[], duckdb.DuckDBPyConnection]) -> None:
        self._connection = connection

    def get(self, request_hash: str) -> str | None:
        row = (
            self._connection()
            .execute("SELECT response FROM llm_cache WHERE request_hash = ?", [request_hash])
            .fetchone()
        )
        return row[0] if row else None

    def put(self, request_hash: str, response: str, tokens_in: int, tokens_out: int) -> None:
        self._connection().execute("DELETE FROM llm_cache WHERE request_hash = ?", [request_hash])
        self._connection().execute(
            "INSERT INTO llm_cache VALUES (?, ?, ?, ?, ?)",
            [request_hash, response, tokens_in, tokens_out, datetime.now(UTC)],
        )


@dataclass
class Usage:
    """What a distiller has used since it was made; cost in the unit of the prices, None without prices."""

    num_distilled: int = 0
    num_cached: int = 0
    num_failed: int = 0
    num_requests: int = 0
    num_repairs: int = 0
    num_redacted: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    num_estimated: int = 0
    cost: float | None = None

    def as_json(self) -> dict[str, Any]:
        """For `distill --json`."""
        return asdict(self)


class _Budget:
    """Counts tokens and cost; refuses a request that could exceed a limit if all in flight come to their worst."""

    def __init__(
        self, usage: Usage, max_tokens: int | None, max_cost: float | None, prices: tuple[float, float] | None
    ) -> None:
        self._usage, self._max_tokens, self._max_cost, self._prices = usage, max_tokens, max_cost, prices
        self._reserved: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._next = 0

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        return (tokens_in * self._prices[0] + tokens_out * self._prices[1]) / 1e6 if self._prices else None

    def reserve(self, tokens_in: int, tokens_out: int) -> int | None:
        """A ticket for a request of at most so many tokens, or None if it does not fit any more."""
        with self._lock:
            total_in = self._usage.tokens_in + tokens_in + sum(r[0] for r in self._reserved.values())
            total_out = self._usage.tokens_out + tokens_out + sum(r[1] for r in self._reserved.values())
            cost = self.cost(total_in, total_out)
            if self._max_tokens is not None and total_in + total_out > self._max_tokens:
                return None
            if self._max_cost is not None and cost is not None and cost > self._max_cost:
                return None
            self._next += 1
            self._reserved[self._next] = (tokens_in, tokens_out)
            return self._next

    def settle(self, ticket: int, reply: ChatReply | None) -> None:
        """Books what the request used; without a reply (cancelled, broken off) nothing is known to be used."""
        with self._lock:
            self._reserved.pop(ticket, None)
            if reply is None:
                return
            usage = self._usage
            usage.num_requests += reply.num_requests
            usage.tokens_in += reply.tokens_in
            usage.tokens_out += reply.tokens_out
            usage.num_estimated += reply.is_estimated
            usage.cost = self.cost(usage.tokens_in, usage.tokens_out)


@dataclass(frozen=True, slots=True)
class _Outcome:
    key: str
    record: Distilled | Failed
    response: str = ""
    tokens_in: int = 0
    tokens_out: int = 0


class LlmDistiller:
    """Distils with a chat model.

    Args:
        client: the model server.
        cache: where accepted answers are kept; None keeps none.
        concurrency: requests in flight at most.
        num_repairs: how often a model is told what is wrong with its answer before the exchange fails.
        price_in, price_out: per million tokens, in any currency; both or neither.
        max_cost: in that currency; max_tokens: in and out together. The rest fails with "budget…" and stays pending.
        max_side_chars: each side of an exchange is cut to this many characters.
    """

    def __init__(
        self,
        client: ChatClient,
        *,
        cache: ResponseCache | None = None,
        concurrency: int = 8,
        num_repairs: int = 2,
        price_in: float | None = None,
        price_out: float | None = None,
        max_cost: float | None = None,
        max_tokens: int | None = None,
        max_side_chars: int = MAX_SIDE_CHARS,
    ) -> None:
        if concurrency < 1 or num_repairs < 0 or max_side_chars < 200:
            raise InputError(
                f"concurrency ({concurrency}) must be at least 1, num_repairs ({num_repairs}) at least 0 and "
                f"max_side_chars ({max_side_chars}) at least 200."
            )
        if (price_in is None) != (price_out is None) or min(price_in or 0, price_out or 0) < 0:
            raise InputError("Give both prices (per million tokens in and out), not negative, or neither.")
        if max_cost is not None and price_in is None:
            raise InputError(f"max_cost ({max_cost}) needs the prices per million tokens in and out.")
        self.name = f"llm/1:{client.model}"
        self.usage = Usage()
        self._client, self._cache = client, cache
        self._concurrency, self._num_repairs, self._max_side_chars = concurrency, num_repairs, max_side_chars
        prices = (price_in, price_out) if price_in is not None and price_out is not None else None
        self._budget = _Budget(self.usage, max_tokens, max_cost, prices)

    def distil(self, exchanges: Iterable[Exchange]) -> Iterator[tuple[Exchange, Distilled | Failed]]:
        """Yields each exchange with its record as answers arrive.

        Raises: EndpointError as soon as the endpoint can do no request at all; what was yielded before is good.
        """
        source = iter(exchanges)
        waiting: dict[str, list[Prompt]] = {}
        spent = False
        with Requests[_Outcome](self._client.aclose) as requests:
            try:
                for exchange in source:
                    if spent:
                        yield self._finish(exchange, Failed("budget spent"))
                        continue
                    prompt = build_prompt(exchange, self._max_side_chars)
                    self.usage.num_redacted += prompt.num_redacted
                    key = self._key(prompt)
                    if key in waiting:  # an equal exchange is being asked about
                        waiting[key].append(prompt)
                        continue
                    cached = self._from_cache(key, prompt)
                    if cached:
                        yield self._finish(exchange, cached)
                        continue
                    while len(waiting) >= self._concurrency:
                        yield from self._take(requests, waiting)
                    ticket = self._reserve(prompt.messages)
                    while ticket is None and waiting:  # what is in flight may use less than it has reserved
                        yield from self._take(requests, waiting)
                        ticket = self._reserve(prompt.messages)
                    if ticket is None:
                        spent = True
                        yield self._finish(exchange, Failed("budget spent"))
                        continue
                    waiting[key] = [prompt]
                    requests.start(partial(self._ask, key, prompt, ticket))
                while waiting:
                    yield from self._take(requests, waiting)
            finally:
                requests.stop()
                for outcome in requests.arrived():  # paid for, though nobody waits any more
                    self._keep(outcome)

    def _take(
        self, requests: Requests[_Outcome], waiting: dict[str, list[Prompt]]
    ) -> Iterator[tuple[Exchange, Distilled | Failed]]:
        outcome = requests.next()
        self._keep(outcome)
        first, *equal = waiting.pop(outcome.key)
        yield self._finish(first.exchange, outcome.record)
        for prompt in equal:
            record = self._checked(prompt, outcome.response) if outcome.response else outcome.record
            yield self._finish(prompt.exchange, record)

    def _finish(self, exchange: Exchange, record: Distilled | Failed) -> tuple[Exchange, Distilled | Failed]:
        if isinstance(record, Failed):
            self.usage.num_failed += 1
        else:
            self.usage.num_distilled += 1
            self.usage.num_cached += bool(record.details.get("cached"))
        return exchange, record

    def _key(self, prompt: Prompt) -> str:
        client = self._client
        settings = json.dumps([client.parameters, SCHEMA], sort_keys=True)
        return digest(client.model, client.endpoint, settings, json.dumps(prompt.messages))

    def _keep(self, outcome: _Outcome) -> None:
        if self._cache is not None and outcome.response:
            self._cache.put(outcome.key, outcome.response, outcome.tokens_in, outcome.tokens_out)

    def _from_cache(self, key: str, prompt: Prompt) -> Distilled | None:
        response = self._cache.get(key) if self._cache is not None else None
        record = self._checked(prompt, response) if response else None
        return record if isinstance(record, Distilled) else None

    def _checked(self, prompt: Prompt, response: str) -> Distilled | Failed:
        """An answer that is here already: no tokens, no cost."""
        try:
            record = read_reply(prompt, response)
        except BadReply as e:  # the checks have changed, or the equal exchange differs behind a redaction
            return Failed(str(e))
        return replace(record, details={"model": self._client.model, "cached": True, "tokens_in": 0, "tokens_out": 0})

    def _reserve(self, messages: Sequence[dict[str, str]]) -> int | None:
        # 2.5 characters a token is the dense end of code, so that the reservation holds.
        tokens_in = int(sum(len(m["content"]) for m in messages) / 2.5) + 20
        return self._budget.reserve(tokens_in, int(self._client.parameters["max_output_tokens"]))

    async def _ask(self, key: str, prompt: Prompt, ticket: int | None) -> _Outcome:
        """Asks, and tells the model what was wrong until the answer is accepted."""
        messages, wrong = list(prompt.messages), ""
        tokens_in = tokens_out = num_estimated = 0
        for attempt in range(self._num_repairs + 1):
            if attempt:
                ticket = self._reserve(messages)
                self.usage.num_repairs += ticket is not None
            if ticket is None:
                return _Outcome(key, Failed(f"budget spent before a repair of: {wrong}"))
            try:
                reply = await self._client.complete(messages, SCHEMA)
            except BaseException:
                self._budget.settle(ticket, None)
                raise
            self._budget.settle(ticket, reply)
            tokens_in, tokens_out = tokens_in + reply.tokens_in, tokens_out + reply.tokens_out
            num_estimated += reply.is_estimated
            if reply.failure:
                return _Outcome(key, Failed(reply.failure))
            try:
                record = read_reply(prompt, reply.text)
            except BadReply as e:
                wrong = "the answer was cut off; be shorter" if reply.is_cut else str(e)
                messages = [*prompt.messages, *_repair(prompt, reply.text, wrong)]
                continue
            details: dict[str, Any] = {"model": self._client.model, "tokens_in": tokens_in, "tokens_out": tokens_out}
            details |= {"attempts": attempt + 1, "cost": self._budget.cost(tokens_in, tokens_out)}
            details |= {"redacted": prompt.num_redacted, "tokens_estimated": num_estimated > 0}
            return _Outcome(key, replace(record, details=details), write_reply(record), tokens_in, tokens_out)
        return _Outcome(key, Failed(f"no acceptable answer in {self._num_repairs + 1} attempts; the last: {wrong}"))


def _repair(prompt: Prompt, answer: str, wrong: str) -> list[dict[str, str]]:
    """The model's own answer and what is wrong with it."""
    order = f"That answer cannot be used: {wrong[:800]}. Return the corrected JSON object only."
    if len(answer) > 20_000:  # no record is so long, and redacting it would take long
        answer = ""
    answer, order = redact_like(prompt, [answer, order])
    return [{"role": "assistant", "content": answer[:4000] or "(nothing)"}, {"role": "user", "content": order}]
