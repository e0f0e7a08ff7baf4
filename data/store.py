"""The store: one DuckDB file, opened politely, migrated in numbered steps, with errors that say what to do.

DuckDB lets one process write and nobody read meanwhile. So nobody holds the file longer than needed: who wants it and
cannot have it leaves a note in `<store>.wait/`, and a long writer hands the file over between two transactions
(`Store.hand_over`). Events of other processes come in through the spool (workbench.data.spool) and need no lock at all.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Self

import duckdb

from workbench.errors import (
    StoreBusy,
    StoreDamaged,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreNewer,
    StoreReadOnly,
)

WAIT_SECONDS = 30.0
POLL_SECONDS = 0.02
#: A waiter touches its note at every poll: one older than this is of a process that died.
STALE_NOTE_SECONDS = 5.0
#: What precedes the first block of a DuckDB file.
_FILE_HEADER_BYTES = 3 * 4096


def default_path() -> Path:
    """$WORKBENCH_STORE, else workbench/workbench.duckdb in the user's data folder."""
    if named := os.environ.get("WORKBENCH_STORE"):
        return Path(named)
    data_home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data_home) / "workbench" / "workbench.duckdb"


def migrations() -> list[tuple[int, str]]:
    """(version, SQL) of every schema file, in order."""
    folder = resources.files("workbench.data") / "schema"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".sql")), key=lambda f: f.name)
    return [(int(f.name[:4]), f.read_text("utf-8")) for f in files]


