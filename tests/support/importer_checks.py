"""What the tests of importers share: reading bytes, and the contract that every importer keeps."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from typing import Any

import orjson

from workbench.data.importers.base import Source
from workbench.data.records import PART_KINDS, ROLES, Checkpoint, Conversation, Message, Record, Unreadable


def read(
    importer: Any, content: bytes, start: int = 0, session: dict[str, Any] | None = None
) -> tuple[list[Record], Counter[str]]:
    source = Source("log.jsonl", io.BytesIO(content[start:]), start, session)
    return list(importer.read(source)), source.skipped


def messages(records: list[Record]) -> list[Message]:
    return [record for record in records if isinstance(record, Message)]


def assert_accounted(content: bytes, records: list[Record], skipped: Counter[str]) -> None:
    """Each line is the place of messages, or counted as skipped, or unreadable: exactly one of them."""
    spoken = {(m.offset, m.length) for m in messages(records)}
    unreadable = {(r.offset, r.length) for r in records if isinstance(r, Unreadable)}
    offset, lines = 0, set()
    for raw in io.BytesIO(content):
        lines.add((offset, len(raw)))
        offset += len(raw)
    assert spoken | unreadable <= lines
    assert not spoken & unreadable
    assert len(spoken) + len(unreadable) + sum(skipped.values()) == len(lines)


def assert_well_formed(records: list[Record], with_ids: bool = True) -> None:
    """Args: with_ids: each message has an id; what was spoilt may lack it."""
    announced = set()
    for record in records:
        if isinstance(record, Conversation):
            announced.add(record.session_id)
            orjson.dumps(record.meta)
        elif isinstance(record, Message):
            assert record.session_id in announced, "a message before its conversation"
            assert record.role in ROLES
            assert isinstance(record.native_id, str)
            assert record.native_id or not with_ids
            for part in record.parts:
                assert part.kind in PART_KINDS
                assert isinstance(part.text, str)
                assert {type(part.call_id), type(part.name)} <= {str, type(None)}
                orjson.dumps(part.data)
            for value in (record.tokens_in, record.tokens_out, record.tokens_cached, record.created_at):
                assert value is None or (isinstance(value, int) and abs(value) < 1 << 63)


class Result:
    """Everything that an importer yields for some bytes, checked against the contract."""

    def __init__(self, importer: Any, raw: bytes, path: str = "x", **known: Any) -> None:
        source = Source(path, io.BytesIO(raw), **known)
        self.records = list(importer.read(source))
        self.skipped = source.skipped
        self.messages = messages(self.records)
        self.unreadable = [r for r in self.records if isinstance(r, Unreadable)]
        self.conversations = [r for r in self.records if isinstance(r, Conversation)]
        assert_well_formed(self.records, with_ids=False)
        assert all(isinstance(r, Conversation | Message | Unreadable | Checkpoint) for r in self.records)
        for message in self.messages:
            assert message.parts
            assert message.parent_id is None or isinstance(message.parent_id, str)
            orjson.dumps(message)

    def num_accounted(self) -> int:
        return len(self.messages) + sum(self.skipped.values()) + len(self.unreadable)

    def texts(self, kind: str) -> list[str]:
        return [p.text for m in self.messages for p in m.parts if p.kind == kind]


def spoil(value: Any, rng: random.Random, rate: float) -> Any:
    """A copy of a JSON value in which some values, at any depth, are replaced by ones of another type."""
    if rng.random() < rate:
        odd = [None, True, 0, -1, 1 << 60, 1.5, "", "x", "{", [], {}, [[]], [None], {"type": 3}, {"role": []}, ["a", 1],
               [{"role": "user"}], {"content": [{"type": "image", "source": 1}]}, [["human", {"a": 1}]]]  # fmt: skip
        return rng.choice(odd)
    if isinstance(value, dict):
        return {k: spoil(v, rng, rate) for k, v in value.items() if rng.random() > rate / 4}
    if isinstance(value, list):
        return [spoil(v, rng, rate) for v in value]
    if isinstance(value, str) and value[:1] in "{[" and rng.random() < 0.7:
        try:
            return json.dumps(spoil(json.loads(value), rng, rate))
        except ValueError:
            return value
    return value
