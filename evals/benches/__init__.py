"""One file per bench. The table is static: listing benches imports none and reads no data."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

from workbench.errors import InputError

if TYPE_CHECKING:
    from workbench.evals.benches.base import Bench

#: Name (of the bench and of its module here) -> what it asks. A module has `load(split) -> list[Task]`, GRADER,
#: MAX_TOKENS, and `verify` or `make_environment`.
BENCHES = {
    "gsm8k": "word problems of grade school, a number (7,473 train, 1,319 test)",
    "math500": "competition mathematics, an expression (500; half of them train)",
    "svamp": "word problems with one operation and a distraction, a number (1,000; half of them train)",
    "bbh": "27 tasks of BIG-Bench Hard, a choice, word or number (6,511; half of them train)",
    "countdown": "make a number of given numbers (generated)",
    "reasoning_gym": "16 generators of reasoning-gym (generated; extra evals)",
    "rooms": "walk to a room on a map that only experience tells (generated, many turns)",
    "shop": "serve customers with tools over a small database (generated, many turns)",
}


def load_bench(name: str, split: str = "test") -> Bench:
    """The bench of that name; split train, test or all.

    Raises: InputError for an unknown name or split, and for missing data; MissingExtra.
    """
    from workbench.evals.benches.base import SPLITS, Bench

    if name not in BENCHES:
        near = get_close_matches(name, BENCHES, 1)
        raise InputError(
            f"Unknown bench {name!r}{f', did you mean {near[0]!r}?' if near else '.'} There are {', '.join(BENCHES)}."
        )
    if split not in (*SPLITS, "all"):
        raise InputError(f"The split is train, test or all, not {split!r}.")
    module = import_module(f"workbench.evals.benches.{name}")
    tasks = [task for part in (SPLITS if split == "all" else (split,)) for task in module.load(part)]
    return Bench(
        name, split, tasks, module.GRADER, module.MAX_TOKENS, getattr(module, "verify", None),
        getattr(module, "make_environment", None),
    )  # fmt: skip
