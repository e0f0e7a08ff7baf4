"""The runner of benches: known scores, statuses, resumption, ids, statistics."""

from __future__ import annotations

import itertools
import json
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_made as made
import pytest
from bench_made import GREEDY, SAMPLING, rows, scored

from workbench.data.store import Store
from workbench.errors import EndpointError, InputError, NotFound
from workbench.evals import bench_report
from workbench.evals.bench_report import compare, report
from workbench.evals.bench_run import Evaluation, Policy, Progress, Sampling, run_bench
from workbench.evals.benches import load_bench
from workbench.evals.environments.rooms import Rooms
from workbench.evals.verifiers import Verdict

pytest.importorskip("torch").set_num_threads(1)


# --- scores and statuses ----------------------------------------------------------------------------------------------


def test_the_oracle_scores_1_and_the_silent_policy_0(tmp_path: Path) -> None:
    bench = made.sums()
    best = scored(tmp_path, bench, made.oracle(bench.tasks))
    assert best["score"]["estimate"] == best["score_completed"]["estimate"] == best["score"]["high"] == 1.0
    assert best["score"]["method"] == "wilson"
    assert 0.9 < best["score"]["low"] < 1
    assert best["by_status"] == {"ok": 60}
    silent = scored(tmp_path, bench, made.policy(lambda prompt, rng: "", version="silent"))
    assert silent["score"]["estimate"] == 0.0
    assert silent["by_status"] == {"wrong_format": 60}


def test_a_policy_that_does_not_end_is_truncated_whatever_it_says(tmp_path: Path) -> None:
    bench = made.sums()
    answers = made.oracle(bench.tasks)
    endless = made.policy(lambda prompt, rng: f"#### {prompt[:2]} " * 40)
    found = scored(tmp_path, bench, endless)
    assert found["by_status"] == {"truncated": 60}
    assert found["score"]["estimate"] == 0.0
    assert found["score_completed"] is None
    longest = max(len(task.answer) for task in bench.tasks)
    cut = scored(tmp_path, bench, answers, replace(GREEDY, max_tokens=longest))  # no room for the end of the longest
    assert 0 < cut["by_status"]["truncated"] < 60
    assert cut["score"]["estimate"] == pytest.approx(1 - cut["by_status"]["truncated"] / 60)
    assert cut["score_completed"]["estimate"] == 1.0


def test_a_failing_policy_is_no_silent_zero_and_spares_the_others_of_its_batch(tmp_path: Path) -> None:
    bench, broken = made.sums(), [True]
    best = made.oracle(bench.tasks)

    def writer(temperature: float, seed: int) -> Any:
        def write(prompts: Any, max_tokens: int) -> Any:
            if broken[0] and any(best.tokenizer.decode(ids).startswith(("7 ", "8 ")) for ids in prompts):
                raise RuntimeError("out of   memory")
            return best.writer(temperature, seed)(prompts, max_tokens)

        return write

    policy = replace(best, writer=writer)
    found = scored(tmp_path, bench, policy)
    assert found["by_status"] == {"ok": 58, "policy_error": 2}
    assert found["not_judged"] == 2
    assert found["score"]["estimate"] == pytest.approx(58 / 60)
    assert found["score_completed"]["estimate"] == 1.0
    failed = [row for row in rows(tmp_path / "s.duckdb") if row[3] == "policy_error"]
    assert [(row[4], row[-1]) for row in failed] == [(None, "RuntimeError: out of memory")] * 2
    broken[0] = False
    assert scored(tmp_path, bench, policy)["drawn"] == 0  # what failed is a result, until it is asked for again
    again = scored(tmp_path, bench, policy, retry=True)
    assert (again["drawn"], again["stored"], again["by_status"]) == (2, 58, {"ok": 60})


def test_a_failing_verifier_is_a_grader_error(tmp_path: Path) -> None:
    def verify(text: str, task: Any) -> Verdict:
        if task.id == "sum-003":
            raise ValueError("cannot")
        return Verdict(None, "timeout") if task.id == "sum-004" else Verdict(1.0, "ok", "x")

    found = scored(tmp_path, replace(made.sums(), verify=verify), made.adder(1.0))
    assert found["by_status"] == {"grader_error": 1, "ok": 58, "timeout": 1}
    assert found["score"]["estimate"] == pytest.approx(58 / 60)
    assert found["score_completed"]["estimate"] == 1.0


