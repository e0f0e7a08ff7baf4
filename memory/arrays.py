"""NumPy arrays from and to DuckDB. Nothing here imports numpy.ma (6 ms of CPU in a fresh process) unless it must."""

from __future__ import annotations

from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from workbench.data.columns import viewed


def fetch(con: duckdb.DuckDBPyConnection, sql: str, parameters: Any) -> dict[str, NDArray]:
    """The columns of a query's result."""
    if isinstance(parameters, list):  # DuckDB imports numpy.ma for an array (6 ms of CPU, once), and not for a list
        parameters = [value.tolist() if isinstance(value, np.ndarray) else value for value in parameters]
    return {name: np.asarray(column) for name, column in con.execute(sql, parameters).fetchnumpy().items()}


def distinct(values: NDArray) -> NDArray:
    """The different values, ascending, as np.unique gives them, which imports numpy.ma."""
    values = np.sort(values)
    return values[np.append(True, values[1:] != values[:-1])[: len(values)]]


def insert(con: duckdb.DuckDBPyConnection, sql: str, parameters: list[Any], batch: dict[str, NDArray]) -> None:
    """Runs an INSERT … FROM batch, whose columns are these arrays."""
    with viewed(con, "batch", batch):
        con.execute(sql, parameters)
