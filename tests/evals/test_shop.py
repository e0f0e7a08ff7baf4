"""The shop: worked calls lead to the expected state, and nothing else does."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.evals.environments.shop import CITIES, ITEMS, NAMES, TOOLS, Shop, make_task
from workbench.policies.tasks import Task

TASKS = [make_task(number) for number in range(120)]


def play(task: Task, calls: list[str]) -> tuple[float, list[str], Any]:
    """(reward, answers, state)"""
    shop = Shop()
    state = shop.reset(task)
    answers = [shop.step(state, call)[0].strip() for call in calls]
    return shop.reward(state), answers, state


def test_worked_calls_succeed_and_are_answered_without_error() -> None:
    for task in TASKS:
        calls = task.answer.splitlines()
        reward, answers, _ = play(task, calls)
        assert reward == 1.0, task.id
        assert not any("error" in answer for answer in answers)
        assert len(calls) <= Shop().max_turns
        assert all(len(call) <= 48 for call in calls)


def test_doing_nothing_succeeds_only_where_nothing_is_to_be_done() -> None:
    idle = [task.meta["database"] == task.meta["expected"] for task in TASKS]
    assert [play(task, ["done"])[0] for task in TASKS] == [float(is_idle) for is_idle in idle]
    assert 0.1 < sum(idle) / len(idle) < 0.5  # such tasks exist, and do not dominate


def test_without_done_there_is_no_success() -> None:
    for task in TASKS:
        calls = task.answer.splitlines()
        assert calls.pop() == "done"
        assert play(task, calls)[0] == 0.0


def test_any_further_change_is_a_failure() -> None:
    for task in TASKS:
        *calls, done = task.answer.splitlines()
        expected = task.meta["expected"]
        customer, row = next(iter(expected["customers"].items()))
        city = next(city for city in CITIES if city != row["city"])
        item = next(item for item, pieces in expected["stock"].items() if pieces)
        assert play(task, [*calls, f"move customer={customer} city={city}", done])[0] == 0.0
        assert play(task, [*calls, f"place customer={customer} item={item} quantity=1", done])[0] == 0.0
        assert play(task, [*calls, f"lookup item={item}", done])[0] == 1.0  # to look changes nothing


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ("buy item=lamp", "unknown tool"),
        ("", "unknown tool"),
        ("find", "find takes name=…"),
        ("find name=Ada name=Ben", "find takes name=…"),
        ("lookup", "lookup takes one of"),
        ("lookup item=spoon", "no spoon in stock"),
        ("cancel order=1", "no 1 in orders"),
        ("cancel order", "cancel takes order=…"),
        ("place customer=1 item=lamp quantity=1", "no 1 in customers"),
        ("move customer=1 city=Rome", "no 1 in customers"),
    ],
)
def test_a_wrong_call_is_answered_with_what_is_wrong_and_changes_nothing(call: str, answer: str) -> None:
    task = TASKS[0]
    _, answers, state = play(task, [call])
    assert answers[0].startswith(f"-> error: {answer}")
    assert state.database == task.meta["database"]


@pytest.mark.parametrize("quantity", ["0", "-3", "1.5", "1000", "many", "²", ""])
def test_a_quantity_is_a_number_of_pieces(quantity: str) -> None:
    customer = next(iter(TASKS[0].meta["database"]["customers"]))
    _, answers, state = play(TASKS[0], [f"place customer={customer} item=lamp quantity={quantity}"])
    assert "is no number from 1 to 999" in answers[0]
    assert state.database == TASKS[0].meta["database"]


def test_only_the_first_line_of_a_turn_counts() -> None:
    task = TASKS[0]
    _, answers, state = play(task, ["\n  lookup item=lamp\ndone\ncancel order=1"])
    assert answers == [f"-> item=lamp stock={task.meta['database']['stock']['lamp']}"]
    assert not state.is_done


IDS = st.sampled_from(
    [key for task in TASKS[:5] for table in ("customers", "orders") for key in task.meta["database"][table]]
)
CALLS = st.one_of(
    st.builds("cancel order={}".format, IDS),
    st.builds("change order={} quantity={}".format, IDS, st.integers(-1, 30)),
    st.builds("place customer={} item={} quantity={}".format, IDS, st.sampled_from(ITEMS), st.integers(0, 30)),
    st.builds("move customer={} city={}".format, IDS, st.sampled_from(CITIES)),
    st.builds("find name={}".format, st.sampled_from(NAMES)),
    st.builds("lookup {}={}".format, st.sampled_from(["order", "customer", "item", "x"]), IDS),
    st.text(max_size=20).filter(lambda text: "done" not in text),
)


def pieces(database: dict[str, Any]) -> dict[str, int]:
    """In stock and in orders that are not cancelled, by item."""
    orders = [row for row in database["orders"].values() if row["status"] != "cancelled"]
    return {i: n + sum(o["quantity"] for o in orders if o["item"] == i) for i, n in database["stock"].items()}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.sampled_from(TASKS[:5]), st.lists(CALLS, max_size=25))
def test_no_call_raises_or_makes_or_loses_pieces(task: Task, calls: list[str]) -> None:
    before = copy.deepcopy(task.meta)
    _, _, state = play(task, calls)
    assert task.meta == before  # an episode works on a copy
    assert min(state.database["stock"].values()) >= 0
    assert pieces(state.database) == pieces(task.meta["database"])
    shipped = {k: row for k, row in before["database"]["orders"].items() if row["status"] == "shipped"}
    assert {k: state.database["orders"][k] for k in shipped} == shipped


def test_a_task_survives_json_and_its_number_decides_it() -> None:
    for number, task in enumerate(TASKS[:20]):
        meta = json.loads(json.dumps(task.meta))
        again = Task(task.id, task.prompts, task.answer, meta=meta)
        assert play(again, task.answer.splitlines())[0] == 1.0
        assert make_task(number) == task
        assert make_task(number, seed=1).meta != task.meta
        assert TOOLS in task.prompts["prompt"]
        assert task.answer in task.prompts["privileged"]
        assert task.answer not in task.prompts["prompt"]
