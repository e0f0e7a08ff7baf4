"""What a training run reads: made once, topped up, judged, cut into the student's tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

torch.set_num_threads(1)

from tiny_models import make_tokenizer  # noqa: E402
from training_made import plain_model, query, recipe  # noqa: E402

from workbench import train as training  # noqa: E402
from workbench.data.store import Store  # noqa: E402
from workbench.errors import InputError, TrainingError  # noqa: E402
from workbench.policies.lm.rollout import Rollout  # noqa: E402
from workbench.policies.store import load_rollouts, save_rollouts  # noqa: E402
from workbench.train import train  # noqa: E402


def test_rollouts_are_made_once_and_topped_up(tmp_path: Path) -> None:
    """Another objective replays them; more of them a task adds only what lacks; other weights get their own."""
    store = tmp_path / "s.duckdb"
    off = {"divergence": "forward_kl", "on_policy": 0.0}
    (first,) = train(recipe(tmp_path, config=off), store).rollouts
    assert (first["policy"], first["num"], first["made"], first["reused"]) == ("teacher", 8, 8, 0)
    (replayed,) = train(recipe(tmp_path, method="sequence-kd"), store).rollouts
    assert (replayed["made"], replayed["reused"], replayed["digest"]) == (0, 8, first["digest"])
    (more,) = train(recipe(tmp_path, config=off, rollouts={"per_task": 3}), store).rollouts
    assert (more["num"], more["made"], more["reused"]) == (24, 16, 8)
    (fewer,) = train(recipe(tmp_path, method="sequence-kd", rollouts={"per_task": 1}), store).rollouts
    assert fewer["digest"] == first["digest"]
    other = {"teacher": {"new": {"hidden": 16, "layers": 1, "seed": 3}}}
    (theirs,) = train(recipe(tmp_path, config=off, models=other), store).rollouts
    assert (theirs["made"], theirs["reused"]) == (8, 0)
    assert theirs["versions"] != first["versions"]
    (both,) = train(recipe(tmp_path, config=off, rollouts={"per_task": 9, "any_version": True}), store).rollouts
    assert (both["num"], both["versions"]) == (32, sorted(first["versions"] + theirs["versions"]))
    samples = query(
        tmp_path, "SELECT sampling->>'temperature', min(sample), max(sample), count(reward) FROM rollouts GROUP BY 1"
    )
    assert samples == [("1.0", 0, 2, 32)]


def test_pass_rates_come_from_stored_tries_and_weigh_the_tasks(tmp_path: Path) -> None:
    from workbench.train_data import BASE, Gatherer, choose_judge, choose_tasks

    chosen = recipe(tmp_path, method="paced", rollouts={"tries": 4})
    result = train(chosen, tmp_path / "s.duckdb")
    assert {one["policy"]: one["num"] for one in result.rollouts} == {"teacher": 8, f"{BASE} (pass rates)": 32}
    right = dict(
        query(tmp_path, f"SELECT task_id, sum((reward >= 1)::INT) FROM rollouts WHERE policy = '{BASE}' GROUP BY 1")
    )
    judge = choose_judge(chosen)
    models = {
        name: training._model(source, chosen, judge.environment, tmp_path, lambda _: None)
        for name, source in {"student": chosen.student, **chosen.models}.items()
    }
    gatherer = Gatherer(chosen, tmp_path / "s.duckdb", models["student"], models, judge, lambda _: None)
    data = gatherer.gather(choose_tasks(chosen, judge, tmp_path / "s.duckdb"))
    assert {task.id: task.pass_rate for task in data.tasks} == {t: (n + 0.5) / 5 for t, n in right.items()}
    assert all(supply.made == 0 for supply in data.supplies)


def test_without_a_judge_pass_rates_are_refused(tmp_path: Path) -> None:
    folder = plain_model(tmp_path)
    chosen = recipe(
        tmp_path, method="paced", student=folder, models={"teacher": folder}, environment=None, tasks={"set": "sums"}
    )
    with pytest.raises(InputError, match="nothing judges the student's rollouts"):
        train(chosen, tmp_path / "s.duckdb")


def test_labels_are_the_answers_and_end(tmp_path: Path) -> None:
    chosen = recipe(
        tmp_path, method="sequence-kd", config={"policy": "labels"}, student=plain_model(tmp_path), models={},
        environment=None, tasks={"set": "sums"},
    )  # fmt: skip
    result = train(chosen, tmp_path / "s.duckdb")
    assert (result.rollouts[0]["num"], result.rollouts[0]["versions"]) == (8, ["worked"])
    rows = query(tmp_path, "SELECT text, completion_ids FROM rollouts WHERE task_id = 'sum-3'")
    assert rows == [("w7", [10, 1])]


def test_a_writer_with_other_tokens_is_encoded_again_and_refused_in_an_environment(tmp_path: Path) -> None:
    student = plain_model(tmp_path)
    teacher = plain_model(tmp_path, [f"w{i}" for i in reversed(range(26))], "teacher")
    chosen = recipe(
        tmp_path, method="sequence-kd", student=student, models={"teacher": teacher}, environment=None,
        tasks={"set": "sums"},
    )  # fmt: skip
    train(chosen, tmp_path / "s.duckdb")
    tokenizer = make_tokenizer()
    for text, ids in query(tmp_path, "SELECT text, completion_ids FROM rollouts"):
        words = [number for number in ids if number != tokenizer.eos_token_id]
        assert tokenizer.decode(words) == text
        assert all(word in text.split() for word in tokenizer.convert_ids_to_tokens(words))
    with pytest.raises(InputError, match="cannot be cut into the student's tokens"):
        train(
            recipe(tmp_path, method="sequence-kd", student=student, models={"teacher": teacher}), tmp_path / "s.duckdb"
        )
    with pytest.raises(InputError, match=r"Token 3 is 'w0' for the student and 'w25' for 'teacher'"):
        train(
            recipe(tmp_path, student=student, models={"teacher": teacher}, environment=None, tasks={"set": "sums"}),
            tmp_path / "s.duckdb",
        )
    assert query(tmp_path, "SELECT count(*) FROM runs") == [(1,)]


def test_fresh_rollouts_can_be_kept_and_replayed(tmp_path: Path) -> None:
    store = tmp_path / "s.duckdb"
    kept = train(recipe(tmp_path, keep_rollouts=True), store)
    rows = query(
        tmp_path, "SELECT policy, step, count(*), count(DISTINCT model_version) FROM rollouts GROUP BY ALL ORDER BY 2"
    )
    assert rows == [(f"student@{kept.run_id}", 0, 4, 1), (f"student@{kept.run_id}", 1, 4, 1)]
    assert train(recipe(tmp_path, keep_rollouts=True), store).was_done
    replay = train(
        recipe(tmp_path, method="sequence-kd", config={"policy": f"student@{kept.run_id}"}, settings={"batch_size": 2}),
        store,
    )
    assert replay.rollouts[0]["made"] == 0


def test_a_policy_of_the_store_alone_is_enough(tmp_path: Path) -> None:
    """What another program wrote (an API's text, say) trains a student without any teacher model."""
    folder = plain_model(tmp_path)
    from workbench.policies.lm.local_models import load

    tokens = load(folder).tokens
    rollouts = [Rollout(f"sum-{i}", [3 + i, 4 + i], [5 + i, 1]) for i in range(8)]
    with Store(tmp_path / "s.duckdb") as store, store.transaction() as con:
        save_rollouts(con, "teacher", rollouts, ["x"] * 8, model_version="some-api", tokenizer=tokens, sampling={})
    chosen = recipe(tmp_path, method="sequence-kd", student=folder, models={}, environment=None, tasks={"set": "sums"})
    (supply,) = train(chosen, tmp_path / "s.duckdb").rollouts
    assert (supply["num"], supply["reused"], supply["versions"]) == (8, 8, ["some-api"])


def test_the_same_words_with_other_settings_are_other_rollouts(tmp_path: Path) -> None:
    """Else the tasks whose completion happens to be the same would be left out of the run, without a word."""
    rollouts = [Rollout(f"sum-{i}", [3 + i, 4 + i], [5 + i, 1]) for i in range(8)]
    plain_model(tmp_path)
    with Store(tmp_path / "s.duckdb") as store, store.transaction() as con:
        for sampling in ({"temperature": 1.0}, {"temperature": 0.0}, {"temperature": 1.0}):
            save_rollouts(con, "teacher", rollouts, ["x"] * 8, model_version="m", tokenizer="t", sampling=sampling)
        for sampling in ({"temperature": 1.0}, {"temperature": 0.0}):
            found = load_rollouts(con, "teacher", [r.task_id for r in rollouts], "t", sampling=sampling)
            assert [len(some) for some in found.values()] == [1] * 8


def test_a_bench_brings_its_tasks_and_judges_what_is_written(tmp_path: Path) -> None:
    """Countdown's verifier rewards the student's tries; pass rates follow, and test tasks are left alone."""
    from workbench.evals.benches import load_bench

    tasks = load_bench("countdown", "train").tasks
    words = sorted({word for task in tasks for text in task.prompts.values() for word in str(text).split()})
    student, teacher = plain_model(tmp_path, words), plain_model(tmp_path, words, "teacher")
    chosen = recipe(
        tmp_path, method="paced", config={"stages": ["reverse_kl"]}, student=student, environment=None,
        models={"teacher": {"new": None, "folder": teacher}}, tasks={"bench": "countdown", "limit": 6},
        rollouts={"tries": 2}, settings={"max_completion_tokens": 4},
    )  # fmt: skip
    with pytest.raises(TrainingError, match="Are teacher and student the same model"):
        train(chosen, tmp_path / "s.duckdb")
    assert query(tmp_path, "SELECT DISTINCT verified, reward FROM rollouts") == [("countdown/1", 0.0)]
    assert {task for (task,) in query(tmp_path, "SELECT task_id FROM rollouts")} <= {task.id for task in tasks}
