"""The lexical index in DuckDB: documents and postings of every layer of text; written here, scored in `bm25`.

Nothing here begins or commits a transaction: the caller's makes text and postings one. Bulk postings are sorted by
(layer, term), so that zone maps find a term in a few row groups; additions go unsorted into a second table, which
`compact` merges into the first.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import duckdb
import numpy as np
from numpy.typing import NDArray

from workbench.errors import InputError, StoreError
from workbench.memory.arrays import distinct, fetch, insert
from workbench.memory.pieces import Pieces, numbered
from workbench.memory.terms import count_terms
from workbench.memory.tokenizers import Tokenizer, get_tokenizer

# A query reads all recent postings: 250,000 cost it about 1 ms. Compaction rewrites the layer (0.2 microseconds of
# CPU a posting): at a share of 1/32 that is less than 0.4 ms for each added document of 40 terms, at any size.
_RECENT_ROWS = 250_000
_RECENT_SHARE = 1 / 32
# While a large ingest runs, each posting is rewritten some times instead of some dozen times: queries are slower until
# its end (4,000,000 recent postings cost one about 16 ms).
_RECENT_ROWS_MEANWHILE, _RECENT_SHARE_MEANWHILE = 4_000_000, 1 / 4
_COMPACT_ROWS_AT_ONCE, _READ_ROWS_AT_ONCE = 8_000_000, 4_000_000
_TERMS_AT_ONCE = 40


class Document(NamedTuple):
    """A text to index.

    Args:
        doc: the exchange's `seq`, 0 <= doc < 2**31; unique within a layer.
        user_text, assistant_text: the text, by who wrote it; a layer without roles leaves the first empty.
        previous: the doc that comes before it in the same thread of the conversation, None if there is none.
        pieces: the numbers of the texts' pieces in a vocabulary, where that has been found out.
    """

    doc: int
    user_text: str
    assistant_text: str
    previous: int | None = None
    pieces: Pieces | None = None


class Postings(NamedTuple):
    """Postings of some terms, parallel arrays (uint64, then int32), sorted by term."""

    term: NDArray
    doc: NDArray
    tf: NDArray
    tf_user: NDArray


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of text in the index; every change of its documents gives it a greater `revision`."""

    id: int
    name: str
    tokenizer: Tokenizer
    revision: int


def find_layer(con: duckdb.DuckDBPyConnection, name: str) -> Layer | None:
    """The layer of that name, None if nothing was ever added to it."""
    # Every search asks this; without a filter DuckDB answers in half the time, and layers are few.
    for layer, found, tokenizer, revision in con.execute("SELECT * FROM lexical_layers").fetchall():
        if found == name:
            return Layer(layer, name, get_tokenizer(tokenizer), revision)
    return None


def add(con: duckdb.DuckDBPyConnection, layer: str, tokenizer: str, documents: Iterable[Document]) -> int:
    """Index documents; one that the layer has already is replaced.

    Args:
        layer: "verbatim" or "distilled/<distiller>"; the first addition makes it.
        tokenizer: a name in `tokenizers.TOKENIZERS`.
        documents: a batch; tuples will do. Batches of some hundred cost least.

    Returns: how many were indexed.

    Raises: InputError if the layer was made with another tokenizer, or a doc comes twice in the batch.
    """
    batch = [Document(*document) for document in documents]
    if not batch:
        return 0
    docs = np.array([document.doc for document in batch], np.int32)
    if len(distinct(docs)) < len(docs):
        raise InputError(f"the same document comes twice in one batch for layer {layer!r}: give each doc once")
    target = _layer_for(con, layer, tokenizer)
    _remove(con, target.id, docs)
    revision = next_revision(target.revision)
    lengths, lengths_user = _insert_postings(con, target, batch, docs)
    back = [0 if document.previous is None else document.doc - document.previous for document in batch]
    insert(
        con,
        "INSERT INTO lexical_documents SELECT ?, doc, back, length, length_user, ? FROM batch",
        [target.id, revision],
        {"doc": docs, "back": np.array(back, np.int32), "length": lengths, "length_user": lengths_user},
    )
    _set_revision(con, target, revision)
    return len(batch)


def remove(con: duckdb.DuckDBPyConnection, layer: str, docs: Sequence[int] | NDArray[np.integer]) -> int:
    """Take documents out of a layer; those that it does not have are passed over. Returns how many it had."""
    target = find_layer(con, layer)
    if target is None or not len(docs):
        return 0
    count = _remove(con, target.id, distinct(np.asarray(docs, np.int32)))
    if count:
        _set_revision(con, target)
    return count


