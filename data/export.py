"""Every table out of the store: Arrow in memory, Parquet on disk, `datasets` for training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from workbench.data.store import Store, store_errors
from workbench.errors import InputError, MissingExtra

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

ROWS_PER_BATCH = 10_000


def tables(con: duckdb.DuckDBPyConnection) -> list[str]:
    """Names of the store's tables."""
    rows = con.execute("SELECT table_name FROM duckdb_tables() WHERE NOT internal ORDER BY table_name").fetchall()
    return [row[0] for row in rows]


def reader(con: duckdb.DuckDBPyConnection, table: str) -> pa.RecordBatchReader:
    """A table as a stream of Arrow record batches.

    Raises: InputError for a name that is no table of the store.
    """
    known = tables(con)
    if table not in known:
        raise InputError(f"The store has no table {table!r}. Its tables: {', '.join(known)}.")
    return con.sql(f'SELECT * FROM "{table}"').to_arrow_reader(ROWS_PER_BATCH)


def to_arrow(con: duckdb.DuckDBPyConnection, table: str) -> pa.Table:
    """A whole table in memory."""
    return reader(con, table).read_all()


def to_parquet(store: Store, folder: Path, names: Iterable[str] | None = None) -> dict[str, int]:
    """Writes `<folder>/<table>.parquet` for each table (None = all); returns rows per table.

    A file is written under another name and renamed when whole, so that a kill leaves no half file under its name.
    """
    import pyarrow.parquet as pq

    rows: dict[str, int] = {}
    with store_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in names or tables(store.con):
            batches = reader(store.con, name)
            partial, count = folder / f"{name}.parquet.partial", 0
            try:
                with pq.ParquetWriter(partial, batches.schema, compression="zstd") as writer:
                    for batch in batches:
                        writer.write_batch(batch)
                        count += batch.num_rows
                partial.rename(folder / f"{name}.parquet")
            finally:
                partial.unlink(missing_ok=True)
            rows[name] = count
    return rows


def to_datasets(con: duckdb.DuckDBPyConnection, table: str) -> datasets.Dataset:
    """A table as a Hugging Face `datasets.Dataset`.

    Raises: MissingExtra without the `datasets` package.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("a Dataset needs `datasets`, which is not installed", "train") from error
    arrow: Any = to_arrow(con, table)
    return datasets.Dataset(arrow)
