"""Requests: names into tasks and retrievers, a user's own file, and the command that asks the same."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from workbench.errors import InputError
from workbench.evals import recall_run
from workbench.evals.recall_request import Request, load_retriever

GOOD = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Options:
    depth: int = 3

class Mine:
    name = "mine"
    def fingerprint(self): return f"1 {Options()}"
    def build(self, documents, folder): return Index(documents)

class Index:
    def __init__(self, documents): self.texts = {d.id: d.text for d in documents}
    def search(self, text, k): return [(id, 1.0) for id in sorted(self.texts)][:k]
    def returned(self, document_id): return self.texts[document_id]
    def num_bytes(self): return 1
    def close(self): pass

made = Mine()
def make(): return Mine()
def needs(x): return Mine()
number = 3
class Half:
    name = "half"
class Nameless(Mine):
    name = None
class Failing(Mine):
    def __init__(self): raise OSError("no weights")
class Numbered(Mine):
    def fingerprint(self): return 3
class Unknown(Mine):
    def fingerprint(self): raise OSError("no weights")
class Bare(Mine):
    def build(self, documents, folder): return object()
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(GOOD)
    return path


@pytest.mark.parametrize("name", ["Mine", "made", "make"])
def test_a_users_retriever_is_a_class_an_object_or_a_function(own: Path, name: str) -> None:
    retriever = load_retriever(f"{own}:{name}")
    assert retriever.name == "mine"
    assert retriever.build([], own.parent).search("x", 3) == []


def test_an_edit_of_a_users_file_is_another_fingerprint(own: Path) -> None:
    """evals.md P1: what answered may not be told from its name."""
    before = load_retriever(f"{own}:Mine").fingerprint()
    assert load_retriever(f"{own}:Mine").fingerprint() == before
    own.write_text(GOOD.replace("1.0", "2.0"))
    assert load_retriever(f"{own}:Mine").fingerprint() != before


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("{own}", "named FILE.py:NAME"), ("{own}:", "named FILE.py:NAME"), ("notes.txt:Mine", "named FILE.py:NAME"),
        ("nowhere.py:Mine", "no file nowhere"), ("{own}:Other", "has no Other"),
        ("{own}:needs", "without arguments"), ("{own}:number", "neither a retriever nor a function"),
        ("{own}:Half", "has no fingerprint, build"), ("{own}:Nameless", "name of Nameless .* must be a text, not None"),
        ("{own}:Failing", "could not be called without arguments .OSError: no weights"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_users_retriever_is_said(own: Path, place: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_retriever(place.format(own=own))


def test_a_fingerprint_must_be_a_text_and_an_index_have_its_methods(own: Path) -> None:
    with pytest.raises(InputError, match=r"fingerprint of mine in .*own\.py must be a text, not 3"):
        load_retriever(f"{own}:Numbered").fingerprint()
    with pytest.raises(InputError, match=r"fingerprint of mine in .*own\.py failed \(OSError: no weights\)"):
        load_retriever(f"{own}:Unknown").fingerprint()
    with pytest.raises(InputError, match="has no search, returned, num_bytes, close; see"):
        load_retriever(f"{own}:Bare").build([], own.parent)


def test_a_file_that_fails_to_import_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import nothing_of_this_name\n")
    with pytest.raises(InputError, match=r"broken\.py could not be imported \(ModuleNotFoundError"):
        load_retriever(f"{path}:X")


def test_retrievers_come_in_order_and_share_their_corpora(own: Path) -> None:
    request = Request(tasks=["agentlog"], grids=("tokenizers", "default"), retrievers=[f"{own}:Mine"])
    found = request.load_retrievers()
    names = [retriever.name for retriever in found]
    assert names[0] == "verbatim keyword [code/1]"
    assert names[-1] == "mine"
    assert len(names) == len(set(names)) == 9 + 6 + 1
    assert len({id(getattr(r, "_corpora", None)) for r in found[:-1]}) == 1


def test_all_peers_are_those_that_need_no_model_folder() -> None:
    from workbench.evals.peers import NEEDS_FOLDER, PEERS

    request = Request(tasks=["agentlog"], peers=["all"])
    names = {retriever.name for retriever in request.load_retrievers()[9:]}
    assert len(names) == len(set(PEERS) - set(NEEDS_FOLDER))


def test_listing_peers_and_grids_imports_no_peer() -> None:
    """evals.md P6."""
    import subprocess

    code = (
        "import sys, workbench.evals.recall_request, workbench.evals.recall_report, workbench.evals.recall_html; "
        "from workbench.evals.peers import PEERS; "
        "print([m for m in sys.modules if m.startswith('workbench.evals.peers.') or m in "
        "('torch', 'transformers', 'scipy', 'pandas', 'sentence_transformers', 'bm25s', 'rank_bm25', 'mem0')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_the_command_asks_for_the_same() -> None:
    request = Request(
        tasks=["my tasks/a.jsonl", "locomo"], grids=["fusions"], peers=["all"], k=20, budget=500, times=False,
        baseline="verbatim keyword", split="all",
    )  # fmt: skip
    assert request.command() == (
        "workbench eval recall --task 'my tasks/a.jsonl' --task locomo --grid fusions --peer all --split all -k 20 "
        "--budget 500 --baseline 'verbatim keyword' --no-times"
    )
    assert shlex.split(request.command())[4] == "my tasks/a.jsonl"


def test_task_files_are_read(tmp_path: Path) -> None:
    rows = [
        {"kind": "task", "name": "mine", "version": "1"}, {"kind": "document", "id": "d", "user": "words"},
        {"kind": "query", "id": "q", "text": "words", "relevant": ["d"]},
    ]  # fmt: skip
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = Request(tasks=[str(path)]).load_tasks()
    assert (task.name, len(task.queries)) == ("mine", 1)
    with pytest.raises(InputError, match="Two tasks are called 'mine'"):
        Request(tasks=[str(path), str(path)]).load_tasks()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]) + "{]\n")
    with pytest.raises(InputError, match=r"t\.jsonl, line 3: not valid JSON"):
        Request(tasks=[str(path)]).load_tasks()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": []}, "Name a task"), ({"split": "half"}, "tune, report"), ({"k": 0}, "k must be 1"),
        ({"budget": 0}, "budget is a number of tokens"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_meant_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Request(**{"tasks": ["agentlog"], **options})


def test_an_unknown_baseline_is_refused_before_anything_runs() -> None:
    with pytest.raises(InputError, match="'both hybird' is none of verbatim keyword, "):
        Request(tasks=["agentlog"], baseline="both hybird").load_retrievers()


def test_the_code_version_covers_what_answers_depend_on_and_no_report(tmp_path: Path) -> None:
    modules = ("ours", "recall_grid", "recall_run", "baseline_distillers", "peers/p", "recall_report")
    for name in ("data/store.py", "data/schema/1.sql", "memory/a/b.py", *(f"evals/{module}.py" for module in modules)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    before = recall_run.digest_of_sources(tmp_path)
    assert recall_run.digest_of_sources(tmp_path) == before
    (tmp_path / "evals/recall_report.py").write_text("y")
    assert recall_run.digest_of_sources(tmp_path) == before
    seen = {before}
    for name in ("data/schema/1.sql", "memory/a/b.py", "evals/ours.py", "evals/peers/p.py"):
        (tmp_path / name).write_text("y")
        seen.add(recall_run.digest_of_sources(tmp_path))
    assert len(seen) == 5
    assert len(recall_run.code_version()) == 20
