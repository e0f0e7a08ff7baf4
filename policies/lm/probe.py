"""What a served model gives: found out by tiny requests, never by the server's name.

The fields that OpenAI's API lacks are vLLM's: prompt_logprobs, return_token_ids, logprob_token_ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp
from typing import Any, Literal

from workbench.errors import EndpointError
from workbench.policies.lm.endpoint import Endpoint, Refused

Level = Literal["text", "generated top-k", "prompt top-k", "fixed ids", "full"]
Temperature = Literal["honoured", "ignored", "unknown"]

#: Beyond OpenAI's API: ids instead of text in the answer, and no sampling defaults of the model's own
#: (vLLM takes them from generation_config.json where a request is silent).
EXTENSIONS = {
    "return_token_ids": True, "return_tokens_as_token_ids": True, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
}  # fmt: skip
_CAPS = (64, 20, 5, 1)
# Two answers to one question may differ by rounding (bfloat16, other batches); twice the temperature changes far more.
_SAME_NATS = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What a server does for a model.

    Args:
        has_completions, has_chat: the routes that answer.
        has_extensions: takes `EXTENSIONS` (which says nothing of whether it heeds them).
        accepts_ids: a prompt may be token ids.
        returns_ids: completions come with their token ids.
        generated_top_k, prompt_top_k: words listed for each generated token, and for each token of a given prompt;
            the largest of 64, 20, 5, 1 that it gave (or k, where `probe` was asked for another), 0 = none.
        has_fixed_ids: gives log-probabilities of the ids that a request names, for generated tokens.
        vocabulary: words of a whole row; None = no whole rows.
        generated_temperature, prompt_temperature: whether these log-probabilities follow the temperature asked for.
        ends_with_eos: the end-of-sequence id is among a completion's ids; None = not known.
    """

    has_completions: bool = False
    has_chat: bool = False
    has_extensions: bool = False
    accepts_ids: bool = False
    returns_ids: bool = False
    generated_top_k: int = 0
    prompt_top_k: int = 0
    has_fixed_ids: bool = False
    vocabulary: int | None = None
    generated_temperature: Temperature = "unknown"
    prompt_temperature: Temperature = "unknown"
    ends_with_eos: bool | None = None

    @property
    def level(self) -> Level:
        """The most that it gives; each level has all below it."""
        if self.vocabulary is not None:
            return "full"
        if self.prompt_top_k:
            return "fixed ids" if self.has_fixed_ids else "prompt top-k"
        return "generated top-k" if self.generated_top_k else "text"


def probe(endpoint: Endpoint, tokenizer: Any, *, text: str = "1, 2, 3, 4, 5, 6,", k: int = 64) -> Capabilities:
    """Finds out what the server gives, with about 20 requests of one token.

    Args: tokenizer: of the model, for ids and its end; text: the prompt; k: the most that is asked for.

    Raises: EndpointError if it cannot be reached, or neither completes text nor chats.
    """
    ask = _Asker(endpoint, text)
    found: dict[str, Any] = {}
    plain, chat = ask.completion(), ask.chat()
    found["has_completions"], found["has_chat"] = plain is not None, chat is not None
    if plain is None:
        if chat is None:
            raise EndpointError(
                f"{endpoint.base_url} neither completes text nor chats with {endpoint.model!r}: {ask.refusal} "
                "Is the model's name right, and does the URL end in /v1?"
            )
        ask.route = ask.chat
    extended = ask.route(**EXTENSIONS)
    found["has_extensions"] = extended is not None
    found["returns_ids"] = extended is not None and completion_ids(choice_of(extended)) is not None
    ask.extensions = EXTENSIONS if extended is not None else {}
    caps = [k, *(cap for cap in _CAPS if cap < k)]
    found["generated_top_k"] = next((n for cap in caps if (n := ask.generated_top_k(cap))), 0)
    if found["generated_top_k"]:
        rows = [ask.generated_row(found["generated_top_k"], temperature) for temperature in (1.0, 2.0)]
        found["generated_temperature"] = _temperature(*rows)
    if plain is not None:
        ids = list(tokenizer(text)["input_ids"])
        found |= _probe_prompts(ask, ids, caps)
        found["ends_with_eos"] = ask.ends_with(tokenizer.eos_token_id) if found["returns_ids"] else None
    return Capabilities(**found)


def _probe_prompts(ask: _Asker, ids: list[int], caps: Sequence[int]) -> dict[str, Any]:
    """What it does with prompts: ids, and their log-probabilities."""
    answer = ask.completion(prompt=ids)
    used = ((answer or {}).get("usage") or {}).get("prompt_tokens", len(ids))
    found: dict[str, Any] = {"accepts_ids": answer is not None and used == len(ids)}
    if not found["accepts_ids"]:
        return found
    for cap in caps:
        if row := ask.prompt_row(ids, cap):
            found["prompt_top_k"] = min(cap, len(row))
            found["prompt_temperature"] = _temperature(row, ask.prompt_row(ids, cap, 2.0))
            break
    whole = ask.prompt_row(ids, -1)
    if whole and abs(sum(map(exp, whole.values())) - 1) < 1e-3:
        found["vocabulary"] = len(whole)
    # Three ids: one request lists the likeliest word and the one drawn without being asked for any.
    wanted = sorted({*ids, 0, 1, 2})[:3]
    row = ask.generated_row(1, 1.0, logprob_token_ids=wanted)
    found["has_fixed_ids"] = {f"token_id:{one}" for one in wanted} <= set(row)
    return found


