"""One file per log format. The table is explicit: nothing registers itself."""

from __future__ import annotations

from importlib import import_module

from workbench.data.importers.base import Importer, Probe

#: Module names, in the order in which they are asked; the highest `detect` wins, the first on a tie.
IMPORTERS = (
    "claude_code", "codex", "gemini_cli", "pi", "chatgpt", "claude_ai", "openai_chat", "sharegpt",
    "swe_agent", "openhands", "atif", "otel", "langsmith", "langfuse", "workbench_log",
)  # fmt: skip


def importer(name: str) -> Importer:
    """The importer module of a format name in IMPORTERS."""
    return import_module(f"workbench.data.importers.{name}")  # type: ignore[return-value]


def detect(probe: Probe) -> str | None:
    """The name of the format that the content looks most like; None where no importer knows it."""
    scores = [(importer(name).detect(probe), name) for name in IMPORTERS]
    best = max(scores, key=lambda pair: pair[0])
    return best[1] if best[0] > 0 else None
