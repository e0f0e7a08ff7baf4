"""`workbench eval`: as a program sees it, in-process, on a small task file; and killed from outside."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from workbench.cli.app import run

WORDS = ["cache", "retry", "index", "token", "merge", "queue", "parser", "socket", "budget", "schema", "worker"]


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    rng = random.Random(4)
    rows: list[dict[str, Any]] = [{"kind": "task", "name": "small", "version": "1", "licence": "made up"}]
    for number in range(30):
        words = " ".join(rng.choices(WORDS, k=40))
        rows.append({"kind": "document", "id": f"d{number}", "user": f"word{number} {words}", "assistant": words[::-1]})
    for number in range(20):
        text = f"word{number} {rng.choice(WORDS)}"
        rows.append({"kind": "query", "id": f"q{number}", "text": text, "relevant": [f"d{number}"]})
    path = tmp_path / "small.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def _call(*arguments: str, store: str = "s.duckdb") -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(["--store", str(tmp_path / store), "eval", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return _call


def test_tasks_are_listed(call: Any) -> None:
    code, out, _ = call("tasks", "--json")
    assert code == 0
    assert {"locomo", "agentlog", "skills"} <= {row["name"] for row in json.loads(out)}
    assert "LoCoMo" in call("tasks")[1] or "locomo" in call("tasks")[1]


def test_recall_end_to_end(call: Any, task_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    asked = ["recall", "--task", str(task_file), "--split", "all", "--no-times"]
    code, out, _ = call(*asked, "--report", str(page), "--json")
    assert code == 0
    found = json.loads(out)
    (summary,) = found["tasks"]
    assert (found["asked"], found["stored"]) == (180, 0)
    assert [row["name"] for row in summary["runs"]][:2] == ["verbatim keyword", "verbatim vector"]
    assert len(summary["runs"]) == 9
    assert summary["runs"][0]["metrics"]["mrr"]["mean"] == 1.0
    assert {row["statuses"]["ok"] for row in summary["runs"]} == {20}
    assert [comparison["metric"] for comparison in summary["comparisons"]] == ["mrr", "ndcg@10"]
    first = page.read_bytes()

    code, out, _ = call(*asked, "--report", str(page), "--json")
    assert (code, json.loads(out)["asked"], json.loads(out)["stored"]) == (0, 0, 180)
    assert page.read_bytes() == first
    call(*asked, "--report", str(page), "--json", store="another.duckdb")
    assert page.read_bytes() == first, "two runs give the same bytes"
    assert not list(tmp_path.glob("*.partial"))

    code, out, _ = call(*asked)
    assert code == 0
    assert "| both hybrid |" in out
    assert "180 were in the store" in out


def test_options_reach_the_run(call: Any, task_file: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "class Mine:\n    name = 'mine'\n    def fingerprint(self): return '1'\n"
        "    def build(self, documents, folder): return Index(documents)\n"
        "class Index:\n    def __init__(self, documents): self.texts = {d.id: d.text for d in documents}\n"
        "    def search(self, text, k): return [(i, 1.0) for i, t in self.texts.items() if text.split()[0] in t][:k]\n"
        "    def returned(self, i): return self.texts[i]\n    def num_bytes(self): return 7\n"
        "    def close(self): pass\n"
    )
    code, out, _ = call(
        "recall", "--task", str(task_file), "--split", "tune", "--grid", "tokenizers", "--retriever", f"{own}:Mine",
        "-k", "5", "--budget", "90", "--baseline", "mine", "--json",
    )  # fmt: skip
    assert code == 0
    (summary,) = json.loads(out)["tasks"]
    assert (summary["split"], summary["k"], summary["budget"]) == ("tune", 5, 90)
    assert len(summary["runs"]) == 10
    assert summary["runs"][-1]["name"] == "mine"
    assert summary["runs"][-1]["index_bytes"] == 7
    assert "times" in summary["runs"][-1]
    assert {comparison["baseline"] for comparison in summary["comparisons"]} == {"mine"}
    assert all(row["tokens"] <= 90 for row in summary["runs"])


def test_odd_texts_of_a_task_are_printed_and_told_and_unscored_queries_counted(call: Any, tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text(
        '{"kind": "task", "name": "half \\ud800", "version": "1"}\n'
        '{"kind": "document", "id": "d", "user": "some words"}\n'
        '{"kind": "query", "id": "q", "text": "words", "relevant": ["d"], "category": "\\udfff"}\n'
        '{"kind": "query", "id": "nothing", "text": "other", "relevant": []}\n'
    )
    asked = ["recall", "--task", str(path), "--split", "all", "--grid", "tokenizers"]
    code, out, _ = call(*asked, "--json")
    assert code == 0
    (summary,) = json.loads(out)["tasks"]
    assert (summary["num_queries"], summary["num_scored"]) == (2, 1)
    code, out, _ = call(*asked)
    assert code == 0
    assert "## half ?" in out
    assert "2 queries (split all), 1 of them scored, over 1 documents" in out


def test_queries_of_a_single_cluster_are_not_told_as_independent(call: Any, task_file: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in task_file.read_text().splitlines()]
    path, page = tmp_path / "one.jsonl", tmp_path / "r.html"
    rows = [row | ({"cluster": "c"} if row["kind"] == "query" else {}) for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = "queries (all of one cluster, so not independent"
    for file, is_told in ((path, True), (task_file, False)):
        code, out, _ = call("recall", "--task", str(file), "--split", "all", "--report", str(page))
        assert code == 0
        assert (told in out, told in page.read_text()) == (is_told, is_told)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "locomoo"], "did you mean 'locomo'"),
        (["--task", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--task", "FILE", "--grid", "defualt"], "did you mean 'default'"),
        (["--task", "FILE", "--peer", "bm26s"], "did you mean 'bm25s'"),
        (["--task", "FILE", "--split", "half"], "tune, report"),
        (["--task", "FILE", "--baseline", "nobody"], "is none of"),
        (["--task", "FILE", "--report", "/nowhere/r.html"], "/nowhere/r.html"),
        (["--task", "FILE", "--report", "/"], "is a folder"),
        (["--task", "FILE", "-k", "0"], "k must be 1"),
        ([], "--task"),
    ],
)
def test_wrong_use_is_told_and_stores_nothing(
    call: Any, task_file: Path, arguments: list[str], said: str, tmp_path: Path
) -> None:
    code, _, err = call("recall", *(str(task_file) if argument == "FILE" else argument for argument in arguments))
    assert code == 2
    assert said in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "s.duckdb").exists()


def test_ctrl_c_keeps_what_was_answered_and_the_same_command_goes_on(task_file: Path, tmp_path: Path) -> None:
    own = tmp_path / "slow.py"
    own.write_text(
        "import time\nclass Slow:\n    name = 'slow'\n    def fingerprint(self): return '1'\n"
        "    def build(self, documents, folder): return Index(documents)\n"
        "class Index:\n    def __init__(self, documents): self.ids = [d.id for d in documents]\n"
        "    def search(self, text, k): time.sleep(0.3); return [(i, 1.0) for i in self.ids][:k]\n"
        "    def returned(self, i): return i\n    def num_bytes(self): return 1\n    def close(self): pass\n"
    )
    store = tmp_path / "s.duckdb"
    command = [sys.executable, "-m", "workbench", "--store", str(store), "eval", "recall", "--task", str(task_file),
               "--split", "all", "--grid", "tokenizers", "--retriever", f"{own}:Slow", "--json"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):  # until the first query was asked: the store is there, and some answers are on their way
        if store.exists():
            break
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "run the same command again to go on" in err
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0
    found = json.loads(again.stdout)
    assert found["asked"] + found["stored"] == 200
    assert found["tasks"][0]["runs"][-1]["statuses"] == {"ok": 20}
