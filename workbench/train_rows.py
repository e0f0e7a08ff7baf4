"""The rows of a training run: its status, metrics, kept rollouts and artifacts, written while it runs.

The store is held only for the moment of a commit, so that agents can log while a model trains.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from workbench.data.columns import registered
from workbench.data.store import Store
from workbench.errors import StoreError
from workbench.policies.store import save_rollouts

if TYPE_CHECKING:
    from workbench.policies.lm.local_models import LocalModel

FLUSH_SECONDS = 5.0
#: The phase of what is measured when a run has ended; all others are trained.
EVALUATION = "evaluation"
logger = logging.getLogger(__name__)


def find(con: duckdb.DuckDBPyConnection, run_id: str) -> dict[str, Any] | None:
    """A run's status, folder, method and lineage; None if there is no such run."""
    rows = con.execute("SELECT status, folder, method, lineage FROM runs WHERE run_id = ?", [run_id]).fetchall()
    if not rows:
        return None
    status, folder, method, lineage = rows[0]
    return {"status": status, "folder": Path(folder), "method": method, "lineage": json.loads(lineage)}


def by_other_code(con: duckdb.DuckDBPyConnection, recipe: Any, lineage: Any, run_id: str) -> list[str]:
    """Runs of the same recipe on the same data and models, "id (status)", that another version of the code made."""
    rows = con.execute(
        "SELECT run_id || ' (' || status || ')' FROM runs WHERE recipe::VARCHAR = ? AND lineage::VARCHAR = ? "
        "AND run_id <> ? ORDER BY created_at",
        [json.dumps(recipe), json.dumps(lineage), run_id],
    ).fetchall()
    return [text for (text,) in rows]


def last_metrics(con: duckdb.DuckDBPyConnection, run_id: str) -> dict[str, float]:
    """The last value of each of a run's metrics, by name; that of the later phase where several phases have it."""
    rows = con.execute(
        "SELECT name, value FROM metrics m WHERE run_id = ? ORDER BY "
        "(SELECT min(rowid) FROM metrics p WHERE p.run_id = m.run_id AND p.phase = m.phase), step",
        [run_id],
    ).fetchall()
    return dict(rows)


@dataclass(frozen=True, slots=True)
class Writer:
    """Who writes the rollouts that are kept.

    Args: student: whose tokenizer decodes them; versions: role -> version of its model; temperature: of the rollouts.
    """

    student: LocalModel
    versions: Mapping[str, str]
    temperature: float


class Tracker:
    """Writes a run's rows. Args: writer: of kept rollouts, where a run has some."""

    def __init__(self, store: Path, run_id: str, say: Callable[[str], None], writer: Writer | None = None) -> None:
        self.store, self.run_id, self.say, self.writer = store, run_id, say, writer
        self._metrics: list[tuple[str, int, str, float]] = []
        self._kept: list[tuple[str, list[Any]]] = []
        self._flushed_at = float("-inf")

    def begin(
        self, method: str, recipe: Mapping[str, Any], lineage: Mapping[str, Any], code: str,
        packages: Mapping[str, str], folder: Path,
    ) -> None:  # fmt: skip
        """Notes that the run is running; a run that was interrupted goes on under its old row."""
        with Store(self.store) as opened, opened.transaction() as con:
            if find(con, self.run_id):
                con.execute(
                    "UPDATE runs SET status = 'running', error = NULL, ended_at = NULL WHERE run_id = ?", [self.run_id]
                )
                return
            con.execute(
                "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, 'running', NULL, now(), NULL)",
                [self.run_id, method, json.dumps(recipe), json.dumps(lineage), code, json.dumps(packages), str(folder)],
            )

    def on_metrics(self, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        """Takes numbers in; they reach the store every few seconds, and when there are none (a checkpoint comes)."""
        self._metrics += [(phase, step, name, value) for name, value in numbers.items()]
        if "loss" in numbers:
            self.say(f"{phase}: step {step}, loss {numbers['loss']:.4g}")
        if (not numbers and (self._metrics or self._kept)) or time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            try:
                self._flush(wait_seconds=1.0)
            except StoreError as error:  # training goes on; the rows wait for the next time
                logger.warning("metrics could not be stored yet: %s", error)

    def keep(self, segment: str, role: str, rollouts: list[Any]) -> None:
        """Takes in what a role wrote for a batch."""
        self._kept.append((role, rollouts))

    def end(
        self, status: str, error: str | None = None, artifacts: Mapping[str, tuple[Path, str]] | None = None
    ) -> None:
        """Writes what waits, and the end; artifacts: kind -> (path, digest)."""
        self._flush(status=status, error=error, artifacts=artifacts)

    def _flush(
        self, *, wait_seconds: float = 30.0, status: str | None = None, error: str | None = None,
        artifacts: Mapping[str, tuple[Path, str]] | None = None,
    ) -> None:  # fmt: skip
        with Store(self.store, wait_seconds=wait_seconds) as opened, opened.transaction() as con:
            self._insert_metrics(con)
            for role, rollouts in self._kept:
                self._insert_rollouts(con, role, rollouts)
            for kind, (path, version) in (artifacts or {}).items():
                con.execute("DELETE FROM artifacts WHERE run_id = ? AND kind = ?", [self.run_id, kind])
                con.execute("INSERT INTO artifacts VALUES (?, ?, ?, ?)", [self.run_id, kind, str(path), version])
            if status:
                con.execute(
                    "UPDATE runs SET status = ?, error = ?, ended_at = now() WHERE run_id = ?",
                    [status, error, self.run_id],
                )
        self._metrics, self._kept, self._flushed_at = [], [], time.monotonic()

    def _insert_metrics(self, con: duckdb.DuckDBPyConnection) -> None:
        # What a killed run wrote after its last checkpoint comes again when it goes on.
        columns: Any = {"phase": "text", "step": "int", "name": "text", "value": "real"}
        with registered(con, "new_rows", columns, self._metrics):
            con.execute(
                "INSERT INTO metrics SELECT ?, phase, step, name, coalesce(value, 'nan'::DOUBLE) FROM new_rows n "
                "WHERE NOT EXISTS (SELECT 1 FROM metrics m WHERE m.run_id = ? AND m.phase = n.phase "
                "AND m.step = n.step AND m.name = n.name)",
                [self.run_id, self.run_id],
            )

    def _insert_rollouts(self, con: duckdb.DuckDBPyConnection, role: str, rollouts: list[Any]) -> None:
        writer = self.writer
        assert writer is not None
        texts = [writer.student.tokenizer.decode(r.completion_ids, skip_special_tokens=True) for r in rollouts]
        phase, step = rollouts[0].meta["phase"], rollouts[0].meta["step"]
        save_rollouts(
            con, f"{role}@{self.run_id}", rollouts, texts, tokenizer=writer.student.tokens,
            model_version=writer.versions.get(role, f"{self.run_id}, {phase}, step {step}"), run_id=self.run_id,
            step=step, sampling={"phase": phase, "temperature": writer.temperature},
        )  # fmt: skip
