"""Keeps what is derived from the logs in step with them: exchanges, the lexical and the dense index of each layer.

These functions are called inside the transaction that stores the text, so that text and index are one.
"""

from __future__ import annotations

import duckdb

from workbench.memory import dense, postings
from workbench.memory.postings import Document

VERBATIM = "verbatim"
TOKENIZER = "stem/1"


def distilled(distiller: str) -> str:
    """Name of the layer of a distiller's memories."""
    return f"distilled/{distiller}"


def on_change(
    con: duckdb.DuckDBPyConnection, conversation_ids: list[str], more_follows: bool = False
) -> tuple[int, int]:
    """Brings exchanges and indexes up to date after conversations changed; returns exchanges (added, unchanged).

    Args: more_follows: another call comes at once, and the last one without this: what can wait may wait for it.
    """
    from workbench.memory import exchanges  # not needed by recall, and 6 ms of CPU

    rebuilt = exchanges.rebuild(con, conversation_ids)
    if rebuilt.removed:
        for (layer,) in con.execute("SELECT name FROM lexical_layers").fetchall():
            postings.remove(con, layer, rebuilt.removed)
            dense.remove(con, layer, rebuilt.removed)
    postings.add(con, VERBATIM, TOKENIZER, rebuilt.added)
    postings.maintain(con, more_follows=more_follows)
    return len(rebuilt.added), rebuilt.unchanged


def on_memories(con: duckdb.DuckDBPyConnection, distiller: str, memories: list[tuple[int, str]]) -> None:
    """Indexes new memories: (doc, text) of each."""
    layer = distilled(distiller)
    before = dict(
        con.execute(
            "SELECT e.seq, b.seq FROM exchanges e JOIN exchanges b ON b.conversation_id = e.conversation_id AND "
            "b.thread = e.thread AND b.position = e.position - 1 WHERE e.seq IN (SELECT unnest($1::BIGINT[]))",
            [[doc for doc, _ in memories]],
        ).fetchall()
    )
    postings.add(con, layer, TOKENIZER, [Document(doc, "", text, before.get(doc)) for doc, text in memories])
    postings.maintain(con)