def test_a_server_that_fails_ends_the_run_and_what_was_committed_stays(tmp_path: Path) -> None:
    inner, calls = made.adder(0.5), itertools.count()

    def writer(temperature: float, seed: int) -> Any:
        if next(calls) == 2:
            raise EndpointError("the server is gone")
        return inner.writer(temperature, seed)

    store = tmp_path / "s.duckdb"
    with pytest.raises(EndpointError):
        run_bench(store, made.sums(), replace(inner, writer=writer), SAMPLING)
    assert len(rows(store)) == 2 * SAMPLING.batch_size
    assert run_bench(store, made.sums(), inner, SAMPLING).num_drawn == 60 - 2 * SAMPLING.batch_size


def test_the_shop_is_played_and_judged(tmp_path: Path) -> None:
    bench = load_bench("shop")
    prompts = Counter(str(task.prompts["prompt"]) for task in bench.tasks)
    tasks = {str(t.prompts["prompt"]): t for t in bench.tasks if prompts[str(t.prompts["prompt"])] == 1}
    bench = replace(bench, tasks=list(tasks.values())[:40])

    def say(read: str, rng: random.Random) -> str:
        prompt = next(prompt for prompt in tasks if read.startswith(prompt))
        return tasks[prompt].answer.splitlines()[read.count("->")]

    sampling = replace(GREEDY, max_tokens=5000)
    found = scored(tmp_path, bench, made.policy(say), sampling)
    assert (found["score"]["estimate"], found["by_status"]) == (1.0, {"ok": 40})
    idle = sum(task.meta["database"] == task.meta["expected"] for task in bench.tasks)
    lazy = scored(tmp_path, bench, made.policy(lambda read, rng: "done", version="2"), sampling)
    assert (lazy["score"]["estimate"], lazy["by_status"]) == (pytest.approx(idle / 40), {"ok": 40})
    endless = scored(tmp_path, bench, made.policy(lambda read, rng: "find name=Ada", version="3"), sampling)
    assert (endless["score"]["estimate"], endless["by_status"]) == (0.0, {"truncated": 40})  # ran out of turns


def test_rooms_is_played_and_judged(tmp_path: Path) -> None:
    game = Rooms()
    game.max_turn_tokens = 2  # the end token is one of them here
    bench = load_bench("rooms")
    bench = replace(bench, tasks=bench.tasks[:40], make_environment=lambda: game)

    def say(read: str, rng: random.Random) -> str:
        goal, *heard = map(int, re.findall(r"r(\d+)", read))
        return game.best_moves(heard[-1], goal)[0]

    sampling = replace(GREEDY, max_tokens=5000)
    found = scored(tmp_path, bench, made.policy(say), sampling)
    assert (found["score"]["estimate"], found["by_status"]) == (1.0, {"ok": 40})
    confused = scored(tmp_path, bench, made.policy(lambda read, rng: "X", version="2"), sampling)
    assert (confused["score"]["estimate"], confused["by_status"]) == (0.0, {"ok": 40})


def test_an_environment_that_raises_is_a_grader_error(tmp_path: Path) -> None:
    class Broken(Rooms):
        def reward(self, state: Any) -> float:
            raise ValueError("no state")

    bench = load_bench("rooms")
    bench = replace(bench, tasks=bench.tasks[:3], make_environment=Broken)
    found = scored(tmp_path, bench, made.policy(lambda read, rng: "X"))
    assert found["by_status"] == {"grader_error": 3}


