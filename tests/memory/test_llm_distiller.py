"""The llm distiller against a real server process: faults, repair, budget, cache, interruption, and no secret sent."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

from workbench.data.redact import PLACEHOLDER
from workbench.errors import EndpointError, InputError
from workbench.llm_client import OpenAIChat
from workbench.memory.checks import violations
from workbench.memory.distillers._llm_record import BadReply, build_prompt, read_reply
from workbench.memory.distillers.llm import DuckDBCache, LlmDistiller
from workbench.memory.types import Distilled, Exchange, Failed, FileTouch

ROOM = {"room_type": "concept", "room_key": "k", "room_label": "K", "relevance": 0.5}


@pytest.fixture
def con() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as connection:
        schema = (Path(__file__).parents[2] / "data" / "schema" / "0001_initial.sql").read_text()
        connection.execute(schema)
        yield connection


def exchange(n: int, text: str = "") -> Exchange:
    return Exchange(
        f"id{n}", text or f"exchange {n} asks about port 80{n:02d}", f"the answer {n} is in src/mod{n}/file.py"
    )


def make(server: Any, *, client: dict[str, Any] | None = None, **options: Any) -> LlmDistiller:
    settings = {"timeout_seconds": 10.0, "max_wait_seconds": 0.5, "max_retries": 2} | (client or {})
    return LlmDistiller(OpenAIChat(server.url, "tiny", **settings), **options)


def run(distiller: LlmDistiller, exchanges: list[Exchange]) -> dict[str, Distilled | Failed]:
    out = [(e.exchange_id, r) for e, r in distiller.distil(exchanges)]
    assert sorted(i for i, _ in out) == sorted(e.exchange_id for e in exchanges), "each exchange exactly once"
    return dict(out)


def good(record: Distilled | Failed) -> Distilled:
    assert isinstance(record, Distilled), record
    return record


def failed(record: Distilled | Failed) -> str:
    assert isinstance(record, Failed), record
    return record.reason


def record(**changes: Any) -> dict[str, Any]:
    answer = {
        "exchange_core": "asks about port 8001",
        "specific_context": "src/mod1/file.py",
        "room_assignments": [ROOM],
    }
    return {"content": json.dumps(answer | changes)}


def test_many_exchanges_all_faults_at_once(server: Any) -> None:
    kinds = ["429:0.05", "500", "reset", "malformed", "truncated", "wrong_schema", "fences", "commas", "invented",
             "no_usage", "hang:0.05", "not_http_json", "refusal", "ok"]  # fmt: skip
    exchanges = [exchange(n) for n in range(42)]
    server.plan([{"match": f"port 80{n:02d}", "faults": [kinds[n % len(kinds)]]} for n in range(42)])
    distiller = make(server, concurrency=6)
    out = run(distiller, exchanges)
    for n, e in enumerate(exchanges):
        kind, result = kinds[n % len(kinds)], out[e.exchange_id]
        if kind in ("not_http_json", "refusal"):
            assert failed(result)
            continue
        assert violations(exchange=e, distilled=good(result)) == []
        assert good(result).context in e.text
        assert good(result).details["attempts"] == (
            2 if kind in ("malformed", "truncated", "wrong_schema", "invented") else 1
        )
        assert good(result).details["tokens_estimated"] == (kind == "no_usage")
    usage = distiller.usage
    assert (usage.num_distilled, usage.num_failed, usage.num_repairs, usage.num_estimated) == (36, 6, 12, 3)
    assert server.counts()["max_open"] <= 6


def test_runs_at_once_but_never_more_than_allowed(server: Any) -> None:
    server.plan([{"match": "", "faults": ["slow:0.2"] * 12}])
    run(make(server, concurrency=4), [exchange(n) for n in range(12)])
    assert server.counts()["max_open"] == 4


def test_yields_as_answers_arrive(server: Any) -> None:
    server.plan([{"match": "port 8000", "faults": ["slow:1"]}])
    order = [e.exchange_id for e, _ in make(server, concurrency=3).distil(exchange(n) for n in range(6))]
    assert order[-1] == "id0"


def test_repair_tells_the_model_what_was_wrong(server: Any) -> None:
    bad = [
        record(specific_context="port 9999"),
        record(exchange_core="fixed handle_upload() in server.py"),
        record(room_assignments=[]),
        record(room_assignments=[ROOM | {"relevance": 7}]),
    ]
    server.plan([{"match": "", "faults": [*bad, record()]}])
    result = good(run(make(server, num_repairs=4), [exchange(1)])["id1"])
    assert result.core == "asks about port 8001"
    assert result.details["attempts"] == 5
    told = [b["messages"][-1]["content"] for b in server.bodies()[1:]]
    expected = ("port 9999", "handle_upload", "room_assignments", "relevance")
    assert [w in t for w, t in zip(expected, told, strict=True)] == [True] * 4
    assert all(len(b["messages"]) == 4 for b in server.bodies()[1:]), "only the last answer is repeated"


def test_gives_up_after_the_repairs(server: Any) -> None:
    server.plan([{"match": "", "faults": ["malformed"] * 9}])
    distiller = make(server, num_repairs=2)
    assert "3 attempts" in failed(run(distiller, [exchange(1)])["id1"])
    assert len(server.bodies()) == 3
    assert distiller.usage.tokens_in == 300


SECRETS = {
    "aws": "AKIA" + "Z7QX4M2LK9TR5WB3",
    "github": "ghp_" + "q8Rt2Lw9Xz4Vb7Nm1Kc6Hd3Jf5Gs0Pa2Ye8u",
    "openai": "sk-" + "proj-Xk29fLqPz81mNvB47cTyRw30sHdJ",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiI0NzExIn0.k3Jf8sLq0PzXc7Vb2Nm9Qw",
    "password": "Gr!ngo-7788-xx",
    "url": "hunter2.hunter2",
    "email": "petra.muster@firma-intern.de",
    "pem": "MIIEpAIBAAKCAQEA7Zk2v9QpXb3mT5rL8wYcHd1sFgJk4NqVxPz6uEa0tRiO",
    "cookie": "s%3Aq7w8e9r0t1y2u3i4o5p6",
    "flag": "zXc4vBn5mAs6",
}
LOG = f"""deploy fails with error 4711
$ env
AWS_ACCESS_KEY_ID={SECRETS["aws"]}
OPENAI_API_KEY={SECRETS["openai"]}
DATABASE_URL=postgres://app:{SECRETS["url"]}@db.internal:5432/prod
{{"user": "petra", "password": "{SECRETS["password"]}", "mail": "{SECRETS["email"]}"}}
$ curl -H 'Authorization: Bearer {SECRETS["jwt"]}' -H 'Cookie: sid={SECRETS["cookie"]}' https://api.dev/v1
$ tool login --token-secret {SECRETS["flag"]}
-----BEGIN {"RSA"} PRIVATE KEY-----
{SECRETS["pem"]}
{SECRETS["pem"][::-1]}
-----END {"RSA"} PRIVATE KEY-----
see src/deploy/run.py:17"""


def secret_exchange(n: int) -> Exchange:
    return Exchange(
        f"s{n}", f"run {n}: {LOG}", f"I set {SECRETS['password']} and {SECRETS['github']}; error {n} is gone",
        title=f"with {SECRETS['github']}", files=(FileTouch(f"/tmp/{SECRETS['openai']}.txt"),),
    )  # fmt: skip


def traces(secret: str) -> list[bytes]:
    """The secret, its pieces, and how JSON or Base64 would write it."""
    pieces = [secret[i : i + 10] for i in range(0, max(1, len(secret) - 9), 5)]
    forms = [secret, json.dumps(secret)[1:-1], base64.b64encode(secret.encode()).decode()]
    return [p.encode() for p in {*pieces, *forms} if not p.startswith(("eyJhbGciOi", "BEGIN"))]


def test_no_secret_leaves_the_process(server: Any, con: duckdb.DuckDBPyConnection) -> None:
    # A model that knew the secrets: what it says of them is not repeated to it, not accepted and not cached.
    leak = record(specific_context=SECRETS["password"], exchange_core=f"used {SECRETS['github']}")
    core = record(specific_context="error 4711", exchange_core=f"used {SECRETS['password']} and {SECRETS['cookie']}")
    server.plan(
        [
            {"match": "run 0", "faults": ["500", leak, "malformed"]},
            {"match": "run 1", "faults": ["429:0.05", record(specific_context="[REDACTED:password]"), "invented"]},
            {"match": "run 2", "faults": ["reset", "wrong_schema", core]},
            {"match": "run 3", "faults": ["truncated", "fences"]},
        ]
    )
    distiller = make(server, cache=DuckDBCache(lambda: con), num_repairs=3)
    out = run(distiller, [secret_exchange(n) for n in range(6)])
    received = server.received()
    assert received.count(b"POST /v1/chat/completions") == len(server.bodies()) == 6 + 3 + 3 + 2 + 1
    results = "".join(good(r).text + json.dumps(good(r).details) + str(good(r).rooms) for r in out.values())
    cached = str(con.execute("SELECT request_hash, response FROM llm_cache").fetchall())
    assert cached.count("exchange_core") == 6
    for secret in SECRETS.values():
        for trace in traces(secret):
            assert trace not in received
            assert trace not in (results + cached).encode()
    assert b"error 4711" in received
    assert b"src/deploy/run.py:17" in received
    assert good(out["s2"]).core == "used (redacted) and (redacted)"
    assert not any(PLACEHOLDER.search(good(r).text) for r in out.values())
    assert distiller.usage.num_redacted >= 6 * 10


def test_a_detail_or_room_with_a_mark_is_refused_and_a_core_loses_it() -> None:
    prompt = build_prompt(secret_exchange(0))
    with pytest.raises(BadReply, match="REDACTED"):
        read_reply(prompt, record(specific_context="AWS_ACCESS_KEY_ID=[REDACTED:aws-key]")["content"])
    room = ROOM | {"room_key": "[REDACTED:aws-key]"}
    fine = {"specific_context": "error 4711", "exchange_core": "deploy fails with [REDACTED:aws-key]"}
    with pytest.raises(BadReply, match="room"):
        read_reply(prompt, record(**fine, room_assignments=[room])["content"])
    assert read_reply(prompt, record(**fine)["content"]).core == "deploy fails with (redacted)"


def test_cache_answers_the_second_run_without_a_request(server: Any, con: duckdb.DuckDBPyConnection) -> None:
    server.plan()
    exchanges = [exchange(n) for n in range(5)]
    first = run(make(server, cache=DuckDBCache(lambda: con)), exchanges)
    assert len(server.bodies()) == 5
    again = make(server, cache=DuckDBCache(lambda: con))
    second = run(again, exchanges)
    assert len(server.bodies()) == 5
    assert {i: (good(r).text, good(r).rooms) for i, r in first.items()} == {
        i: (good(r).text, good(r).rooms) for i, r in second.items()
    }
    assert (again.usage.num_cached, again.usage.tokens_in, again.usage.cost) == (5, 0, None)
    run(make(server, cache=DuckDBCache(lambda: con), client={"temperature": 0.5}), exchanges[:1])
    assert len(server.bodies()) == 6, "other parameters are another request"


def test_bad_answers_are_not_cached_and_spoilt_entries_are_replaced(
    server: Any, con: duckdb.DuckDBPyConnection
) -> None:
    server.plan([{"match": "", "faults": ["malformed"]}])
    assert failed(run(make(server, cache=DuckDBCache(lambda: con), num_repairs=0), [exchange(1)])["id1"])
    assert con.execute("SELECT count(*) FROM llm_cache").fetchone() == (0,)
    good(run(make(server, cache=DuckDBCache(lambda: con)), [exchange(1)])["id1"])
    con.execute("UPDATE llm_cache SET response = '{}'")
    result = good(run(make(server, cache=DuckDBCache(lambda: con)), [exchange(1)])["id1"])
    assert not result.details.get("cached")
    assert con.execute("SELECT count(*), max(length(response)) > 50 FROM llm_cache").fetchone() == (1, True)


def test_equal_exchanges_are_asked_about_once(server: Any) -> None:
    server.plan([{"match": "", "faults": ["slow:0.2"]}])
    same = [Exchange(f"x{n}", "why does port 8001 fail", "see src/a.py") for n in range(3)]
    out = run(make(server), same)
    assert len(server.bodies()) == 1
    assert len({good(r).text for r in out.values()}) == 1


def test_cost_is_counted_and_its_limit_kept(server: Any) -> None:
    server.plan()
    distiller = make(server, price_in=1.0, price_out=10.0, max_cost=0.02, concurrency=3)
    out = run(distiller, [exchange(n) for n in range(60)])
    done = [r for r in out.values() if isinstance(r, Distilled)]
    assert len(server.bodies()) == len(done)
    assert 0 < len(done) < 60
    assert distiller.usage.cost == pytest.approx(len(done) * (100 * 1.0 + 20 * 10.0) / 1e6)
    assert distiller.usage.cost <= 0.02
    assert {r.reason for r in out.values() if isinstance(r, Failed)} == {"budget spent"}
    assert good(done[0]).details["cost"] == pytest.approx(300 / 1e6)


def test_token_limit_counts_repairs(server: Any) -> None:
    server.plan([{"match": "", "faults": ["malformed"] * 50}])
    distiller = make(server, max_tokens=2500, num_repairs=40, concurrency=1)
    out = run(distiller, [exchange(n) for n in range(3)])
    assert all(failed(r).startswith("budget spent") for r in out.values())
    assert 0 < distiller.usage.tokens_in + distiller.usage.tokens_out <= 2500
    assert len(server.bodies()) == distiller.usage.num_requests > 1


def test_dead_endpoint_ends_the_run_and_keeps_what_came(server: Any, con: duckdb.DuckDBPyConnection) -> None:
    server.plan([{"match": "port 8005", "faults": ["401"]}])
    results = make(server, cache=DuckDBCache(lambda: con), concurrency=1).distil(exchange(n) for n in range(20))
    came = [next(results)[0].exchange_id for _ in range(5)]
    with pytest.raises(EndpointError, match="401"):
        next(results)
    assert came == [f"id{n}" for n in range(5)]
    assert con.execute("SELECT count(*) FROM llm_cache").fetchone() == (5,)


def wait_for(server: Any, name: str, at_least: int) -> None:
    end = time.monotonic() + 20
    while server.counts()[name] < at_least:
        assert time.monotonic() < end, f"{name} stays at {server.counts()}"
        time.sleep(0.02)


def test_leaving_the_loop_cancels_what_is_in_flight(server: Any) -> None:
    server.plan([{"match": "port 8000", "faults": []}, {"match": "", "faults": ["ok", *["slow:60"] * 8]}])
    results = make(server, concurrency=4, client={"timeout_seconds": 60.0}).distil(exchange(n) for n in range(9))
    next(results)
    wait_for(server, "open", 3)
    results.close()  # type: ignore[attr-defined]
    wait_for(server, "dropped", 3)
    assert server.counts()["open"] == 0
    assert not [t for t in threading.enumerate() if t.name == "llm-requests"]


def test_interrupt_from_the_keyboard_ends_the_process(server: Any) -> None:
    server.plan([{"match": "", "faults": ["slow:60"] * 8}])
    code = (
        "from workbench.llm_client import OpenAIChat\n"
        "from workbench.memory.distillers.llm import LlmDistiller\n"
        "from workbench.memory.types import Exchange\n"
        f"d = LlmDistiller(OpenAIChat({server.url!r}, 'tiny', timeout_seconds=60), concurrency=4)\n"
        "list(d.distil(Exchange(str(n), f'question {n}', 'answer') for n in range(9)))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    wait_for(server, "open", 4)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)  # the server would answer after a minute
    assert err.strip().splitlines()[-1] == "KeyboardInterrupt"
    assert "never awaited" not in err
    assert "Task was destroyed" not in err
    wait_for(server, "dropped", 4)


def test_nothing_to_do_asks_nothing(server: Any) -> None:
    server.plan()
    assert run(make(server), []) == {}
    assert server.bodies() == []


@pytest.mark.parametrize(
    "options",
    [
        {"concurrency": 0},
        {"num_repairs": -1},
        {"price_in": 1.0},
        {"price_in": -1.0, "price_out": 1.0},
        {"max_cost": 1.0},
    ],
)
def test_options_that_cannot_be_meant_are_refused(server: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        make(server, **options)
