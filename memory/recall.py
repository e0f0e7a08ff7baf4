"""recall: a query in, the exchanges that fit best out, each with its source and the reason.

An arm is one way to score documents: a mechanism (keyword, vector), a layer (verbatim, distilled), read alone or
together with its neighbours (window). A mode and a layer choose the arms; a fusion makes one list of them. Which
weights are best depends on the logs (research/memory.md §6): `workbench calibrate` measures them on the person's own
store and keeps them in its settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from typing import Any

import duckdb
import numpy as np
import orjson
from numpy.typing import NDArray

from workbench.data.store import Store
from workbench.errors import InputError
from workbench.memory import fusion, index
from workbench.memory.arms import Arms
from workbench.memory.arrays import fetch
from workbench.memory.filters import Filters
from workbench.memory.fusion import Arm
from workbench.memory.show import iso
from workbench.memory.tokenizers import get_tokenizer

MODES = ("keyword", "vector", "hybrid")
LAYERS = ("verbatim", "distilled", "both")
FUSIONS = ("combsum", "rrf", "combmnz", "card")
#: Candidates that each arm hands to the fusion (card 001).
CANDIDATES = 500


@dataclass(frozen=True, slots=True)
class Query:
    """What is looked for, and how.

    Args:
        text: the query.
        mode: keyword, vector, or hybrid (both).
        layer: verbatim (the logs' words), distilled (the memories), or both.
        k: how many hits.
        fusion: combsum (min-max, weighted: the default), rrf, combmnz or card (card 001's own rules).
        weights: arm name -> weight for combsum and rrf; None = the store's calibrated ones, else the defaults.
        distiller: whose memories; None = the one with the most.
    """

    text: str
    mode: str = "hybrid"
    layer: str = "both"
    k: int = 10
    filters: Filters | None = None
    fusion: str = "combsum"
    weights: dict[str, float] | None = None
    distiller: str | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("mode", self.mode, MODES), ("layer", self.layer, LAYERS), ("fusion", self.fusion, FUSIONS),
        ):  # fmt: skip
            if value not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, not {value!r}.")
        if self.k < 1:
            raise InputError(f"k must be 1 or more, not {self.k}.")


@dataclass(slots=True)
class Hit:
    """An exchange that was found. `core` and `context` are None where it was not distilled; `asked` is the beginning of
    the user's words, for people; `quote` is what a prompt gets.
    """

    memory_id: str | None
    exchange_id: str
    conversation_id: str
    source: dict[str, str]
    ply_start: int
    ply_end: int
    started_at: str | None
    score: float
    why: list[str]
    core: str | None
    context: str | None
    files: list[dict[str, str]]
    rooms: list[str]
    project: str | None = None
    agent: str | None = None
    title: str | None = None
    thread: str = ""
    asked: str = ""
    quote: str = field(default="", repr=False)

    def as_json(self) -> dict[str, Any]:
        """All fields by name."""
        return asdict(self)


def recall(store: Store, query: Query, arms: Arms | None = None) -> list[Hit]:
    """The k best exchanges, best first, equal scores in the order in which they were stored.

    Args: arms: kept from earlier calls by a long-lived process; None = made for this call.
    Raises: InputError for filters that cannot be meant.
    """
    con = store.con
    if not query.text.strip():
        raise InputError("The query is empty. Say what to look for.")
    arms = arms or Arms(store)
    distiller = query.distiller or main_distiller(con)
    allowed = _allowed(con, query.filters) if query.filters else None
    if allowed is not None and not len(allowed):
        return []
    calibrated = calibrated_weights(con) if query.layer == "both" else None
    weights = query.weights or calibrated or DEFAULT_WEIGHTS[query.layer]
    without = {name for name, weight in weights.items() if not weight} if query.fusion in ("combsum", "rrf") else set()
    found = find(arms, query, distiller, allowed, without)
    docs, scores = fuse(arms, query, found, weights)
    return _hits(con, query, distiller, docs[: query.k], scores[: query.k], found)


def main_distiller(con: duckdb.DuckDBPyConnection) -> str | None:
    """The distiller with the most memories."""
    row = con.execute("SELECT distiller FROM memories GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT 1").fetchone()
    return row[0] if row else None


def find(
    arms: Arms, query: Query, distiller: str | None, allowed: NDArray[np.int64] | None = None,
    without: Set[str] = frozenset(),
) -> dict[str, Arm]:  # fmt: skip
    """The scored documents of each arm that the mode and the layer ask for; empty arms are left out.

    Args: without: names of arms that are not needed.
    """
    layers = {"verbatim": index.VERBATIM}
    if distiller:
        layers["distilled"] = index.distilled(distiller)
    chosen = layers if query.layer == "both" else {k: v for k, v in layers.items() if k == query.layer}
    mechanisms = {"keyword": ("keyword", "window"), "vector": ("vector",)}.get(
        query.mode, ("keyword", "window", "vector")
    )
    found: dict[str, Arm] = {}
    for short, layer in chosen.items():
        for mechanism in mechanisms:
            if (name := f"{mechanism}:{short}") in without:
                continue
            if mechanism == "vector":
                found[name] = arms.vector(layer, query.text, CANDIDATES, allowed)
            else:
                found[name] = arms.keyword(layer, query.text, CANDIDATES, allowed, window=mechanism == "window")
    return {name: arm for name, arm in found.items() if len(arm[0])}


#: Arms that score candidates of the other arms by what is known of them.
PRIORS = ("session:verbatim", "session:distilled", "edited", "speaker", "date")
#: By layer, where a store was not calibrated: what an arm is worth depends on what stands beside it. Chosen on the
#: tuning halves of two corpora (benchmarks/results/recall_study.md). Which files an exchange changed is a field of its
#: memory: a search of the verbatim layer alone does without.
DEFAULT_WEIGHTS: dict[str, dict[str, float]] = {
    "verbatim": {
        "keyword:verbatim": 0.25, "window:verbatim": 0.5, "vector:verbatim": 0.5, "session:verbatim": 0.75,
        "edited": 0.0, "speaker": 0.6, "date": 2.0,
    },
    "distilled": {
        "keyword:distilled": 0.25, "window:distilled": 0.5, "vector:distilled": 0.5, "session:distilled": 0.5,
        "edited": 0.5, "speaker": 0.6, "date": 2.0,
    },
    "both": {
        "keyword:verbatim": 0.25, "window:verbatim": 0.5, "vector:verbatim": 0.25, "session:verbatim": 0.5,
        "keyword:distilled": 0.25, "window:distilled": 0.0, "vector:distilled": 0.25, "session:distilled": 0.1,
        "edited": 0.5, "speaker": 0.6, "date": 2.0,
    },
}  # fmt: skip


def fuse(arms: Arms, query: Query, found: dict[str, Arm], weights: Mapping[str, float]) -> Arm:
    """One list of what the arms found, best first, as the query's fusion says; priors join where they have weight."""
    if not found:
        return np.empty(0, np.int64), np.empty(0)
    if query.fusion == "card":
        return _fuse_as_card(found)
    if query.fusion == "combmnz":
        return fusion.comb_mnz(list(found.values()))
    # Ranks would make an order of equal priors.
    if query.fusion == "combsum" and any(weights.get(name) for name in PRIORS):
        found = found | arms.priors(found, query.text)
    used = {name: arm for name, arm in found.items() if weights.get(name)} or found
    values = [weights.get(name) or 1.0 for name in used]
    if query.fusion == "combsum":
        return fusion.comb_sum(list(used.values()), values)
    return fusion.reciprocal_rank(list(used.values()), weights=values)


def _fuse_as_card(found: dict[str, Arm]) -> Arm:
    layers = []
    for short in ("distilled", "verbatim"):
        keyword, vector = found.get(f"keyword:{short}"), found.get(f"vector:{short}")
        if keyword and vector:
            layers.append(fusion.within_layer(keyword, vector))
        elif keyword or vector:
            layers.append(keyword or vector)
    return fusion.across_layers(*layers) if len(layers) == 2 else layers[0]


def calibrated_weights(con: duckdb.DuckDBPyConnection) -> dict[str, float] | None:
    """The weights that `calibrate` found best on this store, None if it was not run."""
    row = con.execute("SELECT value FROM settings WHERE name = 'fusion_weights'").fetchone()
    return orjson.loads(row[0]) if row else None


def _allowed(con: duckdb.DuckDBPyConnection, filters: Filters) -> NDArray[np.int64] | None:
    """The doc numbers that pass, None if everything passes."""
    where, values = filters.sql()
    if where == "true":
        return None
    sql = f"SELECT e.seq FROM exchanges e JOIN conversations c USING (conversation_id) WHERE {where}"
    return fetch(con, sql, values)["seq"]


# -- hits -----------------------------------------------------------------------------------------------------------


def _hits(
    con: duckdb.DuckDBPyConnection, query: Query, distiller: str | None, docs: NDArray, scores: NDArray,
    found: dict[str, Arm],
) -> list[Hit]:  # fmt: skip
    rows = con.execute(
        """
        SELECT e.seq, m.memory_id, e.exchange_id, e.conversation_id, c.format, coalesce(s.path, c.path), c.session_id,
            e.ply_start, e.ply_end, epoch_us(e.started_at), m.core, m.context, e.files, c.project, c.agent, c.title,
            e.thread, e.user_text, e.assistant_text
        FROM exchanges e JOIN conversations c USING (conversation_id) LEFT JOIN sources s ON s.source_id = e.source_id
        LEFT JOIN memories m ON m.exchange_id = e.exchange_id AND m.distiller = $distiller
        WHERE e.seq IN (SELECT unnest($docs::BIGINT[]))""",
        {"distiller": distiller, "docs": docs.tolist()},
    ).fetchall()
    by_doc = {row[0]: row for row in rows}
    rooms = _rooms(con, [row[1] for row in rows if row[1]])
    terms = set(get_tokenizer(index.TOKENIZER)(query.text))
    hits = []
    for doc, score in zip(docs.tolist(), scores.tolist(), strict=True):
        if (row := by_doc.get(doc)) is None:
            continue
        _, memory_id, eid, cid, format, path, session, start, end, at, core, context, files, project, agent = row[:15]
        memory = f"{core}\n{context}" if context else core
        asked = _beginning(row[17])
        hits.append(
            Hit(
                memory_id, eid, cid, {"format": format, "path": path, "session_id": session}, start, end, iso(at),
                round(score, 6), _why(doc, found, terms, f"{row[17]} {row[18]} {memory or ''}"), core, context,
                orjson.loads(files), rooms.get(memory_id or "", []), project, agent, row[15], row[16],
                asked=asked, quote=f"asked: {asked}\n{memory}" if memory else row[17][:400],
            )
        )  # fmt: skip
    return hits


def _beginning(text: str, chars: int = 160) -> str:
    """The first line of a text that says something, cut at a word."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= chars else line[:chars].rsplit(" ", 1)[0] + " …"


def _rooms(con: duckdb.DuckDBPyConnection, memory_ids: Sequence[str]) -> dict[str, list[str]]:
    rows = con.execute(
        "SELECT p.memory_id, list(r.label ORDER BY p.relevance DESC, r.label) FROM memory_rooms p "
        "JOIN rooms r USING (room_id) WHERE p.memory_id IN (SELECT unnest($1::VARCHAR[])) GROUP BY 1",
        [list(memory_ids)],
    ).fetchall()
    return dict(rows)


def _why(doc: int, found: dict[str, Arm], terms: set[str], text: str) -> list[str]:
    """Which arms found it at which rank, best first, and which words of the query it has."""
    ranks = []
    for name, (docs, _) in found.items():
        at = np.flatnonzero(docs == doc)
        if len(at):
            ranks.append((int(at[0]) + 1, name))
    why = [f"{name} #{rank}" for rank, name in sorted(ranks)]
    shared = sorted(terms & set(get_tokenizer(index.TOKENIZER)(text)))
    return why + ([f"words: {' '.join(shared)}"] if shared else [])


class Recaller:
    """recall for a long-lived process: what the arms need is kept in memory and refreshed when the store changed.

    Args: path of the store; wait_seconds: how long a search waits for a process that is writing.
    """

    def __init__(self, path: Any, wait_seconds: float = 5.0) -> None:
        self.path, self.wait_seconds = path, wait_seconds
        self._arms: Arms | None = None

    def search(self, query: Query) -> list[Hit]:
        """As `recall`; the store is open only while this runs."""
        with Store(self.path, read_only=True, wait_seconds=self.wait_seconds) as store:
            if self._arms is None:
                self._arms = Arms(store, warm=True)
            self._arms.attach(store)
            return recall(store, query, self._arms)
