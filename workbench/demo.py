"""The main job on the shipped sample logs: ingest, distil, recall, and what to try next."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

QUESTIONS = (
    "why was the ETA test flaky",
    "what did we decide about the carrier rate limit",
    "timezone bug in delivery dates",
)


def samples() -> Path:
    """The folder of sample logs, a few per format, that the project made."""
    return Path(str(resources.files("workbench.data") / "samples"))


def run(store: Path) -> dict[str, Any]:
    """Ingests the samples twice (the second time adds nothing), distils, asks QUESTIONS; returns what happened."""
    from workbench import api

    first = api.ingest([samples()], store)
    again = api.ingest([samples()], store)
    distilled = api.distill(store)
    answers = [{"query": q, "hits": [hit.as_json() for hit in api.recall(q, store, k=3)]} for q in QUESTIONS]
    return {
        "store": str(store),
        "ingest": first.as_json(),
        "ingest_again": again.as_json(),
        "distill": distilled.as_json(),
        "answers": answers,
        "stats": api.stats(store),
    }
