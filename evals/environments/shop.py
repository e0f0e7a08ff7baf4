"""Shop: a policy serves a customer with tools over a small database, one call a line.

The prompt says what a customer wants and lists the tools; the policy answers with one call a turn, the shop with a
line that begins with `->`. The episode is over with `done`. It is a success if the database is then exactly as it
should be: what was asked for is done, and nothing else has changed. Context "privileged" adds the worked calls.

Verified by: tests/evals/test_shop.py.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from workbench.policies.tasks import Task

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kira", "Leo")
CITIES = ("Bern", "Cairo", "Delhi", "Lima", "Oslo", "Paris", "Quito", "Rome")
ITEMS = ("lamp", "chair", "desk", "clock", "mug", "rug", "vase", "shelf")
ANSWER_MARK = "->"
TOOLS = """find name=NAME
lookup customer=ID | order=ID | item=ITEM
orders customer=ID
place customer=ID item=ITEM quantity=N
cancel order=ID
change order=ID quantity=N
move customer=ID city=CITY
done"""

#: Tables of rows by id: customers {name, city}, stock (item -> pieces), orders {customer, item, quantity, status}.
Database = dict[str, dict[str, Any]]


class _Refused(Exception):
    """A call that the shop does not carry out; its text is the answer."""


@dataclass(slots=True)
class Visit:
    """An episode: the database now, and as it should be at the end."""

    database: Database
    expected: Database
    is_done: bool = False
    calls: list[str] = field(default_factory=list)


class Shop:
    """The environment; the database is in the task's meta, so that one shop serves all tasks.

    Args: as of policies.tasks.Environment.
    """

    def __init__(self, max_turns: int = 12, max_turn_tokens: int = 48) -> None:
        self.max_turns, self.max_turn_tokens = max_turns, max_turn_tokens

    def reset(self, task: Task) -> Visit:
        """A new episode of the task."""
        return Visit(copy.deepcopy(task.meta["database"]), task.meta["expected"])

    def step(self, state: Visit, said: str) -> tuple[str, bool]:
        """Carries out the first line that is said; what is no call is answered with what is wrong."""
        call = next((line.strip() for line in said.splitlines() if line.strip()), "")
        state.calls.append(call)
        if call == "done":
            state.is_done = True
            return "", True
        try:
            answer = _carry_out(state.database, call)
        except _Refused as refusal:
            answer = f"error: {refusal}"
        return f"\n{ANSWER_MARK} {answer}\n", False

    def reward(self, state: Visit) -> float:
        """1 if the policy said `done` and the database is as it should be."""
        return float(state.is_done and state.database == state.expected)


# --- tools ------------------------------------------------------------------------------------------------------------


def _carry_out(database: Database, call: str) -> str:
    words = call.split()
    if not words or words[0] not in _TOOLS:
        raise _Refused(f"unknown tool, use one of {', '.join([*_TOOLS, 'done'])}")
    names, run = _TOOLS[words[0]]
    given = dict(word.split("=", 1) for word in words[1:] if "=" in word)
    if len(given) != len(words) - 1 or (names and set(given) != set(names)):
        raise _Refused(f"{words[0]} takes {' '.join(f'{name}=…' for name in names) or 'one name=value'}")
    return run(database, given)


def _row(database: Database, table: str, key: str) -> Any:
    if key not in database[table]:
        raise _Refused(f"no {key} in {table}")
    return database[table][key]


def _quantity(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1000):
        raise _Refused(f"quantity={text} is no number from 1 to 999")
    return int(text)


def _take(database: Database, item: str, pieces: int) -> None:
    """Takes pieces out of stock; puts them back if negative."""
    there = _row(database, "stock", item)
    if there < pieces:
        raise _Refused(f"only {there} {item} in stock")
    database["stock"][item] = there - pieces


def _placed(database: Database, key: str) -> dict[str, Any]:
    order = _row(database, "orders", key)
    if order["status"] != "placed":
        raise _Refused(f"order {key} is {order['status']}")
    return order


def _find(database: Database, given: dict[str, str]) -> str:
    found = [key for key, row in database["customers"].items() if row["name"] == given["name"]]
    return " ".join(f"customer={key}" for key in found) or "none"


def _lookup(database: Database, given: dict[str, str]) -> str:
    if len(given) != 1 or (name := next(iter(given))) not in ("customer", "order", "item"):
        raise _Refused("lookup takes one of customer=…, order=…, item=…")
    if name == "item":
        return f"item={given[name]} stock={_row(database, 'stock', given[name])}"
    row = _row(database, f"{name}s", given[name])
    return " ".join([f"{name}={given[name]}", *(f"{key}={value}" for key, value in row.items())])


def _orders(database: Database, given: dict[str, str]) -> str:
    _row(database, "customers", given["customer"])
    found = [key for key, row in database["orders"].items() if row["customer"] == given["customer"]]
    return " ".join(f"order={key}" for key in found) or "none"


def _place(database: Database, given: dict[str, str]) -> str:
    _row(database, "customers", given["customer"])
    pieces = _quantity(given["quantity"])
    _take(database, given["item"], pieces)
    key = str(max(map(int, database["orders"])) + 1)
    row = {"customer": given["customer"], "item": given["item"], "quantity": pieces, "status": "placed"}
    database["orders"][key] = row
    return f"order={key} placed"


def _cancel(database: Database, given: dict[str, str]) -> str:
    order = _placed(database, given["order"])
    _take(database, order["item"], -order["quantity"])
    order["status"] = "cancelled"
    return f"order={given['order']} cancelled"


def _change(database: Database, given: dict[str, str]) -> str:
    order, pieces = _placed(database, given["order"]), _quantity(given["quantity"])
    _take(database, order["item"], pieces - order["quantity"])
    order["quantity"] = pieces
    return f"order={given['order']} quantity={pieces}"


def _move(database: Database, given: dict[str, str]) -> str:
    _row(database, "customers", given["customer"])["city"] = given["city"]
    return f"customer={given['customer']} city={given['city']}"


#: Tool -> (names of its arguments, what it does); `lookup` takes one of several.
_TOOLS: dict[str, tuple[tuple[str, ...], Callable[[Database, dict[str, str]], str]]] = {
    "find": (("name",), _find), "lookup": ((), _lookup), "orders": (("customer",), _orders),
    "place": (("customer", "item", "quantity"), _place), "cancel": (("order",), _cancel),
    "change": (("order", "quantity"), _change), "move": (("customer", "city"), _move),
}  # fmt: skip


# --- tasks ------------------------------------------------------------------------------------------------------------


def make_task(number: int, seed: int = 0) -> Task:
    """The task of that number; solvable by construction: its worked calls are played to find the expected state."""
    rng = random.Random(f"shop/{seed}/{number}")
    database = _make_database(rng)
    request, calls = rng.choice(_REQUESTS)(rng, database)
    visit = Visit(copy.deepcopy(database), {})
    for call in calls:
        if not call.startswith("done"):
            _carry_out(visit.database, call)
    prompt = f"You serve customers of a shop with these tools, one call a line:\n{TOOLS}\n\nRequest: {request}\n"
    worked = "\n".join(calls)
    prompts = {"prompt": prompt, "privileged": f"{prompt}\nWorked calls:\n{worked}\n"}
    meta = {"database": database, "expected": visit.database}
    return Task(f"shop-{seed}-{number}", prompts, worked, meta=meta)


def _make_database(rng: random.Random) -> Database:
    customers = {
        str(key): {"name": name, "city": rng.choice(CITIES)}
        for key, name in zip(rng.sample(range(100, 1000), 6), rng.sample(NAMES, 6), strict=True)
    }
    orders = {}
    for key in sorted(rng.sample(range(1000, 10000), 9)):
        customer, item = rng.choice(list(customers)), rng.choice(ITEMS)
        if any(row["customer"] == customer and row["item"] == item for row in orders.values()):
            continue  # "the order of lamps" must mean one order
        status = rng.choice(("placed", "placed", "shipped"))
        orders[str(key)] = {"customer": customer, "item": item, "quantity": rng.randint(1, 6), "status": status}
    return {"customers": customers, "stock": {item: rng.randint(0, 20) for item in ITEMS}, "orders": orders}


def _search(database: Database, customer: str) -> list[str]:
    """The calls that find a customer's orders."""
    return [f"find name={database['customers'][customer]['name']}", f"orders customer={customer}"]


