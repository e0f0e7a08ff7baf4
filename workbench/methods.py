"""The catalog of the systems that are built, one row each; `workbench methods` shows it."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A row of the catalog.

    Args:
        seed: number of the method card.
        evidence: what was shown here, and what was not.
        reading: what is our reading rather than the paper's.
    """

    name: str
    seed: int
    title: str
    arxiv: str
    backend: str
    family: str
    signal: str
    access: str
    granularity: str
    degree: str
    needs: str
    evidence: str
    reading: str

    def as_json(self) -> dict[str, object]:
        """All fields by name."""
        return asdict(self)


ENTRIES = (
    Entry(
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
    ),
)
