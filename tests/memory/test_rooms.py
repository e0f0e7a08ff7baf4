"""Room ids and the rules of assignment."""

from __future__ import annotations

from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from workbench.memory.rooms import assign_rooms, concept_key, room_id
from workbench.memory.types import Exchange, FileTouch


def exchange(user: str = "hello", **fields: object) -> Exchange:
    return Exchange("e", user, "", **fields)  # type: ignore[arg-type]


def test_room_id_is_the_published_digest() -> None:
    expected = sha256(b"file:src/a.py:shop").hexdigest()[:16]
    assert room_id("file", "src/a.py", "shop") == expected
    assert room_id("file", "src/a.py", "other") != expected


def test_the_modified_file_comes_before_the_one_read_and_the_lock_file() -> None:
    files = (FileTouch("uv.lock", "modified"), FileTouch("a.py", "read"), FileTouch("b.py", "modified"))
    rooms = assign_rooms(exchange("add a button", files=files), ["Button"])
    assert [(r.room_type, r.key) for r in rooms] == [("file", "b.py"), ("concept", "button"), ("workflow", "building")]


def test_a_file_room_is_named_below_the_project() -> None:
    files = (FileTouch("/home/ann/shop/src/cart.py", "modified"),)
    rooms = assign_rooms(exchange(files=files, project="/home/ann/shop"))
    assert (rooms[0].key, rooms[0].label) == ("src/cart.py", "cart.py")


def test_a_concept_that_repeats_the_file_name_is_passed_over() -> None:
    rooms = assign_rooms(exchange(files=(FileTouch("cart.py", "read"),)), ["Cart", "voucher"])
    assert [r.key for r in rooms if r.room_type == "concept"] == ["voucher"]


def test_kinds_of_work_have_an_order() -> None:
    assert assign_rooms(exchange("add a test, then fix the crash"))[0].key == "debugging"
    assert assign_rooms(exchange("guten Tag"))[0].key == "conversation"


def test_concept_keys_do_not_depend_on_spelling() -> None:
    assert {concept_key(x) for x in ("Shadow branch", "shadow_branch", "shadowBranch", "SHADOW-BRANCH")} == {
        "shadow-branch"
    }


@given(st.text(max_size=200), st.lists(st.text(max_size=30), max_size=4))
def test_there_are_always_one_to_three_rooms(user: str, concepts: list[str]) -> None:
    rooms = assign_rooms(exchange(user), concepts)
    assert 1 <= len(rooms) <= 3
    assert all(0 <= room.relevance <= 1 and room.key for room in rooms)
