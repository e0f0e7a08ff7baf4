"""Which messages of a conversation are on the branch that is shown, and which were abandoned.

Logs are trees: a person rewinds and asks again, a program retries a failed request, parallel tool calls each hang
their result on another block. Only the first two are branches. The rule: the active branch is the path from the
leaf to the root; what hangs off it belongs to it as long as it holds no fresh words (tool results of parallel
calls, thinking), and is a branch of its own from the first message that does.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Node:
    """A message as far as branching goes: `speaks` is True for words of a user or an assistant."""

    native_id: str
    parent_id: str | None
    agent_id: str | None
    role: str
    speaks: bool


def assign_threads(nodes: list[Node], active_leaf: str | None = None) -> list[str]:
    """The thread of each node, in order: '' active, 'agent:<id>', 'branch:<native_id of its first message>',
    'revision:<n>' for an earlier version of a message that came again with other content.

    Args: nodes in the order of the log; active_leaf: native_id of the shown leaf, None = the last message of the main
        thread.
    """
    threads = [""] * len(nodes)
    newest: dict[str, int] = {}
    for i, node in enumerate(nodes):
        if node.agent_id is not None:
            threads[i] = f"agent:{node.agent_id}"
        elif (earlier := newest.get(node.native_id)) is not None:
            threads[earlier] = f"revision:{earlier}"
        if node.agent_id is None:
            newest[node.native_id] = i
    main = [i for i, thread in enumerate(threads) if not thread]
    parents = _parents(nodes, main, newest)
    shown = newest.get(active_leaf) if active_leaf is not None else None
    active = _path(main[-1] if shown is None and main else shown, parents)
    resolved = set(active)
    for i in main:
        # Up to a node whose thread is known (a parent may stand behind its children), then down again.
        way: list[int] = []
        at: int | None = i
        while at is not None and at not in resolved:
            resolved.add(at)  # ends the walk in a cycle of a broken log, too
            way.append(at)
            at = parents[at]
        for j in reversed(way):
            parent = parents[j]
            inherited = threads[parent] if parent is not None else ""
            if inherited:
                threads[j] = inherited
            elif nodes[j].speaks:
                threads[j] = f"branch:{nodes[j].native_id}"
    return threads


def _parents(nodes: list[Node], main: list[int], newest: dict[str, int]) -> dict[int, int | None]:
    """Index of each main-thread node's parent; without a stated one, the main-thread node before it."""
    parents: dict[int, int | None] = {}
    before: int | None = None
    for i in main:
        parent_id = nodes[i].parent_id
        stated = newest.get(parent_id) if parent_id is not None else None
        is_root = parent_id == ""
        parents[i] = None if is_root else stated if stated is not None and stated != i else before
        before = i
    return parents


def _path(leaf: int | None, parents: dict[int, int | None]) -> set[int]:
    path: set[int] = set()
    node = leaf
    while node is not None and node not in path:  # a cycle in a broken log ends the walk
        path.add(node)
        node = parents.get(node)
    return path
