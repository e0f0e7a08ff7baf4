"""`workbench train` with a teacher behind a server: a real process that speaks the protocol."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

torch.set_num_threads(1)

from tiny_models import make_tokenizer  # noqa: E402
from tiny_server import make_served, shared  # noqa: E402
from training_made import plain_model, query, recipe  # noqa: E402

from workbench import train_data  # noqa: E402
from workbench.data.store import Store  # noqa: E402
from workbench.errors import EndpointError, InputError, TrainingError  # noqa: E402
from workbench.policies.lm.local_models import load  # noqa: E402
from workbench.policies.lm.remote_models import RemoteModel, remote  # noqa: E402
from workbench.policies.store import save_tasks  # noqa: E402
from workbench.policies.tasks import Task  # noqa: E402
from workbench.train import RunResult, train  # noqa: E402

STORED = {"divergence": "forward_kl", "on_policy": 0.0, "teacher_scores": "stored"}


@pytest.fixture
def server() -> Any:
    server = shared()
    server.plan()
    return server


def teacher_folder(folder: Path) -> str:
    """The server's own model and tokenizer."""
    tokenizer, model = make_served()
    model.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    return str(folder / "teacher")


def run(folder: Path, teacher: Any, **changes: Any) -> RunResult:
    """Eight tasks, the student of `plain_model`, and this teacher."""
    given = {"student": plain_model(folder), "models": {"teacher": teacher}, "environment": None,
             "tasks": {"set": "sums"}, **changes}  # fmt: skip
    return train(recipe(folder, **given), folder / "s.duckdb")


def losses(folder: Path, result: RunResult) -> list[float]:
    sql = f"SELECT value FROM metrics WHERE name = 'loss' AND run_id = '{result.run_id}' ORDER BY step"
    return [value for (value,) in query(folder, sql)]


def test_its_text_is_learnt_from_and_asked_for_once(tmp_path: Path, server: Any) -> None:
    served = {"served": {"url": server.url, "model": "tiny"}}
    first = run(tmp_path, served, method="sequence-kd", settings={"steps": 12})
    asked = [body for body in server.bodies() if "prompt" in body and body["max_tokens"] == 8]
    assert sorted(body["prompt"] for body in asked) == sorted(f"w{i} w{i + 1}" for i in range(8))
    assert not any("return_token_ids" in body for body in asked)  # another model's ids would not be ours
    assert first.rollouts[0]["made"] == 8
    assert query(tmp_path, "SELECT DISTINCT policy, model_version FROM rollouts") == [("teacher", "tiny")]
    told = losses(tmp_path, first)
    assert told[-1] < told[0]
    server.plan()
    again = run(tmp_path, served, method="soda", settings={"steps": 1})
    assert {s["policy"]: s["made"] for s in again.rollouts} == {"teacher": 0, "student-base": 8}
    assert server.bodies() == []  # not even a probe


def test_its_scores_are_worth_those_of_the_same_model_here(tmp_path: Path, server: Any) -> None:
    """The same losses at every step up to float16, and the same student."""
    folder = teacher_folder(tmp_path)
    common: dict[str, Any] = {"config": {**STORED, "policy": "labels"}, "rollouts": {"top_k": 20}}
    here = run(tmp_path, folder, **common)
    there = run(tmp_path, {"served": {"url": server.url, "model": "tiny", "tokenizer": folder}}, **common)
    assert (here.scores[0]["made"], there.scores[0]["made"]) == (8, 8)
    assert losses(tmp_path, there) == pytest.approx(losses(tmp_path, here), rel=5e-3)
    for name, weight in load(there.model).model.state_dict().items():
        torch.testing.assert_close(weight, load(here.model).model.state_dict()[name], atol=2e-4, rtol=0)
    server.plan({"seed": 11})  # other weights teach something else
    served = {"url": server.url, "model": "tiny", "tokenizer": folder, "version": "other"}
    other = run(tmp_path, {"served": served}, **common)
    assert losses(tmp_path, other) != pytest.approx(losses(tmp_path, here), rel=5e-2)


def test_it_can_walk_in_an_environment(tmp_path: Path, server: Any) -> None:
    """Only with its tokenizer; the moves of a teacher that knows nothing of rooms are rewarded with nothing."""
    folder = teacher_folder(tmp_path)
    common: dict[str, Any] = {"method": "sequence-kd", "student": folder, "environment": {"name": "rooms", "size": 3}}
    common["tasks"] = {"limit": 4}
    found = run(tmp_path, {"served": {"url": server.url, "model": "tiny", "tokenizer": folder}}, **common)
    assert found.rollouts[0]["made"] == 4
    assert query(tmp_path, "SELECT DISTINCT reward FROM rollouts") == [(0.0,)]
    with pytest.raises(InputError, match="used for its text alone, and an environment's turns follow token ids"):
        run(tmp_path, {"served": {"url": server.url, "model": "tiny", "version": "as text"}}, **common)


