"""Configurations and grids: names that tell them apart, the shape of the paper's 107, no wrong combination."""

from __future__ import annotations

from collections import Counter

import pytest

from workbench.errors import InputError
from workbench.evals.recall_grid import GRIDS, Configuration, grid


def test_the_paper_grid_has_107_different_configurations() -> None:
    found = grid("paper-107")
    assert len(found) == len(set(found)) == len({configuration.name for configuration in found}) == 107
    kinds = Counter(
        "vector" if c.mode == "vector" and c.layer != "both"
        else "bm25" if c.mode in ("bm25", "window", "keyword") and c.layer != "both"
        else "hybrid" if c.layer != "both" else "across"
        for c in found
    )  # fmt: skip
    assert kinds == {"bm25": 20, "vector": 20, "hybrid": 7, "across": 60}
    verbatim = [c for c in found if c.layer == "verbatim" and c.mode != "hybrid"]
    assert len(verbatim) == 10, "a verbatim partner for every pure mechanism"


@pytest.mark.parametrize(("name", "count"), [("default", 9), ("fusions", 12), ("tokenizers", 9)])
def test_small_grids(name: str, count: int) -> None:
    found = grid(name)
    assert len(found) == len({c.name for c in found}) == count


def test_names_tell_equal_and_different_configurations_apart() -> None:
    """A name says all that matters to what is found, and nothing else."""
    assert Configuration().name == "both hybrid"
    assert Configuration(layer="verbatim", mode="keyword", embedder="hashed").name == "verbatim keyword"
    full = Configuration(tokenizer="code/1", embedder="lsa:64", fusion="rrf", distiller="head/1")
    assert full.name == "both hybrid [head/1, code/1, lsa:64, rrf]"
    seen: dict[str, Configuration] = {}
    for names in GRIDS:
        for configuration in grid(names):
            assert seen.setdefault(configuration.name, configuration) == configuration


def test_grids_can_be_joined_without_repetition() -> None:
    both = grid("default", "fusions", "default")
    assert len(both) == 9 + 12 - 3
    assert [c.name for c in both[:9]] == [c.name for c in grid("default")]


def test_arms() -> None:
    assert Configuration(layer="verbatim", mode="keyword").arms == ("keyword:verbatim", "window:verbatim")
    assert Configuration(mode="keyword-vector").arms == ("keyword:verbatim", "vector:distilled")
    assert len(Configuration().arms) == 6
    assert Configuration(mode="vector").uses("vector")
    assert not Configuration(mode="vector").uses("keyword")


@pytest.mark.parametrize(
    "wrong",
    [
        {"layer": "upper"}, {"mode": "psychic"}, {"tokenizer": "none"}, {"fusion": "cold"}, {"distiller": "gin"},
        {"embedder": "word2vec"}, {"embedder": "lsa:many"}, {"embedder": "lsa:0"},
        {"embedder": "sentence-transformers/"}, {"layer": "verbatim", "mode": "keyword-vector"},
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(InputError):
        Configuration(**wrong)


def test_an_unknown_grid_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'fusions'"):
        grid("fusion")
