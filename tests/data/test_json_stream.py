"""The streaming reader of JSON documents: exact on sound ones, loses nothing silently on broken ones."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.data.importers import json_stream
from workbench.data.importers.base import Source
from workbench.data.importers.json_stream import Member, parse_json, read_members
from workbench.data.records import Unreadable

# 64-bit integers: orjson reads longer ones as floats.
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
    | st.sampled_from(['"', "\\", '\\"', "}{][", "},{", '{"a":', "\n", "\u2028", "é", "😀"])
)
_JSON = st.recursive(
    _SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=4), v, max_size=4), max_leaves=25
)
_STYLES = st.fixed_dictionaries(
    {
        "indent": st.sampled_from([None, 0, 1, 4, "\t"]),
        "separators": st.sampled_from([None, (",", ":"), (" ,\r\n ", "\t: ")]),
        "ensure_ascii": st.booleans(),
    }
)


@pytest.fixture(params=[1, 7, 1 << 20])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(json_stream, "_CHUNK_BYTES", request.param)
    return request.param


def _read(raw: bytes, arrays: tuple[str, ...] = (), start: int = 0) -> list[Member | Unreadable]:
    return list(read_members(Source("test", io.BytesIO(raw), start=start), arrays))


def _document(members: list[Member | Unreadable], arrays: tuple[str, ...]) -> Any:
    """Puts a top-level object together again; arrays that came element by element become lists."""
    out: dict[str, Any] = {key: [] for key in arrays}
    for member in members:
        assert isinstance(member, Member)
        assert member.key is not None
        if member.index is None:
            out[member.key] = member.value
        else:
            assert member.index == len(out[member.key])
            out[member.key].append(member.value)
    return out


def _check_account(raw: bytes, members: list[Member | Unreadable]) -> None:
    """Ranges are in order, never overlap, hold what they say, and nothing but separators lies between them."""
    at = 0
    for member in members:
        assert member.offset >= at
        gap = raw[at : member.offset]
        assert re.fullmatch(rb'(?:\xef\xbb\xbf)?[\s,:\[\]{}]*(?:"(?:[^"\\]|\\.)*"[\s,:\[\]{}]*)*', gap, re.DOTALL), gap
        at = member.offset + member.length
        piece = raw[member.offset : at]
        assert len(piece) == member.length
        if isinstance(member, Unreadable):
            assert member.raw == piece[: json_stream.KEPT_RAW_BYTES]
            assert member.reason
        else:
            assert parse_json(piece) == member.value
    assert re.fullmatch(rb'[\s,:\[\]{}]*(?:"(?:[^"\\]|\\.)*"[\s,:\[\]{}]*)*', raw[at:], re.DOTALL)


@given(values=st.lists(_JSON, max_size=6), style=_STYLES)
@settings(max_examples=150, deadline=None)
def test_array_gives_back_its_elements(values: list[Any], style: dict[str, Any]) -> None:
    raw = json.dumps(values, **style).encode("utf-8")
    members = _read(raw)
    assert [m.value for m in members if isinstance(m, Member)] == json.loads(raw)
    assert [m.index for m in members if isinstance(m, Member)] == list(range(len(values)))
    _check_account(raw, members)


@given(
    value=st.dictionaries(st.text(max_size=4) | st.sampled_from(["a", "b"]), _JSON, max_size=5),
    streamed=st.lists(_JSON, max_size=4),
    style=_STYLES,
)
@settings(max_examples=150, deadline=None)
def test_object_gives_back_its_members(value: dict[str, Any], streamed: list[Any], style: dict[str, Any]) -> None:
    raw = json.dumps({**value, "a": streamed}, **style).encode("utf-8")
    members = _read(raw, ("a",))
    assert _document(members, ("a",)) == json.loads(raw)
    assert _document(_read(raw), ()) == json.loads(raw)
    _check_account(raw, members)


def test_every_chunk_size_reads_the_same(chunk_bytes: int) -> None:
    value = {"x": 'é\\"}', "a": [{"k": [1, [2, {"d": '"'}]]}, "s", -1.5e3, None, True, []], "y": {"z": "]"}}
    raw = b"\xef\xbb\xbf" + json.dumps(value, indent=1).encode() + b"\n"
    assert _document(_read(raw, ("a",)), ("a",)) == value
    deep: Any = "bottom }"
    for _ in range(40):
        deep = [deep, {"k": deep}][:1] if isinstance(deep, dict) else {"k": deep}
    raw = json.dumps([deep, 1, deep]).encode()
    assert [m.value for m in _read(raw) if isinstance(m, Member)] == [deep, 1, deep]


def test_offsets_begin_at_the_start_of_the_source() -> None:
    members = _read(b" [1, 22]", start=100)
    assert [(m.offset, m.length) for m in members] == [(102, 1), (105, 2)]


@given(raw=st.binary(max_size=80) | st.text('[]{}",:\\ 1a\n', max_size=60).map(str.encode), keyed=st.booleans())
@settings(max_examples=500, deadline=None)
def test_arbitrary_bytes_never_raise(raw: bytes, keyed: bool) -> None:
    members = _read(raw, ("a", "1") if keyed else ())
    end = 0
    for member in members:
        assert member.offset >= end
        end = member.offset + member.length
    assert end <= len(raw)


_ROWS = [
    {
        "id": f"row-{i}",
        "name": 'said "yes" \\ {[' * (i % 3),
        "list": [{"id": i, "text": "é, ]}"}, {"id": None, "text": ["x", {"y": i}]}],
        "last": i / 3,
    }
    for i in range(9)
]


@given(data=st.data(), indent=st.sampled_from([None, 1]), keyed=st.booleans())
@settings(max_examples=600, deadline=None)
def test_one_broken_byte_costs_its_own_element(data: st.DataObject, indent: int | None, keyed: bool) -> None:
    document = {"head": 1, "rows": _ROWS} if keyed else _ROWS
    raw = json.dumps(document, indent=indent).encode()
    spans = [m for m in _read(raw, ("rows",)) if isinstance(m, Member) and m.index is not None]
    # What the beginning of an element looks like is learnt from a sound one: the first may cost more.
    broken = data.draw(st.integers(1, len(_ROWS) - 1))
    span = spans[broken]
    at = data.draw(st.integers(span.offset, span.offset + span.length - 1))
    byte = data.draw(st.integers(0, 255) | st.sampled_from(list(b'"\\[]{},:')))
    bad = raw[:at] + bytes([byte]) + raw[at + 1 :]
    members = _read(bad, ("rows",))
    _check_account(bad, members)
    got = [m.value for m in members if isinstance(m, Member) and m.offset not in range(span.offset, at + 1)]
    # Nothing after the broken byte is lost but at most the rest of its own element.
    assert [r for r in _ROWS if r in got] == [r for i, r in enumerate(_ROWS) if i != broken]


@given(at=st.integers(0, 2000))
@settings(max_examples=200, deadline=None)
def test_truncated_document_gives_what_was_whole(at: int) -> None:
    raw = json.dumps({"head": 1, "rows": _ROWS}).encode()
    at = min(at, len(raw) - 1)
    members = _read(raw[:at], ("rows",))
    _check_account(raw[:at], members)
    if at:
        last = members[-1]
        assert isinstance(last, Unreadable)
        assert last.unfinished
    whole = [
        m for m in _read(raw, ("rows",)) if isinstance(m, Member) and m.offset + m.length <= at and m.index is not None
    ]
    got = [m for m in members if isinstance(m, Member) and m.index is not None]
    assert got == whole


def test_garbage_after_the_document_is_reported() -> None:
    members = _read(b'[1]\n garbage {"a": 2}')
    assert isinstance(members[0], Member)
    assert isinstance(members[1], Unreadable)
    assert members[1].raw == b']\n garbage {"a": 2}'
    assert not members[1].unfinished


@pytest.mark.parametrize("raw", [b"", b"  \n", b"\xef\xbb\xbf"])
def test_nothing_is_no_error(raw: bytes) -> None:
    assert _read(raw) == []


@pytest.mark.parametrize("raw", [b"42", b'"text"', b"not json at all", b"\x00\xff"])
def test_other_documents_are_unreadable(raw: bytes) -> None:
    (only,) = _read(raw)
    assert isinstance(only, Unreadable)
    assert only.raw == raw


def test_over_long_element_is_passed_over(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(json_stream, "MAX_LINE_BYTES", 200_000 if chunk_bytes == 1 << 20 else 300)
    monkeypatch.setattr(json_stream, "KEPT_RAW_BYTES", 50)
    long = {"id": "long", "name": "n", "text": "x" * 500_000 if chunk_bytes == 1 << 20 else "x" * 5000}
    rows = [{"id": "a", "name": ""}, long, {"id": "b", "name": ""}]
    first, second, third = _read(json.dumps(rows).encode())
    assert isinstance(first, Member)
    assert isinstance(third, Member)
    assert third.value == rows[2]
    assert isinstance(second, Unreadable)
    assert second.length >= len(json.dumps(long))
    assert len(second.raw) == 50


def test_over_long_element_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MAX_LINE_BYTES", 1 << 20)
    held = 0

    class Endless(io.RawIOBase):
        left = 64

        def read(self, size: int = -1) -> bytes:
            nonlocal held
            held = max(held, size)
            self.left -= 1
            return (
                b'[{"id": "'
                if self.left == 63
                else b"x" * size
                if self.left > 0
                else b'"}, {"id": "b"}]' * (self.left == 0)
            )

    members = list(read_members(Source("test", Endless())))  # type: ignore[arg-type]
    assert [type(m) for m in members] == [Unreadable, Member]
    assert held <= 4 << 20


def test_lost_quote_in_the_middle_of_a_file() -> None:
    rows = [{"id": f"{i}", "name": "n", "text": f"line {i}, {{}} [ ]"} for i in range(50)]
    raw = json.dumps(rows).replace('"text": "line 20,', '"text": line 20,').encode()
    members = _read(raw)
    assert [m.value["id"] for m in members if isinstance(m, Member)] == [r["id"] for r in rows if r["id"] != "20"]


def test_many_broken_elements_in_one_file() -> None:
    rows = [json.dumps({"id": i, "name": "n", "t": [{"k": i}]}) for i in range(300)]
    rows[::3] = [row.replace('"t"', '"t') for row in rows[::3]]
    members = _read(f"[{','.join(rows)}]".encode())
    assert [m.value["id"] for m in members if isinstance(m, Member)] == [i for i in range(300) if i % 3]
    assert sum(isinstance(m, Unreadable) for m in members) == 100


def test_members_after_a_broken_array_are_read() -> None:
    raw = b'{"a": [{"x": 1}, {"x": "2}], "b": [{"y": 1}], "c": 3}'
    members = _read(raw, ("a", "b"))
    assert [(m.key, m.value) for m in members if isinstance(m, Member)] == [("a", {"x": 1}), ("b", {"y": 1}), ("c", 3)]


def test_half_surrogates_and_nan_are_read() -> None:
    assert parse_json(rb'["\ud83d", "\ud83d\ude00", "\\ud83d", "\ude00x"]') == ["\ufffd", "😀", "\\ud83d", "\ufffdx"]
    assert parse_json(b'{"reward": NaN, "x": [-Infinity, 1]}') == {"reward": None, "x": [None, 1]}
    for bad in (b"{", b"nan", b"NaN NaN", b'"\xff"', b'"\\x"', b"[" * 5000):
        with pytest.raises((ValueError, RecursionError)):
            parse_json(bad)


def test_recursive_damage_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "_RESCAN_BYTES", 4 << 20)
    raw = b"[" + b'{"a":1,"b":[' * 20_000
    members = _read(raw)
    _check_account(raw, members)
    assert sum(m.length for m in members) == len(raw) - 1
    assert orjson.dumps([m.length for m in members])
