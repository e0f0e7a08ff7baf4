"""Chooses fusion weights on the person's own store, without labels: the store itself says which queries it answers.

The queries are the commits and titles of memory/mined_queries.py. Weights are searched on one half of them and kept
only if the other half agrees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import duckdb
import numpy as np
import orjson
from numpy.typing import NDArray

from workbench.memory.fusion import Arm, normalise_min_max
from workbench.memory.mined_queries import store_queries

GRID = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
MIN_QUERIES = 20
ROUNDS = 3


class Judged(NamedTuple):
    """One query's candidates: min-max normalised scores, a row for each arm, and which candidates are relevant."""

    scores: NDArray[np.float64]
    relevant: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What came out; MRRs are of the half of the queries that the search did not see.

    Args:
        weights: the ones to use: the found ones if `accepted`, else those that the search started from.
    """

    weights: dict[str, float]
    accepted: bool
    num_queries: int
    mrr_before: float
    mrr_after: float

    def as_json(self) -> dict[str, Any]:
        """All fields by name."""
        return {name: getattr(self, name) for name in self.__slots__}


def calibrate(
    con: duckdb.DuckDBPyConnection, search: Callable[[str], Mapping[str, Arm]], start: Mapping[str, float]
) -> Calibration:
    """Calibrates the weights of CombSUM on the queries that the store holds.

    Args:
        search: query text → arm name → the arm's documents and scores.
        start: the weights in use; arms that are not named in it are left out.

    With fewer than MIN_QUERIES queries nothing is changed (`accepted` is False).
    """
    names = list(start)
    queries = store_queries(con)
    judged = [judge(search(query.text), query.relevant, names) for query in queries]
    split = [_is_search_half(query.text) for query in queries]
    return choose_weights(judged, split, names, start)


def save(con: duckdb.DuckDBPyConnection, calibration: Calibration) -> None:
    """Keeps accepted weights in the store's settings, where recall looks for them."""
    if calibration.accepted:
        con.execute("DELETE FROM settings WHERE name = 'fusion_weights'")
        value = orjson.dumps(calibration.weights).decode()
        con.execute("INSERT INTO settings VALUES ('fusion_weights', ?)", [value])


def judge(arms: Mapping[str, Arm], relevant: frozenset[int], names: Sequence[str]) -> Judged:
    """Lines up the arms of one query over the union of their documents; a document that an arm lacks has 0 there."""
    found = [arms[name][0] for name in names if name in arms]
    union = np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)
    scores = np.zeros((len(names), len(union)))
    for row, name in enumerate(names):
        if name in arms:
            docs, values = arms[name]
            scores[row, np.searchsorted(union, docs)] = normalise_min_max(values)
    return Judged(scores, np.isin(union, list(relevant)))


def choose_weights(
    judged: Sequence[Judged], in_search_half: Sequence[bool], names: Sequence[str], start: Mapping[str, float]
) -> Calibration:
    """Coordinate search over GRID on one half; accepted if the other half's MRR does not fall."""
    searched = [query for query, chosen in zip(judged, in_search_half, strict=True) if chosen]
    held_out = [query for query, chosen in zip(judged, in_search_half, strict=True) if not chosen]
    initial = np.array([start[name] for name in names])
    before = _mrr(held_out, initial)
    if len(judged) < MIN_QUERIES or not searched or not held_out:
        return Calibration(dict(start), False, len(judged), before, before)
    weights = search_weights(searched, initial)
    after = _mrr(held_out, weights)
    accepted = after >= before and not np.array_equal(weights, initial)
    chosen = weights if accepted else initial
    return Calibration(
        {name: float(w) for name, w in zip(names, chosen, strict=True)}, accepted, len(judged), before, after
    )


def search_weights(
    queries: Sequence[Judged], initial: NDArray[np.float64], grid: Sequence[float] = GRID
) -> NDArray[np.float64]:
    """Coordinate ascent on MRR from `initial`, each arm in turn over the grid, at most ROUNDS times."""
    weights, best = initial.copy(), _mrr(queries, initial)
    for _ in range(ROUNDS):
        before = best
        for arm in range(len(weights)):
            for value in grid:
                tried = weights.copy()
                tried[arm] = value
                reached = _mrr(queries, tried) if tried.any() else 0.0
                if reached > best + 1e-9:
                    weights, best = tried, reached
        if best == before:
            break
    return weights


def _mrr(queries: Sequence[Judged], weights: NDArray[np.float64]) -> float:
    total = 0.0
    for scores, relevant in queries:
        if relevant.any():
            fused = weights @ scores
            # Ties count against the relevant document, so that a constant score is worth nothing.
            total += 1.0 / np.count_nonzero(fused >= fused[relevant].max())
    return total / len(queries) if queries else 0.0


def _is_search_half(text: str) -> bool:
    return sha256(text.encode("utf-8", "surrogatepass")).digest()[0] % 2 == 0
