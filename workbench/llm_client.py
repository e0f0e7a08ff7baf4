"""A client for any endpoint that speaks OpenAI's chat/completions.

Learns what the server refuses (response_format, max_tokens, temperature) from its answers and remembers it for the
life of the client. The API key is read from the environment for each request; it is never stored and never shown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from workbench.data.records import valid
from workbench.errors import EndpointError, InputError, MissingExtra
from workbench.model_server import RETRIED, api_key, checked_url, explain, is_loopback, wait_seconds

if TYPE_CHECKING:
    import httpx

#: Characters a token, for what the server does not count; English prose has about 4, code about 3.
CHARS_PER_TOKEN = 3.5
#: No answer is larger; what a broken server sends beyond is not read.
MAX_ANSWER_BYTES = 4_000_000
_FORMATS: tuple[Literal["json_schema", "json_object", "plain"], ...] = ("json_schema", "json_object", "plain")


@dataclass(frozen=True, slots=True)
class ChatReply:
    """What one request came to.

    Args:
        text: the model's words, "" if there is a failure.
        failure: why this request has no words, "" if it has; the endpoint itself works.
        is_cut: the model stopped at its output limit.
        tokens_in, tokens_out: as counted by the server; 0 for a request that was refused.
        is_estimated: the server did not count, so the tokens are estimated from characters.
        num_requests: HTTP requests made, retries included.
    """

    text: str = ""
    failure: str = ""
    is_cut: bool = False
    tokens_in: int = 0
    tokens_out: int = 0
    is_estimated: bool = False
    num_requests: int = 1


def estimate_tokens(num_chars: int) -> int:
    """Tokens of a text of so many characters, for servers that do not count."""
    return -int(-num_chars // CHARS_PER_TOKEN)


class OpenAIChat:
    """Chat completions from an OpenAI-compatible server.

    Args:
        base_url: up to and without /chat/completions, usually ending in /v1.
        model: the server's name for it.
        api_key_env: name of the environment variable that holds the key; None sends no key (local servers).
        timeout_seconds: of one request, from connecting to the last byte.
        max_retries: further attempts after 408, 409, 429, 5xx, a broken connection or a timeout.
        max_wait_seconds: longest pause before an attempt; a server that asks for more gets no further attempt.
        temperature: sampling temperature; None leaves it to the server.
        max_output_tokens: of one answer.
    Raises: MissingExtra without httpx; EndpointError or InputError where a request could not succeed.
    """

    def __init__(
        self,
        base_url: str | None,
        model: str | None,
        *,
        api_key_env: str | None = None,
        timeout_seconds: float = 60.0,
        max_retries: int = 4,
        max_wait_seconds: float = 60.0,
        temperature: float | None = 0.0,
        max_output_tokens: int = 600,
    ) -> None:
        try:
            import httpx  # noqa: F401
        except ImportError as e:
            raise MissingExtra(f"Talking to a model server needs httpx, which cannot be imported ({e})", "llm") from e
        if not base_url:
            raise EndpointError(
                "No model server is set. Give its base URL (usually ending in /v1) and a model; "
                "without a server, use the built-in distiller (extractive)."
            )
        self.endpoint = checked_url(base_url).removesuffix("/chat/completions")
        if not model:
            raise EndpointError(f"No model is named for {self.endpoint}. Name one, as that server calls it.")
        if timeout_seconds <= 0 or max_retries < 0 or max_wait_seconds < 0 or max_output_tokens < 1:
            raise InputError(
                f"timeout_seconds ({timeout_seconds}) and max_output_tokens ({max_output_tokens}) must be above 0; "
                f"max_retries ({max_retries}) and max_wait_seconds ({max_wait_seconds}) must not be negative."
            )
        self.model = model
        self.parameters: dict[str, Any] = {"temperature": temperature, "max_output_tokens": max_output_tokens}
        self._api_key_env = api_key_env
        self._timeout_seconds = timeout_seconds
        self._max_retries = max_retries
        self._max_wait_seconds = max_wait_seconds
        self._format = 0
        self._limit_name = "max_tokens"
        self._sends_temperature = temperature is not None
        self._was_reached = False
        self._http: httpx.AsyncClient | None = None
        self._key()

    def _key(self) -> str:
        return api_key(self._api_key_env, self.endpoint)

    async def complete(self, messages: Sequence[dict[str, str]], schema: dict[str, Any]) -> ChatReply:
        """Asks for one answer that follows a JSON schema.

        Args: messages: role and content, in order; schema: what the answer should look like (the server may ignore it).
        Raises: EndpointError if no further request can succeed either: unreachable, wrong key, unknown model.
        """
        num_requests, attempt, failure = 0, 0, ""
        response: httpx.Response | None = None
        while attempt <= self._max_retries:
            shape = self._format, self._limit_name, self._sends_temperature
            num_requests += 1
            response, failure = await self._post(self._body(messages, schema))
            if response is not None and response.status_code == 200:
                self._was_reached = True
                return self._reply(response, messages, num_requests)
            if response is not None and response.status_code in (400, 422) and self._learn(response, shape):
                continue  # asked differently, so this is no further attempt at the same
            if response is not None and response.status_code not in RETRIED:
                self._was_reached = True
                self._raise_if_fatal(response)
                return ChatReply(failure=self._explain(response), num_requests=num_requests)
            if response is not None:
                failure = self._explain(response)
                self._raise_if_quota_spent(response)
            wait = wait_seconds(attempt, response, self._max_wait_seconds)
            if wait > self._max_wait_seconds:
                return ChatReply(failure=f"{failure}; it asks to wait {wait:.0f} s", num_requests=num_requests)
            attempt += 1
            if attempt <= self._max_retries:
                await asyncio.sleep(wait)
        if response is None and failure.startswith("cannot connect"):
            raise EndpointError(f"{self.endpoint}: {failure}, {num_requests} times. Is the server running?")
        return ChatReply(failure=f"{failure} ({num_requests} requests)", num_requests=num_requests)

    async def aclose(self) -> None:
        """Closes the connections; the next request opens new ones."""
        http, self._http = self._http, None
        if http is not None:
            await http.aclose()

    def _body(self, messages: Sequence[dict[str, str]], schema: dict[str, Any]) -> dict[str, Any]:
        whole = [{**message, "content": valid(message["content"])} for message in messages]
        body: dict[str, Any] = {"model": self.model, "messages": whole, "stream": False}
        body[self._limit_name] = self.parameters["max_output_tokens"]
        if self._sends_temperature:
            body["temperature"] = self.parameters["temperature"]
        if _FORMATS[self._format] == "json_schema":
            named = {"name": "record", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        elif _FORMATS[self._format] == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body

    async def _post(self, body: dict[str, Any]) -> tuple[httpx.Response | None, str]:
        """The response, or None and why there is none."""
        import httpx

        if self._http is None:
            # A proxy from the environment must not get between us and a server on this machine.
            is_local = is_loopback(self.endpoint)
            self._http = httpx.AsyncClient(timeout=self._timeout_seconds, trust_env=not is_local)
        key = self._key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            async with asyncio.timeout(self._timeout_seconds):  # httpx's own limits are per read
                return await self._read(self._http, body, headers), ""
        except (TimeoutError, httpx.TimeoutException):
            self._was_reached = True
            return None, f"no answer within {self._timeout_seconds:g} s"
        except httpx.ConnectError as e:
            if not self._was_reached:
                raise EndpointError(
                    f"Cannot connect to {self.endpoint} ({e}). Start the server, or set the right base URL."
                ) from e
            return None, f"cannot connect ({e})"
        except httpx.HTTPError as e:
            return None, f"the connection broke ({type(e).__name__})"

    async def _read(self, http: httpx.AsyncClient, body: dict[str, Any], headers: dict[str, str]) -> httpx.Response:
        """The response with its whole body, or with no body where that is too large."""
        import httpx

        async with http.stream("POST", f"{self.endpoint}/chat/completions", json=body, headers=headers) as response:
            content = bytearray()
            async for part in response.aiter_bytes():
                content += part
                if len(content) > MAX_ANSWER_BYTES:
                    content = bytearray(b'{"error": "more than 4 MB"}')
                    break
            kept = {
                name: response.headers[name] for name in ("retry-after", "content-type") if name in response.headers
            }
            return httpx.Response(response.status_code, headers=kept, content=bytes(content))

    def _learn(self, response: httpx.Response, shape: tuple[int, str, bool]) -> bool:
        """Whether a refused request can be asked in a way that this server may accept."""
        if shape != (self._format, self._limit_name, self._sends_temperature):
            return True  # another request has learnt it meanwhile
        words = response.text.lower()
        if "max_completion_tokens" in words and self._limit_name == "max_tokens":
            self._limit_name = "max_completion_tokens"
        elif "temperature" in words and self._sends_temperature:
            self._sends_temperature = False
        elif self._format < 2 and any(
            w in words for w in ("response_format", "json", "schema", "grammar", "structured")
        ):
            self._format += 1
        else:
            return False
        return True

    def _raise_if_fatal(self, response: httpx.Response) -> None:
        advice = {
            401: f"The key in {self._api_key_env} is not accepted." if self._api_key_env else "It wants an API key.",
            402: "The account has no credit left.",
            403: "The key may not use this model.",
            404: f"Either the base URL is wrong or the server has no model {self.model!r}.",
            405: "The base URL is wrong.",
        }.get(response.status_code)
        if 300 <= response.status_code < 400:
            advice = "It redirects; set the base URL that it redirects to."
        if advice:
            raise EndpointError(f"{self._explain(response)}. {advice}")

    def _raise_if_quota_spent(self, response: httpx.Response) -> None:
        if "insufficient_quota" in response.text:
            raise EndpointError(f"{self._explain(response)}. The account has no quota left.")

    def _explain(self, response: httpx.Response) -> str:
        return explain(self.endpoint, response, self._key())

    def _reply(self, response: httpx.Response, messages: Sequence[dict[str, str]], num_requests: int) -> ChatReply:
        """Reads a 200 response; one that is no chat completion is a failure of this request."""
        try:
            body = response.json()
            choice = body["choices"][0]
            message = choice["message"]
            content = message.get("content")
            if isinstance(content, list):
                content = "".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
            refusal = message.get("refusal")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            failure = f"the answer is no chat completion: {self._explain(response)}"
            return ChatReply(failure=failure, num_requests=num_requests)
        text = valid(content) if isinstance(content, str) else ""
        usage = body.get("usage") if isinstance(body.get("usage"), dict) else {}
        tokens_in, tokens_out = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
        is_estimated = False
        if tokens_in is None or tokens_out is None:
            is_estimated = True
            tokens_in = estimate_tokens(sum(len(m["content"]) for m in messages))
            tokens_out = estimate_tokens(len(text))
        failure = f"the model refused: {str(refusal)[:200]}" if refusal else "" if text else "the answer is empty"
        return ChatReply(
            text="" if failure else text,
            failure=failure,
            is_cut=choice.get("finish_reason") == "length",
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            is_estimated=is_estimated,
            num_requests=num_requests,
        )


def _count(value: Any) -> int | None:
    """What a server says it counted, None where it says nothing that can be."""
    return value if isinstance(value, int) and 0 <= value < 1 << 31 else None
