"""Rows come back from DuckDB as they went in; the text of a registered batch is not held until the transaction ends."""

from __future__ import annotations

import weakref
from typing import Any

import duckdb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.data import columns
from workbench.data.columns import Kind, insert_rows, registered
from workbench.data.records import valid

KINDS: dict[str, Kind] = {"t": "text", "v": "valid", "i": "int", "b": "bool", "moment": "time"}
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
ROWS = st.lists(
    st.tuples(
        st.none() | st.text(max_size=20) | st.just("half \ud83d of a pair"),
        st.none() | TEXT,
        st.none() | st.integers(-(2**63), 2**63 - 1),
        st.none() | st.booleans(),
        st.none() | st.integers(31_536_000_000_000, 7_258_118_400_000_000),
    ),
    max_size=30,
)


@given(ROWS)
def test_rows_come_back(rows: list[tuple[Any, ...]]) -> None:
    with duckdb.connect() as con:
        con.execute("SET TimeZone = 'UTC'")
        con.execute("CREATE TABLE x (moment TIMESTAMPTZ, b BOOLEAN, i BIGINT, v VARCHAR, t VARCHAR)")
        insert_rows(con, "x", KINDS, rows)
        found = con.execute("SELECT t, v, i, b, epoch_us(moment) FROM x").fetchall()
        assert found == [(None if row[0] is None else valid(row[0]), *row[1:]) for row in rows]


def test_late_values_decide_no_type() -> None:
    """DuckDB looks at a sample of an object column: one that begins with NULL or digits is text all the same."""
    rows = [(None, "1", None, None, None)] * 5000 + [("words", "2020-01-01", 2**62, True, 10**15)]
    with duckdb.connect() as con:
        con.execute("SET TimeZone = 'UTC'")
        con.execute("CREATE TABLE x (moment TIMESTAMPTZ, b BOOLEAN, i BIGINT, v VARCHAR, t VARCHAR)")
        insert_rows(con, "x", KINDS, rows)
        assert con.execute("SELECT count(*) FROM x WHERE v = '1' AND t IS NULL").fetchall() == [(5000,)]
        assert con.execute("SELECT t, v, i, b FROM x WHERE t IS NOT NULL").fetchall() == [
            ("words", "2020-01-01", 2**62, True)
        ]


def test_half_a_pair_does_not_end_the_transaction() -> None:
    with duckdb.connect() as con:
        con.execute("CREATE TABLE x (t VARCHAR)")
        con.execute("BEGIN")
        insert_rows(con, "x", {"t": "text"}, [("before",)])
        insert_rows(con, "x", {"t": "text"}, [("\ud800",)])
        con.execute("COMMIT")
        assert con.execute("SELECT t FROM x").fetchall() == [("before",), ("?",)]


def test_text_is_let_go_before_the_transaction_ends() -> None:
    class Word(str):
        __slots__ = ("__weakref__",)

    word = Word("a word")
    alive = weakref.ref(word)
    with duckdb.connect() as con:
        con.execute("BEGIN")
        rows = [(word,)]
        with registered(con, "words", {"t": "valid"}, rows):
            assert con.execute("SELECT t FROM words").fetchall() == [("a word",)]
        del word, rows
        assert alive() is None
        con.execute("COMMIT")


def test_only_text_is_kept_as_objects() -> None:
    assert columns._array((1, 2), "int").dtype == np.int64
    assert columns._array((True, None), "bool").dtype == np.bool_


def test_an_error_inside_a_transaction_is_not_hidden() -> None:
    con = duckdb.connect()
    con.execute("CREATE TABLE numbers (i BIGINT PRIMARY KEY)")
    con.execute("BEGIN")
    with pytest.raises(duckdb.ConstraintException, match="duplicate key"):
        insert_rows(con, "numbers", {"i": "int"}, [(1,), (1,)])
    con.execute("ROLLBACK")
    insert_rows(con, "numbers", {"i": "int"}, [(1,)])
    assert con.execute("FROM numbers").fetchall() == [(1,)]
