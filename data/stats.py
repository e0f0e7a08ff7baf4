"""What a store holds, in numbers."""

from __future__ import annotations

from typing import Any

from workbench.data.store import Store, schema_version


def stats(store: Store) -> dict[str, Any]:
    """Counts of the main tables, by format and agent, tokens per layer, quarantine, file size in bytes."""
    con = store.con

    def value(sql: str) -> int:
        row = con.execute(sql).fetchone()
        return int(row[0] or 0) if row else 0

    def table(sql: str) -> dict[str, int]:
        return {str(key): int(count) for key, count in con.execute(sql).fetchall()}

    verbatim = value("SELECT sum(num_tokens) FROM exchanges")
    distillers = [
        {"distiller": name, "memories": count, "tokens": int(tokens),
         "compression": round(int(source) / max(int(tokens), 1), 2)}
        for name, count, tokens, source in con.execute(
            "SELECT distiller, count(*), sum(m.num_tokens), sum(e.num_tokens) FROM memories m "
            "JOIN exchanges e USING (exchange_id) GROUP BY ALL ORDER BY ALL"
        ).fetchall()
    ]  # fmt: skip
    return {
        "store": str(store.path),
        "schema": schema_version(con),
        "bytes": store.path.stat().st_size,
        "sources": value("SELECT count(*) FROM sources WHERE format IS NOT NULL"),
        "conversations": value("SELECT count(*) FROM conversations"),
        "messages": value("SELECT count(*) FROM messages"),
        "exchanges": value("SELECT count(*) FROM exchanges"),
        "verbatim_tokens": verbatim,
        "distillers": distillers,
        "rooms": value("SELECT count(*) FROM rooms"),
        "quarantined": value("SELECT count(*) FROM quarantine"),
        "by_format": table("SELECT format, count(*) FROM conversations GROUP BY ALL ORDER BY ALL"),
        "by_agent": table("SELECT coalesce(agent, '?'), count(*) FROM conversations GROUP BY ALL ORDER BY ALL"),
        "by_project": table(
            "SELECT coalesce(project, '?'), count(*) FROM conversations GROUP BY ALL ORDER BY count(*) DESC, 1 LIMIT 20"
        ),
    }
