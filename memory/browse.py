"""Browsing without a query: the latest exchanges, and which files were touched by which of them."""

from __future__ import annotations

from typing import Any

import duckdb
import orjson

from workbench.errors import InputError
from workbench.memory.filters import Filters
from workbench.memory.show import iso

ACTIONS = ("read", "modified", "created", "deleted", "referenced")
#: Characters of the user's words that a listing shows.
USER_CHARS = 300
#: Exchanges that are named beside each file.
NAMED_EXCHANGES = 5


def recent(
    con: duckdb.DuckDBPyConnection,
    *,
    project: str | None = None,
    agent: str | None = None,
    since: str | None = None,
    until: str | None = None,
    limit: int = 10,
) -> list[dict[str, Any]]:
    """The latest exchanges, newest first; those whose log has no times come last, newest stored first.

    Args:
        project, agent: the whole name or a part of it, in any case.
        since, until: ISO 8601, a date means its first moment (UTC); until is exclusive. An exchange without a time
            passes neither.
        limit: how many.

    Raises: InputError for a time that is none.
    """
    where, values = Filters(project, agent, since, until).sql()
    rows = con.execute(
        f"""
        SELECT e.exchange_id, e.conversation_id, c.format, coalesce(s.path, c.path), c.session_id,
            c.project, c.agent, c.title, e.thread,
            e.ply_start, e.ply_end, epoch_us(e.started_at), left(e.user_text, {USER_CHARS}),
            (SELECT any_value(m.core ORDER BY m.distiller) FROM memories m WHERE m.exchange_id = e.exchange_id), e.files
        FROM exchanges e JOIN conversations c USING (conversation_id) LEFT JOIN sources s ON s.source_id = e.source_id
        WHERE {where} ORDER BY e.started_at DESC NULLS LAST, e.seq DESC LIMIT ?""",
        [*values, limit],
    ).fetchall()
    return [
        {
            "exchange_id": r[0], "conversation_id": r[1],
            "source": {"format": r[2], "path": r[3], "session_id": r[4]},
            "project": r[5], "agent": r[6], "title": r[7], "thread": r[8], "ply_start": r[9], "ply_end": r[10],
            "started_at": iso(r[11]), "user": r[12], "core": r[13], "files": orjson.loads(r[14]),
        }
        for r in rows
    ]  # fmt: skip


def files_touched(
    con: duckdb.DuckDBPyConnection,
    *,
    path: str | None = None,
    project: str | None = None,
    since: str | None = None,
    action: str | None = None,
    limit: int = 20,
) -> list[dict[str, Any]]:
    """Which files were touched, what was done to them how often, and in which exchanges; last touched first.

    Args:
        path: a part of the path, in any case.
        project, since: as in `recent`.
        action: only touches of this kind (one of ACTIONS; "referenced" = only named in the text).
        limit: how many files.

    Returns: per file and project {path, project, actions {action: exchanges}, num_exchanges, last_at, exchanges (the
        latest NAMED_EXCHANGES)}.
    Raises: InputError for a time or an action that is none.
    """
    if action is not None and action not in ACTIONS:
        raise InputError(f"action must be one of {', '.join(ACTIONS)}, not {action!r}.")
    where, values = Filters(project, since=since).sql()
    of_file, file_values = "true", []
    if path:
        of_file += " AND contains(lower(path), lower(?))"
        file_values.append(path)
    if action:
        of_file += " AND action = ?"
        file_values.append(action)
    rows = con.execute(
        f"""
        WITH touched AS (
            SELECT e.seq, e.exchange_id, e.started_at, c.project, f.path, f.action FROM exchanges e
            JOIN conversations c USING (conversation_id),
            unnest(from_json(e.files, '[{{"path":"VARCHAR","action":"VARCHAR"}}]')) AS t(f) WHERE {where})
        SELECT path, project, histogram(action), count(DISTINCT exchange_id), epoch_us(max(started_at)),
            list({{'exchange_id': exchange_id, 'action': action, 'started_at': epoch_us(started_at)}}
                ORDER BY started_at DESC NULLS LAST, seq DESC)[:{NAMED_EXCHANGES}]
        FROM touched WHERE {of_file} GROUP BY path, project
        ORDER BY max(started_at) DESC NULLS LAST, max(seq) DESC, path LIMIT ?""",
        [*values, *file_values, limit],
    ).fetchall()
    return [
        {
            "path": r[0], "project": r[1], "actions": dict(sorted(r[2].items())), "num_exchanges": r[3],
            "last_at": iso(r[4]), "exchanges": [{**e, "started_at": iso(e["started_at"])} for e in r[5]],
        }
        for r in rows
    ]  # fmt: skip
