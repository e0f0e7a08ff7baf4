"""Supervised training: the student learns from labels alone. A baseline, and what makes teachers and starts.

Paper: none.
Equation: L = -ln softmax(z)_y, the mean over images.
Deviations: none.
Verified by: tests/workbench/test_train_loop.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from workbench.policies.catalog import Entry
from workbench.policies.nouns import Phase, Stored
from workbench.policies.vision.terms import TABLE, Labels


@dataclass(frozen=True, kw_only=True, slots=True)
class Supervised:
    """It has no settings of its own."""

    def phases(self) -> list[Phase]:
        """One phase; nobody but the student."""
        return [Phase(name="train", sources={"main": Stored(TABLE)}, terms=[Labels()])]


METHOD = Supervised
ENTRY = Entry(
    name="supervised",
    seed=None,
    title="Cross-entropy with the labels",
    arxiv="none",
    backend="vision",
    family="vision-baseline",
    signal="labels",
    access="none",
    granularity="image",
    degree="off-policy",
    needs="images with labels; no teacher: it makes the teachers and the baselines of the other methods, and is no "
    "distillation system",
    evidence="a network trained on the digits' labels classifies unseen ones",
    reading="none",
)
