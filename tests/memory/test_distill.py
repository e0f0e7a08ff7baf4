"""distill: checked records in small transactions; goes on where it stopped; nothing stale is written."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import store_helpers as helpers

from workbench import api
from workbench.data.store import Store
from workbench.errors import EndpointError
from workbench.memory import distill as module
from workbench.memory.distill import distill, num_pending
from workbench.memory.filters import Filters
from workbench.memory.index import on_memories
from workbench.memory.types import Distilled, Exchange, Failed, Room


class First:
    """The first line of the user's words; `spoil` replaces some records."""

    def __init__(
        self, name: str = "first/1", spoil: Callable[[int, Exchange], Distilled | Failed | None] | None = None
    ) -> None:
        self.name, self.spoil, self.seen = name, spoil, []

    def distil(self, exchanges: Iterable[Exchange]) -> Iterator[tuple[Exchange, Distilled | Failed]]:
        for i, exchange in enumerate(exchanges):
            self.seen.append(exchange.exchange_id)
            other = self.spoil(i, exchange) if self.spoil else None
            yield (
                exchange,
                other
                or Distilled(exchange.user_text[:40].rsplit(" ", 1)[0], "", (Room("concept", "k", f"label {i}"),)),
            )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "w.duckdb"
    for i in range(2):
        helpers.write_jsonl(tmp_path / "logs" / f"{i}.jsonl", helpers.claude_session(random.Random(i), f"s{i}", 10))
    api.ingest([tmp_path / "logs"], path)
    return path


def run(path: Path, distiller: First, **options: object) -> module.DistillReport:
    with Store(path) as store:
        return distill(store, distiller, on_memories=on_memories, **options)


def test_twice_adds_nothing_and_changes_no_verbatim_text(path: Path) -> None:
    before = helpers.verbatim(path)
    report = run(path, First())
    assert (report.memories_added, report.failed, report.pending) == (20, 0, 0)
    content = helpers.content(path)
    again = run(path, First())
    assert (again.memories_added, again.pending) == (0, 0)
    assert not helpers.difference(content, helpers.content(path))
    assert not helpers.difference(before, helpers.verbatim(path))
    assert run(path, First("first/2")).memories_added == 20, "a new version distils everything anew"
    assert not helpers.difference(before, helpers.verbatim(path))


def test_limit_and_order(path: Path) -> None:
    first, second = First(), First()
    report = run(path, first, limit=7)
    assert (report.memories_added, report.pending) == (7, 13)
    assert run(path, second, limit=100).memories_added == 13
    assert len({*first.seen, *second.seen}) == 20
    with Store(path) as store:
        ids = store.con.execute("SELECT exchange_id FROM exchanges ORDER BY seq").fetchall()
        assert num_pending(store.con, "first/1") == 0
    assert [*first.seen, *second.seen] == [i for (i,) in ids]


def test_pages_and_commits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE", 3)
    monkeypatch.setattr(module, "COMMIT_MEMORIES", 4)
    seen: list[int] = []
    report = run(path, First(), progress=lambda r: seen.append(r.memories_added))
    assert seen == [4, 8, 12, 16, 20, 20]
    assert report.verbatim_tokens > report.memory_tokens > 0


def test_failures_and_broken_checks_stay_pending(path: Path) -> None:
    def spoil(i: int, exchange: Exchange) -> Distilled | Failed | None:
        room = (Room("concept", "k", "l"),)
        return {
            0: Failed("no answer"),
            1: Distilled("", "", room),
            2: Distilled("words", "this is nowhere in the exchange", room),
            3: Distilled("it names no_such_thing.py", "", room),
            4: Distilled("words", "", ()),
        }.get(i)

    report = run(path, First(spoil=spoil))
    assert (report.memories_added, report.failed, report.pending) == (15, 5, 5)
    assert sum(report.reasons.values()) == 5
    assert len(report.reasons) == 5
    assert (run(path, First()).memories_added, run(path, First()).pending) == (5, 0)


