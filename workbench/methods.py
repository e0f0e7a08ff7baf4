"""Every published system that is built here, one row each: the distillation methods, and what memory brings."""

from __future__ import annotations

from workbench.policies import catalog
from workbench.policies.catalog import Entry

MEMORY = Entry(
    name="structured-distillation-memory",
    seed=1,
    title="Structured Distillation for Personalized Agent Memory: 11x Token Reduction with Retrieval Preservation",
    arxiv="2603.13017",
    backend="memory",
    family="agent memory",
    signal="text",
    access="none (extractive) or text (llm)",
    granularity="exchange",
    degree="off-policy",
    needs="nothing (extractive); an OpenAI-compatible endpoint (llm)",
    evidence="see benchmarks/results/recall_quality.md",
    reading="the released code was read, the paper only in part: the ten search modes are inferred from names",
)


def entries() -> list[Entry]:
    """All rows, in the order of the cards."""
    return catalog.in_order([MEMORY, *catalog.entries()])