# --- resumption and identity ------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_and_equals_an_undisturbed_one(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed.duckdb", tmp_path / "whole.duckdb"
    command = [sys.executable, made.__file__, str(killed), "6"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    before = rows(killed)
    assert len(before) == 60 + SAMPLING.batch_size  # sample 0 of all tasks, and one batch of sample 1
    resumed = run_bench(killed, made.sums(), made.adder(0.5), SAMPLING, num_samples=2)
    assert (resumed.num_stored, resumed.num_drawn) == (len(before), 120 - len(before))
    undisturbed = run_bench(whole, made.sums(), made.adder(0.5), SAMPLING, num_samples=2)
    assert undisturbed.num_drawn == 120
    assert rows(killed) == rows(whole)
    assert report(killed, resumed)["score"] == report(whole, undisturbed)["score"]


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    inner, calls = made.adder(0.5), itertools.count()

    def writer(temperature: float, seed: int) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return inner.writer(temperature, seed)

    store = tmp_path / "s.duckdb"
    with pytest.raises(KeyboardInterrupt):
        run_bench(store, made.sums(), replace(inner, writer=writer), SAMPLING)
    assert len(rows(store)) == SAMPLING.batch_size
    with pytest.raises(InputError, match="16 of 60 samples"):
        report(store, Evaluation(rows(store)[0][0], tuple(t.id for t in made.sums().tasks), 1, 0, 0))
    assert run_bench(store, made.sums(), inner, SAMPLING).num_drawn == 60 - SAMPLING.batch_size


def test_a_second_run_draws_nothing_and_more_samples_are_added_to_the_first(tmp_path: Path) -> None:
    store, bench, policy = tmp_path / "s.duckdb", made.sums(), made.adder(0.5)
    first = run_bench(store, bench, policy, SAMPLING)
    again = run_bench(store, bench, policy, SAMPLING)
    assert (again.num_drawn, again.num_stored, again.eval_id) == (0, 60, first.eval_id)
    old = rows(store)
    more = run_bench(store, bench, policy, SAMPLING, num_samples=3)
    assert (more.num_drawn, more.num_stored, more.eval_id) == (120, 60, first.eval_id)
    assert [row for row in rows(store) if row[2] == 0] == old
    by_sample = [[row[4] for row in rows(store) if row[2] == n] for n in range(3)]
    assert by_sample[0] != by_sample[1] != by_sample[2]


def test_whatever_a_sample_depends_on_makes_another_evaluation(tmp_path: Path) -> None:
    store, bench, policy = tmp_path / "s.duckdb", made.sums(20), made.adder(0.5)
    calls: list[tuple[Any, Policy, Sampling, dict[str, Any]]] = [
        (bench, policy, SAMPLING, {}),
        (bench, made.adder(0.5, version="2"), SAMPLING, {}),  # changed weights
        (bench, policy, replace(SAMPLING, seed=1), {}),
        (bench, policy, replace(SAMPLING, temperature=0.5), {}),
        (bench, policy, replace(SAMPLING, max_tokens=65), {}),
        (bench, policy, replace(SAMPLING, is_chat=True), {}),
        (replace(bench, grader="number/2"), policy, SAMPLING, {}),
        (replace(bench, tasks=bench.tasks[1:]), policy, SAMPLING, {}),
        (bench, policy, SAMPLING, {"limit": 10}),
    ]
    ids = [run_bench(store, b, p, s, **options).eval_id for b, p, s, options in calls]
    assert len(set(ids)) == len(calls)
    with Store(store, read_only=True) as opened:
        about = opened.con.execute("SELECT count(*), count(DISTINCT model_version) FROM eval_benches").fetchall()
    assert about == [(len(calls), 2)]


def test_the_chat_template_is_used_when_asked_for(tmp_path: Path) -> None:
    read: list[str] = []
    policy = made.policy(lambda prompt, rng: read.append(prompt) or "#### 0")
    scored(tmp_path, made.sums(3), policy)
    policy.tokenizer.chat_template = "as apply_chat_template writes it"
    scored(tmp_path, made.sums(3), policy, replace(GREEDY, is_chat=True))
    assert read[0] == "0 + 0 = "
    assert read[3] == "<user>0 + 0 ="


def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    store, bench, policy = tmp_path / "s.duckdb", made.sums(3), made.adder(1.0)
    with pytest.raises(InputError, match="At temperature 0 all samples"):
        run_bench(store, bench, policy, GREEDY, num_samples=2)
    for options in ({"num_samples": 0}, {"limit": 0}):
        with pytest.raises(InputError, match="must be 1 or more"):
            run_bench(store, bench, policy, GREEDY, **options)
    with pytest.raises(InputError, match="temperature >= 0"):
        Sampling(temperature=-1.0)
    assert not store.exists()


def test_progress_ends_at_the_score(tmp_path: Path) -> None:
    seen: list[Progress] = []
    store = tmp_path / "s.duckdb"
    done = run_bench(store, made.sums(), made.adder(0.5), SAMPLING, num_samples=2, progress=seen.append)
    assert [p.done for p in seen] == [16, 32, 48, 60, 76, 92, 108, 120]
    assert seen[-1].score == pytest.approx(report(store, done)["score"]["estimate"])


# --- statistics -------------------------------------------------------------------------------------------------------


def test_pass_at_k_and_majority_equal_their_definitions(tmp_path: Path) -> None:
    store, bench = tmp_path / "s.duckdb", made.sums(24)
    done = run_bench(store, bench, made.adder(0.4), SAMPLING, num_samples=5)
    found = report(store, done)
    samples = {t.id: [row[4] for row in rows(store) if row[1] == t.id] for t in bench.tasks}
    for k in (1, 2, 4, 5):
        subsets = {t: list(itertools.combinations(s, k)) for t, s in samples.items()}
        any_right = sum(sum(map(any, sets)) / len(sets) for sets in subsets.values()) / 24
        all_right = sum(sum(map(all, sets)) / len(sets) for sets in subsets.values()) / 24
        assert found["pass_at"][str(k)]["estimate"] == pytest.approx(any_right)
        assert found["pass_hat"][str(k)]["estimate"] == pytest.approx(all_right)
    assert list(found["pass_at"]) == ["1", "2", "4", "5"]
    assert found["pass_at"]["1"]["estimate"] == pytest.approx(found["score"]["estimate"])
    # only two answers are ever given: right, and one too many
    assert found["majority"]["estimate"] == pytest.approx(sum(sum(s) >= 3 for s in samples.values()) / 24)
    assert found["score"]["method"] == "percentile cluster bootstrap"


def test_a_majority_is_of_answers_and_ties_are_shared() -> None:
    def votes(*answers: tuple[str, float | None, str | None]) -> float:
        return bench_report._majority([bench_report._Row("t", s, score, text, 1) for s, score, text in answers])

    right, half = ("ok", 1.0, "1/2"), ("ok", 1.0, "0.5")
    assert votes(right, half, ("ok", 0.0, "3")) == 1.0  # right answers are one answer
    assert votes(right, ("ok", 0.0, "3"), ("ok", 0.0, "3")) == 0.0
    assert votes(right, ("ok", 0.0, "3")) == 0.5
    assert votes(right, ("ok", 0.0, "3"), ("ok", 0.0, "4")) == pytest.approx(1 / 3)
    no_answers = ("wrong_format", 0.0, ""), ("truncated", 0.0, None), ("policy_error", None, None)
    assert votes(right, *no_answers) == 1.0  # what gave no answer has no vote
    assert votes(("wrong_format", 0.0, "")) == 0.0


def test_a_planted_difference_is_found_and_a_planted_null_is_not(tmp_path: Path) -> None:
    store, bench = tmp_path / "s.duckdb", made.sums(400)
    weak = run_bench(store, bench, made.adder(0.50, version="weak"), SAMPLING)
    strong = run_bench(store, bench, made.adder(0.65, version="strong"), SAMPLING)
    found = compare(store, strong.eval_id, weak.eval_id)
    assert found["p"] < 0.001
    assert found["difference"]["low"] > 0
    assert found["difference"]["low"] < 0.15 < found["difference"]["high"]
    same = run_bench(store, bench, made.adder(0.50, version="same"), replace(SAMPLING, seed=1))
    null = compare(store, same.eval_id, weak.eval_id)
    assert null["p"] > 0.05
    assert null["difference"]["low"] < 0 < null["difference"]["high"]
    assert compare(store, weak.eval_id, weak.eval_id)["p"] == 1.0


def test_only_what_was_judged_alike_is_compared(tmp_path: Path) -> None:
    store, bench = tmp_path / "s.duckdb", made.sums(20)
    one = run_bench(store, bench, made.adder(0.5), SAMPLING).eval_id
    other = run_bench(store, bench, made.adder(0.5), SAMPLING, limit=10).eval_id
    third = run_bench(store, replace(bench, grader="number/2"), made.adder(0.5), SAMPLING).eval_id
    with pytest.raises(InputError, match="data digests differ"):
        compare(store, one, other)
    with pytest.raises(InputError, match="graders differ"):
        compare(store, one, third)
    with pytest.raises(NotFound):
        compare(store, one, "nothing")


def test_two_evaluations_are_compared_item_by_item(tmp_path: Path) -> None:
    """Against the rows themselves; a task is the mean of its samples, however many each side has."""
    store, bench = tmp_path / "s.duckdb", made.sums(30)
    one = run_bench(store, bench, made.adder(0.7, version="one"), SAMPLING, num_samples=3).eval_id
    other = run_bench(store, bench, made.adder(0.4, version="other"), replace(SAMPLING, max_tokens=50)).eval_id
    found = compare(store, one, other)

    def mean(eval_id: str, task: str) -> float:
        scores = [row[4] for row in rows(store) if row[0] == eval_id and row[1] == task]
        return sum(scores) / len(scores)

    expected = [(task.id, mean(one, task.id), mean(other, task.id)) for task in bench.tasks]
    assert [item["task_id"] for item in found["items"]] == [task for task, _, _ in expected]
    for name, column in (("first", 1), ("second", 2)):
        assert [item[name] for item in found["items"]] == pytest.approx([row[column] for row in expected])
    gaps = [first - second for _, first, second in expected]
    assert found["difference"]["estimate"] == pytest.approx(sum(gaps) / 30)
    assert found["difference"]["estimate"] == pytest.approx(found["scores"][0] - found["scores"][1])
    counts = [sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps), sum(gap == 0 for gap in gaps)]
    assert [found["better_tasks"], found["worse_tasks"], found["equal_tasks"]] == counts
    assert found["sampling_differs"] == {"max_tokens": [64, 50]}
    mirrored = compare(store, other, one)
    assert mirrored["difference"]["estimate"] == pytest.approx(-found["difference"]["estimate"])
    assert mirrored["difference"]["low"] == pytest.approx(-found["difference"]["high"], abs=0.05)
    assert mirrored["p"] == found["p"]
    with Store(store) as opened:
        opened.con.execute("UPDATE evaluations SET score = 0.1")
    alike = compare(store, one, other)  # three times .1, divided by 3, is no .1
    assert (alike["better_tasks"], alike["worse_tasks"], alike["equal_tasks"]) == (0, 0, 30)