def drop_layer(con: duckdb.DuckDBPyConnection, layer: str) -> None:
    """Forget all documents of a layer, which may then be indexed with another tokenizer."""
    target = find_layer(con, layer)
    if target is not None:
        for table in ("documents", "postings", "recent", "terms", "histogram"):
            con.execute(f"DELETE FROM lexical_{table} WHERE layer = ?", [target.id])
        _set_revision(con, target)


def maintain(con: duckdb.DuckDBPyConnection, *, more_follows: bool = False) -> list[str]:
    """Compact every layer that has much unsorted text, to be called after batches of additions; returns their names.

    Args: more_follows: the next batch comes at once, and a call without this after the last one.
    """
    compacted = []
    most, share = (_RECENT_ROWS_MEANWHILE, _RECENT_SHARE_MEANWHILE) if more_follows else (_RECENT_ROWS, _RECENT_SHARE)
    if _number(con, "SELECT count(*) FROM lexical_recent", []) <= most:
        return compacted
    recent = con.execute(
        "SELECT r.layer, l.name, count(*) FROM lexical_recent r JOIN lexical_layers l USING (layer) GROUP BY ALL"
    ).fetchall()
    for layer, name, rows in recent:
        if rows <= most:
            continue
        if rows > share * _number(con, "SELECT sum(df) FROM lexical_terms WHERE layer = ?", [layer]):
            compact(con, name)
            compacted.append(name)
    return compacted


