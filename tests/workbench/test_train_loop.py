"""`workbench train` on the loop engine: runs resume and are not repeated, lineage is kept, figures are measured."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("sklearn")

torch.set_num_threads(1)

from loop_recipes_made import FLOW, LABELS, PAIRS, loop_recipe  # noqa: E402
from training_made import CHILD_CODE, query, training_child  # noqa: E402

from workbench import train as training  # noqa: E402
from workbench.cli import app  # noqa: E402
from workbench.data.store import Store  # noqa: E402
from workbench.errors import InputError  # noqa: E402
from workbench.loop_recipes import LoopRecipe  # noqa: E402
from workbench.policies.loop.models import load  # noqa: E402
from workbench.recipes import read  # noqa: E402
from workbench.train import train  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
NEW = {
    "diffusion": "{new: {kind: mlp, hidden: 16, depth: 3}}",
    "vision": "{new: {kind: resnet, width: 4}}",
}


def weights(model: Path) -> bytes:
    return (model / "model.safetensors").read_bytes()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs(path: Path, tmp_path: Path) -> None:
    chosen = read(path)
    assert isinstance(chosen, LoopRecipe)
    overrides = ["settings.steps=2", "settings.batch_size=8", f"output={tmp_path}", "data.num=64"]
    overrides += [f"models.{name}={NEW[chosen.backend]}" for name in chosen.models]
    if chosen.student and not chosen.student.copy:
        overrides.append(f"student={NEW[chosen.backend]}")
    overrides += [f"pools.{name}.steps=1" for name in chosen.pools]
    if chosen.backend == "diffusion":
        overrides += ["evaluation.num=32", "evaluation.student_steps=[1]", "evaluation.teacher_steps=[1]"]
    if chosen.method == "ps-kd":
        overrides.append("config.num_images=64")
    result = train(read(path, overrides), tmp_path / "s.duckdb")
    assert query(tmp_path, "SELECT status, method FROM runs") == [("done", chosen.method)]
    assert (result.model / "model.safetensors").exists()
    assert {name.split("/")[0] for name in result.metrics} & {"student", "student@1"}


#: Times as numbers: DuckDB fetches a time with a zone only where pytz is installed.
RUNS = "SELECT * REPLACE (epoch_us(created_at) AS created_at, epoch_us(ended_at) AS ended_at) FROM runs"


def test_a_run_is_loaded_again_as_a_network_and_a_second_call_trains_nothing(tmp_path: Path) -> None:
    first = train(loop_recipe(tmp_path, FLOW), tmp_path / "s.duckdb")
    before = query(tmp_path, RUNS), query(tmp_path, "SELECT * FROM metrics ORDER BY ALL")
    again = train(loop_recipe(tmp_path, FLOW), tmp_path / "s.duckdb")
    assert (first.was_done, again.was_done) == (False, True)
    assert (again.run_id, again.version, again.metrics) == (first.run_id, first.version, first.metrics)
    assert (query(tmp_path, RUNS), query(tmp_path, "SELECT * FROM metrics ORDER BY ALL")) == before
    loaded = load(first.model)
    assert (loaded.version, loaded.config["shape"]) == (first.version, [2])
    from_folder = train(loop_recipe(tmp_path, FLOW, student=str(first.model)), tmp_path / "s.duckdb")
    assert from_folder.run_id != first.run_id
    assert weights(from_folder.model) != weights(first.model)
    assert not train(loop_recipe(tmp_path, FLOW, settings={"seed": 1}), tmp_path / "s.duckdb").was_done


def test_a_teacher_of_another_recipe_is_trained_first_and_lineage_is_in_the_card(tmp_path: Path) -> None:
    (tmp_path / "teacher.yaml").write_text(json.dumps({**FLOW, "output": str(tmp_path / "teacher")}))
    chosen = loop_recipe(tmp_path, PAIRS, models={"teacher": {"recipe": "teacher.yaml"}}, student={"copy": "teacher"})
    result = train(chosen, tmp_path / "s.duckdb")
    assert sorted(query(tmp_path, "SELECT method FROM runs")) == [("flow-matching",), ("slimflow",)]
    assert train(chosen, tmp_path / "s.duckdb").was_done
    assert len(query(tmp_path, "SELECT 1 FROM runs")) == 2
    card = (result.model / "README.md").read_text()
    ((lineage, packages, code),) = query(
        tmp_path, "SELECT lineage, packages, code_version FROM runs WHERE method = 'slimflow'"
    )
    lineage, (pool,) = json.loads(lineage), result.pools
    assert lineage["student"]["version"] == lineage["models"]["teacher"]["version"] == pool["version"]
    for expected in (
        result.run_id, result.version, code, lineage["student"]["version"], lineage["data"]["digest"], pool["digest"],
        "copy of teacher", "2407.12718", '"guidance": 0.0', f"torch {json.loads(packages)['torch']}", "| seed | 0 |",
        "100 pairs `pairs` of `teacher`", f"| student@1/energy_distance | "
        f"{result.metrics['student@1/energy_distance']:.6g} |", "| teacher@2/sliced_wasserstein |",
    ):  # fmt: skip
        assert expected in card, expected
    artifacts = dict(
        query(tmp_path, f"SELECT kind, path FROM artifacts WHERE run_id = '{result.run_id}' ORDER BY kind")
    )
    assert sorted(artifacts) == ["model", "model card", "samples"]
    assert Path(artifacts["samples"]).read_bytes().startswith(b"\x89PNG")


def test_a_pool_is_made_once_and_a_larger_one_goes_on_where_it_ended(tmp_path: Path) -> None:
    def made(num: int, **settings: Any) -> tuple[int, int]:
        pools = {"pairs": {**PAIRS["pools"]["pairs"], "num": num}}
        result = train(loop_recipe(tmp_path, PAIRS, pools=pools, settings=settings), tmp_path / "s.duckdb")
        return result.pools[0]["reused"], result.pools[0]["made"]

    assert made(100) == (0, 100)
    assert made(100, seed=1) == (100, 0)
    assert made(2000) == (1024, 976)
    assert query(tmp_path, "SELECT chunk, num FROM pair_chunks ORDER BY 1") == [(0, 1024), (1, 1024)]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_a_run_that_was_stopped_goes_on_and_equals_an_undisturbed_one(
    how: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real signal in the second phase of two; the first phase is not trained again."""
    monkeypatch.setattr(training, "code_version", lambda: CHILD_CODE)  # of the child, whatever is edited meanwhile
    given = {**PAIRS, "settings": {**PAIRS["settings"], "steps": 9, "save_every": 3, "log_every": 4}}
    for name in ("cut", "whole"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "r.yaml").write_text(json.dumps({**given, "output": str(tmp_path / name / "out")}))
    child = training_child(tmp_path / "cut", "distil")
    child.send_signal(how)
    out, errors = child.communicate("go on\n", timeout=900)
    if how == signal.SIGINT:
        assert child.returncode == 130, errors[-3000:]
        assert "Stopped after step 4 of phase 'distil'" in out
    statuses = {signal.SIGINT: "interrupted", signal.SIGKILL: "running"}
    assert query(tmp_path / "cut", "SELECT status FROM runs") == [(statuses[how],)]

    (first_phase,) = (tmp_path / "cut" / "out").glob("*/1-reflow/end.safetensors")
    before = first_phase.stat().st_mtime_ns
    resumed = train(read(tmp_path / "cut" / "r.yaml"), tmp_path / "cut" / "s.duckdb")
    whole = train(read(tmp_path / "whole" / "r.yaml"), tmp_path / "whole" / "s.duckdb")
    assert first_phase.stat().st_mtime_ns == before
    assert query(tmp_path / "cut", "SELECT status, error FROM runs") == [("done", None)]
    assert weights(resumed.model) == weights(whole.model)
    every = "SELECT phase, step, name, value FROM metrics ORDER BY ALL"
    cut, undisturbed = query(tmp_path / "cut", every), query(tmp_path / "whole", every)
    if how == signal.SIGINT:
        assert cut == undisturbed
    else:  # what was told in the seconds before the kill, and was not yet stored, is gone
        assert set(cut) <= set(undisturbed)
        assert len(set(cut)) == len(cut)
        assert [row for row in cut if row[0] == "evaluation"] == [row for row in undisturbed if row[0] == "evaluation"]
    assert resumed.pools[0]["made"] == 0


