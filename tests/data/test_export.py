"""Export: every table comes back equal from Arrow, Parquet and `datasets`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from workbench import api
from workbench.data import export
from workbench.data.store import Store
from workbench.errors import InputError, StoreReadOnly

SAMPLES = Path(__file__).parents[2] / "data/samples"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "w.duckdb"
    api.ingest([SAMPLES / "claude_code", SAMPLES / "codex"], path)
    api.distill(path)
    return path


def test_round_trip(path: Path, tmp_path: Path) -> None:
    with Store(path, read_only=True) as store:
        names = export.tables(store.con)
        assert {"messages", "parts", "exchanges", "memories", "rooms", "schema_versions"} <= set(names)
        rows = export.to_parquet(store, tmp_path / "out")
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"{n}.parquet" for n in names]
        for name in names:
            table = export.to_arrow(store.con, name)
            assert rows[name] == table.num_rows
            [(count,)] = store.con.execute(f'SELECT count(*) FROM "{name}"').fetchall()
            assert count == table.num_rows
            assert pq.read_table(tmp_path / "out" / f"{name}.parquet").equals(table), name
            # DuckDB reads the file back as the table that it was
            different = store.con.execute(
                f'SELECT count(*) FROM (SELECT COLUMNS(*)::VARCHAR FROM "{name}" EXCEPT ALL '
                "SELECT COLUMNS(*)::VARCHAR FROM read_parquet(?))", [str(tmp_path / "out" / f"{name}.parquet")]
            ).fetchall()  # fmt: skip
            assert different == [(0,)], name


def test_only_some_tables_and_twice(path: Path, tmp_path: Path) -> None:
    with Store(path, read_only=True) as store:
        for _ in range(2):
            assert list(export.to_parquet(store, tmp_path, ["messages"])) == ["messages"]
        assert [p.name for p in tmp_path.iterdir()] == ["messages.parquet"]
        with pytest.raises(InputError, match=r"no table 'nope'.*messages"):
            export.to_parquet(store, tmp_path, ["nope"])
        with pytest.raises(InputError):
            export.to_arrow(store.con, 'messages" UNION SELECT 1 --')
        file = tmp_path / "file"
        file.write_text("x")
        with pytest.raises((StoreReadOnly, OSError)):
            export.to_parquet(store, file)


def test_a_failure_leaves_no_half_file(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    from workbench.errors import StoreFull

    with Store(path, read_only=True) as store:
        export.to_parquet(store, tmp_path, ["parts"])
        before = (tmp_path / "parts.parquet").read_bytes()
        monkeypatch.setattr(pq.ParquetWriter, "write_batch", fail)
        with pytest.raises(StoreFull):
            export.to_parquet(store, tmp_path, ["parts"])
    assert [p.name for p in tmp_path.iterdir()] == ["parts.parquet"]
    assert (tmp_path / "parts.parquet").read_bytes() == before


DATASETS = """
import sys, datasets
from pathlib import Path
from workbench.data import export
from workbench.data.store import Store
with Store(Path(sys.argv[1]), read_only=True) as store:
    for name in ("exchanges", "memories", "parts"):
        found = export.to_datasets(store.con, name)
        assert isinstance(found, datasets.Dataset)
        arrow = export.to_arrow(store.con, name)
        assert found.column_names == arrow.column_names
        for column in ("text", "core", "user_text", "tools", "files"):
            if column in found.column_names:
                assert list(found[column]) == arrow[column].to_pylist()
"""


def test_datasets(path: Path) -> None:
    """In a process of its own: after a training run in the same one, opening this store was seen to hang."""
    pytest.importorskip("datasets", reason="the `datasets` package is not installed (extra `train`)")
    command = [sys.executable, "-c", DATASETS, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
