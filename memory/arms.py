"""The arms of recall over one store: made on demand, cold for a single query or warm for a long-lived process."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from workbench.data.store import Store
from workbench.memory import dense
from workbench.memory.arrays import distinct, fetch
from workbench.memory.bm25 import Bm25Options, ColdBm25, WarmBm25
from workbench.memory.embedding import SENTENCE_TRANSFORMERS, Embedder, get_embedder
from workbench.memory.fusion import Arm
from workbench.memory.index import VERBATIM
from workbench.memory.named import date_scores, dates_in, speaker_of, speaker_scores
from workbench.memory.postings import find_layer
from workbench.memory.vectors import current_model

#: Memories are short: long ones lose less for their length (benchmarks/results/recall_quality.md; LoCoMo agrees).
DISTILLED = Bm25Options(variant="lucene", k1=1.2, b=0.3)
PLAIN = Bm25Options()
NOTHING: Arm = (np.empty(0, np.int64), np.empty(0))


class Arms:
    """Keyword and vector search over the layers of a store.

    Args: warm: keep postings in memory between calls; `attach` then gives each call's open store.
    """

    def __init__(self, store: Store, warm: bool = False) -> None:
        self.store, self.warm = store, warm
        self._bm25: dict[str, ColdBm25 | WarmBm25] = {}
        self._dense: dict[tuple[str, str], dense.DenseIndex] = {}
        self._embedder: Embedder | None = None
        self._query: tuple[str, str] | None = None  # (model, text) that _vector is of
        self._vector = np.empty(0, np.float32)

    def attach(self, store: Store) -> None:
        """Uses this open store from now on; what is in memory is refreshed by the next search."""
        self.store = store
        for searcher in (*self._bm25.values(), *self._dense.values()):
            searcher.attach(store.con)
        if self._embedder is not None and not self._embedder.name.startswith(SENTENCE_TRANSFORMERS):
            self._embedder = None  # a learnt model reads from the store that is closed by now

    def keyword(self, layer: str, text: str, n: int, allowed: NDArray[np.int64] | None, window: bool = False) -> Arm:
        """BM25 of a layer; nothing where the layer has no documents yet."""
        if layer not in self._bm25:
            if find_layer(self.store.con, layer) is None:
                return NOTHING
            self._bm25[layer] = (WarmBm25 if self.warm else ColdBm25)(self.store.con, layer)
        options = PLAIN if layer == VERBATIM else DISTILLED
        return self._bm25[layer].search(text, n, allowed=allowed, options=replace(options, window=window))

    def priors(self, found: dict[str, Arm], text: str) -> dict[str, Arm]:
        """What speaks for a candidate beside its own words: "session", the best keyword score (of each layer) in its
        conversation; "edited", that it changed files; "speaker" and "date", that the query names its speaker or time.
        """
        docs = distinct(np.concatenate([docs for docs, _ in found.values()]))
        rows = fetch(
            self.store.con,
            "SELECT seq, hash(conversation_id) AS conversation, "
            "files LIKE '%\"modified\"%' OR files LIKE '%\"created\"%' AS edited, "
            "left(user_text, 130) AS beginning, coalesce(epoch_us(started_at), 0) AS started_us "
            "FROM exchanges WHERE seq IN (SELECT unnest($1::BIGINT[])) ORDER BY seq",
            [docs],
        )
        docs = rows["seq"]
        conversation = np.searchsorted(distinct(rows["conversation"]), rows["conversation"])
        arms: dict[str, Arm] = {}
        for name in [name for name in found if name.startswith("keyword:")]:
            best = np.zeros(int(conversation.max(initial=0)) + 1)
            at = np.searchsorted(docs, found[name][0])
            np.maximum.at(best, conversation[at], found[name][1])
            arms[name.replace("keyword", "session")] = (docs, best[conversation])
        edited = docs[rows["edited"]]
        if len(edited):
            arms["edited"] = (edited, np.ones(len(edited)))
        speakers = [speaker_of(beginning) for beginning in rows["beginning"]]
        named = {"speaker": speaker_scores(text, speakers)}
        if dates_in(text):  # the days of thousands of candidates cost more than looking whether they are asked for
            named["date"] = date_scores(text, _days(rows))
        arms |= {name: (docs, scores) for name, scores in named.items() if scores.any()}
        return arms

    def vector(self, layer: str, text: str, n: int, allowed: NDArray[np.int64] | None) -> Arm:
        """Dense search of a layer; nothing where it has no vectors yet."""
        con = self.store.con
        model = current_model(con)
        if model is None or dense.find_space(con, layer, model) is None:
            return NOTHING
        if (layer, model) not in self._dense:
            folder = self.store.path.with_name(self.store.path.name + ".vectors")
            self._dense[layer, model] = dense.DenseIndex(con, layer, model, folder)
        if self._query != (model, text):
            if self._embedder is None or self._embedder.name != model:
                self._embedder = get_embedder(con, model)
            self._query, self._vector = (model, text), self._embedder.embed([text])[0]
        return self._dense[layer, model].search(self._vector, n, allowed=allowed)


def _days(rows: dict[str, NDArray]) -> list[str]:
    """ISO dates of the candidates, "" where the time is not known."""
    days = rows["started_us"].astype("datetime64[us]").astype("datetime64[D]").astype(str)
    return [day if us else "" for day, us in zip(days.tolist(), rows["started_us"].tolist(), strict=True)]
