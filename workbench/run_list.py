"""Training runs as the store has them: all of them in short, or one with everything that is known of it.

with Store(path, read_only=True) as store:
    rows = runs(store.con)
    found = describe(store.con, find_run(store.con, "38f2"))
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Any

import duckdb

from workbench.data.records import digest
from workbench.errors import InputError, NotFound
from workbench.evals.bench_report import mean_score
from workbench.model_card import evaluations_of
from workbench.train_rows import EVALUATION

SHORT = 8  # characters of a run's id where people read it
_LISTED = 5  # runs that an error names


def runs(con: duckdb.DuckDBPyConnection, run_ids: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """All runs, or those with these ids, the newest first.

    Returns: run_id, method, status; created_at, ended_at: ISO 8601, UTC; steps: trained so far, over all phases; loss:
        the last one; headline: {"name", "value"} or None: the mean score of the newest evaluation (what could not be
        judged counts 0), else the first that was measured of the student at the run's end.
    """
    rows = con.execute(
        "SELECT run_id, method, status, epoch_us(created_at), epoch_us(ended_at) FROM runs "
        "WHERE ? IS NULL OR list_contains(?, run_id) ORDER BY created_at DESC, run_id",
        [run_ids, run_ids],
    ).fetchall()
    steps = dict(con.execute(_STEPS, [EVALUATION]).fetchall())
    losses = dict(con.execute(_LOSSES).fetchall())
    measured = _measured(con)
    return [
        {
            "run_id": run_id, "method": method, "status": status, "created_at": _iso(created), "ended_at": _iso(ended),
            "steps": steps.get(run_id, 0), "loss": losses.get(run_id),
            "headline": _score_of_newest(con, run_id) or measured.get(run_id),
        }
        for run_id, method, status, created, ended in rows
    ]  # fmt: skip


_STEPS = (
    "SELECT run_id, sum(num)::BIGINT FROM (SELECT run_id, phase, max(step) AS num FROM metrics WHERE phase <> ? "
    "GROUP BY ALL) GROUP BY run_id"
)
#: rowid: phases follow each other as their first rows came in.
_LOSSES = "SELECT run_id, arg_max(value, rowid) FROM metrics WHERE name = 'loss' GROUP BY run_id"


def _measured(con: duckdb.DuckDBPyConnection) -> dict[str, dict[str, Any]]:
    """Of each run what was measured first of the student when it had ended."""
    rows = con.execute(
        "SELECT run_id, arg_min(name, rowid), arg_min(value, rowid) FROM metrics "
        "WHERE phase = ? AND starts_with(name, 'student') GROUP BY run_id",
        [EVALUATION],
    ).fetchall()
    return {run_id: {"name": name, "value": value} for run_id, name, value in rows}


def _score_of_newest(con: duckdb.DuckDBPyConnection, run_id: str) -> dict[str, Any] | None:
    found = _evaluations(con, run_id)
    if not found:
        return None
    newest = max(found, key=lambda one: (one["created_at"], one["eval_id"]))
    rows = con.execute(
        "SELECT avg(coalesce(score, 0)) FROM evaluations WHERE eval_id = ?", [newest["eval_id"]]
    ).fetchall()
    return {"name": f"{newest['task_set']} {newest['split']}", "value": rows[0][0]}


def find_run(con: duckdb.DuckDBPyConnection, prefix: str) -> str:
    """The id of the run whose id begins like that.

    Raises: NotFound if there is none, InputError if there are several.
    """
    rows = con.execute("SELECT run_id, method, status FROM runs ORDER BY created_at DESC, run_id").fetchall()
    if not rows:
        raise NotFound("The store has no runs yet. `workbench train RECIPE.yaml` makes one.")
    found = [row for row in rows if row[0].startswith(prefix)]
    if len(found) == 1:
        return found[0][0]
    if not found:
        ids = {run_id[: max(SHORT, len(prefix))]: (run_id, method, status) for run_id, method, status in rows}
        near = [ids[one] for one in get_close_matches(prefix, ids, _LISTED, 0.0)]
        raise NotFound(f"No run's id begins with {prefix!r}. Nearest: {_named(near)}. `workbench runs list` has all.")
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    raise InputError(
        f"{len(found)} runs' ids begin with {prefix!r}: {_named(found[:_LISTED])}{more}. Give more characters."
    )


def _named(rows: Sequence[tuple[str, str, str]]) -> str:
    return ", ".join(f"{run_id} ({method}, {status})" for run_id, method, status in rows)


def describe(con: duckdb.DuckDBPyConnection, run_id: str) -> dict[str, Any]:
    """Everything of a run but its single values: the row of `runs`, recipe, lineage, metrics, artifacts, evaluations.

    Raises: NotFound.
    """
    names = ("method", "status", "error", "folder", "code_version", "recipe", "lineage", "packages")
    rows = con.execute(
        f"SELECT {', '.join(names)}, epoch_us(created_at), epoch_us(ended_at) FROM runs WHERE run_id = ?", [run_id]
    ).fetchall()
    if not rows:
        raise NotFound(f"The store has no run {run_id!r}.")
    *values, created, ended = rows[0]
    found: dict[str, Any] = {"run_id": run_id, **dict(zip(names, values, strict=True))}
    found |= {name: json.loads(found[name]) for name in ("recipe", "lineage", "packages")}
    artifacts = con.execute(
        "SELECT kind, path, digest FROM artifacts WHERE run_id = ? ORDER BY rowid", [run_id]
    ).fetchall()
    return {
        **found, "created_at": _iso(created), "ended_at": _iso(ended), "metrics": _metrics(con, run_id),
        "artifacts": [dict(zip(("kind", "path", "digest"), row, strict=True)) for row in artifacts],
        "evaluations": [
            {**one, "created_at": _iso(one["created_at"]), "by_status": _statuses(con, one["eval_id"]),
             "score_all": mean_score(con, one["eval_id"])}
            for one in _evaluations(con, run_id)
        ],
    }  # fmt: skip


def _metrics(con: duckdb.DuckDBPyConnection, run_id: str) -> list[dict[str, Any]]:
    """One row for each metric of each phase, in the order in which they came; numbers are of the finite values.

    num: values; not_finite: of them; first, last: in the order of steps; lowest_at, highest_at: their steps.
    """
    names = ("phase", "name", "num", "not_finite", "last_step", "first", "last", "lowest", "lowest_at", "highest",
             "highest_at")  # fmt: skip
    rows = con.execute(
        "SELECT phase, name, count(*), count(*) - count(v), max(step), arg_min(v, step), arg_max(v, step), min(v), "
        "arg_min(step, v), max(v), arg_max(step, v) FROM "
        "(SELECT *, rowid AS place, CASE WHEN isfinite(value) THEN value END AS v FROM metrics WHERE run_id = ?) "
        "GROUP BY phase, name ORDER BY min(min(place)) OVER (PARTITION BY phase), min(place)",
        [run_id],
    ).fetchall()
    return [dict(zip(names, row, strict=True)) for row in rows]


def _evaluations(con: duckdb.DuckDBPyConnection, run_id: str) -> list[dict[str, Any]]:
    """Evaluations of the run's model, with whose they are and when they began (microseconds since the epoch)."""
    if not con.execute("SELECT 1 FROM eval_benches LIMIT 1").fetchall():
        return []
    models = con.execute("SELECT digest FROM artifacts WHERE run_id = ? AND kind = 'model'", [run_id]).fetchall()
    version = models[0][0] if models else digest("no model", run_id)
    found = []
    for one in evaluations_of(con, run_id, version):
        rows = con.execute(
            "SELECT model, epoch_us(created_at) FROM eval_benches WHERE eval_id = ?", [one["eval_id"]]
        ).fetchall()
        found.append({**one, "model": rows[0][0], "created_at": rows[0][1]})
    return found


def _statuses(con: duckdb.DuckDBPyConnection, eval_id: str) -> dict[str, int]:
    """How many samples of an evaluation have which status, so far."""
    return dict(
        con.execute(
            "SELECT status, count(*) FROM evaluations WHERE eval_id = ? GROUP BY status ORDER BY status", [eval_id]
        ).fetchall()
    )


def flat(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """("settings.steps", "60"), ("rollouts.0.policy", "teacher"), … of nested mappings, and of lists of these."""
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        value = dict(enumerate(value))
    if isinstance(value, Mapping) and value:
        for name, one in value.items():
            yield from flat(one, f"{place}.{name}" if place else str(name))
    else:
        yield place, text(value)


def text(value: Any) -> str:
    """A string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _iso(microseconds: int | None) -> str | None:
    if microseconds is None:
        return None
    return datetime.fromtimestamp(microseconds // 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
