"""Pools of a teacher's pairs in the store: made once, chunk by chunk, known by the teacher's weights and the sampler.

A chunk is committed as soon as it is made, so that a kill loses one at most, and the store is held only meanwhile. Each
chunk has noise of its own, so that a pool's first rows are those of every larger pool of the same sampling.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np

from workbench.data.records import digest
from workbench.data.store import Store
from workbench.errors import InputError
from workbench.policies.diffusion.options import Precision, Solver

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.policies.diffusion.predict import Predictions

CHUNK = 1024  # pairs between two commits
_DTYPES = {"float32": "<f4", "float16": "<f2"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """What decides a pool beside the teacher: as in `pairs.make_pairs`; guidance: its weight, 1 = none."""

    steps: int = 50
    solver: Solver = "heun"
    guidance: float = 1.0
    seed: int = 0
    precision: Precision = "float32"


@dataclass(frozen=True, slots=True)
class Pool:
    """A pool. Args: table: z, x0 [num, *shape] float32 and, with classes, c [num]; digest: of all numbers in it; made:
    pairs that the store lacked."""

    table: dict[str, Tensor]
    digest: str
    made: int


def supply(
    store: Path, teacher: Predictions, version: str, shape: Sequence[int], num: int, sampling: Sampling, *,
    device: str = "cpu", say: Callable[[str], None] = lambda _: None,
) -> Pool:  # fmt: skip
    """A pool of `num` pairs; what the store lacks is made and kept there.

    Args: version: digest of the teacher's weights; shape: of one datum; device: of the teacher; say: told
        of each chunk.

    Raises: InputError as `make_pairs` does, and for a guidance without classes.
    """
    from workbench.policies.diffusion.pairs import make_pairs
    from workbench.policies.diffusion.predict import Guided

    if sampling.guidance != 1 and not teacher.num_classes:
        raise InputError(f"A guidance of {sampling.guidance} needs a teacher with classes, and this one has none.")
    numbers = range(-(-num // CHUNK))
    ids = [chunk_id(version, shape, sampling, number) for number in numbers]
    with Store(store, read_only=True) as opened:
        there = _known(opened.con, ids)
    guided = teacher if sampling.guidance == 1 else Guided(teacher, sampling.guidance)
    missing = [number for number in numbers if ids[number] not in there]
    for number in missing:
        say(f"pairs {number * CHUNK + 1:,} of {num:,}")
        pairs = make_pairs(
            guided, CHUNK, shape, steps=sampling.steps, solver=sampling.solver, batch_size=CHUNK,
            seed=int(digest("pairs", str(sampling.seed), str(number)), 16) % 2**63, device=device,
        )  # fmt: skip
        with Store(store) as opened, opened.transaction() as con:
            save_chunk(con, version, sampling, number, pairs)
    with Store(store, read_only=True) as opened:
        table, mark = load(opened.con, ids, num)
    return Pool(table, mark, sum(min(CHUNK, num - number * CHUNK) for number in missing))


def chunk_id(version: str, shape: Sequence[int], sampling: Sampling, chunk: int) -> str:
    """The key of a chunk: what decides its contents."""
    return digest("pairs", version, json.dumps([list(shape), asdict(sampling), chunk], sort_keys=True))


def save_chunk(
    con: duckdb.DuckDBPyConnection, version: str, sampling: Sampling, chunk: int, pairs: dict[str, Tensor]
) -> int:
    """Adds a chunk unless the store has it; returns how many rows were added. The caller holds the transaction."""
    shape, dtype = list(pairs["z"].shape[1:]), _DTYPES[sampling.precision]
    key = chunk_id(version, shape, sampling, chunk)
    z, x0 = (pairs[name].numpy().astype(dtype).tobytes() for name in ("z", "x0"))
    c = pairs["c"].numpy().astype("<i4").tobytes() if "c" in pairs else None
    return con.execute(
        "INSERT INTO pair_chunks SELECT ?, ?, ?, ?, ?, ?, ?, ?, ?, now() "
        "WHERE NOT EXISTS (SELECT 1 FROM pair_chunks WHERE chunk_id = ?)",
        [key, version, json.dumps(asdict(sampling), sort_keys=True), chunk, len(pairs["z"]), shape, z, x0, c, key],
    ).fetchall()[0][0]


def load(con: duckdb.DuckDBPyConnection, ids: Sequence[str], num: int) -> tuple[dict[str, Tensor], str]:
    """The first `num` pairs of these chunks, as float32, and the digest of their numbers."""
    import torch

    rows = con.execute(
        "SELECT chunk_id, sampling, num, shape, z, x0, c FROM pair_chunks WHERE chunk_id IN "
        "(SELECT unnest(?::VARCHAR[])) ORDER BY chunk",
        [list(ids)],
    ).fetchall()
    found: dict[str, list[np.ndarray[Any, Any]]] = {"z": [], "x0": [], "c": []}
    for _, sampling, count, shape, z, x0, c in rows:
        dtype = _DTYPES[json.loads(sampling)["precision"]]
        for name, data in (("z", z), ("x0", x0)):
            found[name].append(np.frombuffer(data, dtype).reshape(count, *shape).astype(np.float32))
        if c is not None:
            found["c"].append(np.frombuffer(c, "<i4").astype(np.int64))
    arrays = {name: np.concatenate(parts)[:num] for name, parts in found.items() if parts}
    mark = digest("pool", *(part for name, array in arrays.items() for part in (name, array.tobytes())))
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, mark


def _known(con: duckdb.DuckDBPyConnection, ids: Sequence[str]) -> set[str]:
    rows = con.execute(
        "SELECT chunk_id FROM pair_chunks WHERE chunk_id IN (SELECT unnest(?::VARCHAR[]))", [list(ids)]
    ).fetchall()
    return {key for (key,) in rows}
