"""Configurations of our own recall and named grids of them: layer x mode x tokenizer x embedder x fusion x distiller.

Paper: Structured Distillation for Personalized Agent Memory, arXiv 2603.13017, seed id 1 (card 001).
Deviations: the paper's list of 107 configurations is not published; "paper-107" is our reading, see `paper_107`.
Verified by: tests/evals/test_recall_grid.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product

from workbench.errors import InputError
from workbench.memory.recall import FUSIONS, LAYERS
from workbench.memory.tokenizers import TOKENIZERS

#: Mode -> the arms of each layer that it looks at. The first three are the product's modes; bm25 and window are the
#: two halves of keyword.
_PURE: dict[str, tuple[str, ...]] = {
    "keyword": ("keyword", "window"),
    "vector": ("vector",),
    "hybrid": ("keyword", "window", "vector"),
    "bm25": ("keyword",),
    "window": ("window",),
}
#: Modes of the layer "both" that search each layer in another way (the first is the paper's best).
_MIXED: dict[str, tuple[str, ...]] = {
    "keyword-vector": ("keyword:verbatim", "vector:distilled"),
    "vector-keyword": ("vector:verbatim", "keyword:distilled"),
}
MODES = (*_PURE, *_MIXED)
DISTILLERS = ("extractive/1", "head/1", "span/1")
#: lsa and hashed take a number of dimensions ("lsa:64"); without one it is the product's.
EMBEDDERS = ("lsa", "hashed", "sentence-transformers/MODEL")


@dataclass(frozen=True, kw_only=True, slots=True)
class Configuration:
    """One way to recall.

    Args:
        layer: verbatim, distilled or both.
        mode: one of MODES.
        tokenizer: of the lexical index; a name in memory.tokenizers.
        embedder: one of EMBEDDERS.
        fusion: combsum, rrf, combmnz or card, each with the product's default weights.
        distiller: one of DISTILLERS; head/1 and span/1 are the card's baselines (38 tokens each).
    Raises: InputError for a name that does not exist or does not go with the layer.
    """

    layer: str = "both"
    mode: str = "hybrid"
    tokenizer: str = "stem/1"
    embedder: str = "lsa"
    fusion: str = "combsum"
    distiller: str = "extractive/1"

    def __post_init__(self) -> None:
        for name, known in (
            ("layer", LAYERS), ("mode", MODES), ("tokenizer", tuple(TOKENIZERS)), ("fusion", FUSIONS),
            ("distiller", DISTILLERS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}.")
        if self.mode in _MIXED and self.layer != "both":
            raise InputError(f"The mode {self.mode} searches both layers; the layer must be both, not {self.layer}.")
        kind, _, dim = self.embedder.partition(":")
        is_library = kind.startswith("sentence-transformers/") and len(kind) > len("sentence-transformers/")
        if not is_library and (kind not in ("lsa", "hashed") or (dim and not dim.isdigit()) or dim == "0"):
            raise InputError(f"embedder must be one of {', '.join(EMBEDDERS)}, not {self.embedder!r}.")

    @property
    def name(self) -> str:
        """Layer and mode, then what differs from the product's defaults and matters here: "both hybrid [rrf]"."""
        changed = [
            value
            for value, default, matters in (
                (self.distiller, "extractive/1", self.layer != "verbatim"),
                (self.tokenizer, "stem/1", self.uses("keyword") or self.uses("window")),
                (self.embedder, "lsa", self.uses("vector")),
                (self.fusion, "combsum", len(self.arms) > 1),
            )
            if matters and value != default
        ]
        return f"{self.layer} {self.mode}" + (f" [{', '.join(changed)}]" if changed else "")

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms as recall names them: mechanism:layer."""
        if self.mode in _MIXED:
            return _MIXED[self.mode]
        layers = ("verbatim", "distilled") if self.layer == "both" else (self.layer,)
        return tuple(f"{arm}:{layer}" for layer in layers for arm in _PURE[self.mode])

    def uses(self, mechanism: str) -> bool:
        """Whether any arm is of this mechanism: keyword, window or vector."""
        return any(arm.startswith(f"{mechanism}:") for arm in self.arms)


def default() -> list[Configuration]:
    """Layer x mode at the product's defaults: 9."""
    return [Configuration(layer=layer, mode=mode) for layer in LAYERS for mode in ("keyword", "vector", "hybrid")]