def test_compare_prints_and_names_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from workbench.cli.app import run

    store, bench = tmp_path / "s.duckdb", made.sums(30)
    one = run_bench(store, bench, made.adder(0.9, version="one"), SAMPLING).eval_id
    other = run_bench(store, bench, made.adder(0.1, version="other"), SAMPLING).eval_id
    command = ["--store", str(store), "eval", "compare", one]
    assert run([*command, other]) == 0
    printed = capsys.readouterr().out
    assert "tasks better, worse, equal" in printed
    assert run([*command, other, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == compare(store, one, other)
    assert run([*command, "nothing"]) == NotFound.exit_code
    assert "no evaluation 'nothing'" in capsys.readouterr().err
    single = made.sums(1)
    ids = [run_bench(store, single, made.adder(x, version=str(x)), SAMPLING).eval_id for x in (0.0, 1.0)]
    assert compare(store, *ids)["difference"]["low"] is None


def test_an_evaluation_knows_the_run_that_made_its_model(tmp_path: Path) -> None:
    """By the digest of the weights; also where the evaluation came first. Others have none."""
    store, bench = tmp_path / "s.duckdb", made.sums(4)
    policy = replace(made.adder(0.5), weights="w1")
    early = run_bench(store, bench, replace(policy, version="early"), SAMPLING).eval_id
    with Store(store) as opened, opened.transaction() as con:
        for run, day, weights in (("r1", 1, "w1"), ("r2", 2, "w1"), ("r3", 3, "w3")):
            con.execute(
                "INSERT INTO runs VALUES (?, 'm', '{}', '{}', 'c', '{}', 'f', 'done', NULL, make_timestamptz(?), NULL)",
                [run, day],
            )
            con.execute("INSERT INTO artifacts VALUES (?, 'model', 'p', ?)", [run, weights])
    late = run_bench(store, bench, policy, SAMPLING).eval_id
    named = run_bench(store, bench, replace(policy, name="out/r1/model", version="named"), SAMPLING).eval_id
    run_bench(store, bench, replace(policy, version="early"), SAMPLING)
    stranger = run_bench(store, bench, made.adder(0.5, version="stranger"), SAMPLING).eval_id
    with Store(store, read_only=True) as opened:
        found = dict(opened.con.execute("SELECT eval_id, run_id FROM eval_benches").fetchall())
    assert found == {early: "r2", late: "r2", named: "r1", stranger: None}


def test_one_task_has_a_score_and_no_made_up_interval(tmp_path: Path) -> None:
    found = scored(tmp_path, made.sums(1), made.adder(1.0), SAMPLING, num_samples=2)
    assert found["score"] == {"estimate": 1.0, "low": None, "high": None, "method": "one task: no interval"}
    found = scored(tmp_path, made.sums(6), made.adder(1.0), SAMPLING, num_samples=2)
    assert found["score"] == found["pass_at"]["2"]
    assert (found["score"]["low"] < 0.7, found["score"]["high"]) == (True, 1.0)
