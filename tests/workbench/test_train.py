"""`workbench train`: recipes run, runs resume and are not repeated, what is missing is made once, lineage is kept."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

torch.set_num_threads(1)

from tiny_models import make_tokenizer  # noqa: E402
from training_made import CHILD_CODE, SMALL, query, recipe, training_child  # noqa: E402

from workbench import train as training  # noqa: E402
from workbench.cli import app  # noqa: E402
from workbench.data.store import Store  # noqa: E402
from workbench.errors import InputError, NotFound, StoreFull  # noqa: E402
from workbench.policies.running import Interrupted  # noqa: E402
from workbench.recipes import read  # noqa: E402
from workbench.train import train  # noqa: E402
from workbench.train_run import code_files  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def weights(model: Path) -> bytes:
    return (model / "model.safetensors").read_bytes()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs(path: Path, tmp_path: Path) -> None:
    overrides = ["settings.steps=2", "settings.batch_size=4", f"output={tmp_path}", "environment.size=3"]
    overrides += ["student={new: {hidden: 16, layers: 1}}", "tasks.limit=6", "rollouts.tries=2"]
    if "models" in path.read_text():
        overrides.append("models={teacher: {new: {hidden: 16, layers: 1, seed: 9}}}")
    chosen = read(path, overrides)
    result = train(chosen, tmp_path / "s.duckdb")
    phases = len(chosen.config.phases())
    assert query(tmp_path, "SELECT status, method FROM runs") == [("done", chosen.method)]
    assert len(query(tmp_path, "SELECT DISTINCT phase FROM metrics WHERE name = 'train_loss'")) == phases
    assert (result.model / "model.safetensors").exists()
    assert all(supply["num"] == supply["made"] > 0 for supply in result.rollouts)


#: Times as numbers: DuckDB fetches a time with a zone only where pytz is installed.
RUNS = "SELECT * REPLACE (epoch_us(created_at) AS created_at, epoch_us(ended_at) AS ended_at) FROM runs"


def test_a_run_is_loaded_again_as_a_model_and_a_second_call_trains_nothing(tmp_path: Path) -> None:
    from workbench.policies.lm.local_models import load, vocabulary_version

    first = train(recipe(tmp_path), tmp_path / "s.duckdb")
    before = query(tmp_path, RUNS), query(tmp_path, "SELECT * FROM metrics ORDER BY ALL")
    again = train(recipe(tmp_path), tmp_path / "s.duckdb")
    assert (first.was_done, again.was_done) == (False, True)
    assert (again.run_id, again.version, again.model) == (first.run_id, first.version, first.model)
    assert (query(tmp_path, RUNS), query(tmp_path, "SELECT * FROM metrics ORDER BY ALL")) == before
    loaded = load(first.model)
    assert loaded.version == first.version
    assert loaded.tokens == vocabulary_version(make_tokenizer(recipe(tmp_path).environment.make().words()))  # pyright: ignore
    other = train(recipe(tmp_path, settings={"seed": 1}), tmp_path / "s.duckdb")
    assert other.run_id != first.run_id
    assert not other.was_done


def test_training_from_a_folder_equals_training_from_memory(tmp_path: Path) -> None:
    """Saving and loading a student changes nothing but its version."""
    environment = recipe(tmp_path).environment.make()  # pyright: ignore
    tokenizer = make_tokenizer(environment.words())
    from workbench.policies.lm import tiny

    tiny.make_model(tokenizer, 1, 16, 1).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    from_folder = train(recipe(tmp_path, student=str(tmp_path / "student")), tmp_path / "s.duckdb")
    from_memory = train(recipe(tmp_path), tmp_path / "s.duckdb")
    assert from_folder.run_id != from_memory.run_id
    assert weights(from_folder.model) == weights(from_memory.model)


def test_a_model_of_another_recipe_is_trained_first_and_only_once(tmp_path: Path) -> None:
    teacher = {**SMALL, "method": "sequence-kd", "config": {"policy": "labels"}, "output": str(tmp_path / "teacher")}
    (tmp_path / "teacher.yaml").write_text(json.dumps(teacher))
    chosen = recipe(tmp_path, models={"teacher": {"recipe": str(tmp_path / "teacher.yaml")}})
    first = train(chosen, tmp_path / "s.duckdb")
    assert sorted(query(tmp_path, "SELECT method, status FROM runs")) == [("gkd", "done"), ("sequence-kd", "done")]
    assert train(chosen, tmp_path / "s.duckdb").run_id == first.run_id
    assert len(query(tmp_path, "SELECT 1 FROM runs")) == 2


def test_lineage_is_in_the_card_and_evaluations_come_in_later(tmp_path: Path) -> None:
    chosen = recipe(tmp_path, method="taid")
    result = train(chosen, tmp_path / "s.duckdb")
    card = (result.model / "README.md").read_text()
    ((lineage, packages, code),) = query(tmp_path, "SELECT lineage, packages, code_version FROM runs")
    lineage = json.loads(lineage)
    (supply,) = result.rollouts
    for expected in (
        result.run_id, result.version, code, lineage["student"]["version"], lineage["models"]["teacher"]["version"],
        supply["digest"], lineage["tasks"]["digest"], "| teacher | 8 | 8 |", "2501.16937", '"t_start": 0.4',
        f"torch {json.loads(packages)['torch']}", "| seed | 0 |", "None in the store yet",
    ):  # fmt: skip
        assert expected in card, expected
    assert query(tmp_path, "SELECT kind, digest FROM artifacts ORDER BY 1")[0] == ("model", result.version)
    with Store(tmp_path / "s.duckdb") as store, store.transaction() as con:
        con.execute(
            "INSERT INTO eval_benches VALUES ('e1', 'rooms', 'test', 'd', 'm', 'v', '{}', 'reward/1', ?, now())",
            [result.run_id],
        )
        con.execute(  # a bench that knows the model by its folder alone
            "INSERT INTO eval_benches VALUES ('e2', 'svamp', 'test', 'd', ?, 'v', '{}', 'number/1', NULL, now())",
            [f"out/{result.run_id}/model"],
        )
        con.execute("INSERT INTO evaluations VALUES ('e2', 't', 0, 'ok', 0.5, '', NULL, 'number/1', 1, 0.0, NULL)")
        for sample, score in enumerate((1.0, 0.0, 1.0, None)):
            con.execute(
                "INSERT INTO evaluations VALUES ('e1', 't', ?, 'ok', ?, '', NULL, 'reward/1', 1, 0.0, NULL)",
                [sample, score],
            )
    assert train(chosen, tmp_path / "s.duckdb").was_done
    card = (result.model / "README.md").read_text()
    assert "| rooms | test | reward/1 | 4 | 1 | 0.667 | `e1` |" in card
    assert "| svamp | test | number/1 | 1 | 0 | 0.500 | `e2` |" in card


def test_a_run_that_ctrl_c_stopped_goes_on_and_equals_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real signal in the second phase of two; the first phase is not trained again."""
    monkeypatch.setattr(training, "code_version", lambda: CHILD_CODE)  # of the child, whatever is edited meanwhile
    given = {**SMALL, "method": "soda", "settings": {**SMALL["settings"], "steps": 12, "save_every": 5}}
    for name in ("cut", "whole"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "r.yaml").write_text(json.dumps({**given, "output": str(tmp_path / name / "out")}))
    child = training_child(tmp_path / "cut", "preference")
    child.send_signal(signal.SIGINT)
    out, errors = child.communicate("go on\n", timeout=120)
    assert child.returncode == 130, errors[-3000:]
    assert "Stopped after step 2 of phase 'preference'" in out  # asked after the first, when metrics are told
    assert query(tmp_path / "cut", "SELECT status FROM runs") == [("interrupted",)]

    resumed = train(read(tmp_path / "cut" / "r.yaml"), tmp_path / "cut" / "s.duckdb")
    whole = train(read(tmp_path / "whole" / "r.yaml"), tmp_path / "whole" / "s.duckdb")
    assert query(tmp_path / "cut", "SELECT status, error FROM runs") == [("done", None)]
    assert weights(resumed.model) == weights(whole.model)
    losses = "SELECT phase, step, value FROM metrics WHERE name = 'loss' ORDER BY ALL"
    assert query(tmp_path / "cut", losses) == query(tmp_path / "whole", losses)
    assert len(query(tmp_path / "cut", losses)) == 4 + 8


