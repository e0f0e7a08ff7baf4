"""What the clients of model servers share: address, key, retries, and what a refusal says."""

from __future__ import annotations

import email.utils
import os
import random
import time
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from workbench.errors import EndpointError, InputError

if TYPE_CHECKING:
    import httpx

#: Statuses after which the same request may succeed.
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}


def checked_url(base_url: str) -> str:
    """The address without spaces around it and slashes behind; raises InputError for none, and for one with a key."""
    url = base_url.strip().rstrip("/")
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for what is no number from 0 to 65535
    except ValueError as error:  # which may name a part of a password
        raise InputError("The base URL is no http or https address: look at its host and port.") from error
    if parts.username or parts.password:
        raise InputError("The base URL holds a user name or password; put the key into an environment variable.")
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable() or " " in url:
        raise InputError(f"The base URL {base_url!r} is no http or https address.")
    return url


def is_loopback(base_url: str) -> bool:
    """Whether the address is on this machine."""
    host = urlsplit(base_url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def api_key(variable: str | None, base_url: str) -> str:
    """The key in that environment variable, "" without one; checked, because httpx shows a malformed one in its error.

    Raises: EndpointError for a variable that is not set, or holds what is no key.
    """
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key or not (key.isascii() and key.isprintable()) or " " in key:
        raise EndpointError(
            f"The environment variable {variable} should hold the API key for {base_url}, and "
            f"{'has characters that no key has' if key else 'is not set'}. Set it, or name another variable."
        )
    return key


def json_object(response: httpx.Response) -> dict[str, Any] | None:
    """The answer, None if it is no JSON object."""
    try:
        answer = response.json()
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None


def explain(url: str, response: httpx.Response, key: str) -> str:
    """Status and the server's own words, without the key that some servers repeat."""
    answer = json_object(response) or {}
    error = answer.get("error", answer.get("message", answer.get("detail", response.text)))
    words = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    if key:
        words = words.replace(key, "[REDACTED:api-key]")
    return f"{url} answered {response.status_code}: {' '.join(words.split())[:300]}"


def wait_seconds(attempt: int, response: httpx.Response | None, max_wait_seconds: float) -> float:
    """What the server asks for, else exponential back-off with jitter, up to the longest wait."""
    asked = response.headers.get("retry-after", "") if response is not None else ""
    try:
        return max(0.0, float(asked))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    except (TypeError, ValueError):
        return min(max_wait_seconds, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)