class Store:
    """An open store. Use as a context manager; `con` is its DuckDB connection.

    Args:
        path: the file; made (with its folder) on the first write.
        read_only: other readers may have it open at the same time.
        create: make it if there is none (never if read_only).
        wait_seconds: how long to wait for another process to hand it over.

    Raises: StoreMissing (no file, and none may be made), StoreNewer, StoreDamaged, StoreReadOnly, StoreFull, StoreBusy.
    """

    con: duckdb.DuckDBPyConnection

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, read_only: bool = False, create: bool = True,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:  # fmt: skip
        self.path = Path(path) if path is not None else default_path()
        self.read_only = read_only
        self.wait_seconds = wait_seconds
        if self.path.is_dir():
            raise StoreError(f"{self.path} is a folder; --store takes a file.")
        if (read_only or not create) and not self.path.exists():
            raise StoreMissing(
                f"There is no store at {self.path}. "
                "Make one with `workbench ingest PATH`, or name another with --store."
            )
        if not read_only:
            self._check_writable()
            if not self.path.exists():
                self._create()
        self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; committed work is on disk already."""
        with store_errors(self.path):
            self.con.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """All or nothing: commits at the end of the block, rolls back on any exception."""
        with store_errors(self.path):
            self.con.execute("BEGIN")
            try:
                yield self.con
                self.con.execute("COMMIT")
            except BaseException:
                self.rollback()
                raise

    def rollback(self) -> None:
        """Undoes the open transaction, if the connection still has one."""
        with contextlib.suppress(duckdb.Error):
            self.con.execute("ROLLBACK")

    def hand_over(self) -> bool:
        """Lets waiting processes have the file, then takes it back. Call between transactions of long work.

        Returns: True if the file was handed over (prepared statements and registered views are gone then).
        """
        if not any(self._fresh_notes()):
            return False
        self.close()
        deadline = time.monotonic() + 2.0
        while any(self._fresh_notes()) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        self._open()
        return True

    # -- opening ------------------------------------------------------------------------------------------------

    def _check_writable(self) -> None:
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreReadOnly(f"The folder {folder} cannot be made: {error.strerror}.") from error
        # The folder as well: DuckDB writes its log (.wal) beside the file. The mode, because root may write anything.
        for target in (self.path, folder):
            if target.exists() and (target.stat().st_mode & 0o222 == 0 or not os.access(target, os.W_OK)):
                raise StoreReadOnly(
                    f"{target} is read-only. Make it writable (chmod u+w), or name another store with --store."
                )

    def _create(self) -> None:
        """Makes an empty store under another name first: a kill never leaves half a file under the store's own."""
        new = self.path.with_name(f"{self.path.name}.new-{os.getpid()}-{id(self):x}")
        try:
            with store_errors(self.path):
                self.con = _connect(new, read_only=False)
                try:
                    self._migrate()
                    self.con.execute("PRAGMA enable_checkpoint_on_shutdown")
                finally:
                    self.con.close()
                try:
                    os.link(new, self.path)
                except FileExistsError:
                    pass  # another process was faster: its store is the store
                except OSError:  # a file system without hard links
                    new.rename(self.path)
        finally:
            for left in (new, new.with_name(new.name + ".wal")):
                left.unlink(missing_ok=True)

    def _open(self) -> None:
        self.con = self._wait_for_connection()
        try:
            with store_errors(self.path):
                self._check_whole()
                self._migrate()
                if not self.read_only:
                    self.con.execute("PRAGMA enable_checkpoint_on_shutdown")
        except BaseException:
            self.con.close()
            raise

    def _wait_for_connection(self) -> duckdb.DuckDBPyConnection:
        note = self._wait_folder() / f"{os.getpid()}-{id(self):x}"
        deadline = time.monotonic() + self.wait_seconds
        try:
            while True:
                try:
                    return _connect(self.path, self.read_only)
                except duckdb.Error as error:
                    if not any(text in str(error) for text in _IN_USE):
                        raise _translated(error, self.path) or error from error
                    if time.monotonic() > deadline:
                        raise StoreBusy(
                            f"Another process is using {self.path} and did not hand it over within "
                            f"{self.wait_seconds:g} s. Try again when it has finished."
                        ) from error
                    _leave_note(note)
                    time.sleep(POLL_SECONDS)
        finally:
            with contextlib.suppress(OSError):
                note.unlink(missing_ok=True)

    def _wait_folder(self) -> Path:
        return self.path.with_name(self.path.name + ".wait")

    def _fresh_notes(self) -> Iterator[Path]:
        try:
            for note in self._wait_folder().iterdir():
                if time.time() - note.stat().st_mtime < STALE_NOTE_SECONDS:
                    yield note
                else:
                    note.unlink(missing_ok=True)
        except FileNotFoundError:
            return

    def _check_whole(self) -> None:
        """Raises StoreDamaged if the end of the file is missing: DuckDB notices only when it comes to read there."""
        sizes = self.con.execute("SELECT block_size, total_blocks, used_blocks FROM pragma_database_size()").fetchone()
        alone = self.con.execute("FROM duckdb_connection_count()").fetchone()
        if not sizes or alone != (1,):  # another thread of this process is writing: blocks may not be on disk yet
            return
        block_size, total, used = sizes
        whole_blocks = max(0, self.path.stat().st_size - _FILE_HEADER_BYTES) // block_size
        if whole_blocks >= total:
            return
        # Free blocks at the end may be missing: a checkpoint cuts them off after it has written their number.
        tables = self.con.execute("SELECT schema_name, table_name FROM duckdb_tables() WHERE NOT internal").fetchall()
        last = [
            self.con.execute("SELECT max(block_id) FROM pragma_storage_info(?)", [f'"{schema}"."{table}"']).fetchone()
            for schema, table in tables
        ]
        if whole_blocks < used or any(row and row[0] is not None and row[0] >= whole_blocks for row in last):
            raise _damaged(self.path, f"{whole_blocks} of {total} blocks are there: its end is missing")

    def _migrate(self) -> None:
        current = schema_version(self.con)
        steps = migrations()
        newest = steps[-1][0]
        if current > newest:
            raise StoreNewer(
                f"{self.path} has schema {current}; this version of the workbench knows schemas up to {newest}. "
                "Upgrade the workbench (pip install --upgrade workbench), or name another store with --store."
            )
        pending = [step for step in steps if step[0] > current]
        if not pending:
            return
        if current == 0 and self.con.execute("FROM duckdb_tables() WHERE NOT internal LIMIT 1").fetchall():
            raise _damaged(self.path, "it holds the tables of another program")
        if self.read_only:
            self.con.close()
            Store(self.path, wait_seconds=self.wait_seconds).close()
            self.con = self._wait_for_connection()
            return
        if current > 0:
            self._back_up(self.path.with_name(f"{self.path.name}.v{current}.bak"))
        with self.transaction() as con:
            con.execute("CREATE TABLE IF NOT EXISTS schema_versions (version INTEGER, applied_at TIMESTAMPTZ)")
            for version, sql in pending:
                con.execute(sql)
                con.execute("INSERT INTO schema_versions VALUES (?, now())", [version])

    def _back_up(self, backup: Path) -> None:
        # Through DuckDB: to open and close the file in any other way would give up this process's lock on it (POSIX).
        partial = backup.with_name(backup.name + ".partial")
        name = self.con.execute("SELECT current_database()").fetchone()
        assert name is not None
        try:
            for left in (partial, partial.with_name(partial.name + ".wal")):
                left.unlink(missing_ok=True)
            self.con.execute("ATTACH ? AS backup_of_store", [str(partial)])
            self.con.execute(f"COPY FROM DATABASE {_quoted(name[0])} TO backup_of_store")
            self.con.execute("CHECKPOINT backup_of_store")
            self.con.execute("DETACH backup_of_store")
            partial.rename(backup)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def schema_version(con: duckdb.DuckDBPyConnection) -> int:
    """The newest migration that the file has; 0 for an empty one."""
    try:
        return int(con.execute("SELECT max(version) FROM schema_versions").fetchall()[0][0] or 0)
    except duckdb.CatalogException:
        return 0


