"""One JSON document of any size from a forward-only stream: element by element, in flat memory.

The end of an element is found by one regular expression over the buffered bytes (possessive, so that it never
backtracks), its value by orjson. After a broken element the scan goes on at the next place that looks like the
beginning of its siblings (the same first two keys): quotes inside JSON strings are escaped, so that such a place
cannot lie inside a sound string, whatever a lost quote or bracket did to the counting.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from workbench.data.importers.base import KEPT_RAW_BYTES, MAX_LINE_BYTES, Source
from workbench.data.records import Unreadable

_CHUNK_BYTES = 1 << 20
#: What may be scanned in vain for the ends of elements; after that only ends within _CHUNK_BYTES are looked for.
_RESCAN_BYTES = 64 << 20
#: No pattern that `_skip` looks for is longer than this.
_OVERLAP_BYTES = 4096
_HEAD_BYTES = 512

_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_PLAIN = rb'[^"\[\]{}]*+'
_SCALAR = rb'[^\s,:\[\]{}"]++'


def _nested(levels: int) -> bytes:
    """A pattern for an array or object with at most `levels` levels; brackets are only counted, orjson judges them."""
    inside = rb"%s(?:%s%s)*+" % (_PLAIN, _STRING, _PLAIN)
    for _ in range(levels - 1):
        inside = rb"%s(?:(?:%s|[{\[]%s[}\]])%s)*+" % (_PLAIN, _STRING, inside, _PLAIN)
    return rb"[{\[]%s[}\]]" % inside


# Seven levels hold nearly all real elements; deeper ones are counted bracket by bracket.
_VALUE = re.compile(_nested(7), re.DOTALL)
_BALANCED = re.compile(rb"(?:%s|%s|[^\[\]{}\"]++)*+" % (_STRING, _nested(6)), re.DOTALL)
_ATOM = re.compile(rb"%s|%s|(\"|\Z)" % (_STRING, _SCALAR), re.DOTALL)
_SPACE = re.compile(rb"[ \t\r\n]*+")
_FIRST_KEYS = re.compile(
    rb"\{\s*(%s)\s*:\s*(?:(?:%s|%s)\s*,\s*(%s)\s*:)?" % (_STRING, _STRING, _SCALAR, _STRING), re.DOTALL
)
_SHORT_SCALAR = rb'(?:"[^"\\]{0,300}(?:\\.[^"\\]{0,100}){0,20}"|[^\s,:\[\]{}"]{1,40})'
_ESCAPE = re.compile(rb"\\(?:(u[dD][89abAB]..\\u[dD][c-fC-F]..)|(u[dD][89a-fA-F]..)|.)", re.DOTALL)
_SECOND_KEY_END = rb"\s*+:"
_NEVER = rb"(?!)"
_NO_SEPARATOR = "a comma or a closing bracket was expected"
_BROKEN = object()


@dataclass(slots=True)
class Member:
    """A value of the document.

    Args:
        key: which member of the top-level object it is, or is an element of; None where the document is an array.
        index: its position in the array that is streamed; None for a member that is given whole.
        offset, length: where the value lies in the source, in bytes.
        value: as json.loads gives it, but that NaN and Infinity are None and half a surrogate pair is U+FFFD.
    """

    key: str | None
    index: int | None
    offset: int
    length: int
    value: Any


def read_members(source: Source, arrays: Collection[str] = ()) -> Iterator[Member | Unreadable]:
    """Yields the elements of a top-level array, or the members of a top-level object.

    Args:
        source: its offsets begin at `source.start`.
        arrays: members of a top-level object whose arrays are streamed: one Member per element.

    All bytes but white space, separators, the brackets of the streamed arrays and member names are inside a Member
    or an Unreadable. Never raises on content.
    """
    return _Reader(source, arrays).document()


def parse_json(raw: bytes) -> Any:
    """The value of a JSON text; NaN and Infinity are None, half a surrogate pair (a cut emoji) is U+FFFD.

    Raises: ValueError (orjson.JSONDecodeError, UnicodeDecodeError, RecursionError) if it is no JSON.
    """
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        fixed = _ESCAPE.sub(lambda m: rb"\ufffd" if m[2] else m[0], raw) if b"\\u" in raw else raw
        if b"NaN" in raw or b"Infinity" in raw:
            return json.loads(fixed.decode(), parse_constant=lambda _: None, parse_int=_integer)
        if fixed == raw:
            raise
        return orjson.loads(fixed)


def _start_of(head: bytes) -> bytes | None:
    """A pattern for the beginning of elements that begin like `head`; None where that is not telling."""
    keys = _FIRST_KEYS.match(head)
    if keys:
        second = rb"\s*%s\s*,\s*%s%s" % (_SHORT_SCALAR, re.escape(keys[2]), _SECOND_KEY_END) if keys[2] else b""
        return rb"\{\s*%s\s*:%s" % (re.escape(keys[1]), second)
    if head.startswith(b"["):
        return rb"(?<=[,\s])\["
    return None if head.startswith(b"{") or not head else rb"(?<=,)(?=[^,])"


def _integer(digits: str) -> int | float:
    """As orjson: what does not fit 64 bits is a float."""
    return orjson.loads(digits)


class _Reader:
    """The window of the stream that is in memory. `pos` is where reading stands; what lies before it is dropped."""

    def __init__(self, source: Source, arrays: Collection[str]) -> None:
        self.stream = source.stream
        self.base = source.start
        self.buf = b""
        self.pos = 0
        self.eof = False
        self.arrays = frozenset(arrays)
        names = b"|".join(re.escape(orjson.dumps(name)) for name in sorted(self.arrays))
        self.member_start = rb"(?:%s)\s*:\s*\[" % names if names else _NEVER
        # Of the streamed array that was begun last: how many elements, the first bytes of a sound one, and whether
        # something in it was unreadable.
        self.index, self.sound_head, self.damaged = 0, b"", False
        self.rescanned = 0
        self.given_up = False
        self.reason = ""

    def document(self) -> Iterator[Member | Unreadable]:
        while len(self.buf) < 3 and self.fill():
            pass
        if self.base == 0 and self.buf.startswith(b"\xef\xbb\xbf"):
            self.pos = 3
        first = self.space()
        if first < 0:
            return
        if first == 0x5B:
            self.pos += 1
            self.member_start = _NEVER
            yield from self.elements(None)
        elif first == 0x7B:
            self.pos += 1
            yield from self.members()
        else:
            yield self.skip(None, "a JSON object or array was expected")
        if self.space() >= 0:
            yield self.skip(None, "bytes after the end of the JSON document")

    def elements(self, key: str | None) -> Iterator[Member | Unreadable]:
        """The elements of the array that reading stands in; ends after its closing bracket.

        It also ends, with `pos` at a member name, where the next sound thing is another streamed member.
        """
        while (byte := self.space()) != 0x5D or not self.is_closed_by(key):
            if byte < 0:
                yield from self.truncated()
                return
            length = self.value_length()
            value = self.parse(length)
            if value is not _BROKEN and (byte in b"[{" or self.follows(length) in (0x2C, 0x5D, -1)):
                yield Member(key, self.index, self.base + self.pos, length, value)
                # An element that damage closed early is shorter than its sound siblings: it must not stand for them.
                if len(self.sound_head) < min(length, _HEAD_BYTES) and not (self.damaged and self.sound_head):
                    self.sound_head = self.buf[self.pos : self.pos + min(length, _HEAD_BYTES)]
                self.pos += length
            else:
                self.reason = self.reason if value is _BROKEN else _NO_SEPARATOR
                if self.is_contained(length, b",]", self.sibling()):
                    yield self.take(length)
                else:
                    yield self.skip(self.sibling(), self.reason, unfinished=length == 0)
                    if self.at_member():
                        return
                    self.index += 1
                    continue
            self.index += 1
            byte = self.space()
            if byte == 0x2C:
                self.pos += 1
            elif byte >= 0 and (byte != 0x5D or not self.is_closed_by(key)):
                if not self.sibling().match(self.buf, self.pos):
                    yield self.skip(self.sibling(), _NO_SEPARATOR)
                if self.at_member():
                    return
        self.pos += 1

    def members(self) -> Iterator[Member | Unreadable]:
        """The members of the top-level object whose brace was just passed; ends after its closing brace."""
        key: str | None = None
        while (byte := self.space()) != 0x7D or self.follows(1) >= 0:
            if byte < 0:
                yield from self.truncated()
                return
            if byte == 0x7B and key and self.boundary().match(self.buf, self.pos):
                # The bracket that ended the array was one that damage had left over.
                yield from self.elements(key)
            else:
                length = self.value_length() if byte == 0x22 else 0
                name = self.parse(length)
                if not isinstance(name, str) or self.follows(length) != 0x3A:
                    cut = byte == 0x22 and (length == 0 or self.follows(length) < 0)
                    yield self.skip(self.boundary(), "a member name was expected", cut)
                    continue
                self.pos += length
                self.space()
                self.pos += 1
                byte = self.space()
                if byte == 0x5B and name in self.arrays:
                    key = name
                    self.pos += 1
                    self.index, self.sound_head, self.damaged = 0, b"", False
                    yield from self.elements(key)
                elif byte >= 0:
                    yield from self.whole_member(name)
            byte = self.space()
            if byte == 0x2C:
                self.pos += 1
            elif byte >= 0 and byte != 0x7D and not self.at_member():
                yield self.skip(self.boundary(), _NO_SEPARATOR)
        self.pos += 1

    def whole_member(self, name: str) -> Iterator[Member | Unreadable]:
        """The member whose value is at `pos`."""
        length = self.value_length()
        value = self.parse(length)
        if value is not _BROKEN:
            yield Member(name, None, self.base + self.pos, length, value)
            self.pos += length
        elif self.is_contained(length, b",}", None):
            yield self.take(length)
        else:
            yield self.skip(self.boundary(), self.reason, unfinished=length == 0)

    def fill(self) -> bool:
        """Reads on; False at the end of the stream."""
        if self.eof:
            return False
        rest = self.buf[self.pos :]
        # Reading as much again as is held keeps the cost of a long element linear.
        chunk = self.stream.read(max(_CHUNK_BYTES, len(rest)))
        self.eof = not chunk
        self.base += self.pos
        self.buf, self.pos = rest + chunk, 0
        return not self.eof

    def space(self) -> int:
        """Passes white space; the byte after it, or -1 at the end of the stream."""
        while True:
            self.pos = _SPACE.match(self.buf, self.pos).end()  # type: ignore[union-attr]
            if self.pos < len(self.buf):
                return self.buf[self.pos]
            if not self.fill():
                return -1

    def follows(self, length: int) -> int:
        """The first byte that is no white space after the `length` bytes at `pos`; -1 at the end of the stream."""
        while True:
            at = _SPACE.match(self.buf, self.pos + length).end()  # type: ignore[union-attr]
            if at < len(self.buf):
                return self.buf[at]
            length = at - self.pos
            if not self.fill():
                return -1

    def value_length(self) -> int:
        """The number of bytes of the value at `pos`; 0 if it has no end, or is longer than MAX_LINE_BYTES."""
        found = _VALUE.match(self.buf, self.pos)
        if found:
            return found.end() - self.pos if found.end() - self.pos <= MAX_LINE_BYTES else 0
        if self.buf[self.pos] not in b"[{":
            return self.atom_length()
        depth = at = 0
        while self.rescanned <= _RESCAN_BYTES:
            at = _BALANCED.match(self.buf, self.pos + at).end() - self.pos  # type: ignore[union-attr]
            byte = self.buf[self.pos + at] if self.pos + at < len(self.buf) else 0x22
            if byte != 0x22:
                at += 1
                depth += 1 if byte in b"[{" else -1
            if depth <= 0 and at:
                return at if at <= MAX_LINE_BYTES else 0
            if byte == 0x22 and (len(self.buf) - self.pos > MAX_LINE_BYTES or not self.fill()):
                self.rescanned += len(self.buf) - self.pos
                return 0
        while len(self.buf) - self.pos < _CHUNK_BYTES and self.fill():
            pass
        found = _VALUE.match(self.buf, self.pos)
        return found.end() - self.pos if found else 0

    def atom_length(self) -> int:
        """As value_length, for a string, number or literal; 1 for a stray bracket or separator."""
        while True:
            found = _ATOM.match(self.buf, self.pos)
            length = found.end() - self.pos if found else 1
            is_open = found is not None and found[1] is not None
            if not is_open and self.pos + length < len(self.buf):
                return length if length <= MAX_LINE_BYTES else 0
            if len(self.buf) - self.pos > MAX_LINE_BYTES or not self.fill():
                return 0 if is_open or length > MAX_LINE_BYTES else length

    def parse(self, length: int) -> Any:
        """The value of the `length` bytes at `pos`, or _BROKEN and a reason."""
        if length == 0:
            long = len(self.buf) - self.pos > MAX_LINE_BYTES
            self.reason = (
                f"element longer than {MAX_LINE_BYTES >> 20} MiB" if long else "the document ends inside this element"
            )
            return _BROKEN
        try:
            return parse_json(self.buf[self.pos : self.pos + length])
        except (ValueError, RecursionError) as error:
            self.reason = f"not JSON: {getattr(error, 'msg', error)}"
            return _BROKEN

    def sibling(self) -> re.Pattern[bytes]:
        """A pattern for the beginning of the next element of this array, or of the next streamed array."""
        starts = [_start_of(self.sound_head)]
        own = _start_of(self.buf[self.pos : self.pos + _HEAD_BYTES])
        # Bytes that may be the broken ones are believed where they agree on two keys, or there is nothing else.
        if own and (not self.sound_head or own.endswith(_SECOND_KEY_END)):
            starts.append(own)
        return re.compile(b"|".join([*(filter(None, starts)), self.member_start]), re.DOTALL)

    def boundary(self) -> re.Pattern[bytes]:
        """A pattern for where the top-level object can be read on: a streamed array, or more of a damaged one."""
        start = _start_of(self.sound_head) if self.damaged else None
        return re.compile(b"|".join(filter(None, [start, self.member_start])), re.DOTALL)

    def is_contained(self, length: int, after: bytes, sibling: re.Pattern[bytes] | None) -> bool:
        """Whether the damage at `pos` left the brackets in order, so that reading can go on after `length` bytes."""
        if length == 0 or self.buf[self.pos] in b"]}" or self.follows(length) not in (*after, -1):
            return False
        self.rescanned += length
        if sibling is None or self.rescanned > _RESCAN_BYTES:
            return True
        return sibling.search(self.buf, self.pos + 1, self.pos + length) is None

    def is_closed_by(self, key: str | None) -> bool:
        """Whether the ] at `pos` is the end of the array, not one that damage left over."""
        return self.follows(1) in ((-1,) if key is None else (0x2C, 0x7D, -1))

    def at_member(self) -> bool:
        return re.compile(self.member_start).match(self.buf, self.pos) is not None

    def take(self, length: int) -> Unreadable:
        self.damaged = True
        raw = self.buf[self.pos : self.pos + min(length, KEPT_RAW_BYTES)]
        self.pos += length
        return Unreadable(self.base + self.pos - length, length, self.reason, raw)

    def truncated(self) -> Iterator[Unreadable]:
        if not self.given_up:
            reason = "the document ends before its last bracket"
            yield Unreadable(self.base + self.pos, 0, reason, b"", unfinished=True)

    def skip(self, until: re.Pattern[bytes] | None, reason: str, unfinished: bool = False) -> Unreadable:
        """Passes everything up to the next match of `until`, or the end; keeps the first KEPT_RAW_BYTES of it.

        Args:
            unfinished: whether the end of the stream, if that is what is met, cut this off.
        """
        self.damaged = True
        start, raw, at = self.base + self.pos, b"", 1
        found = None
        while found is None:
            found = until.search(self.buf, self.pos + at) if until else None
            end = found.start() if found else max(self.pos, len(self.buf) - (_OVERLAP_BYTES if until else 0))
            raw += self.buf[self.pos : min(end, self.pos + KEPT_RAW_BYTES - len(raw))]
            at = 1 if end == self.pos else 0
            self.pos = end
            if found is None and not self.fill():
                raw += self.buf[self.pos : self.pos + KEPT_RAW_BYTES - len(raw)]
                self.pos = len(self.buf)
                self.given_up = True
                break
        length = self.base + self.pos - start
        return Unreadable(start, length, reason, raw, unfinished and found is None and length <= MAX_LINE_BYTES)
