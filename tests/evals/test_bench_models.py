"""The runner of benches with models, local and served, and its command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_made as made
import pytest
from bench_made import GREEDY, rows, scored

from workbench.data.store import Store
from workbench.evals.bench_report import report
from workbench.evals.bench_run import Sampling, run_bench
from workbench.evals.benches import load_bench
from workbench.evals.benches.base import Bench
from workbench.evals.environments.rooms import Rooms
from workbench.evals.verifiers import EXACT, exact
from workbench.policies.tasks import Task

pytest.importorskip("torch").set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(Rooms().words())
    make_model(tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_local_model_gives_the_same_samples_again_and_leaves_torch_alone(folder: Path, tmp_path: Path) -> None:
    import torch

    from workbench.evals.bench_policy import local_policy

    bench, policy = load_bench("rooms"), local_policy(folder)
    sampling = Sampling(temperature=1.0, max_tokens=32, batch_size=16)
    state = torch.random.get_rng_state()
    found = []
    for name in ("a", "b"):
        run_bench(tmp_path / name, bench, policy, sampling, num_samples=2, limit=40)
        found.append(rows(tmp_path / name))
        torch.rand(3)
    assert found[0] == found[1]
    assert len({row[5] for row in found[0]}) > 20
    torch.random.set_rng_state(state)
    run_bench(tmp_path / "c", bench, policy, sampling, limit=10)
    assert torch.equal(torch.random.get_rng_state(), state)
    too_long = run_bench(tmp_path / "d", bench, policy, replace(sampling, max_tokens=5000), limit=2)
    assert report(tmp_path / "d", too_long)["by_status"].keys() <= {"ok", "truncated"}  # a turn is one token


def test_a_changed_model_folder_is_another_version(folder: Path, tmp_path: Path) -> None:
    import shutil

    from tiny_models import make_model, make_tokenizer

    from workbench.evals.bench_policy import local_policy

    before = local_policy(folder).version
    assert local_policy(folder).version == before
    weights, template, setting = (shutil.copytree(folder, tmp_path / name) for name in ("w", "t", "s"))
    make_model(make_tokenizer(Rooms().words()), seed=1).save_pretrained(weights)
    (template / "chat_template.jinja").write_text("{{ messages }}")
    generation = json.loads((setting / "generation_config.json").read_text())
    (setting / "generation_config.json").write_text(json.dumps({**generation, "repetition_penalty": 1.2}))
    assert len({before, *(local_policy(path).version for path in (weights, template, setting))}) == 4


def test_a_prompt_that_does_not_fit_is_a_policy_error(folder: Path, tmp_path: Path) -> None:
    from workbench.evals.bench_policy import local_policy

    found = scored(tmp_path, made.sums(4), local_policy(folder), replace(GREEDY, max_tokens=500))
    assert found["by_status"] == {"policy_error": 4}
    assert "do not fit the model's 128 positions" in rows(tmp_path / "s.duckdb")[0][-1]


@pytest.mark.parametrize("mode", [{}, {"extensions": False, "ids": False, "fixed_ids": False, "prompt_top_k": 0}])
def test_a_served_model_writes_what_the_same_model_writes_here(mode: dict[str, Any], tmp_path: Path) -> None:
    import tiny_server

    from workbench.evals.bench_policy import local_policy, served_policy

    tokenizer, model = tiny_server.make_served()
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "model")
    server = tiny_server.shared()
    server.plan(mode)
    tasks = [Task(f"t{i}", {"prompt": f"w{i} w{5 * i % 26} w3"}, "#### w1") for i in range(12)]
    bench = Bench("words", "test", tasks, EXACT, 12, exact)
    here, greedy = local_policy(tmp_path / "model"), replace(GREEDY, max_tokens=12)
    run_bench(tmp_path / "here", bench, here, greedy)
    with served_policy("tiny", server.url, tmp_path / "model") as there:
        run_bench(tmp_path / "there", bench, there, greedy)
        assert bool(there.tokenizer.chat_template) == (not mode)
        assert there.version != here.version
    # A server of text gives no ids, so that a special token in the middle is not counted there.
    local, served = ([row[1 : -2 if mode else None] for row in rows(tmp_path / name)] for name in ("here", "there"))
    assert local == served
    assert len({row[4] for row in local}) > 3


def cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    from workbench.cli.app import run

    code = run(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ("--store", str(tmp_path / "s.duckdb"))
    command = (*store, "eval", "bench", "--model", str(folder), "--bench", "rooms", "--limit", "20", "--samples", "2",
               "--temperature", "1")  # fmt: skip
    code, out, _ = cli(capsys, *command, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["drawn"], found["samples"], found["is_partial"], found["split"]) == (40, 40, True, "test")
    assert sum(found["by_status"].values()) == 40
    assert set(found["pass_at"]) == {"1", "2"}
    code, out, _ = cli(capsys, *command)
    assert code == 0
    assert "PARTIAL" in out
    assert "0 drawn now, 40 in the store" in out


def test_the_command_explains_what_cannot_be_meant(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ("--store", str(tmp_path / "s.duckdb"), "eval", "bench")
    wrong = [
        (("--model", str(folder), "--bench", "room"), "did you mean 'rooms'"),
        (("--model", str(tmp_path / "none"), "--bench", "rooms"), "no config.json"),
        (("--model", "http://localhost:1/v1", "--bench", "rooms"), "NAME@URL"),
        (("--model", "m@http://localhost:1/v1", "--bench", "rooms"), "without --tokenizer"),
        (("--model", str(folder), "--bench", "rooms", "--samples", "2"), "At temperature 0"),
    ]
    for arguments, message in wrong:
        code, _, err = cli(capsys, *store, *arguments)
        assert (code, message in err) == (2, True), err


def test_benches_are_listed_and_their_tasks_put_into_the_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from workbench.policies.store import load_tasks

    listed = json.loads(cli(capsys, "eval", "benches", "--json")[1])
    assert {"gsm8k", "shop"} <= {row["name"] for row in listed}
    store = ("--store", str(tmp_path / "s.duckdb"))
    code, out, _ = cli(capsys, *store, "eval", "add-tasks", "shop", "--split", "all", "--json")
    sizes = {split: len(load_bench("shop", split).tasks) for split in ("train", "test")}
    assert code == 0
    assert json.loads(out)["splits"] == {s: {"tasks": n, "added": n} for s, n in sizes.items()}
    assert "0 of them new" in cli(capsys, *store, "eval", "add-tasks", "shop")[1]
    with Store(tmp_path / "s.duckdb", read_only=True) as opened:
        tasks = {task.id: task for task in load_tasks(opened.con, "shop", "train")}
    assert tasks == {task.id: task for task in load_bench("shop", "train").tasks}