def test_a_failure_is_a_row_and_the_next_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench import loop_measures

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(loop_measures, "distances", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(loop_recipe(tmp_path, FLOW), tmp_path / "s.duckdb")
    assert query(tmp_path, "SELECT status, error FROM runs") == [("failed", "RuntimeError: out of memory")]
    assert not train(loop_recipe(tmp_path, FLOW), tmp_path / "s.duckdb").was_done
    assert query(tmp_path, "SELECT status, error FROM runs") == [("done", None)]


def test_a_classifier_learns_the_digits_and_its_accuracy_is_kept(tmp_path: Path) -> None:
    teacher = train(loop_recipe(tmp_path, LABELS), tmp_path / "s.duckdb")
    student = {"new": {"kind": "mlp-classifier", "width": 4, "depth": 1, "seed": 1}}
    chosen = loop_recipe(
        tmp_path, LABELS, method="logit-standardization", student=student, models={"teacher": str(teacher.model)},
        settings={"steps": 2},
    )  # fmt: skip
    result = train(chosen, tmp_path / "s.duckdb")
    assert teacher.metrics["student/accuracy"] > 0.8
    assert result.metrics["teacher/accuracy"] == teacher.metrics["student/accuracy"]
    assert result.metrics["student/accuracy"] < 0.5
    assert (
        f"| student/accuracy | {result.metrics['student/accuracy']:.6g} |" in (result.model / "README.md").read_text()
    )


def test_an_adapter_is_saved_as_a_plain_network_that_predicts_as_it_did(tmp_path: Path) -> None:
    from workbench.policies.loop import models
    from workbench.policies.loop.roles import Adapted

    data = {"name": "gauss8", "num": 256, "classes": 2}
    new = {"new": {"kind": "mlp", "hidden": 16, "depth": 2}}
    chosen = loop_recipe(
        tmp_path, {**FLOW, "student": None}, method="lora-guidance", config={"rank": 2, "weight": 2.0},
        models={"teacher": new}, data=data, settings={"learning_rate": 0.1},
    )  # fmt: skip
    result = train(chosen, tmp_path / "s.duckdb")
    base = models.make("mlp", models.MlpSizes(hidden=16, depth=2), (2,), 2, 0).net
    plain = load(result.model).net
    assert "lora" not in "".join(dict(plain.named_parameters()))
    adapted = Adapted(base, "student", 2)
    start = weights(result.model)
    with torch.no_grad():
        for one in adapted.parameters():
            one.normal_()
    x, t, c = torch.randn(5, 2), torch.rand(5), torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(models.merged(adapted)(x, t, c), adapted(x, t, c))
    assert not torch.allclose(adapted(x, t, c), base(x, t, c))  # the base itself stays as it was
    assert start == weights(result.model)


def test_what_cannot_be_trained_is_refused_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "s.duckdb"
    with pytest.raises(InputError, match=r"is no folder of a network: it has no config\.json"):
        train(loop_recipe(tmp_path, FLOW, student=str(tmp_path / "nowhere")), store)
    with pytest.raises(InputError, match=r"A dit is made for images, and the data have the shape \[2\]"):
        train(loop_recipe(tmp_path, FLOW, student={"new": {"kind": "dit"}}), store)
    with pytest.raises(InputError, match="The oracle checkerboard is a mixture in the plane"):
        train(loop_recipe(tmp_path, FLOW, data={"name": "digits"}, models={"t": {"oracle": "checkerboard"}}), store)
    with pytest.raises(InputError, match=r"'teacher' \(exact mixture gauss8\) has no weights to copy"):
        train(
            loop_recipe(tmp_path, FLOW, student={"copy": "teacher"}, models={"teacher": {"oracle": "gauss8"}}), store
        )  # fmt: skip
    trained = train(loop_recipe(tmp_path, FLOW), store)
    chosen = loop_recipe(tmp_path, LABELS, method="logit-standardization", models={"teacher": str(trained.model)})
    with pytest.raises(InputError, match=r"models\.teacher .* is a mlp for data of the shape \[2\] and 0 classes"):
        train(chosen, store)
    with pytest.raises(InputError, match="needs a model for the role 'teacher'"):
        train(loop_recipe(tmp_path, FLOW, method="swiftbrush"), store)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="runs in one process"):
        train(loop_recipe(tmp_path, FLOW), store)


def test_the_command_shows_pools_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(json.dumps({**PAIRS, "output": str(tmp_path / "out")}))
    arguments = ["--store", str(tmp_path / "s.duckdb"), "train", str(tmp_path / "r.yaml"), "settings.steps=2"]
    assert app.run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["method"], found["was_done"], found["pools"][0]["made"]) == ("slimflow", False, 100)
    assert app.run(arguments) == 0
    said = capsys.readouterr().out
    assert "nothing was trained" in said
    assert "100 from the store" in said
    assert "student@1/energy_distance" in said


def test_a_store_of_the_former_schema_gets_its_table(tmp_path: Path) -> None:
    with Store(tmp_path / "s.duckdb") as store, store.transaction() as con:
        con.execute("DROP TABLE pair_chunks")
        con.execute("DELETE FROM schema_versions WHERE version >= 5")
    with Store(tmp_path / "s.duckdb") as store:
        assert store.con.execute("SELECT count(*) FROM pair_chunks").fetchall() == [(0,)]
