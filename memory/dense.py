"""Dense search: vectors in DuckDB, exact inner products over a memory-mapped matrix that is derived from them.

A space is the vectors of one layer under one embedding model. Its matrix stands in two files in a folder beside the
store: `<space>.<generation>.f32` (rows of float32, only ever appended to) and `<space>.rows` (which doc each row is;
replaced as a whole). They are brought up to date when a search finds them behind, and may be deleted at any time;
where they cannot be read or written, the vectors are read from DuckDB. Both ways give the same numbers.

`add` and `remove` neither begin nor commit a transaction: the caller's makes text and vectors one.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import duckdb
import numpy as np
from numpy.typing import NDArray

from workbench.errors import InputError, NotFound
from workbench.memory.arrays import distinct, fetch, insert
from workbench.memory.fusion import Arm, top
from workbench.memory.postings import next_revision

_READ_AT_ONCE = 100_000  # vectors taken out of DuckDB at once: with 256 dimensions 50 MB
_ROWS_AT_ONCE = 8_192
_DEAD_SHARE = 0.25  # a matrix file with more rows of removed documents is written anew
_MAGIC = 0x776256454354_0001
_HEADER = np.dtype([(name, "<i8") for name in ("magic", "revision", "generation", "rows", "dim", "checksum")])
_ROW = np.dtype([("doc", "<i4"), ("revision", "<i8")])  # doc -1: the document is gone
# Products in float32 err by less than this for vectors of length 1; nearer ones are compared in float64.
_FLOAT32_ERROR = 1e-5


@dataclass(frozen=True, slots=True)
class Space:
    """The vectors of a layer under a model; every change gives it a greater `revision`."""

    id: int
    layer: str
    model: str
    dim: int
    revision: int


def find_space(con: duckdb.DuckDBPyConnection, layer: str, model: str) -> Space | None:
    """The space of that layer and model, None if nothing was ever added to it."""
    rows = con.execute(
        "SELECT space, dim, revision FROM embedding_spaces WHERE layer = ? AND model = ?", [layer, model]
    ).fetchall()
    return Space(rows[0][0], layer, model, rows[0][1], rows[0][2]) if rows else None


def add(
    con: duckdb.DuckDBPyConnection,
    layer: str,
    model: str,
    docs: Sequence[int] | NDArray[np.integer],
    vectors: NDArray[np.floating],
) -> int:
    """Keep the vectors of documents, to the precision of float16; those that a document had before are replaced.

    Args:
        docs: each once; `exchanges.seq`.
        vectors: (len(docs), dim), of length 1 (or 0: such a document is never found first).

    Returns: how many were added.

    Raises: InputError if the shape does not fit or the space has another dim.
    """
    numbers = np.asarray(docs, np.int32)
    if vectors.ndim != 2 or len(vectors) != len(numbers):
        raise InputError(f"{len(numbers)} documents need as many vectors, not an array of shape {vectors.shape}")
    if not len(numbers):
        return 0
    if len(distinct(numbers)) < len(numbers):
        raise InputError(f"the same document comes twice in one batch for layer {layer!r}: give each doc once")
    space = find_space(con, layer, model) or _create_space(con, layer, model, vectors.shape[1])
    if vectors.shape[1] != space.dim:
        raise InputError(f"layer {layer!r} has vectors of {space.dim} dimensions for {model!r}, not {vectors.shape[1]}")
    _delete(con, space, numbers)
    blobs = np.empty(len(numbers), object)
    blobs[:] = [row.tobytes() for row in np.ascontiguousarray(vectors, "<f2")]
    revision = next_revision(space.revision)
    batch = {"doc": numbers, "vector": blobs}
    insert(con, "INSERT INTO embeddings SELECT ?, doc, ?, vector FROM batch", [space.id, revision], batch)
    con.execute("UPDATE embedding_spaces SET revision = ? WHERE space = ?", [revision, space.id])
    return len(numbers)


def remove(con: duckdb.DuckDBPyConnection, layer: str, docs: Sequence[int] | NDArray[np.integer]) -> int:
    """Forget the vectors of documents in a layer, whatever their model; returns how many there were."""
    numbers, count = np.asarray(docs, np.int32), 0
    for (model,) in con.execute("SELECT model FROM embedding_spaces WHERE layer = ?", [layer]).fetchall():
        space = find_space(con, layer, model)
        if space is not None and (gone := _delete(con, space, numbers)):
            revision = next_revision(space.revision)
            con.execute("UPDATE embedding_spaces SET revision = ? WHERE space = ?", [revision, space.id])
            count += gone
    return count


def drop_space(con: duckdb.DuckDBPyConnection, layer: str, model: str) -> None:
    """Forget all vectors of a layer under a model; nothing happens if there are none."""
    space = find_space(con, layer, model)
    if space is not None:
        con.execute("DELETE FROM embeddings WHERE space = ?", [space.id])
        con.execute("DELETE FROM embedding_spaces WHERE space = ?", [space.id])


class DenseIndex:
    """Exact search in one space; sees what its connection sees at the time of a search.

    Args: folder: for the matrix files; made if it is missing. None: the matrix is held in memory.
    """

    def __init__(self, con: duckdb.DuckDBPyConnection, layer: str, model: str, folder: Path | None = None) -> None:
        self._con, self._layer, self._model, self._folder = con, layer, model, folder
        self._space: Space | None = None
        self._rows = np.empty(0, _ROW)
        self._matrix: NDArray[np.float32] = np.empty((0, 0), np.float32)

    def attach(self, con: duckdb.DuckDBPyConnection) -> None:
        """Look through this connection to the same store from now on; what is in memory stays."""
        self._con = con

    def __len__(self) -> int:
        self.refresh()
        return int(np.count_nonzero(self._rows["doc"] >= 0))

    def refresh(self) -> None:
        """Take in what changed since the last look; every search begins with it."""
        space = find_space(self._con, self._layer, self._model)
        if space is None:
            raise NotFound(f"layer {self._layer!r} has no vectors of {self._model!r}: run `workbench distill` first")
        if space != self._space:
            self._rows, self._matrix = _mapped(self._con, space, self._folder) or _in_memory(self._con, space)
            self._space = space

    def search(
        self, vector: NDArray[np.floating], n: int | None = None, *, allowed: NDArray[np.integer] | None = None
    ) -> Arm:
        """The documents with the greatest inner product, best first, equal ones by ascending doc.

        Args:
            vector: (dim,), of length 1; with vectors of length 1 the score is the cosine.
            n: at most so many; None for all.
            allowed: only these docs; None for all.

        Returns: (docs, scores), parallel arrays; scores are products with the stored float16 values, in float64.
            Nothing for a query of zeros, in which the model saw nothing.

        Raises: NotFound if there are no vectors; InputError if the query has another dim.
        """
        self.refresh()
        query = np.asarray(vector, np.float32)
        if query.shape != (self._matrix.shape[1],):
            raise InputError(f"the query has shape {query.shape}, the vectors {self._matrix.shape[1]} dimensions")
        if not query.any():
            return top(np.empty(0, np.int32), np.empty(0), n)
        docs = self._rows["doc"]
        usable = docs >= 0
        if allowed is not None:
            usable &= np.isin(docs, allowed)
        chosen = np.flatnonzero(usable)
        few = 4 * len(chosen) < len(docs)
        products = self._matrix[chosen] @ query if few else (self._matrix @ query)[chosen]
        if n is not None and n < len(chosen):
            last = np.partition(products, len(products) - n)[len(products) - n] if n > 0 else np.inf
            chosen = chosen[products >= last - _FLOAT32_ERROR]
        # Sums row by row, so that equal vectors have equal scores whatever BLAS made of them.
        exact, wide = np.empty(len(chosen)), query.astype(np.float64)
        for start in range(0, len(chosen), _ROWS_AT_ONCE):
            some = self._matrix[chosen[start : start + _ROWS_AT_ONCE]].astype(np.float64)
            exact[start : start + len(some)] = np.einsum("ij,j->i", some, wide)
        return top(docs[chosen], exact, n)


def _create_space(con: duckdb.DuckDBPyConnection, layer: str, model: str, dim: int) -> Space:
    number = con.execute("SELECT coalesce(max(space), 0) + 1 FROM embedding_spaces").fetchall()[0][0]
    con.execute("INSERT INTO embedding_spaces VALUES (?, ?, ?, ?, 0)", [number, layer, model, dim])
    return Space(number, layer, model, dim, 0)


def _delete(con: duckdb.DuckDBPyConnection, space: Space, docs: NDArray[np.int32]) -> int:
    newest = con.execute("SELECT max(doc) FROM embeddings WHERE space = ?", [space.id]).fetchall()[0][0]
    if newest is None or not len(docs) or newest < docs.min():
        return 0  # new documents, as nearly always
    deleted = con.execute(
        "DELETE FROM embeddings WHERE space = ? AND doc IN (SELECT unnest(?::INTEGER[])) RETURNING doc",
        [space.id, docs],
    )
    return len(deleted.fetchall())


def _read_rows(con: duckdb.DuckDBPyConnection, space: Space) -> NDArray[np.void]:
    columns = fetch(con, "SELECT doc, revision FROM embeddings WHERE space = ?", [space.id])
    rows = np.empty(len(columns["doc"]), _ROW)
    rows["doc"], rows["revision"] = columns["doc"], columns["revision"]
    return rows[np.argsort(rows["doc"], kind="stable")]


def _read_vectors(con: duckdb.DuckDBPyConnection, space: Space, docs: NDArray[np.int32]) -> NDArray[np.float32]:
    # In the order of docs, which ascend.
    if not len(docs):
        return np.empty((0, space.dim), np.float32)
    columns = fetch(
        con,
        "SELECT doc, vector FROM embeddings WHERE space = ? AND doc BETWEEN ? AND ?",
        [space.id, int(docs[0]), int(docs[-1])],
    )
    order = np.argsort(columns["doc"], kind="stable")
    order = order[np.isin(columns["doc"][order], docs)]
    return np.frombuffer(b"".join(columns["vector"][order]), "<f2").reshape(len(docs), space.dim).astype(np.float32)


def _in_memory(con: duckdb.DuckDBPyConnection, space: Space) -> tuple[NDArray[np.void], NDArray[np.float32]]:
    rows = _read_rows(con, space)
    matrix = np.empty((len(rows), space.dim), np.float32)
    for start in range(0, len(rows), _READ_AT_ONCE):
        docs = rows["doc"][start : start + _READ_AT_ONCE]
        matrix[start : start + len(docs)] = _read_vectors(con, space, docs)
    return rows, matrix


def _mapped(
    con: duckdb.DuckDBPyConnection, space: Space, folder: Path | None
) -> tuple[NDArray[np.void], NDArray[np.float32]] | None:
    # The matrix file, brought up to date; None where there is no folder or it cannot be written.
    if folder is None:
        return None
    stem = _stem(folder, space)
    header, rows = _read_index(stem, space.dim)
    if header["revision"] != space.revision or not _agrees(con, space, stem, header, rows, rows["doc"] >= 0):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            header, rows = _bring_up_to_date(con, space, stem, header, rows)
        except OSError:
            return None
    matrix = _open_matrix(stem, header)
    return None if matrix is None else (rows, matrix)


def _stem(folder: Path, space: Space) -> Path:
    digest = blake2b("\n".join((space.layer, space.model)).encode(), digest_size=6).hexdigest()
    return folder / f"{space.id}-{digest}"


def _delete_orphans(con: duckdb.DuckDBPyConnection, folder: Path) -> None:
    # Files of spaces that the store has no more: each model that was learnt anew would leave its own behind.
    spaces = [find_space(con, *key) for key in con.execute("SELECT layer, model FROM embedding_spaces").fetchall()]
    names = {_stem(folder, space).name for space in spaces if space}
    for path in folder.iterdir():
        if path.suffix in (".f32", ".rows") and path.name.partition(".")[0] not in names:
            path.unlink(missing_ok=True)


def _index_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.rows")


def _matrix_path(stem: Path, header: np.void) -> Path:
    return stem.with_name(f"{stem.name}.{header['generation']}.f32")


def _open_matrix(stem: Path, header: np.void) -> NDArray[np.float32] | None:
    shape = (int(header["rows"]), int(header["dim"]))
    if not shape[0]:
        return np.empty(shape, np.float32)
    try:
        return np.asarray(np.memmap(_matrix_path(stem, header), "<f4", "r", shape=shape))
    except (OSError, ValueError):
        return None


def _new_header(dim: int) -> np.void:
    return np.array([(_MAGIC, -1, -1, 0, dim, 0)], _HEADER)[0]


def _read_index(stem: Path, dim: int) -> tuple[np.void, NDArray[np.void]]:
    # What the files hold; nothing, at revision -1, if they are missing, cut off or damaged.
    nothing = _new_header(dim), np.empty(0, _ROW)
    try:
        content = _index_path(stem).read_bytes()
        header, body = np.frombuffer(content, _HEADER, 1)[0], content[_HEADER.itemsize :]
        size = _matrix_path(stem, header).stat().st_size
    except (OSError, ValueError):
        return nothing
    whole = len(body) == header["rows"] * _ROW.itemsize and size >= header["rows"] * dim * 4
    if header["magic"] != _MAGIC or header["dim"] != dim or not whole or header["checksum"] != zlib.crc32(body):
        return nothing
    return header, np.frombuffer(body, _ROW).copy()


def _agrees(
    con: duckdb.DuckDBPyConnection,
    space: Space,
    stem: Path,
    header: np.void,
    rows: NDArray[np.void],
    alive: NDArray[np.bool_],
) -> bool:
    # Compares the first and the last row with the store: a checksum over all would cost more than the search.
    matrix, at = _open_matrix(stem, header), np.flatnonzero(alive)
    if matrix is None:
        return False
    ends = at[[0, -1]] if len(at) else at
    return all(np.array_equal(_read_vectors(con, space, rows["doc"][[row]]), matrix[[row]]) for row in ends)


def _bring_up_to_date(
    con: duckdb.DuckDBPyConnection, space: Space, stem: Path, header: np.void, rows: NDArray[np.void]
) -> tuple[np.void, NDArray[np.void]]:
    # A row is known by its doc and the revision that added it. Readers of the old index never look at what is appended
    # beyond its rows; a matrix that is written anew is a new file, of another generation.
    now = _read_rows(con, space)
    at = np.minimum(np.searchsorted(now["doc"], rows["doc"]), len(now) - 1)
    kept = now[at] == rows if len(now) else np.zeros(len(rows), bool)
    anew = (
        header["revision"] == -1
        or np.count_nonzero(~kept) > _DEAD_SHARE * len(now)
        or not _agrees(con, space, stem, header, rows, kept)
    )
    header = _new_header(space.dim) if anew else header.copy()
    if anew:
        rows, added = rows[:0], now
        header["generation"] = time.time_ns()
    else:
        rows["doc"][~kept] = -1
        is_new = np.ones(len(now), bool)
        is_new[at[kept]] = False
        added = now[is_new]
    with open(_matrix_path(stem, header), "wb" if anew else "r+b") as file:
        file.seek(len(rows) * space.dim * 4)
        for start in range(0, len(added), _READ_AT_ONCE):
            file.write(_read_vectors(con, space, added["doc"][start : start + _READ_AT_ONCE]).astype("<f4").tobytes())
    rows = np.concatenate([rows, added])
    header["revision"], header["rows"], header["checksum"] = space.revision, len(rows), zlib.crc32(rows.tobytes())
    fresh = stem.with_name(f"{stem.name}.{os.getpid()}.part")
    fresh.write_bytes(header.tobytes() + rows.tobytes())
    os.replace(fresh, _index_path(stem))
    if anew:
        for path in stem.parent.glob(f"{stem.name}.*.f32"):
            if path != _matrix_path(stem, header):
                path.unlink(missing_ok=True)
        _delete_orphans(con, stem.parent)
    return header, rows
