"""Agent logs go in; compact memories, skills and smaller, better models come out.

import workbench
workbench.ingest(["~/.claude/projects"])
workbench.distill()
for hit in workbench.recall("why did the retry test fail", k=5):
    print(hit.core, hit.source.path)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.api import distill, ingest, recall, remember, show, stats
    from workbench.data.store import Store
    from workbench.memory.recall import Hit

__version__ = "0.1.0"
__all__ = ["Hit", "Store", "distill", "ingest", "recall", "remember", "show", "stats"]

_HOMES = {"Store": "workbench.data.store", "Hit": "workbench.memory.recall"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(_HOMES.get(name, "workbench.api")), name)
    raise AttributeError(f"module 'workbench' has no attribute {name!r}")
