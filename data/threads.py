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
    active = _path(newest.get(active_leaf or "", main[-1] if main else -1), parents)
    for i in main:  # a parent stands before its children or is resolved already: one pass in log order suffices
        if i in active:
            continue
        parent = parents[i]
        inherited = threads[parent] if parent is not None and parent not in active else ""
        if inherited:
            threads[i] = inherited
        elif nodes[i].speaks:
            threads[i] = f"branch:{nodes[i].native_id}"
    return threads


def _parents(nodes: list[Node], main: list[int], newest: dict[str, int]) -> dict[int, int | None]:
    """Index of each main-thread node's parent; without a stated one, the main-thread node before it."""
    parents: dict[int, int | None] = {}
    before: int | None = None
    for i in main:
        stated = newest.get(nodes[i].parent_id or "")
        is_root = nodes[i].parent_id == ""
        parents[i] = None if is_root else stated if stated is not None and stated != i else before
        before = i
    return parents


def _path(leaf: int, parents: dict[int, int | None]) -> set[int]:
    path: set[int] = set()
    node: int | None = leaf
    while node is not None and node >= 0 and node not in path:  # a cycle in a broken log ends the walk
        path.add(node)
        node = parents.get(node)
    return path
