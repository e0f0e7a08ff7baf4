"""eval make-task and eval answers through the command line: what is printed, what is written, what resumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench import api
from workbench.cli import app, eval_task_commands
from workbench.cli.eval_commands import group
from workbench.evals.tasks import task_file

Run = Callable[..., tuple[int, Any, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line on the store of this test: exit code, what --json printed (or the text), stderr."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if "make-task" not in {command.name for command in group.registered_commands}:
        eval_task_commands.register(group)

    def call(*arguments: str) -> tuple[int, Any, str]:
        capsys.readouterr()
        code = app.run(["--store", str(tmp_path / "s.duckdb"), *arguments])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out and "--json" in arguments else out, err

    return call


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """One session in which an agent commits; ingested into the store of this test."""
    common = {"workbench": 1, "type": "message", "session_id": "s"}
    calls = [
        {
            "kind": "tool_call",
            "name": "Edit",
            "data": {"file_path": "/w/cart.py", "old_string": "a", "new_string": "b"},
        },
        {"kind": "tool_call", "name": "Bash", "data": {"command": "git commit -m 'Round cart totals before tax'"}},
        {"kind": "text", "text": "Rounding happens earlier now, in the cart itself."},
    ]
    rows = [
        {"workbench": 1, "type": "conversation", "session_id": "s", "project": "/w/shop"},
        common
        | {"role": "user", "native_id": "u", "parts": [{"kind": "text", "text": "the sums of the basket are off"}]},
        common | {"role": "assistant", "native_id": "a", "parts": calls},
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    api.ingest([tmp_path / "s.jsonl"], tmp_path / "s.duckdb")
    return tmp_path


def test_make_task_writes_a_task_that_can_be_read(run: Run, logs: Path) -> None:
    code, found, _ = run("eval", "make-task", "--out", str(logs / "t.jsonl"), "--json")
    assert code == 0
    task = task_file.load(logs / "t.jsonl")
    assert (found["queries"], found["documents"], found["fingerprint"]) == (1, 1, task.fingerprint)
    assert [query.text for query in task.queries] == ["Round cart totals before tax"]
    code, text, _ = run("eval", "make-task", "--out", str(logs / "t.jsonl"), "--kinds", " commit")
    assert code == 0
    assert "queries commit" in text
    assert f"workbench eval recall --task {logs / 't.jsonl'}" in " ".join(text.split())


def test_make_task_with_a_model(run: Run, logs: Path, server: Any) -> None:
    answer = {"question": "Where did we cure the wrong amounts at the till?", "answer": "Rounding earlier"}
    server.plan([{"match": "basket", "faults": [{"content": json.dumps(answer)}]}])
    options = ("--llm", "m", "--base-url", server.url, "--json")
    code, found, _ = run("eval", "make-task", "--out", str(logs / "t.jsonl"), *options)
    assert code == 0
    assert found["notes"] == {"queries_commit": 1, "question_unrelated": 1}  # no word in common
    server.plan(
        [
            {
                "match": "basket",
                "faults": [
                    {"content": json.dumps(answer | {"question": "Which place rounds what we sum at the till?"})}
                ],
            }
        ]
    )
    code, found, _ = run("eval", "make-task", "--out", str(logs / "t.jsonl"), *options)
    assert found["usage"]["num_cached"] == 1  # the first answer is kept, whatever the filter says of it
    assert server.bodies() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kinds", "comit"], "no kind of query 'comit'"),
        (["--max-per-kind", "-1"], "max_per_kind must be 1 or more, not -1"),
        (["--out", "task.json"], "FILE.jsonl or FILE.jsonl.gz, not task.json"),
        (["--kinds", "question"], "Questions need --llm"),
        (["--llm", "m"], "Questions need --llm"),
        (["--llm", "m", "--base-url", "http://x/v1", "--kinds", "commit"], "the kind question"),
        (["--kinds", "error"], "hold no query of the kinds error"),
    ],
)
def test_mistakes_of_make_task_are_named(run: Run, logs: Path, arguments: list[str], message: str) -> None:
    code, _, err = run("eval", "make-task", "--out", str(logs / "t.jsonl"), *arguments)
    assert code != 0
    assert message in " ".join(err.split())
    assert not (logs / "t.jsonl").exists()


def answers(path: Path, texts: list[str], **fields: Any) -> str:
    rows = [
        {"id": f"i{k}", "question": f"question {k}?", "answer": t, "targets": ["blue"]} | fields
        for k, t in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def verdict(word: str) -> dict[str, str]:
    return {"content": json.dumps({"reason": "because", "verdict": word})}


def test_rules_need_no_store(run: Run, tmp_path: Path) -> None:
    file = answers(tmp_path / "a.jsonl", ["Blue", "red", "the blue car"])
    code, found, _ = run("eval", "answers", file, "--json")
    assert code == 0
    assert found["graders"]["exact"]["score"] == pytest.approx(1 / 3)
    assert [(g["id"], g["value"], g["version"]) for g in found["grades"]] == [
        ("i0", 1.0, "exact_match/1"), ("i1", 0.0, "exact_match/1"), ("i2", 0.0, "exact_match/1"),
    ]  # fmt: skip
    code, text, _ = run("eval", "answers", file, "--grader", "f1")
    assert code == 0
    assert "0.556" in text  # (1 + 0 + 2/3) / 3
    assert not (tmp_path / "s.duckdb").exists()


def test_two_judges_agree_or_not_within_one_budget(run: Run, tmp_path: Path, server: Any) -> None:
    file = answers(tmp_path / "a.jsonl", [f"answer-{k:02d}" for k in range(4)])
    server.plan([
        {"match": '"model": "strict"', "faults": [verdict("incorrect")] * 4},
        {"match": '"model":"strict"', "faults": [verdict("incorrect")] * 4},
        {"match": "answer-", "faults": [verdict("correct")] * 4},
    ])  # fmt: skip
    judges = ("--grader", "judge", "--judge", f"kind@{server.url}", "--judge", f"strict@{server.url}")
    code, found, _ = run("eval", "answers", file, *judges, "--json")
    assert code == 0
    assert [found["graders"][f"{name}@{server.url}"]["score"] for name in ("kind", "strict")] == [1.0, 0.0]
    assert found["agreement"]["krippendorff_alpha"] < 0
    assert len(found["grades"]) == 8
    assert len(server.bodies()) == 8
    # The second run is served from the store; without a budget left nothing could be asked.
    code, again, _ = run("eval", "answers", file, *judges, "--budget-tokens", "0", "--json")
    assert (code, again["graders"], again["grades"]) == (0, found["graders"], found["grades"])
    assert len(server.bodies()) == 8


def test_a_spent_budget_is_said_and_goes_on_later(run: Run, tmp_path: Path, server: Any) -> None:
    file = answers(tmp_path / "a.jsonl", [f"answer-{k:02d}" for k in range(30)])
    server.plan([{"match": "answer-", "faults": [verdict("correct")] * 60}])
    judges = ("--grader", "judge", "--judge", f"m@{server.url}", "--concurrency", "1")
    code, text, _ = run("eval", "answers", file, *judges, "--budget-tokens", "4000")
    assert code == 0
    assert "The budget does not reach for one more" in text
    prices = ("--price-in", "1", "--price-out", "2", "--budget-usd", "1")
    code, found, _ = run("eval", "answers", file, *judges, *prices, "--json")
    assert code == 0
    assert found["graders"][f"m@{server.url}"]["by_status"] == {"ok": 30}
    assert found["usage"][f"m@{server.url}"]["num_cached"] > 0
    assert found["usage"][f"m@{server.url}"]["cost"] > 0
    assert len(server.bodies()) == 30


def test_versus_judges_both_orders(run: Run, tmp_path: Path, server: Any) -> None:
    a = answers(tmp_path / "a.jsonl", ["ours-0", "ours-1"])
    b = answers(tmp_path / "b.jsonl", ["theirs-0", "theirs-1"])
    server.plan([
        {"match": "ours-0", "faults": [verdict("first"), verdict("second")]},
        {"match": "ours-1", "faults": [verdict("first"), verdict("first")]},
    ])  # fmt: skip
    options = ("--grader", "judge", "--judge", f"m@{server.url}", "--concurrency", "1", "--versus", b)
    code, found, _ = run("eval", "answers", a, *options, "--json")
    assert code == 0
    result = found["graders"][f"m@{server.url}"]
    assert (result["wins"], result["ties"], result["losses"], result["ties_by_position"]) == (1, 1, 0, 1)
    code, text, _ = run("eval", "answers", a, *options)
    assert code == 0
    assert "ties by position" in text
    assert len(server.bodies()) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grader", "bleu"], "no grader 'bleu'"),
        (["--grader", "judge"], "needs --judge MODEL@URL"),
        (["--judge", "m@http://x/v1"], "need --grader judge"),
        (["--grader", "judge", "--judge", "model"], "takes MODEL@URL"),
        (["--grader", "judge", "--judge", "m@http://x/v1", "--budget-usd", "1"], "needs the prices"),
        (["--versus", "b.jsonl"], "need --grader judge"),
    ],
)
def test_mistakes_of_answers_are_named(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    pytest.importorskip("httpx", reason="the llm extra is not installed")
    code, _, err = run("eval", "answers", answers(tmp_path / "a.jsonl", ["x"]), *arguments)
    assert code != 0
    assert message in " ".join(err.split())
    assert "Traceback" not in err
