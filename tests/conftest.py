"""What all tests share."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from fake_llm_server import FakeServer

# A shell that starts CI in the background makes it ignore Ctrl-C, and every process that it starts inherits that; the
# tests that interrupt a process need the ordinary behaviour.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    """A chat server with faults on demand."""
    pytest.importorskip("httpx", reason="the llm extra is not installed")
    pytest.importorskip("detect_secrets", reason="the llm extra is not installed")
    with FakeServer() as running:
        yield running
