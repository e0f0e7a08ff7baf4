"""Requests to a server that speaks OpenAI's API: many at once, with retries, and errors that say what to do.

The API key is read from the environment for each request; it is never stored and never shown. Nothing but the address
given is spoken to: no proxy, no redirect.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from threading import Thread
from typing import TYPE_CHECKING, Any

from workbench.errors import EndpointError, InputError, MissingExtra
from workbench.model_server import RETRIED, api_key, checked_url, explain, json_object, wait_seconds

if TYPE_CHECKING:
    import httpx

_ADVICE = {
    401: "The server wants another API key: set the environment variable that api_key_env names.",
    403: "The key may not use this model.",
    404: "Either the base URL is wrong or the server has no such route or model.",
}


class Refused(EndpointError):
    """The server understood the request and will not do it; asking again changes nothing."""


class Endpoint:
    """A model on a server.

    Args:
        base_url: up to and with /v1.
        model: the server's name for it.
        api_key_env: name of the environment variable that holds the key; None sends no key.
        timeout_seconds: of one request, to the last byte.
        max_retries: further attempts after 408, 409, 425, 429, 5xx, a broken connection, a timeout or an answer that
            is no JSON.
        max_wait_seconds: longest pause before an attempt; a server that asks for more gets no further one.
        concurrency: requests at once.

    Raises: MissingExtra without httpx; InputError for what is no address, or numbers that cannot be meant.
    """

    def __init__(
        self, base_url: str, model: str, *, api_key_env: str | None = None, timeout_seconds: float = 120.0,
        max_retries: int = 4, max_wait_seconds: float = 30.0, concurrency: int = 8,
    ) -> None:  # fmt: skip
        try:
            import httpx
        except ImportError as error:
            raise MissingExtra(f"Talking to a model server needs httpx ({error})", "llm") from error
        self.base_url, self.model = checked_url(base_url), model
        if not model:
            raise InputError(f"No model is named for {base_url}. Name one, as that server calls it.")
        if timeout_seconds <= 0 or max_retries < 0 or max_wait_seconds < 0 or concurrency < 1:
            raise InputError(
                f"timeout_seconds ({timeout_seconds}) must be above 0, concurrency ({concurrency}) 1 or more, and "
                f"max_retries ({max_retries}) and max_wait_seconds ({max_wait_seconds}) 0 or more."
            )
        self._api_key_env, self._timeout_seconds = api_key_env, timeout_seconds
        self._max_retries, self._max_wait_seconds, self._concurrency = max_retries, max_wait_seconds, concurrency
        self._was_reached = False
        limits = httpx.Limits(max_connections=concurrency)
        # trust_env would bring in proxies, and credentials from ~/.netrc
        self._http = httpx.Client(timeout=timeout_seconds, limits=limits, trust_env=False)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def map(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """`post` for each body, at most `concurrency` at once; the answers in the order of the bodies.

        Raises: the first error; requests that have not begun by then are not made. Ctrl-C waits for none of them.
        """
        futures: list[Future[dict[str, Any]]] = [Future() for _ in bodies]
        waiting = deque(zip(futures, bodies, strict=True))

        def work() -> None:
            while waiting:
                with suppress(IndexError):  # another thread took the last one
                    future, body = waiting.popleft()
                    try:
                        future.set_result(self.post(path, body))
                    except BaseException as error:
                        future.set_exception(error)

        # No ThreadPoolExecutor: the process would not end before its threads have.
        threads = [Thread(target=work, name="request", daemon=True) for _ in range(min(self._concurrency, len(bodies)))]
        for thread in threads:
            thread.start()
        try:
            return [future.result() for future in futures]
        except BaseException as error:
            waiting.clear()
            for thread in threads if isinstance(error, Exception) else ():
                thread.join()
            raise

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The server's answer.

        Args: path: after the base URL, "/completions"; body: without the model.

        Raises: Refused where the server will not do it, EndpointError where it cannot be reached or keeps failing.
        """
        failure = ""
        for attempt in range(self._max_retries + 1):
            response, failure = self._send(path, body)
            if response is not None and response.status_code == 200:
                answer = json_object(response)
                if answer is not None:
                    return answer
                failure = f"{self.base_url}{path} answered 200 with what is no JSON object: {response.text[:80]!r}"
            elif response is not None:
                failure = explain(f"{self.base_url}{path}", response, self._key())
                if response.status_code not in RETRIED or "insufficient_quota" in response.text:
                    advice = _ADVICE.get(response.status_code, "")
                    raise Refused(f"{failure}. {advice}".rstrip())
            wait = wait_seconds(attempt, response, self._max_wait_seconds)
            if wait > self._max_wait_seconds:
                raise EndpointError(
                    f"{failure}. It asks to wait {wait:.0f} s, and max_wait_seconds is {self._max_wait_seconds:g}: "
                    "try later, or lower the concurrency."
                )
            if attempt < self._max_retries:
                time.sleep(wait)
        raise EndpointError(
            f"{failure} ({self._max_retries + 1} requests). Look at the server's log; a longer timeout_seconds "
            f"({self._timeout_seconds:g}) or a lower concurrency ({self._concurrency}) helps one that is overloaded."
        )

    def _send(self, path: str, body: Mapping[str, Any]) -> tuple[httpx.Response | None, str]:
        """The response, or None and why there is none."""
        import httpx

        url = f"{self.base_url}{path}"
        key = self._key()
        request = self._http.build_request(
            "POST", url, json={"model": self.model, **body}, headers={"Authorization": f"Bearer {key}"} if key else {}
        )
        end = time.monotonic() + self._timeout_seconds
        try:
            response = self._http.send(request, stream=True)
            try:
                content = b""
                for chunk in response.iter_bytes():
                    content += chunk
                    if time.monotonic() > end:  # httpx's own limit is for each read
                        raise httpx.ReadTimeout("the answer does not end")
            finally:
                response.close()
        except httpx.TimeoutException:
            return None, f"{url} gave no answer within {self._timeout_seconds:g} s"
        except httpx.ConnectError as error:
            if not self._was_reached:
                raise EndpointError(
                    f"Cannot connect to {url} ({error}). Start the server, or correct the URL."
                ) from error
            return None, f"cannot connect to {url} any more ({error})"
        except httpx.HTTPError as error:
            return None, f"the connection to {url} broke ({type(error).__name__})"
        self._was_reached = True
        headers = {"retry-after": response.headers["retry-after"]} if "retry-after" in response.headers else {}
        return httpx.Response(response.status_code, content=content, headers=headers), ""

    def _key(self) -> str:
        return api_key(self._api_key_env, self.base_url)
