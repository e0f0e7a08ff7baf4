"""One file per log format. The table is explicit: nothing registers itself."""

from __future__ import annotations

from functools import cache
from importlib import import_module, resources

from workbench.data.importers.base import Importer, Probe
from workbench.data.records import digest
from workbench.errors import InputError

#: Of `detect`: those that come after need not be asked, which costs as much as reading a small log.
CERTAIN = 96
#: Module names, in the order in which they are asked; the first that is CERTAIN wins, else the highest `detect`.
IMPORTERS = (
    "claude_code", "codex", "gemini_cli", "pi", "chatgpt", "claude_ai", "openai_chat", "sharegpt",
    "swe_agent", "openhands", "atif", "otel", "langsmith", "langfuse", "workbench_log",
)  # fmt: skip


def importer(name: str) -> Importer:
    """The importer module of a format name. Raises: InputError for a name that is not in IMPORTERS."""
    if name not in IMPORTERS:
        raise InputError(f"No format is called {name!r}. Known: {', '.join(IMPORTERS)}.")
    return import_module(f"workbench.data.importers.{name}")  # type: ignore[return-value]


def detect(probe: Probe) -> str | None:
    """The name of the format that the content looks most like; None where no importer knows it."""
    best_score, best = 0, None
    for name in IMPORTERS:
        score = importer(name).detect(probe)
        if score > best_score:
            best_score, best = score, name
        if score >= CERTAIN:
            break
    return best


@cache
def fingerprint() -> str:
    """Of the importers' code: what other ones took for no log is worth another look."""
    files = sorted(resources.files(__name__).iterdir(), key=lambda file: file.name)
    return digest(*[file.read_bytes() for file in files if file.name.endswith(".py")])
