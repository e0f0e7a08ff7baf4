"""What the tests of memory share."""

from __future__ import annotations

from collections.abc import Iterator

import duckdb
import pytest

from workbench.data.store import migrations


@pytest.fixture
def con() -> Iterator[duckdb.DuckDBPyConnection]:
    """An empty store in memory."""
    with duckdb.connect() as con:
        for _, sql in migrations():
            con.execute(sql)
        yield con