def fusions() -> list[Configuration]:
    """Every fusion in the hybrid mode of every layer: 12."""
    return [Configuration(layer=layer, fusion=fusion) for layer in LAYERS for fusion in FUSIONS]


def tokenizers() -> list[Configuration]:
    """Every tokenizer in the keyword mode of every layer: 9."""
    return [Configuration(layer=layer, mode="keyword", tokenizer=name) for layer in LAYERS for name in TOKENIZERS]


def paper_107() -> list[Configuration]:
    """107 configurations in the paper's shape: 20 BM25, 20 vector, 7 hybrids within a layer, 60 across layers.

    Our reading. What is known: 107 in all; 20 BM25 and 20 vector ones that were compared verbatim against distilled;
    five modes within a layer and five across; weights, fusions and encoders were varied; truncation and a random span
    of 38 tokens are baselines. The list itself and the paper's HNSW, MiniLM and Haiku are not here. So:
        BM25    4 texts (verbatim, extractive, first 38 tokens, random 38 tokens) x 5 variants (three tokenizers;
                window; BM25 + window)
        vector  the same 4 texts x 5 embedders (LSA of 256, 128 and 64 dimensions; hashed words of 256 and 64)
        hybrid  the 4 texts at the default fusion, verbatim at the other three
        across  5 modes (keyword, vector, hybrid, keyword-vector, vector-keyword) x 3 distillers x 4 fusions
    """
    texts = [("verbatim", "extractive/1"), *(("distilled", distiller) for distiller in DISTILLERS)]
    bm25 = [("bm25", name) for name in TOKENIZERS] + [("window", "stem/1"), ("keyword", "stem/1")]
    embedders = ("lsa", "lsa:128", "lsa:64", "hashed", "hashed:64")
    across = ("keyword", "vector", "hybrid", "keyword-vector", "vector-keyword")
    return [
        *(
            Configuration(layer=layer, distiller=distiller, mode=mode, tokenizer=tokenizer)
            for (layer, distiller), (mode, tokenizer) in product(texts, bm25)
        ),
        *(
            Configuration(layer=layer, distiller=distiller, mode="vector", embedder=embedder)
            for (layer, distiller), embedder in product(texts, embedders)
        ),
        *(Configuration(layer=layer, distiller=distiller) for layer, distiller in texts),
        *(Configuration(layer="verbatim", fusion=fusion) for fusion in FUSIONS if fusion != "combsum"),
        *(
            Configuration(mode=mode, distiller=distiller, fusion=fusion)
            for mode, distiller, fusion in product(across, DISTILLERS, FUSIONS)
        ),
    ]


#: Name -> (what it holds, how it is made).
GRIDS: dict[str, tuple[str, Callable[[], list[Configuration]]]] = {
    "default": ("layer x mode at the product's defaults", default),
    "fusions": ("every fusion, hybrid mode", fusions),
    "tokenizers": ("every tokenizer, keyword mode", tokenizers),
    "paper-107": ("107 configurations in the shape of the paper's (our reading)", paper_107),
}


def grid(*names: str) -> list[Configuration]:
    """The configurations of these grids, each once, in order; raises InputError for an unknown name."""
    found: dict[str, Configuration] = {}
    for name in names:
        if name not in GRIDS:
            near = get_close_matches(name, GRIDS, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(f"Unknown grid {name!r}; {hint}There are {', '.join(GRIDS)}.")
        found |= {configuration.name: configuration for configuration in GRIDS[name][1]()}
    return list(found.values())
