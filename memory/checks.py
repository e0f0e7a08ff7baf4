"""What every record must hold before it is written, whichever distiller made it."""

from __future__ import annotations

import re

from workbench.memory.types import Distilled, Exchange

# An identifier is what a reader would search for letter by letter: text in back-ticks or double quotes, a path, a
# dotted, snake_case or camelCase name, an option, and anything with a digit in it.
_QUOTED = re.compile(r"`([^`\n]+)`|\"([^\"\n]+)\"|“([^”\n]+)”")
_TOKEN = re.compile(r"[^\s`\"“”‘’()\[\]{}<>,;|]+")
_CAMEL = re.compile(r"[a-z][A-Z]|[A-Z]{2}[a-z]{2}")
_GROUPED = re.compile(r"\d[\d,]*")
_GROUPING = re.compile(r"(?<=\d),(?=\d{3})")
_EDGE = ".:!?'*…"


def violations(exchange: Exchange, distilled: Distilled) -> list[str]:
    """What is wrong with the record, in words; [] if it may be written.

    `context` must be a verbatim substring of the exchange's text; `core` must not be empty and may name only
    identifiers that the exchange holds (in its text, its files' paths, its tools or its title); one to three rooms.
    """
    found: list[str] = []
    if not distilled.core.strip():
        found.append("core is empty")
    if distilled.context and distilled.context not in exchange.text:
        found.append(f"context is no verbatim part of the exchange: {distilled.context[:80]!r}")
    unknown = unknown_identifiers(distilled.core, exchange)
    if unknown:
        found.append(f"core names what the exchange does not: {', '.join(map(repr, unknown[:5]))}")
    if not 1 <= len(distilled.rooms) <= 3:
        found.append(f"{len(distilled.rooms)} rooms instead of one to three")
    if not all(room.key.strip() for room in distilled.rooms):
        found.append("a room has an empty key")
    found += [
        f"relevance {room.relevance} of room {room.key!r} is not in 0 to 1"
        for room in distilled.rooms
        if not 0 <= room.relevance <= 1
    ]
    return found


def identifiers(text: str) -> list[str]:
    """The identifiers that a text names, in order, each once."""
    found: dict[str, None] = {}
    for groups in _QUOTED.findall(text):
        found["".join(groups).strip()] = None
    for token in _TOKEN.findall(_QUOTED.sub(" ", text)):
        token = token.strip(_EDGE)
        if token and _is_identifier(token):
            found[token] = None
    found.pop("", None)
    return list(found)


def _is_identifier(token: str) -> bool:
    if any(c.isdigit() for c in token) or token.startswith("--"):
        return True
    inner = token.strip("/\\_-.")
    # "and/or", "read/write" and "e.g" are prose: a path needs two separators, a root or a dotted end.
    is_path = "\\" in inner or inner.count("/") > 1 or (token[0] in "/~.@" and "/" in token) or "::" in inner
    dotted = bool(re.search(r"\w\.\w{2,}", inner))
    return is_path or dotted or "_" in inner or bool(_CAMEL.search(inner))


def unknown_identifiers(core: str, exchange: Exchange) -> list[str]:
    """Identifiers of `core` that the exchange does not hold, letter by letter and as whole names."""
    named = identifiers(core)
    if not named:
        return []
    parts = [exchange.text, exchange.title, exchange.project, *exchange.tools, *(f.path for f in exchange.files)]
    haystack = "\n".join(parts)
    return [name for name in named if not _holds(haystack, name)]


def _holds(haystack: str, name: str) -> bool:
    """Whether `name` stands in the text and is not merely the piece of a longer name or number."""
    if _found_whole(haystack, name):
        return True
    if _GROUPED.fullmatch(name):  # 1,887 for 1887 and the other way round
        return _found_whole(_GROUPING.sub("", haystack), name.replace(",", ""))
    words = name.split()
    return len(words) > 1 and re.search(r"\s+".join(map(re.escape, words)), haystack) is not None


def _found_whole(haystack: str, name: str) -> bool:
    start = haystack.find(name)
    while start >= 0:
        before, after = haystack[start - 1 : start], haystack[start + len(name) : start + len(name) + 1]
        # A number may be glued to its unit (30 for 30s), a name may not be the piece of a longer one.
        joins_left = _continues(before, name[0], name.isdigit())
        joins_right = _continues(after, name[-1], name.isdigit())
        if not joins_left and not joins_right:
            return True
        start = haystack.find(name, start + 1)
    return False


def _continues(neighbour: str, edge: str, is_number: bool) -> bool:
    if is_number:
        return neighbour.isdigit()
    # Scripts without blanks between words may stand right beside a name.
    return edge.isalnum() and (neighbour == "_" or (neighbour.isalnum() and neighbour < "\u2e80"))