def _temperature(one: Mapping[Any, float], two: Mapping[Any, float]) -> Temperature:
    """Whether log-probabilities at temperature 1 and 2 differ."""
    both = [abs(value - two[word]) for word, value in one.items() if word in two]
    if not both:
        return "unknown"
    return "honoured" if max(both) > _SAME_NATS else "ignored"


class _Asker:
    """Sends the requests of a probe; None for what the server refuses."""

    def __init__(self, endpoint: Endpoint, text: str) -> None:
        self.endpoint, self.text, self.refusal = endpoint, text, ""
        self.extensions: Mapping[str, Any] = {}
        self.route = self.completion

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any] | None:
        try:
            return self.endpoint.post(path, {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, **body})
        except Refused as error:
            if " answered 401: " in str(error) or " answered 403: " in str(error):
                raise
            self.refusal = str(error)
            return None

    def completion(self, **body: Any) -> dict[str, Any] | None:
        """One token after the text."""
        return self._post("/completions", {"prompt": self.text, **body})

    def chat(self, **body: Any) -> dict[str, Any] | None:
        """One token of an answer to the text."""
        return self._post("/chat/completions", {"messages": [{"role": "user", "content": self.text}], **body})

    def generated_row(self, k: int, temperature: float, **body: Any) -> dict[str, float]:
        """Words and log-probabilities of the first generated token; {} if there are none."""
        wanted = {"logprobs": k} if self.route == self.completion else {"logprobs": True, "top_logprobs": k}
        answer = self.route(**{**self.extensions, **wanted, "temperature": temperature, **body})
        rows = None if answer is None else generated_rows(choice_of(answer))
        return rows[1][0] if rows and rows[1] else {}

    def generated_top_k(self, cap: int) -> int:
        """How many words it lists when asked for so many."""
        return min(cap, len(self.generated_row(cap, 1.0)))

    def prompt_row(self, ids: list[int], k: int, temperature: float = 1.0) -> dict[int, float]:
        """Words and log-probabilities of the last token of the prompt; {} if there are none."""
        answer = self.completion(prompt=ids, prompt_logprobs=k, temperature=temperature)
        rows = None if answer is None else prompt_rows(answer)
        return rows[-1] if rows else {}

    def ends_with(self, eos_id: int | None) -> bool | None:
        """Whether a completion that the server ends holds the end's id; None if it cannot be brought to end."""
        answer = self.completion(**self.extensions, logit_bias={str(eos_id): 100}, max_tokens=3)
        if answer is None or choice_of(answer).get("finish_reason") != "stop":
            return None
        return (completion_ids(choice_of(answer)) or [None])[-1] == eos_id


# -- reading answers -------------------------------------------------------------------------------------------------


@contextmanager
def reading() -> Iterator[None]:
    """Turns what a wrongly built answer causes into an EndpointError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise EndpointError(
            f"The server's answer is not built as OpenAI's API says ({type(error).__name__}: {str(error)[:100]}). "
            "Look at its log; is it behind a gateway that changes answers?"
        ) from error


def choice_of(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The first choice of an answer."""
    with reading():
        choice = answer["choices"][0]
        if not isinstance(choice, dict):
            raise TypeError(f"a choice is {choice!r}")
        return choice


def completion_ids(choice: Mapping[str, Any]) -> list[int] | None:
    """Token ids of a completion: listed as such, or in the names of its tokens; None if in neither."""
    with reading():
        if isinstance(choice.get("token_ids"), list):
            return [int(one) for one in choice["token_ids"]]
        logprobs = choice.get("logprobs") or {}
        names = logprobs.get("tokens") or [row["token"] for row in logprobs.get("content") or []]
        ids = [token_id(name) for name in names]
        return None if not ids or None in ids else [one for one in ids if one is not None]


def token_id(name: str) -> int | None:
    """5 for "token_id:5", else None."""
    prefix, _, number = name.rpartition(":")
    return int(number) if prefix == "token_id" and number.isdigit() else None


def generated_rows(choice: Mapping[str, Any]) -> tuple[list[float], list[dict[str, float]]] | None:
    """Log-probability of each generated token, and the words listed for each ([] if none); None without any."""
    with reading():
        logprobs = choice.get("logprobs")
        if not logprobs:
            return None
        if logprobs.get("content") is not None:
            rows = logprobs["content"]
            listed = [{one["token"]: float(one["logprob"]) for one in row.get("top_logprobs") or []} for row in rows]
            return [float(row["logprob"]) for row in rows], listed
        listed = [{name: float(value) for name, value in row.items()} for row in logprobs.get("top_logprobs") or []]
        return [float(value) for value in logprobs["token_logprobs"]], listed


def prompt_rows(answer: Mapping[str, Any]) -> list[dict[int, float]] | None:
    """For each token of the prompt: word id -> log-probability ({} for the first); None without any."""
    with reading():
        rows = choice_of(answer).get("prompt_logprobs") or answer.get("prompt_logprobs")
        if not rows:
            return None
        return [{int(word): float(entry["logprob"]) for word, entry in (row or {}).items()} for row in rows]
