"""Peers of recall, one file each. The table is static: listing peers imports no peer and no library."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

from workbench.errors import InputError

if TYPE_CHECKING:
    from workbench.evals.retriever import Retriever

#: Name -> the module here whose `load(name, folder)` makes it.
PEERS = {
    "rank-bm25": "okapi",
    "rank-bm25-stem": "okapi",
    "bm25s": "lucene",
    "fts5": "fts5",
    "bi-encoder": "bi_encoder",
    "cross-encoder": "cross_encoder",
    "mem0": "mem0_raw",
    "combsum-minilm": "combsum",
    "combsum-minilm-window": "combsum",
}

#: Names with the folder of a model behind a colon (bi-encoder:FOLDER); cross-encoder has no model without one.
NEEDS_FOLDER = ("cross-encoder",)
TAKES_FOLDER = (*NEEDS_FOLDER, "bi-encoder")


def load_peer(name: str) -> Retriever:
    """The peer of that name; its libraries are imported when it builds or is asked for its fingerprint.

    Raises: InputError for an unknown name, and for a model folder that is missing, not there, or not taken.
    """
    peer, colon, folder = name.partition(":")
    if peer not in PEERS:
        near = get_close_matches(peer, PEERS, 1, 0.5)
        raise InputError(
            f"Unknown peer {name!r}{f', did you mean {near[0]!r}?' if near else '.'} There are {', '.join(PEERS)}."
        )
    if colon and peer not in TAKES_FOLDER:
        raise InputError(
            f"The peer {peer!r} takes no model folder: {name!r}. Those that do: {', '.join(TAKES_FOLDER)}."
        )
    if (colon or peer in NEEDS_FOLDER) and not folder:
        raise InputError(f"The peer {name!r} needs the folder of a model behind a colon: {peer}:FOLDER.")
    return import_module(f"workbench.evals.peers.{PEERS[peer]}").load(name, folder)