def _some_order(rng: random.Random, database: Database) -> tuple[str, dict[str, Any], str, list[str]]:
    """(id, order, the customer's name, calls that find it)."""
    key = rng.choice(list(database["orders"]))
    order = database["orders"][key]
    mine = [k for k, row in database["orders"].items() if row["customer"] == order["customer"]]
    looks = [f"lookup order={k}" for k in mine[: mine.index(key) + 1]]
    name = database["customers"][order["customer"]]["name"]
    return key, order, name, [*_search(database, order["customer"]), *looks]


def _ask_cancel(rng: random.Random, database: Database) -> tuple[str, list[str]]:
    key, order, name, calls = _some_order(rng, database)
    if order["status"] == "placed":
        calls.append(f"cancel order={key}")
    return f"{name} wants the {order['item']} order cancelled, unless it is shipped already.", [*calls, "done"]


def _ask_change(rng: random.Random, database: Database) -> tuple[str, list[str]]:
    key, order, name, calls = _some_order(rng, database)
    wanted = order["quantity"] + rng.randint(1, 8)
    enough = database["stock"][order["item"]] >= wanted - order["quantity"]
    if order["status"] == "placed":
        calls.append(f"lookup item={order['item']}")
        calls += [f"change order={key} quantity={wanted}"] if enough else []
    return (
        f"{name} wants {wanted} pieces in the {order['item']} order instead of {order['quantity']}. "
        "If it is shipped already, or the stock is too small, leave it as it is.",
        [*calls, "done"],
    )


def _ask_place(rng: random.Random, database: Database) -> tuple[str, list[str]]:
    customer = rng.choice(list(database["customers"]))
    name, item, wanted = database["customers"][customer]["name"], rng.choice(ITEMS), rng.randint(1, 12)
    calls = [f"find name={name}", f"lookup item={item}"]
    if database["stock"][item] >= wanted:
        calls.append(f"place customer={customer} item={item} quantity={wanted}")
    return f"{name} orders {wanted} pieces of: {item}. If the stock is too small, order nothing.", [*calls, "done"]


def _ask_move(rng: random.Random, database: Database) -> tuple[str, list[str]]:
    customer = rng.choice(list(database["customers"]))
    row = database["customers"][customer]
    city = rng.choice([city for city in CITIES if city != row["city"]])
    return f"{row['name']} has moved to {city}.", [
        f"find name={row['name']}", f"move customer={customer} city={city}", "done",
    ]  # fmt: skip


_REQUESTS = (_ask_cancel, _ask_change, _ask_place, _ask_move)
