"""What memory is made of: the exchange that is distilled, the four-field record that comes out, the hit of a recall."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol


@dataclass(frozen=True, slots=True)
class FileTouch:
    """A file that an exchange touched; `action` comes from tool calls where there are any."""

    path: str
    action: Literal["read", "modified", "created", "deleted", "referenced"] = "referenced"


@dataclass(frozen=True, slots=True)
class Exchange:
    """A user turn and all that answered it (card 001): what every distiller sees.

    `user_text` and `assistant_text` are verbatim; messages of one role are joined by a blank line.
    """

    exchange_id: str
    user_text: str
    assistant_text: str
    project: str = ""
    title: str = ""
    files: tuple[FileTouch, ...] = ()
    tools: tuple[str, ...] = ()
    content_hash: str = ""

    @property
    def text(self) -> str:
        """The verbatim text that is searched, and that core and context are checked against."""
        return f"{self.user_text}\n\n{self.assistant_text}" if self.assistant_text else self.user_text


@dataclass(frozen=True, slots=True)
class Room:
    """A shared place that exchanges about the same thing are filed under; relevance is 0 to 1."""

    room_type: Literal["file", "concept", "workflow"]
    key: str
    label: str
    relevance: float = 1.0


@dataclass(frozen=True, slots=True)
class Distilled:
    """The record of one exchange; the fourth field, files, is the exchange's own and never the distiller's.

    Args:
        core: one or two sentences in the exchange's own terms.
        context: one concrete detail, a verbatim substring of the exchange's text ("" if it has none).
        rooms: one to three.
        details: what the distiller wants kept beside the record (model, cost …), JSON-able.
    """

    core: str
    context: str
    rooms: tuple[Room, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What is indexed, embedded and counted as the memory's tokens."""
        return f"{self.core}\n{self.context}" if self.context else self.core


@dataclass(frozen=True, slots=True)
class Failed:
    """An exchange that could not be distilled this time; it stays pending and is tried again by the next run."""

    reason: str


class Distiller(Protocol):
    """Turns exchanges into records, in any order; the caller commits what has come so far in batches.

    `name` carries the version ("extractive/1"): a new version distils everything anew.
    """

    name: str

    def distil(self, exchanges: Iterable[Exchange]) -> Iterator[tuple[Exchange, Distilled | Failed]]: ...