def compact(con: duckdb.DuckDBPyConnection, layer: str) -> None:
    """Merge what was added to a layer since the last time into its sorted postings; scores stay the same."""
    target = find_layer(con, layer)
    if target is None:
        return
    both = """(SELECT * FROM lexical_postings WHERE layer = $layer AND term BETWEEN $low AND $high
               UNION ALL SELECT * FROM lexical_recent WHERE layer = $layer AND term BETWEEN $low AND $high)"""
    before, added = (
        _number(con, f"SELECT count(*) FROM lexical_{table} WHERE layer = ?", [target.id])
        for table in ("postings", "recent")
    )
    parts = 1 + (rows := before + added) // _COMPACT_ROWS_AT_ONCE
    # Only where there were postings before must the sorted ones wait elsewhere until these are gone.
    into = "lexical_sorted" if before else "lexical_postings"
    # Columns are spelled out: DuckDB 2.0.0 loses rows of a table made by an empty CREATE TABLE AS in the transaction.
    con.execute(
        "CREATE OR REPLACE TEMP TABLE lexical_sorted"
        " (layer SMALLINT, term UBIGINT, doc INTEGER, tf INTEGER, tf_user INTEGER)"
    )
    # Hashes are spread evenly: ranges of them are parts of equal size, and only one part is sorted in memory at once.
    for part in range(parts):
        bounds = {"low": (part << 64) // parts, "high": ((part + 1) << 64) // parts - 1}
        con.execute(f"INSERT INTO {into} SELECT * FROM {both} ORDER BY term, doc", {"layer": target.id, **bounds})
    for table in ("recent", "terms", "histogram", *(["postings"] if before else [])):
        con.execute(f"DELETE FROM lexical_{table} WHERE layer = ?", [target.id])
    con.execute("INSERT INTO lexical_postings SELECT * FROM lexical_sorted")
    con.execute(
        "INSERT INTO lexical_terms SELECT layer, term, count(*) FROM lexical_postings WHERE layer = ?"
        " GROUP BY ALL ORDER BY term",
        [target.id],
    )
    con.execute(
        "INSERT INTO lexical_histogram SELECT layer, df, count(*) FROM lexical_terms WHERE layer = ? GROUP BY ALL",
        [target.id],
    )
    con.execute("DROP TABLE lexical_sorted")
    kept = _number(con, "SELECT count(*) FROM lexical_postings WHERE layer = ?", [target.id])
    if kept != rows:
        raise StoreError(
            f"compaction of layer {layer!r} kept {kept} of {rows} postings: the transaction must be undone"
        )


def read_documents(
    con: duckdb.DuckDBPyConnection, layer: int, *columns: str, since: int | None = None
) -> dict[str, NDArray]:
    """Documents of a layer, by ascending doc: doc and these columns of lexical_documents, parallel arrays.

    Args: since: only those that were added in this revision or later.
    """
    newer = "" if since is None else " AND revision >= ?"
    found = fetch(
        con,
        f"SELECT {', '.join(('doc', *columns))} FROM lexical_documents WHERE layer = ?{newer}",
        [layer] if since is None else [layer, since],
    )
    doc = found["doc"]
    if np.any(doc[1:] < doc[:-1]):
        order = np.argsort(doc, kind="stable")
        found = {name: column[order] for name, column in found.items()}
    return found


def read_postings(
    con: duckdb.DuckDBPyConnection, layer: int, terms: Sequence[int], *, roles: bool = True
) -> list[tuple[int, NDArray, NDArray, NDArray]]:
    """The postings of some terms (hashes) in a layer: (term, doc, tf, tf_user), for each term that has any.

    Args: roles: False leaves tf_user out (0), which a query without a role prior does not need.
    """
    pieces: list[tuple[int, NDArray, NDArray, NDArray]] = []
    for start in range(0, len(terms), _TERMS_AT_ONCE):
        some = list(terms[start : start + _TERMS_AT_ONCE])
        columns = f"doc, tf{', tf_user' if roles else ''}"
        # One comparison for each term, for which zone maps leave a few row groups; recent postings are read through.
        one = f"SELECT ?::UTINYINT AS number, {columns} FROM lexical_postings WHERE layer = ? AND term = ?"
        recent = (
            f"SELECT number, {columns} FROM lexical_recent"
            " JOIN (SELECT unnest(?::UBIGINT[]) AS term, unnest(?::UTINYINT[]) AS number) USING (term) WHERE layer = ?"
        )
        each = [value for number, term in enumerate(some) for value in (number, layer, term)]
        found = fetch(
            con, " UNION ALL ".join([*[one] * len(some), recent]), [*each, some, list(range(len(some))), layer]
        )
        number = found["number"]
        if np.any(number[1:] < number[:-1]):
            order = np.argsort(number, kind="stable")
            number, found = number[order], {name: column[order] for name, column in found.items()}
        bounds = np.searchsorted(number, np.arange(len(some) + 1, dtype=number.dtype)).tolist()
        tf_user = found["tf_user"] if roles else np.broadcast_to(np.int32(0), len(number))
        pieces += [
            (term, found["doc"][a:b], found["tf"][a:b], tf_user[a:b])
            for term, (a, b) in zip(some, pairwise(bounds), strict=True)
            if a < b
        ]
    return pieces


def read_all_postings(con: duckdb.DuckDBPyConnection, layer: int, table: str) -> Iterator[Postings]:
    """All postings of a layer in `lexical_<table>` (postings or recent), in parts, by ascending term."""
    rows = _number(con, f"SELECT count(*) FROM lexical_{table} WHERE layer = ?", [layer])
    parts = 1 + rows // _READ_ROWS_AT_ONCE
    for part in range(parts if rows else 0):
        bounds = [(part << 64) // parts, ((part + 1) << 64) // parts - 1]
        sql = f"SELECT term, doc, tf, tf_user FROM lexical_{table} WHERE layer = ? AND term BETWEEN ? AND ?"
        yield sorted_postings([fetch(con, sql, [layer, *bounds])])


def read_postings_of(con: duckdb.DuckDBPyConnection, layer: int, docs: NDArray[np.int32]) -> Postings:
    """The postings of some documents in a layer (a scan, unless they are recent)."""
    tables = []
    for table in ("recent", "postings"):
        tables.append(
            fetch(
                con,
                f"SELECT term, doc, tf, tf_user FROM lexical_{table}"
                " JOIN (SELECT unnest(?::INTEGER[]) AS doc) USING (doc) WHERE layer = ?",
                [docs, layer],
            )
        )
        docs = np.setdiff1d(docs, tables[-1]["doc"])
        if not len(docs):
            break
    return sorted_postings(tables)


def next_revision(last: int) -> int:
    """A number greater than `last` that no rolled-back transaction has used: microseconds since 1970, or last + 1."""
    return max(last + 1, time.time_ns() // 1000)


def df_histogram(con: duckdb.DuckDBPyConnection, layer: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many terms of a layer occur in how many documents: (df, number of terms with it)."""
    # What compaction counted, corrected for the terms that have come or gone since.
    columns = fetch(
        con,
        """WITH changes AS (
               SELECT term, sum(change) AS change FROM (
                   SELECT term, 1 AS change FROM lexical_recent WHERE layer = $layer
                   UNION ALL SELECT term, df FROM lexical_terms WHERE layer = $layer AND df < 0
               ) GROUP BY term
           ), changed AS (
               SELECT coalesce(t.df, 0) AS old, coalesce(t.df, 0) + c.change AS new FROM changes c
               LEFT JOIN (SELECT term, df FROM lexical_terms WHERE layer = $layer AND df > 0) t USING (term)
           )
           SELECT df::BIGINT AS df, sum(terms)::BIGINT AS terms FROM (
               SELECT df, num_terms AS terms FROM lexical_histogram WHERE layer = $layer
               UNION ALL SELECT old, -1 FROM changed
               UNION ALL SELECT new, 1 FROM changed
           ) WHERE df > 0 GROUP BY df HAVING sum(terms) > 0 ORDER BY df""",
        {"layer": layer},
    )
    return columns["df"], columns["terms"]


def sorted_postings(tables: list[dict[str, NDArray]]) -> Postings:
    """Tables of postings joined into one that is sorted by term."""
    columns = {
        name: tables[0][name] if len(tables) == 1 else np.concatenate([table[name] for table in tables])
        for name in ("term", "doc", "tf", "tf_user")
    }
    term = columns["term"]
    if np.any(term[1:] < term[:-1]):
        order = np.argsort(term, kind="stable")
        columns = {name: column[order] for name, column in columns.items()}
    return Postings(columns["term"], columns["doc"], columns["tf"], columns["tf_user"])


def _layer_for(con: duckdb.DuckDBPyConnection, name: str, tokenizer: str) -> Layer:
    chosen, layer = get_tokenizer(tokenizer), find_layer(con, name)
    if layer is None:
        layer = Layer(_number(con, "SELECT max(layer) FROM lexical_layers", []) + 1, name, chosen, 0)
        con.execute("INSERT INTO lexical_layers VALUES (?, ?, ?, 0)", [layer.id, name, tokenizer])
    elif layer.tokenizer.name != tokenizer:
        if _number(con, "SELECT count(*) FROM lexical_documents WHERE layer = ?", [layer.id]):
            raise InputError(
                f"layer {name!r} is indexed with tokenizer {layer.tokenizer.name!r}, not {tokenizer!r}: "
                "drop the layer first to index it anew"
            )
        con.execute("UPDATE lexical_layers SET tokenizer = ? WHERE layer = ?", [tokenizer, layer.id])
        layer = replace(layer, tokenizer=chosen)
    return layer


def _insert_postings(
    con: duckdb.DuckDBPyConnection, layer: Layer, batch: list[Document], docs: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    texts, pieces = [(each.user_text, each.assistant_text) for each in batch], [each.pieces for each in batch]
    counts = count_terms(layer.tokenizer, *numbered(texts, pieces))
    if len(counts.term):
        columns = {"term": counts.term, "doc": docs[counts.row], "tf": counts.tf, "tf_user": counts.tf_user}
        insert(con, "INSERT INTO lexical_recent SELECT ?, term, doc, tf, tf_user FROM batch", [layer.id], columns)
    return counts.length, counts.length_user


def _set_revision(con: duckdb.DuckDBPyConnection, layer: Layer, revision: int | None = None) -> None:
    revision = next_revision(layer.revision) if revision is None else revision
    con.execute("UPDATE lexical_layers SET revision = ? WHERE layer = ?", [revision, layer.id])


def _number(con: duckdb.DuckDBPyConnection, sql: str, parameters: list) -> int:
    # fetchall, because fetchone would leave a result open, and DuckDB 2 then refuses other work on the connection.
    return con.execute(sql, parameters).fetchall()[0][0] or 0


def _remove(con: duckdb.DuckDBPyConnection, layer: int, docs: NDArray[np.int32]) -> int:
    if _number(con, "SELECT max(doc) + 1 FROM lexical_documents WHERE layer = ?", [layer]) <= docs.min():
        return 0  # new documents, as nearly always
    removed = fetch(
        con,
        "DELETE FROM lexical_documents WHERE layer = ? AND doc IN (SELECT unnest(?::INTEGER[])) RETURNING doc, length",
        [layer, docs],
    )
    left = removed["doc"][removed["length"] > 0]
    if len(left):
        recent = fetch(
            con,
            "DELETE FROM lexical_recent WHERE layer = ? AND doc IN (SELECT unnest(?::INTEGER[])) RETURNING doc",
            [layer, left],
        )
        left = np.setdiff1d(left, recent["doc"])
    if len(left):
        columns = fetch(
            con,
            "DELETE FROM lexical_postings WHERE layer = ? AND doc IN (SELECT unnest(?::INTEGER[])) RETURNING term",
            [layer, left],
        )
        insert(con, "INSERT INTO lexical_terms SELECT ?, term, -1 FROM batch", [layer], {"term": columns["term"]})
    return len(removed["doc"])
