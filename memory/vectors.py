"""Keeps the vectors of all layers in step with their texts, under the store's embedding model.

The default model is learnt from the store's own exchanges (memory.embedding), and anew when the store has doubled; the
vectors of the old one are dropped then. All of it is derived and may be interrupted: what is missing is made next time.
"""

from __future__ import annotations

from collections.abc import Callable

import duckdb
import orjson

from workbench.data.store import Store
from workbench.errors import InputError
from workbench.memory import dense, embedding
from workbench.memory.index import VERBATIM, distilled

#: Fewer exchanges than this say too little about which words go together.
LEARN_FROM = 10
BATCH = 1000
#: The names that a person can choose; the last stands for any model of that library.
CHOICES = ("lsa", "hashed", "sentence-transformers/MODEL")


def current_model(con: duckdb.DuckDBPyConnection) -> str | None:
    """Name of the model whose vectors recall uses; None before there are any."""
    row = con.execute("SELECT value FROM settings WHERE name = 'embedding_model'").fetchone()
    return orjson.loads(row[0]) if row else None


def num_missing(con: duckdb.DuckDBPyConnection) -> int:
    """How many documents of all layers have no vector yet (0 where there are more vectors than texts)."""
    model = current_model(con)
    return sum(max(0, texts - vectors) for texts, vectors in _counts(con, model))


def update(
    store: Store, choice: str | None = None, progress: Callable[[int], None] | None = None, learn: bool = True
) -> int:
    """Makes the vectors that are missing, in transactions of BATCH; returns how many.

    Args:
        choice: one of CHOICES; None = what was chosen before, at first "lsa".
        progress: called with the number made so far.
        learn: False = never learn a model now, unless there is none.

    Raises: InputError for an unknown choice; MissingExtra.
    """
    con = store.con
    embedder = _embedder(store, choice, learn)
    made = 0
    for layer, sql, parameters in _texts(con, embedder.name):
        while rows := store.con.execute(f"{sql} LIMIT {BATCH}", parameters).fetchall():
            vectors = embedder.embed([row[1] for row in rows])
            with store.transaction() as con:
                dense.add(con, layer, embedder.name, [row[0] for row in rows], vectors)
            made += len(rows)
            if progress:
                progress(made)
            if store.hand_over():
                embedder = embedding.get_embedder(store.con, embedder.name)
    return made


def _embedder(store: Store, choice: str | None, learn: bool) -> embedding.Embedder:
    con = store.con
    before = current_model(con)
    kind = choice or ("lsa" if before is None else before.split(":")[0].split("/1")[0])
    if kind.startswith(embedding.SENTENCE_TRANSFORMERS):
        embedder: embedding.Embedder = embedding.get_embedder(con, kind)
    elif kind == "hashed":
        embedder = embedding.hashed()
    elif kind == "lsa":
        return _learnt(store, before, learn)
    else:
        raise InputError(f"No embedder is called {kind!r}. There are {', '.join(CHOICES)}.")
    if embedder.name != before:
        with store.transaction() as con:
            _switch(con, embedder.name)
    return embedder


def _learnt(store: Store, before: str | None, learn: bool) -> embedding.Embedder:
    con = store.con
    row = con.execute("SELECT count(*) FROM exchanges").fetchone()
    count = int(row[0]) if row else 0
    if count < LEARN_FROM:
        embedder: embedding.Embedder = embedding.hashed()
    else:
        row = con.execute("SELECT num_documents FROM embedding_models WHERE model = ?", [before]).fetchone()
        if row and (count < 2 * row[0] or not learn):
            return embedding.get_embedder(con, before or "")
        texts = con.execute("SELECT user_text || '\n\n' || assistant_text FROM exchanges ORDER BY seq").fetchall()
        embedder = embedding.learn([text for (text,) in texts])
    if embedder.name != before:
        with store.transaction() as con:
            if isinstance(embedder, embedding.LexicalEmbedder) and embedder.name != embedding.HASHED:
                embedder.save(con)
            _switch(con, embedder.name)
    return embedder


def _switch(con: duckdb.DuckDBPyConnection, model: str) -> None:
    """Makes a model the current one and drops what other models left."""
    con.execute("DELETE FROM settings WHERE name = 'embedding_model'")
    con.execute("INSERT INTO settings VALUES ('embedding_model', ?)", [orjson.dumps(model).decode()])
    for layer, other in con.execute("SELECT layer, model FROM embedding_spaces WHERE model <> ?", [model]).fetchall():
        dense.drop_space(con, layer, other)
    for table in ("embedding_features", "embedding_models"):
        con.execute(f"DELETE FROM {table} WHERE model <> ?", [model])


def _layers(con: duckdb.DuckDBPyConnection) -> list[tuple[str, str, list[str]]]:
    """(layer, SQL of its (doc, text) rows, parameters)."""
    found: list[tuple[str, str, list[str]]] = [
        (VERBATIM, "SELECT e.seq, e.user_text || '\n\n' || e.assistant_text FROM exchanges e", [])
    ]
    for (name,) in con.execute("SELECT DISTINCT distiller FROM memories ORDER BY 1").fetchall():
        sql = "SELECT e.seq, m.text FROM memories m JOIN exchanges e USING (exchange_id) WHERE m.distiller = ?"
        found.append((distilled(name), sql, [name]))
    return found


def _texts(con: duckdb.DuckDBPyConnection, model: str) -> list[tuple[str, str, list[str | int]]]:
    """The same for the documents that have no vector of this model yet."""
    found = []
    for layer, sql, parameters in _layers(con):
        missing = (
            f"SELECT * FROM ({sql}) t(doc, text) ANTI JOIN (SELECT doc FROM embeddings JOIN embedding_spaces "
            "USING (space) WHERE layer = ? AND model = ?) v USING (doc) ORDER BY doc"
        )
        found.append((layer, missing, [*parameters, layer, model]))
    return found


def _counts(con: duckdb.DuckDBPyConnection, model: str | None) -> list[tuple[int, int]]:
    """(texts, vectors) of each layer."""
    vectors = dict(
        con.execute(
            "SELECT layer, count(*) FROM embeddings JOIN embedding_spaces USING (space) WHERE model = ? GROUP BY 1",
            [model],
        ).fetchall()
    )
    texts = {VERBATIM: con.execute("SELECT count(*) FROM exchanges").fetchall()[0][0]}
    texts |= {distilled(n): c for n, c in con.execute("SELECT distiller, count(*) FROM memories GROUP BY 1").fetchall()}
    return [(count, vectors.get(layer, 0)) for layer, count in texts.items()]
