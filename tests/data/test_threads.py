"""Which messages are on the branch that is shown: trees of all the shapes that logs have."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.data.threads import Node, assign_threads


def user(id: str, parent: str | None = None, agent: str | None = None) -> Node:
    return Node(id, parent, agent, "user", True)


def assistant(id: str, parent: str | None = None, agent: str | None = None) -> Node:
    return Node(id, parent, agent, "assistant", True)


def tool(id: str, parent: str | None = None, agent: str | None = None) -> Node:
    return Node(id, parent, agent, "tool", False)


def test_nothing_and_linear() -> None:
    assert assign_threads([]) == []
    assert assign_threads([], "x") == []
    assert assign_threads([user("a"), assistant("b"), user("c")]) == ["", "", ""]
    assert assign_threads([user("a", None), assistant("b", "a"), tool("c", "b"), assistant("d", "c")]) == [""] * 4


def test_parallel_tool_results_belong_to_the_branch_they_hang_off() -> None:
    nodes = [
        user("u"), assistant("a", "u"),
        tool("r1", "a"), tool("r2", "a"), tool("r3", "a"),
        assistant("b", "r3"),
    ]  # fmt: skip
    assert assign_threads(nodes) == [""] * 6


def test_rewound_branch_with_its_tools() -> None:
    nodes = [
        user("u1"), assistant("a1", "u1"),
        user("u2", "a1"), assistant("a2", "u2"), tool("t2", "a2"),
        user("u3", "a1"), assistant("a3", "u3"),
    ]  # fmt: skip
    assert assign_threads(nodes) == ["", "", "branch:u2", "branch:u2", "branch:u2", "", ""]
    assert assign_threads(nodes, "a2") == ["", "", "", "", "", "branch:u3", "branch:u3"]


def test_branches_of_a_branch_share_its_thread_only_below_it() -> None:
    nodes = [
        user("u1"), assistant("a1", "u1"),
        user("u2", "a1"), assistant("x", "u2"), assistant("y", "u2"),
        user("u3", "a1"),
    ]  # fmt: skip
    assert assign_threads(nodes) == ["", "", "branch:u2", "branch:u2", "branch:u2", ""]


def test_retries_and_revisions() -> None:
    retried = [user("u"), assistant("a1", "u"), assistant("a2", "u")]
    assert assign_threads(retried) == ["", "branch:a1", ""]
    revised = [user("u"), assistant("a", "u"), assistant("a", "u"), assistant("a", "u"), user("v", "a")]
    assert assign_threads(revised) == ["", "revision:1", "revision:2", "", ""]


def test_sub_agents_have_threads_of_their_own() -> None:
    nodes = [
        user("u"), assistant("a", "u"),
        user("p", "a", "one"), assistant("q", "p", "one"), user("p2", "a", "two"),
        tool("r", "a"), assistant("b", "r"),
    ]  # fmt: skip
    assert assign_threads(nodes) == ["", "", "agent:one", "agent:one", "agent:two", "", ""]
    only = [user("p", None, "one"), assistant("q", "p", "one")]
    assert assign_threads(only) == ["agent:one", "agent:one"]


def test_unknown_parents_continue_what_is_before_them() -> None:
    nodes = [user("u"), assistant("a", "gone"), user("v", "gone too"), assistant("b", "v")]
    assert assign_threads(nodes) == [""] * 4
    assert assign_threads([user("u", "u"), assistant("a", "a")]) == ["", ""]


def test_active_leaf_in_the_middle_and_unknown() -> None:
    nodes = [user("u"), assistant("a", "u"), user("v", "a"), assistant("b", "v")]
    assert assign_threads(nodes, "a") == ["", "", "branch:v", "branch:v"]
    assert assign_threads(nodes, "nowhere") == [""] * 4


def test_second_root() -> None:
    nodes = [user("u", ""), assistant("a", "u"), user("v", ""), assistant("b", "v")]
    assert assign_threads(nodes) == ["branch:u", "branch:u", "", ""]


def test_empty_native_ids_are_no_parents() -> None:
    nodes = [user("", None), assistant("a", None), user("b", "a")]
    assert assign_threads(nodes) == ["", "", ""]


def test_cycles_end() -> None:
    cycle = [user("a", "c"), assistant("b", "a"), user("c", "b")]
    assert assign_threads(cycle) == ["", "", ""]
    aside = [user("a", "b"), assistant("b", "a"), user("r", ""), assistant("s", "r")]
    threads = assign_threads(aside)
    assert threads[2:] == ["", ""]
    assert all(t.startswith("branch:") for t in threads[:2])


def test_parents_after_their_children() -> None:
    """As in chat exports whose nodes are a mapping in any order."""
    tree = [
        user("u1", ""), assistant("a1", "u1"), user("u2", "a1"), tool("t2", "u2"), assistant("a2", "t2"),
        user("u3", "a1"), assistant("a3", "u3"),
    ]  # fmt: skip
    expected = dict(zip((n.native_id for n in tree), assign_threads(tree, "a3"), strict=True))
    assert expected["a2"] == expected["t2"] == expected["u2"] == "branch:u2"
    for seed in range(40):
        shuffled = random.Random(seed).sample(tree, len(tree))
        found = dict(zip((n.native_id for n in shuffled), assign_threads(shuffled, "a3"), strict=True))
        assert found == expected, [n.native_id for n in shuffled]


ids = st.sampled_from(["", "a", "b", "c", "d", "e", "f", "g"])
nodes = st.builds(
    Node,
    ids,
    st.none() | ids,
    st.sampled_from([None, None, None, "one", "two"]),
    st.sampled_from(["user", "assistant", "tool"]),
    st.booleans(),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(nodes, max_size=14), st.none() | ids)
def test_every_node_gets_one_thread(nodes: list[Node], leaf: str | None) -> None:
    threads = assign_threads(nodes, leaf)
    assert len(threads) == len(nodes)
    for i, (node, thread) in enumerate(zip(nodes, threads, strict=True)):
        if node.agent_id:
            assert thread == f"agent:{node.agent_id}"
        else:
            later = any(n.native_id == node.native_id and n.agent_id is None for n in nodes[i + 1 :])
            assert (thread == f"revision:{i}") == later
            assert thread == "" or thread.startswith(("branch:", "revision:"))
    main = [i for i, n in enumerate(nodes) if n.agent_id is None]
    if main and leaf is None:
        assert threads[main[-1]] == "", "the last message is on the active branch"
    if leaf is not None and any(n.native_id == leaf and n.agent_id is None for n in nodes):
        newest = max(i for i in main if nodes[i].native_id == leaf)
        assert threads[newest] == "", "the shown leaf is on the active branch"


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 25))
def test_order_of_the_log_does_not_matter_where_the_tree_is_stated(seed: int, size: int) -> None:
    rng = random.Random(seed)
    tree = [Node("0", "", None, "user", True)]
    for i in range(1, size):
        tree.append(Node(str(i), str(rng.randrange(i)), None, rng.choice(["user", "tool"]), rng.random() < 0.6))
    leaf = str(rng.randrange(size))
    expected = dict(zip((n.native_id for n in tree), assign_threads(tree, leaf), strict=True))
    rng.shuffle(tree)
    assert dict(zip((n.native_id for n in tree), assign_threads(tree, leaf), strict=True)) == expected