def test_a_killed_run_goes_on_from_its_last_checkpoint_and_counts_nothing_twice(tmp_path: Path) -> None:
    """What kill -9 leaves: a row that says running, metrics beyond the last checkpoint, no end of the phase."""
    chosen = recipe(tmp_path, settings={"steps": 4, "save_every": 3})
    whole = train(chosen, tmp_path / "s.duckdb")
    before, metrics = weights(whole.model), query(tmp_path, "SELECT * FROM metrics ORDER BY ALL")
    shutil.rmtree(whole.model)
    shutil.rmtree(whole.folder / "1-distil" / "checkpoint-4", ignore_errors=True)
    (whole.folder / "1-distil" / "end.safetensors").unlink()
    with Store(tmp_path / "s.duckdb") as store, store.transaction() as con:
        con.execute("UPDATE runs SET status = 'running', ended_at = NULL")
    again = train(chosen, tmp_path / "s.duckdb")
    assert (again.run_id, again.was_done) == (whole.run_id, False)
    assert weights(again.model) == before
    assert query(tmp_path, "SELECT * FROM metrics ORDER BY ALL") == metrics
    assert query(tmp_path, "SELECT status FROM runs") == [("done",)]


def test_a_failure_is_a_row_and_the_next_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.policies.lm import run as lm_run

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(lm_run, "run_method", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(recipe(tmp_path), tmp_path / "s.duckdb")
    assert query(tmp_path, "SELECT status, error FROM runs") == [("failed", "RuntimeError: out of memory")]
    with monkeypatch.context() as patched:
        patched.setattr(lm_run, "run_method", fail)
        patched.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        with pytest.raises(StoreFull, match=r"is full\. Free some space and run the command again"):
            train(recipe(tmp_path), tmp_path / "s.duckdb")
    assert not train(recipe(tmp_path), tmp_path / "s.duckdb").was_done
    assert query(tmp_path, "SELECT status, error FROM runs") == [("done", None)]


def test_other_code_is_another_run_and_the_result_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(recipe(tmp_path), tmp_path / "s.duckdb")
    monkeypatch.setattr(training, "code_version", lambda: "another")
    second = train(recipe(tmp_path), tmp_path / "s.duckdb")
    assert second.run_id != first.run_id
    assert (first.other_code, second.other_code) == ([], [f"{first.run_id} (done)"])
    assert weights(second.model) == weights(first.model)


def test_the_code_is_known_by_the_files_that_decide_a_run() -> None:
    home = Path(training.__file__).parent
    files = [path.relative_to(home).as_posix() for path in code_files()]
    for name in ("policies/lm/engine.py", "kernels/divergences.py", "evals/environments/rooms.py", "train.py"):
        assert name in files


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    import fcntl

    first = train(recipe(tmp_path), tmp_path / "s.duckdb")
    with (first.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="Another process is training this run"):
            train(recipe(tmp_path), tmp_path / "s.duckdb")


def test_metrics_that_are_no_numbers_are_stored_too(tmp_path: Path) -> None:
    from workbench.train_rows import Tracker

    rows = Tracker(tmp_path / "s.duckdb", "r", lambda _: None)
    for _ in range(2):  # the second is what a killed run writes again
        rows.on_metrics("p", 1, {"loss": 0.5, "grad_norm": float("nan"), "high": float("inf")})
        rows._flush()
    found = query(tmp_path, "SELECT name, value::VARCHAR FROM metrics ORDER BY 1")
    assert found == [("grad_norm", "nan"), ("high", "inf"), ("loss", "0.5")]


def test_metrics_are_stored_before_a_checkpoint_however_short_the_time(tmp_path: Path) -> None:
    from workbench.train_rows import Tracker

    rows = Tracker(tmp_path / "s.duckdb", "r", lambda _: None)
    for step in (1, 2, 3):
        rows.on_metrics("p", step, {"loss": 0.5})
    rows.on_metrics("p", 3, {})
    assert query(tmp_path, "SELECT step FROM metrics ORDER BY 1") == [(1,), (2,), (3,)]


def test_what_cannot_be_trained_is_refused_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "s.duckdb"
    off = {"on_policy": 0.0, "policy": "someone"}
    with pytest.raises(NotFound, match=r"policy 'someone'.* Add models\.someone, or store some"):
        train(recipe(tmp_path, config=off), store)
    with pytest.raises(InputError, match=r"is no model folder: it has no config\.json"):
        train(recipe(tmp_path, student=str(tmp_path / "nowhere")), store)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"has no \*\.safetensors"):
        train(recipe(tmp_path, student=str(tmp_path / "pickled")), store)
    with pytest.raises(NotFound, match="The store has no tasks 'gsm8k'"):
        train(recipe(tmp_path, tasks={"set": "gsm8k"}), store)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot be written .* Name another `output`"):
        train(recipe(tmp_path, output=str(tmp_path / "file")), store)
    with pytest.raises(InputError, match="needs a model for the role 'teacher'"):
        train(recipe(tmp_path, models={}), store)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="runs in one process"):
        train(recipe(tmp_path), store)


def test_the_command_says_what_was_done_and_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({**SMALL, "output": str(tmp_path / "out")}))
    arguments = ["--store", str(tmp_path / "s.duckdb"), "train", str(path), "settings.steps=3"]
    assert app.run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["method"], found["was_done"]) == ("gkd", False)
    assert app.run(arguments) == 0
    assert "nothing was trained" in capsys.readouterr().out
    assert app.run([*arguments, "settings.stepz=1"]) == InputError.exit_code
    assert "did you mean 'steps'" in capsys.readouterr().err

    def stop(*_: Any, **__: Any) -> None:
        raise Interrupted("Stopped after step 1 of phase 'p'; it is saved.")

    monkeypatch.setattr(training, "train", stop)
    assert app.run(arguments) == app.INTERRUPTED
    said = capsys.readouterr().err
    assert f"Go on with: workbench --store {tmp_path / 's.duckdb'} train {path} settings.steps=3" in said
