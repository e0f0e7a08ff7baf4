"""The task that a person's own store makes: its kinds, its leak filter, its documents, and the model's questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workbench import api
from workbench.data.store import Store
from workbench.errors import InputError
from workbench.evals.asking import Budget
from workbench.evals.generated_questions import QuestionWriter
from workbench.evals.metrics import evaluate
from workbench.evals.tasks import task_file
from workbench.evals.tasks.base import RecallTask, judgements, oracle_run, random_run
from workbench.evals.tasks.own_logs import MASK, build
from workbench.memory.distillers.llm import DuckDBCache

FIXED = "the sums of the basket are off by a cent"
REFERENCE = "do in the invoice as in cart/rounding.py back then"


def call(name: str, call_id: str, **arguments: str) -> dict[str, Any]:
    return {"kind": "tool_call", "name": name, "call_id": call_id, "data": arguments}


def result(text: str, call_id: str) -> dict[str, Any]:
    return {"kind": "tool_result", "call_id": call_id, "text": text, "is_error": True}


def edit(path: str) -> dict[str, Any]:
    return call("Edit", path, file_path=f"/w/shop/{path}", old_string="a", new_string="b")


def session(path: Path, name: str, day: int, *turns: tuple[str, str, list[dict[str, Any]]]) -> None:
    """A session in the workbench's own format: user, assistant and tool parts of each turn."""
    rows: list[dict[str, Any]] = [
        {
            "workbench": 1,
            "type": "conversation",
            "session_id": name,
            "project": "/w/shop",
            "title": f"About {name} in the shop",
        }
    ]
    for n, (user, assistant, parts) in enumerate(turns):
        common = {
            "workbench": 1,
            "type": "message",
            "session_id": name,
            "created_at": f"2026-01-{day:02}T10:{n:02}:00Z",
        }
        rows.append(common | {"role": "user", "native_id": f"{name}u{n}", "parts": [{"kind": "text", "text": user}]})
        answer = [*parts, {"kind": "text", "text": assistant}]
        rows.append(common | {"role": "assistant", "native_id": f"{name}a{n}", "parts": answer})
    (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with one commit, one error, one back-reference, and one copied query of each of the first two."""
    logs = tmp_path / "logs"
    logs.mkdir()
    broken = [call("Bash", "1", command="make"), result("a.py:7:1: undefined: roundTotal (typecheck)", "1")]
    commit = [call("Bash", "2", command="git commit -m 'Round cart totals before tax'")]
    session(
        logs, "s", 1,
        (FIXED, "Rounding now happens earlier.", [*broken, edit("cart/rounding.py")]),
        ("save that please, with a good message", "It is saved in the history.", commit),
        ("what is the weather like in the hills?", "I cannot see the hills from here, sorry.", []),
    )  # fmt: skip
    copied_error = [call("Bash", "3", command="make"), result("panic: negative totals in the cart", "3")]
    copied_commit = [call("Bash", "4", command="git commit -m 'Reject carts with negative totals'")]
    session(
        logs, "t", 2,
        (REFERENCE, "The invoice rounds as the cart does.", [edit("invoice.py")]),
        (
            "it says x.go:12: panic: negative totals in the cart !",
            "Done. Committed as: reject carts with negative totals.", [*copied_error, edit("fees.py"), *copied_commit],
        ),
    )  # fmt: skip
    api.ingest([logs], tmp_path / "s.duckdb")
    return tmp_path / "s.duckdb"


def made(path: Path, **options: Any) -> RecallTask:
    with Store(path, read_only=True) as store:
        return build(store.con, **options)


def asked(task: RecallTask) -> dict[str, tuple[str, list[str]]]:
    texts = {document.id: document.user for document in task.documents}
    return {q.text: (q.category, sorted(texts[doc] for doc in q.relevance)) for q in task.queries}


def test_each_kind_finds_its_query_and_its_answers(path: Path) -> None:
    task = made(path)
    assert asked(task) == {
        "Round cart totals before tax": ("commit", [FIXED]),
        "undefined: roundTotal (typecheck)": ("error", [FIXED]),
        REFERENCE: ("reference", [FIXED]),
    }
    assert REFERENCE not in {document.user for document in task.documents}  # it would find itself
    assert len(task.documents) == 4
    assert task.notes == {
        "commit_copied": 1, "documents_left_out_as_query": 1, "error_copied": 1, "queries_commit": 1,
        "queries_error": 1, "queries_reference": 1, "reference_to_nothing_earlier": 1,
    }  # fmt: skip
    assert {query.cluster for query in task.queries} == {min(q.cluster for q in task.queries)}
    assert [(d.time, d.previous is None) for d in task.documents if d.user == FIXED] == [("2026-01-01T10:00:00", True)]


def test_no_query_stands_in_a_document_and_masking_keeps_the_copied_ones(path: Path) -> None:
    for task in (made(path), made(path, mask_copied=True)):
        for query in task.queries:
            words = " ".join(query.text.lower().split())
            assert not any(words in " ".join(document.text.lower().split()) for document in task.documents)
    task = made(path, mask_copied=True)
    assert {q.text for q in task.queries} - {q.text for q in made(path).queries} == {
        "Reject carts with negative totals", "panic: negative totals in the cart",
    }  # fmt: skip
    masked = next(document for document in task.documents if MASK in document.text)
    assert masked.user == f"it says x.go:12: {MASK} !"
    assert masked.assistant == f"Done. Committed as: {MASK}."
    assert (task.notes["commit_masked"], task.notes["error_masked"]) == (1, 1)


def test_the_scores_of_chance_and_of_knowing_the_answers(path: Path) -> None:
    """Silent failure P2: the checks with known scores hold for a task that was built."""
    task = made(path)
    best = evaluate(oracle_run(task.queries), judgements(task.queries), ["mrr", "ndcg@10"]).means()
    assert best == {"mrr": 1.0, "ndcg@10": 1.0}
    runs = [evaluate(random_run(task, task.queries, s), judgements(task.queries), ["recall@1"]) for s in range(300)]
    chance = sum(run.means()["recall@1"] for run in runs) / len(runs)
    assert chance == pytest.approx(1 / 4, abs=0.06)  # standard deviation 0.015


def test_the_same_store_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    for name in "ab":
        task_file.save(made(path), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert task_file.load(tmp_path / "a") == made(path)


def test_kinds_limits_and_seeds(path: Path) -> None:
    assert {q.category for q in made(path, kinds=["title", "commit"]).queries} == {"title", "commit"}
    both = made(path, kinds=["error"], mask_copied=True)
    assert len(both.queries) == 2
    few = [made(path, kinds=["error"], mask_copied=True, max_per_kind=1, seed=seed) for seed in range(8)]
    assert {len(task.queries) for task in few} == {1}
    assert {task.queries[0].text for task in few} == {query.text for query in both.queries}
    assert few[0].notes["error_beyond_the_limit"] == 1


def test_exchanges_with_the_same_text_answer_together(path: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    session(again, "resumed", 3, (FIXED, "Rounding now happens earlier.", []))
    api.ingest([again], path)
    [query] = [query for query in made(path).queries if query.category == "commit"]
    assert len(query.relevance) == 2


def test_mistakes_are_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no kind of query 'comit'; there are commit, error"):
        made(path, kinds=["comit"])
    with pytest.raises(InputError, match="question are written by a model"):
        made(path, kinds=["question"])
    with Store(tmp_path / "empty.duckdb") as store, pytest.raises(InputError, match="holds no exchange"):
        build(store.con)
    plain = tmp_path / "plain"
    plain.mkdir()
    session(plain, "s", 1, ("what is the weather like in the hills?", "I cannot see the hills from here.", []))
    api.ingest([plain], tmp_path / "plain.duckdb")
    with pytest.raises(InputError, match=r"1 exchanges hold no query of the kinds commit, error, reference"):
        made(tmp_path / "plain.duckdb")


# --- questions of a model


def question(text: str, answer: str) -> dict[str, str]:
    return {"content": json.dumps({"question": text, "answer": answer})}


def written(path: Path, server: Any, progress: Any = None, **budget: int) -> tuple[RecallTask, QuestionWriter]:
    from workbench.llm_client import OpenAIChat

    client = OpenAIChat(server.url, "m", max_retries=0, max_output_tokens=100)
    with Store(path) as store:
        cache = DuckDBCache(lambda: store.con)
        writer = QuestionWriter(client, cache=cache, budget=Budget(**budget), concurrency=1)
        return build(store.con, kinds=["commit", "question"], writer=writer, progress=progress), writer


GOOD = "Where did we cure the wrong sums at the till?"


def plan(server: Any) -> None:
    server.plan([
        {"match": "basket", "faults": [question(GOOD, "Rounding earlier")] * 2},
        {"match": "hills", "faults": [question("What is the weather like in the hills?", "I cannot see")]},
        {"match": "invoice", "faults": [{"content": "no"}, {"content": "again no"}]},
        {"match": "", "faults": [question("Which colour has the moon on Sundays at sea?", "blue")] * 9},
    ])  # fmt: skip


def test_questions_of_a_model_are_filtered_counted_and_cached(path: Path, server: Any) -> None:
    plan(server)
    seen: list[int] = []
    task, writer = written(path, server, seen.append)
    assert asked(task)[GOOD] == ("question", [FIXED])
    assert [q.answer for q in task.queries if q.category == "question"] == ["Rounding earlier"]
    assert writer.dropped == {"question_copied_phrase": 1, "question_grader_error": 1, "question_unrelated": 2}
    assert {name: count for name, count in task.notes.items() if name.startswith("question")} == writer.dropped
    assert seen == [1]
    requests = len(server.bodies())
    assert requests == 6  # five exchanges, one of them asked twice
    server.plan([{"match": "", "faults": ["500"] * 9}])
    again, second = written(path, server)
    assert again.queries == task.queries
    assert (second.usage.num_cached, len(server.bodies())) == (4, 1)  # only what was never answered is asked again


def test_the_budget_stops_and_a_higher_one_goes_on(path: Path, server: Any) -> None:
    plan(server)
    # The fake server counts 120 tokens a request; each reserves some 1,300 for the worst case.
    first, writer = written(path, server, max_tokens=1600)
    asked_first = sum(len(body["messages"]) == 2 for body in server.bodies())  # the others are repairs
    assert 0 < asked_first < 5
    assert first.notes["question_skipped"] == 5 - asked_first
    assert writer.usage.tokens_in + writer.usage.tokens_out <= 1600
    _, rest = written(path, server)
    assert 0 < rest.usage.num_cached <= asked_first
    assert "question_skipped" not in rest.dropped


def test_secrets_leave_no_machine(path: Path, tmp_path: Path, server: Any) -> None:
    secret = "ghp_" + "a1B2c3D4e5" * 3 + "a1B2c3"
    logs = tmp_path / "secret"
    logs.mkdir()
    session(
        logs, "x", 4, (f"log in to the basket with token={secret} please", "The log-in works again, as it should.", [])
    )
    api.ingest([logs], path)
    plan(server)
    _, writer = written(path, server)
    assert b"log in to the basket" in server.received()
    assert secret.encode() not in server.received()
    assert writer.usage.num_redacted == 1
