"""Looking ahead in a stream of which only read() is known: for formats that occur as JSON lines and as a document."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

from workbench.data.importers.base import Source

_PEEK_BYTES = 1 << 20


class _Forward(io.RawIOBase):
    """Gives io.BufferedReader (readline and peek in C) a stream of which only read() is known."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def with_peek(source: Source) -> Any:
    """Makes `source.stream` an io.BufferedReader, which can look ahead, and gives it back."""
    source.stream = reader = io.BufferedReader(_Forward(source.stream), _PEEK_BYTES)  # type: ignore[assignment]
    return reader