#: Another process has the file; another thread of this one has it in the other mode, or is just closing it.
_IN_USE = ("lock on file", "different configuration", "Unique file handle conflict")


def _connect(path: Path, read_only: bool) -> duckdb.DuckDBPyConnection:
    # Nothing is fetched behind the user's back: extensions are never installed or loaded from the network.
    config: dict[str, Any] = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
    con = duckdb.connect(str(path), read_only=read_only, config=config)
    con.execute("SET TimeZone = 'UTC'")
    if not read_only:  # until the file has been looked at: one that is refused is left as it is
        con.execute("PRAGMA disable_checkpoint_on_shutdown")
    return con


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _leave_note(note: Path) -> None:
    with contextlib.suppress(OSError):  # a folder that cannot be written has no writer to ask
        note.parent.mkdir(exist_ok=True)
        note.touch()


@contextlib.contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """Turns DuckDB's and the system's errors about the file into StoreErrors with advice."""
    try:
        yield
    except (duckdb.Error, OSError) as error:
        translated = _translated(error, path)
        if translated is None:
            raise
        raise translated from error


def _damaged(path: Path, what: str) -> StoreDamaged:
    return StoreDamaged(
        f"{path} is damaged or no workbench store ({what}). It was left as it is. Move it away and ingest "
        "the logs again, or put a backup in its place."
    )


def _translated(error: Exception, path: Path) -> StoreError | None:
    text = " ".join(str(error).split())
    if "No space left" in text or "File too large" in text or "Disk quota" in text:
        return StoreFull(
            f"The disk that holds {path} is full. Nothing of the last step was stored, all before it is; "
            "free some space and run the command again: it goes on where it stopped."
        )
    if "Read-only file system" in text or "Permission denied" in text or "read-only mode" in text:
        return StoreReadOnly(f"{path} cannot be written ({text[:120]}). Make it writable or name another store.")
    # The last is DuckDB's word for the file of another database.
    damaged = (
        "not a valid DuckDB",
        "Could not read enough bytes",
        "Corrupt",
        "corrupt",
        "checksum",
        "deserialize",
        'Extension "',
    )
    if isinstance(error, duckdb.Error) and any(word in text for word in damaged):
        return _damaged(path, text[:160])
    if isinstance(error, duckdb.FatalException | duckdb.InternalException | duckdb.SerializationException):
        return StoreDamaged(f"{path} could not be read ({text[:160]}). It was left as it is.")
    if isinstance(error, duckdb.IOException):
        return StoreError(f"{path}: {text[:300]}")
    return None
