"""Dense search: vectors in DuckDB, exact inner products over a memory-mapped matrix that is derived from them.

A space is the vectors of one layer under one embedding model. Its matrix stands in two files in a folder beside the
store: `<space>.f32` (rows of float32, only ever appended to) and `<space>.rows` (which doc each row is; replaced as a
whole). They are brought up to date when a search finds them behind, and may be deleted at any time; where they cannot
be read or written, the vectors are read from DuckDB. Both ways give the same numbers.

`add` and `remove` neither begin nor commit a transaction: the caller's makes text and vectors one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import duckdb
import numpy as np
from numpy.typing import NDArray

from workbench.errors import InputError, NotFound
from workbench.memory.fusion import Arm, top
from workbench.memory.postings import fetch, next_revision

_READ_AT_ONCE = 100_000  # vectors taken out of DuckDB at once: with 256 dimensions 50 MB
_DEAD_SHARE = 0.25  # a matrix file with more rows of removed documents is written anew
_MAGIC = 0x776256454354_0001
_HEADER = np.dtype([("magic", "<i8"), ("revision", "<i8"), ("rows", "<i8"), ("dim", "<i8")])
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
    if len(np.unique(numbers)) < len(numbers):
        raise InputError(f"the same document comes twice in one batch for layer {layer!r}: give each doc once")
    space = find_space(con, layer, model) or _create_space(con, layer, model, vectors.shape[1])
    if vectors.shape[1] != space.dim:
        raise InputError(f"layer {layer!r} has vectors of {space.dim} dimensions for {model!r}, not {vectors.shape[1]}")
    _delete(con, space, numbers)
    blobs = np.empty(len(numbers), object)
    blobs[:] = [row.tobytes() for row in np.ascontiguousarray(vectors, "<f2")]
    revision = next_revision(space.revision)
    con.register("batch", {"doc": numbers, "vector": blobs})
    try:
        con.execute("INSERT INTO embeddings SELECT ?, doc, ?, vector FROM batch", [space.id, revision])
    finally:
        con.unregister("batch")
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

        Returns: (docs, scores), parallel arrays; scores are products of the stored float16 values, in float64.

        Raises: NotFound if there are no vectors; InputError if the query has another dim.
        """
        self.refresh()
        query = np.asarray(vector, np.float32)
        if query.shape != (self._matrix.shape[1],):
            raise InputError(f"the query has shape {query.shape}, the vectors {self._matrix.shape[1]} dimensions")
        docs = self._rows["doc"]
        usable = docs >= 0
        if allowed is not None:
            usable &= np.isin(docs, allowed)
        chosen = np.flatnonzero(usable)
        if 4 * len(chosen) < len(docs):
            products = self._matrix[chosen] @ query
        else:
            products = (self._matrix @ query)[chosen]
        if n is not None and n < len(chosen):
            last = np.partition(products, len(products) - n)[len(products) - n] if n > 0 else np.inf
            chosen = chosen[products >= last - _FLOAT32_ERROR]
        # Sums row by row, so that equal vectors have equal scores whatever BLAS made of them.
        exact = np.einsum("ij,j->i", self._matrix[chosen].astype(np.float64), query.astype(np.float64))
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
    stem = f"{space.id}-{blake2b(f'{space.layer}\n{space.model}'.encode(), digest_size=6).hexdigest()}"
    index, matrix = folder / f"{stem}.rows", folder / f"{stem}.f32"
    rows, revision = _read_index(index, matrix, space.dim)
    if revision != space.revision:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            rows = _bring_up_to_date(con, space, rows, index, matrix)
        except OSError:
            return None
    if not len(rows):
        return None
    with contextlib.suppress(OSError, ValueError):
        return rows, np.memmap(matrix, "<f4", "r", shape=(len(rows), space.dim))
    return None


def _read_index(index: Path, matrix: Path, dim: int) -> tuple[NDArray[np.void], int]:
    # Rows and the space's revision when they were written; no rows and -1 if the files are no pair that can be used.
    try:
        content, size = index.read_bytes(), matrix.stat().st_size
    except OSError:
        return np.empty(0, _ROW), -1
    if len(content) < _HEADER.itemsize:
        return np.empty(0, _ROW), -1
    header = np.frombuffer(content, _HEADER, 1)[0]
    body = content[_HEADER.itemsize :]
    whole = len(body) == header["rows"] * _ROW.itemsize and size >= header["rows"] * dim * 4
    if header["magic"] != _MAGIC or header["dim"] != dim or not whole:
        return np.empty(0, _ROW), -1
    return np.frombuffer(body, _ROW).copy(), int(header["revision"])


def _bring_up_to_date(
    con: duckdb.DuckDBPyConnection, space: Space, rows: NDArray[np.void], index: Path, matrix: Path
) -> NDArray[np.void]:
    # A row is known by its doc and the revision that added it.
    now = _read_rows(con, space)
    at = np.minimum(np.searchsorted(now["doc"], rows["doc"]), len(now) - 1)
    kept = now[at] == rows if len(now) else np.zeros(len(rows), bool)
    rows["doc"][~kept] = -1
    new = np.ones(len(now), bool)
    new[at[kept]] = False
    anew = np.count_nonzero(~kept) > _DEAD_SHARE * len(now)
    if anew:
        rows, new[:] = rows[:0], True
    added = now[new]
    # Readers of the old index never look beyond its rows; a matrix that is written anew gets a new file.
    target = matrix.with_suffix(f".f32.{os.getpid()}") if anew else matrix
    with open(target, "wb" if anew or not len(rows) else "r+b") as file:
        file.seek(len(rows) * space.dim * 4)
        for start in range(0, len(added), _READ_AT_ONCE):
            file.write(_read_vectors(con, space, added["doc"][start : start + _READ_AT_ONCE]).astype("<f4").tobytes())
    rows = np.concatenate([rows, added])
    header = np.array([(_MAGIC, space.revision, len(rows), space.dim)], _HEADER)
    fresh = index.with_suffix(f".rows.{os.getpid()}")
    fresh.write_bytes(header.tobytes() + rows.tobytes())
    if anew:
        os.replace(target, matrix)
    os.replace(fresh, index)
    return rows