def test_interrupt_keeps_what_was_committed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMMIT_MEMORIES", 4)

    def spoil(i: int, exchange: Exchange) -> None:
        if i == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(path, First(spoil=spoil))
    rest = First()
    assert run(path, rest).memories_added == 12
    assert len(rest.seen) == 12


def test_labels_of_rooms_do_not_depend_on_where_commits_fall(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.duckdb"
    other.write_bytes(path.read_bytes())
    run(path, First())
    monkeypatch.setattr(module, "COMMIT_MEMORIES", 3)
    run(other, First())
    assert not helpers.difference(helpers.content(path), helpers.content(other))


def test_a_log_that_grows_while_it_is_distilled(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is handed over between commits: records of exchanges that changed meanwhile are not written."""
    monkeypatch.setattr(module, "COMMIT_MEMORIES", 4)
    log = tmp_path / "logs" / "0.jsonl"
    lines = helpers.claude_session(random.Random(0), "s0", 10)
    hand_over, grown = Store.hand_over, []

    def other_process_grows_the_log(self: Store) -> bool:
        if grown:
            return hand_over(self)
        grown.append(True)
        self.close()
        # A word is put into the third exchange: it and those after it get new numbers.
        late = {
            **lines[11],
            "uuid": "late",
            "message": {**lines[11]["message"], "id": "late", "content": [{"type": "text", "text": "Late words."}]},
        }
        helpers.write_jsonl(log, [*lines[:12], late, *lines[12:]])
        api.ingest([log], self.path)
        self._open()
        return True

    monkeypatch.setattr(Store, "hand_over", other_process_grows_the_log)
    run(path, First())
    report = run(path, First())
    assert report.pending == 0
    with Store(path) as store:
        bad = store.con.execute(
            "SELECT (SELECT count(*) FROM memories ANTI JOIN exchanges USING (exchange_id, content_hash)), "
            "(SELECT count(*) FROM memories) - (SELECT count(*) FROM exchanges), "
            "(SELECT count(*) FROM lexical_documents d WHERE doc NOT IN (SELECT seq FROM exchanges)), "
            "(SELECT count(*) FROM memory_rooms ANTI JOIN memories USING (memory_id))"
        ).fetchall()
    assert bad == [(0, 0, 0, 0)]
    content = helpers.content(path)["index"]
    assert sum(1 for key in content if key[0] == "distilled/first/1") == 20


def test_one_room_however_its_key_is_spelt_and_once_for_each_memory(path: Path) -> None:
    def rooms(i: int, exchange: Exchange) -> Distilled:
        concept = ("Cart Total", "cart total", "cart_total", "cartTotal")[i % 4]
        file = ("./src/cart.py", "src\\cart.py")[i % 2]
        placed = (Room("concept", concept, concept), Room("concept", "cart-total", "x", 0.2), Room("file", file, file))
        return Distilled(exchange.user_text.split()[0], "", placed)

    report = run(path, First(spoil=rooms))
    assert report.failed == 0
    with Store(path) as store:
        found = store.con.execute(
            "SELECT r.room_key, count(*), min(p.relevance) FROM rooms r JOIN memory_rooms p USING (room_id) "
            "GROUP BY r.room_id, r.room_key ORDER BY 1"
        ).fetchall()
        where, values = Filters(room="CART total").sql()
        asked = store.con.execute(f"SELECT count(*) FROM exchanges e WHERE {where}", values).fetchall()
    assert asked == [(report.memories_added,)]
    assert found == [("cart-total", report.memories_added, 1.0), ("src/cart.py", report.memories_added, 1.0)]


def test_a_room_without_a_key_is_refused(path: Path) -> None:
    report = run(path, First(spoil=lambda i, e: Distilled(e.user_text.split()[0], "", (Room("concept", "  ", " "),))))
    assert dict(report.reasons) == {"check: a room has an empty key": 20}


def test_what_came_before_the_model_server_failed_is_kept(path: Path) -> None:
    def fail(i: int, exchange: Exchange) -> None:
        if i == 7:
            raise EndpointError("the server is gone")

    with pytest.raises(EndpointError, match="gone"):
        run(path, First(spoil=fail))
    with Store(path) as store:
        assert num_pending(store.con, "first/1") == 13
