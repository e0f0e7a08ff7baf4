"""Hands rows of Python values to DuckDB by way of NumPy columns.

Half the CPU of an Arrow table for text, which would be encoded twice; and pyarrow imports pandas (0.2 s, 60 MB) at its
first array, wherever pandas is installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import duckdb
import numpy as np

from workbench.data.records import valid

#: "valid" is text that holds no half of a surrogate pair for sure; "time": microseconds since the epoch, UTC.
Kind = Literal["text", "valid", "int", "real", "bool", "time"]

_NO_TIME = np.iinfo(np.int64).min  # NumPy's NaT


@contextmanager
def viewed(con: duckdb.DuckDBPyConnection, name: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Iterator[None]:
    """Makes arrays a view of that name inside the block."""
    con.register(name, arrays)
    try:
        yield
    finally:
        # In a transaction that failed this fails as well, and would hide why (a full disk, Ctrl-C).
        with suppress(duckdb.Error):
            con.unregister(name)


@contextmanager
def registered(
    con: duckdb.DuckDBPyConnection, name: str, columns: dict[str, Kind], rows: Sequence[Sequence[Any]]
) -> Iterator[None]:
    """Makes rows (values in the order of `columns`; None = NULL) a view of that name inside the block."""
    values = zip(*rows, strict=True) if rows else [()] * len(columns)
    arrays = {c: _array(v, kind) for v, (c, kind) in zip(values, columns.items(), strict=True)}
    try:
        with viewed(con, name, arrays):
            yield
    finally:
        # DuckDB holds what was registered until the transaction ends: all text of a large log otherwise.
        for array in arrays.values():
            if array.dtype == object:
                array.fill(None)


def insert_rows(
    con: duckdb.DuckDBPyConnection, table: str, columns: dict[str, Kind], rows: Sequence[Sequence[Any]]
) -> None:
    """Inserts rows (values in the order of `columns`; None = NULL) with one statement."""
    if rows:
        with registered(con, "new_rows", columns, rows):
            con.execute(f"INSERT INTO {table} BY NAME SELECT * FROM new_rows")


def _array(column: tuple[Any, ...], kind: Kind) -> np.ndarray[Any, Any]:
    if kind == "text" or kind == "valid":
        array = np.empty(len(column), object)
        array[:] = column if kind == "valid" else _encodable(column)
        return array
    if kind == "time":
        return np.array([_NO_TIME if value is None else value for value in column], "datetime64[us]")
    dtype = {"bool": np.bool_, "int": np.int64, "real": np.float64}[kind]
    if None not in column:
        return np.array(column, dtype)
    return np.ma.array(np.array([value or 0 for value in column], dtype), mask=[value is None for value in column])


def _encodable(column: tuple[Any, ...]) -> Sequence[Any]:
    # Looked at here, because an error inside the statement would end the caller's transaction.
    try:
        "".join(filter(None, column)).encode()
    except UnicodeEncodeError:
        return [value and valid(value) for value in column]
    return column
