"""Stored scores in `workbench train`: made once, worth the live teacher, and then the teacher is not even read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

torch.set_num_threads(1)

from training_made import plain_model, query, recipe  # noqa: E402

from workbench.errors import InputError  # noqa: E402
from workbench.policies.lm import local_models, scoring  # noqa: E402
from workbench.train import RunResult, train  # noqa: E402

WORDS = 22  # of rooms with a side of 3: three special tokens, four moves, nine rooms, six coordinates
OFF = {"divergence": "forward_kl", "on_policy": 0.0}
STORED = {**OFF, "teacher_scores": "stored"}


def made(result: RunResult) -> tuple[int, int]:
    (scores,) = result.scores
    return scores["reused"], scores["made"]


def run(folder: Path, top_k: int = 4, **changes: Any) -> RunResult:
    return train(recipe(folder, **{"config": STORED, "rollouts": {"top_k": top_k}, **changes}), folder / "s.duckdb")


def losses(folder: Path, result: RunResult) -> list[float]:
    sql = f"SELECT value FROM metrics WHERE name = 'loss' AND run_id = '{result.run_id}' ORDER BY step"
    return [value for (value,) in query(folder, sql)]


def test_scores_are_made_once_for_all_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another objective reads them, though the teacher cannot be asked any more."""
    first = run(tmp_path)
    assert made(first) == (0, 8)

    def refuse(*_: Any) -> None:
        raise AssertionError("the teacher was asked again")

    monkeypatch.setattr(scoring.LocalTeacher, "top_k", refuse)
    assert made(run(tmp_path, config={**STORED, "divergence": "reverse_kl"})) == (8, 0)
    assert made(run(tmp_path, method="taid", config={"teacher_scores": "stored"})) == (8, 0)
    assert run(tmp_path).was_done
    assert query(tmp_path, "SELECT count(*), min(k), max(k) FROM teacher_scores") == [(8, 4, 4)]


def test_what_scores_depend_on_makes_others(tmp_path: Path) -> None:
    """Another k, another prompt of the teacher, another teacher."""
    assert made(run(tmp_path)) == (0, 8)
    assert made(run(tmp_path, top_k=5)) == (0, 8)
    writing = {"top_k": 4, "context": "prompt"}  # the rollouts stay the same ones
    assert made(run(tmp_path, rollouts=writing, config={**STORED, "teacher_context": "privileged"})) == (0, 8)
    other = {"teacher": {"new": {"hidden": 16, "layers": 1, "seed": 3}}}
    again = run(tmp_path, models=other)
    assert made(again) == (0, 8)
    assert again.rollouts[0]["made"] == 8  # and its own rollouts
    assert query(tmp_path, "SELECT count(*), count(DISTINCT teacher) FROM teacher_scores") == [(32, 2)]


@pytest.mark.parametrize("context", ["prompt", "privileged"])
def test_all_words_train_like_the_live_teacher(tmp_path: Path, context: str) -> None:
    """k = V; losses of every step up to float16. With few words they are less."""
    writing = {"context": "prompt", "top_k": WORDS}
    live = run(tmp_path, config={**OFF, "teacher_context": context}, rollouts=writing)
    assert live.scores == []
    whole = run(tmp_path, config={**STORED, "teacher_context": context}, rollouts=writing)
    few = run(tmp_path, config={**STORED, "teacher_context": context}, rollouts={**writing, "top_k": 2})
    expected = losses(tmp_path, live)
    assert losses(tmp_path, whole) == pytest.approx(expected, rel=5e-3)
    assert losses(tmp_path, few)[0] < 0.9 * expected[0]


def test_a_teacher_whose_rollouts_and_scores_are_stored_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = plain_model(tmp_path), plain_model(tmp_path, name="teacher")
    reweigh(Path(teacher))
    plain: dict[str, Any] = {"environment": None, "tasks": {"set": "sums"}, "student": student}
    plain["models"] = {"teacher": {"new": None, "folder": teacher}}
    read, kept = [], local_models._read

    def noted(folder: Path, *rest: Any) -> Any:
        read.append(folder.name)
        return kept(folder, *rest)

    monkeypatch.setattr(local_models, "_read", noted)
    assert made(run(tmp_path, **plain)) == (0, 8)
    assert sorted(read) == ["model", "teacher"]
    read.clear()
    second = run(tmp_path, **plain, method="taid", config={"teacher_scores": "stored"})
    assert (made(second), read) == ((8, 0), ["model"])
    read.clear()
    assert run(tmp_path, **plain).was_done
    assert read == []


def reweigh(folder: Path) -> None:
    """Other weights, so that teacher and student differ."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_card_names_the_scores(tmp_path: Path) -> None:
    result = run(tmp_path)
    ((lineage,),) = query(tmp_path, "SELECT lineage->>'$.scores[0].version' FROM runs")
    card = (result.model / "README.md").read_text()
    assert f"Scores of `teacher` (`{lineage}`, prompt `prompt`): its 4 likeliest words of every token of 8" in card


def test_what_cannot_be_scored_is_refused_with_advice(tmp_path: Path) -> None:
    for changes in ({"on_policy": 0.5}, {"temperature": 2.0}, {"off_policy_source": "teacher"}):
        with pytest.raises(InputError, match="need on_policy 0, off_policy_source stored, temperature 1"):
            recipe(tmp_path, config={**STORED, **changes})
    with pytest.raises(InputError, match=r"rollouts\.top_k is 64, and the vocabulary has 22 words\. Lower it"):
        run(tmp_path, top_k=64)
    student = plain_model(tmp_path)
    other = plain_model(tmp_path, [f"w{i}" for i in reversed(range(26))], "teacher")
    plain: dict[str, Any] = {"environment": None, "tasks": {"set": "sums"}, "student": student}
    with pytest.raises(InputError, match="has another vocabulary than the student"):
        run(tmp_path, **plain, models={"teacher": {"new": None, "folder": other}})
    labels = {**STORED, "policy": "labels"}
    with pytest.raises(InputError, match=r"has no such model\. Add models\.teacher"):
        run(tmp_path, **plain, models={}, config=labels)
