"""Benches: splits never overlap, worked answers score 1, empty and constant policies score what is known."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from workbench.errors import InputError
from workbench.evals.benches import BENCHES, load_bench
from workbench.evals.benches.base import Bench, split_of
from workbench.evals.tasks.base import shared_data
from workbench.evals.verifiers import NUMBER, number
from workbench.policies.tasks import Task

DATA = {"gsm8k": "gsm8k_test.jsonl", "math500": "math500_test.json", "svamp": "svamp_test.jsonl",
        "bbh": "bbh/snarks.json"}  # fmt: skip


def loaded(name: str, split: str) -> Bench:
    if name in DATA:
        try:
            shared_data(f"llm/{DATA[name]}")
        except InputError as missing:
            pytest.skip(str(missing))
    if name == "reasoning_gym":
        pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (extra evals)")
    if name == "math500" and not importlib.util.find_spec("math_verify"):
        pytest.skip("math-verify is not installed (extra math)")
    return load_bench(name, split)


@pytest.mark.parametrize("name", BENCHES)
def test_train_and_test_share_no_task_and_no_prompt(name: str) -> None:
    train, test = loaded(name, "train"), loaded(name, "test")
    assert min(len(train.tasks), len(test.tasks)) >= 200
    for key in (lambda task: task.id, lambda task: str(task.prompts["prompt"])):
        left, right = ({key(task) for task in bench.tasks} for bench in (train, test))
        assert not left & right


@pytest.mark.parametrize("name", BENCHES)
def test_loading_twice_gives_the_same_tasks_and_they_survive_json(name: str) -> None:
    bench = loaded(name, "test")
    assert loaded(name, "test").data_digest() == bench.data_digest()
    for task in bench.tasks[:50]:
        assert json.loads(json.dumps(dict(task.meta))) == dict(task.meta)
        assert task.prompts["prompt"].strip()


@pytest.mark.parametrize("name", [name for name in BENCHES if name not in ("rooms", "shop")])
def test_the_worked_answer_scores_1_and_an_empty_one_0(name: str) -> None:
    bench = loaded(name, "test")
    assert bench.verify
    step = 12 if name == "math500" else 5
    for task in bench.tasks[::step]:
        assert bench.verify(task.answer, task).score == 1.0, task.id
        assert bench.verify("", task)[:2] == (0.0, "wrong_format"), task.id
        assert bench.verify("I do not know.\nSorry.", task).score == 0.0, task.id


@pytest.mark.parametrize("name", ["gsm8k", "svamp", "countdown", "bbh"])
def test_answers_of_other_tasks_score_no_more_than_chance(name: str) -> None:
    bench = loaded(name, "test")
    assert bench.verify
    answers = [task.answer for task in bench.tasks]
    random.Random(0).shuffle(answers)
    mean = sum(bench.verify(a, t).score or 0.0 for a, t in zip(answers, bench.tasks, strict=True)) / len(answers)
    assert mean < (0.15 if name == "bbh" else 0.06)


def test_a_constant_policy_on_bbh_scores_the_share_of_its_target() -> None:
    bench = loaded("bbh", "test")
    assert bench.verify
    chosen = [task for task in bench.tasks if task.meta["task"] == "boolean_expressions"]
    expected = sum(task.answer == "#### True" for task in chosen) / len(chosen)
    assert sum(bench.verify("#### True", task).score or 0.0 for task in chosen) / len(chosen) == expected
    assert 0.3 < expected < 0.7


def test_a_published_size_is_the_size_of_all() -> None:
    sizes = {"gsm8k": 7473 + 1319, "math500": 500, "svamp": 1000, "bbh": 6511}
    for name, size in sizes.items():
        assert len(loaded(name, "all").tasks) == size


@pytest.mark.parametrize("name", ["rooms", "shop"])
def test_the_expert_of_an_environment_succeeds(name: str) -> None:
    bench = load_bench(name)
    assert bench.make_environment
    environment = bench.make_environment()
    for task in bench.tasks[:60]:
        state = environment.reset(task)
        if name == "rooms":
            made = [move for _, move, _ in environment.expert(task, random.Random(0))]  # pyright: ignore
        else:
            made = task.answer.splitlines()
        ends = [environment.step(state, said)[1] for said in made]
        assert ends == [False] * (len(made) - 1) + [True]
        assert environment.reward(state) == 1.0
        assert environment.reward(environment.reset(task)) == 0.0


def test_unknown_names_and_splits_are_explained() -> None:
    with pytest.raises(InputError, match="did you mean 'gsm8k'"):
        load_bench("gsm8")
    with pytest.raises(InputError, match="train, test or all, not 'dev'"):
        load_bench("countdown", "dev")


@pytest.mark.parametrize("name", DATA)
def test_missing_data_is_explained(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_SHARED_DATA", str(tmp_path))
    with pytest.raises(InputError, match="Set WORKBENCH_SHARED_DATA"):
        load_bench(name)


def test_two_tasks_of_one_id_and_no_task_are_refused() -> None:
    task = Task("a", {"prompt": "?"})
    with pytest.raises(InputError, match="two tasks with the id 'a'"):
        Bench("b", "test", [task, task], NUMBER, 8, number)
    with pytest.raises(InputError, match="needs tasks"):
        Bench("b", "test", [], NUMBER, 8, number)


def test_the_digest_follows_everything_that_a_task_says() -> None:
    def of(**changed: object) -> str:
        fields = {"id": "a", "prompts": {"prompt": "?"}, "answer": "1", "meta": {}} | changed
        return Bench("b", "test", [Task(**fields)], NUMBER, 8, number).data_digest()  # pyright: ignore

    variants = [of(), of(id="b"), of(prompts={"prompt": "!"}), of(answer="2"), of(meta={"x": 1})]
    assert len(set(variants)) == len(variants)
    assert of() == of()


def test_a_split_follows_the_content_and_its_share() -> None:
    splits = [split_of(f"problem {n}", test_share=0.2) for n in range(5000)]
    assert splits == [split_of(f"problem {n}", test_share=0.2) for n in range(5000)]
    assert 0.18 < splits.count("test") / 5000 < 0.22
    assert splits != [split_of(f"problem {n}", test_share=0.2, seed=1) for n in range(5000)]


def test_listing_benches_imports_no_bench_and_nothing_heavy() -> None:
    code = (
        "import sys, workbench.evals.benches as b; assert len(b.BENCHES) == 8; "
        "print([m for m in ('torch', 'transformers', 'reasoning_gym', 'duckdb', 'workbench.evals.benches.gsm8k') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