def test_what_a_served_teacher_cannot_do_is_told_before_it_is_asked(tmp_path: Path, server: Any) -> None:
    served = {"url": server.url, "model": "tiny"}
    with pytest.raises(InputError, match=r"the method asks it at every step\. Take a method that learns from stored"):
        run(tmp_path, {"served": served})
    assert server.bodies() == []
    with pytest.raises(InputError, match=r"scores are of token ids: name the folder of its tokenizer"):
        run(tmp_path, {"served": served}, config={**STORED, "policy": "labels"}, rollouts={"top_k": 4})
    with pytest.raises(InputError, match="student: a model behind a server cannot be trained"):
        recipe(tmp_path, student={"served": served})
    with pytest.raises(InputError, match=r"models\.teacher\.served\.model is missing"):
        recipe(tmp_path, models={"teacher": {"served": {"url": server.url}}})


def test_a_tokenizer_of_another_model_is_noticed(tmp_path: Path, server: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({"?": 0, "w": 1, "1": 2}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?", eos_token="?").save_pretrained(tmp_path / "other")
    teacher = remote(server.url, "tiny", make_tokenizer(), tokenizer=tmp_path / "other")
    with (
        teacher.endpoint,
        pytest.raises(InputError, match=r"cuts a sentence into \d+ tokens, and the tokenizer that the recipe names"),
    ):
        _ = teacher.served
    with pytest.raises(InputError, match=r"There is no tokenizer in .*nowhere: it is no folder"):
        remote(server.url, "tiny", make_tokenizer(), tokenizer=tmp_path / "nowhere")


def test_no_secret_leaves_the_machine() -> None:
    """The address is never spoken to: it is one that no host has."""
    teacher = remote("http://192.0.2.1/v1", "tiny", make_tokenizer())
    key = "AKIA" + "IOSFODNN7EXAMPLB"
    tasks = [Task("plain", {"prompt": "w1 w2"}, ""), Task("secret", {"prompt": f"aws_access_key_id = {key}"}, "")]
    with pytest.raises(
        InputError, match=r"secret holds what looks like a secret .* nothing of this batch was sent"
    ) as e:
        teacher.roll_out(tasks, context="prompt", max_tokens=4, temperature=1.0, seed=0)
    assert key not in str(e.value)
    words = make_tokenizer(["aws_access_key_id", "=", key])
    scorer = remote("http://192.0.2.1/v1", "tiny", words)
    ids = words(f"aws_access_key_id = {key}")["input_ids"]
    with pytest.raises(InputError, match="looks like a secret") as e:
        replace(scorer, is_text_only=False).top_k([ids], [ids], 4)
    assert key not in str(e.value)


def test_chat_prompts_without_a_template_are_refused_before_the_server_is_asked(tmp_path: Path, server: Any) -> None:
    folder = plain_model(tmp_path)
    tasks = [Task(f"chat-{i}", {"prompt": [{"role": "user", "content": f"w{i}"}]}, "w1") for i in range(8)]
    with Store(tmp_path / "s.duckdb") as store, store.transaction() as con:
        save_tasks(con, "chats", "train", tasks)
    for models in ({"teacher": {"served": {"url": server.url, "model": "tiny"}}}, {"teacher": folder}):
        chosen = recipe(
            tmp_path, method="sequence-kd", student=folder, models=models, environment=None, tasks={"set": "chats"}
        )
        with pytest.raises(InputError, match=r"has no chat template: give it the one"):
            train(chosen, tmp_path / "s.duckdb")
    assert not [body for body in server.bodies() if body.get("max_tokens") == 8]


def test_a_server_that_fails_leaves_what_was_written(
    tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run goes on with the chunks that are there."""
    served = {"served": {"url": "http://127.0.0.1:9/v1", "model": "tiny"}}
    with pytest.raises((TrainingError, RuntimeError), match=r"127\.0\.0\.1:9"):
        run(tmp_path, served, method="sequence-kd")
    assert query(tmp_path, "SELECT count(*) FROM rollouts") == [(0,)]
    served = {"served": {"url": server.url, "model": "tiny"}}
    monkeypatch.setattr(train_data, "_SERVED_CHUNK", 3)
    asked: list[int] = []
    write = RemoteModel.roll_out

    def fail_once(self: RemoteModel, tasks: Any, **options: Any) -> Any:
        asked.append(len(tasks))
        if len(asked) == 2:
            raise EndpointError("it keeps failing")
        return write(self, tasks, **options)

    monkeypatch.setattr(RemoteModel, "roll_out", fail_once)
    with pytest.raises(EndpointError, match="it keeps failing"):
        run(tmp_path, served, method="sequence-kd")
    (supply,) = run(tmp_path, served, method="sequence-kd").rollouts
    assert (supply["reused"], supply["made"], asked) == (3, 5, [3, 3, 3, 2])
