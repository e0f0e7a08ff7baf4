"""Teacher scores: made once, kept, and worth what the live teacher is worth."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("httpx")
pytest.importorskip("trl")

import tiny_server  # noqa: E402
from tiny_models import make_args, make_model  # noqa: E402

from workbench.errors import InputError  # noqa: E402
from workbench.policies.lm.endpoint import Endpoint  # noqa: E402
from workbench.policies.lm.engine import LmTrainer  # noqa: E402
from workbench.policies.lm.probe import probe  # noqa: E402
from workbench.policies.lm.rollout import Rollout, Scores  # noqa: E402
from workbench.policies.lm.scoring import LocalTeacher, attach, keep, prompts_of  # noqa: E402
from workbench.policies.lm.served import ServedModel  # noqa: E402
from workbench.policies.nouns import Fresh, Mixed, Phase, Role, Source, Stored  # noqa: E402
from workbench.policies.tasks import Task  # noqa: E402
from workbench.policies.terms import TokenDivergence  # noqa: E402

TOKENIZER, MODEL = tiny_server.make_served()
WORDS = len(TOKENIZER)
SCHEMA = Path(__file__).parents[2] / "data" / "schema" / "0004_training.sql"
TASKS = [Task(f"t{i}", {"prompt": f"w{i} w{7 * i % 26}", "privileged": f"w1 w2 w{i}"}) for i in range(8)]


def make_rollouts() -> list[Rollout]:
    """One a task, of 2 to 7 tokens and the end, the second with words of an environment."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for task in TASKS:
        length = int(torch.randint(2, 8, (), generator=generator))
        ids = torch.randint(3, WORDS, (length,), generator=generator).tolist()
        found.append(Rollout(task.id, TOKENIZER(task.prompts["prompt"])["input_ids"], [*ids, 1]))
    found[1].mask = [1] * (len(found[1].completion_ids) - 2) + [0, 1]
    return found


ROLLOUTS = make_rollouts()


@pytest.fixture
def con() -> duckdb.DuckDBPyConnection:
    found = duckdb.connect()
    found.execute(SCHEMA.read_text())
    return found


class Counting:
    """A teacher that says how often it was asked."""

    def __init__(self, model: Any, version: str | None = None) -> None:
        self.teacher = LocalTeacher(model, version)
        self.version, self.asked = self.teacher.version, 0

    def top_k(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], k: int) -> list[Scores]:
        self.asked += len(prompts)
        return self.teacher.top_k(prompts, completions, k)


@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_local_scores_are_the_models_log_softmax(batch_tokens: int) -> None:
    """However sequences are batched and padded, and in the order in which they were given."""
    prompts, completions = [r.prompt_ids for r in ROLLOUTS], [r.completion_ids for r in ROLLOUTS]
    found = LocalTeacher(MODEL, "v", batch_tokens).top_k([*prompts, [3]], [*completions, []], 6)
    assert found[-1].ids.shape == (0, 6)
    for rollout, scores in zip(ROLLOUTS, found, strict=False):
        ids = rollout.prompt_ids + rollout.completion_ids
        with torch.no_grad():
            logits = MODEL(input_ids=torch.tensor([ids])).logits[0, len(rollout.prompt_ids) - 1 : -1]
        expected = logits.log_softmax(-1).topk(6)
        assert (scores.ids == expected.indices.numpy()).all()
        np.testing.assert_allclose(scores.logprobs, expected.values.numpy(), atol=1e-5)


def test_what_cannot_be_scored() -> None:
    teacher = LocalTeacher(MODEL)
    with pytest.raises(InputError, match=f"between 1 and the teacher's {WORDS} words, not 64"):
        teacher.top_k([[3]], [[4]], 64)
    with pytest.raises(InputError, match="prompt without tokens"):
        teacher.top_k([[]], [[4]], 2)


def test_nothing_is_scored_twice(con: duckdb.DuckDBPyConnection) -> None:
    """Also across rollouts with the same tokens; another k, other weights, another prompt are other scores."""
    teacher = Counting(MODEL)
    twice = [*ROLLOUTS, replace(ROLLOUTS[0], reward=1.0)]
    first = attach(con, teacher, "teacher", twice, k=5, chunk=3)
    assert teacher.asked == len(ROLLOUTS)
    second = attach(con, teacher, "teacher", twice, k=5)
    assert teacher.asked == len(ROLLOUTS)
    for one, other in zip(first, second, strict=True):
        assert one.scores is not None
        assert other.scores is not None
        assert (one.scores.ids == other.scores.ids).all()
        assert (one.scores.logprobs == other.scores.logprobs).all()
        assert one.scores.logprobs.dtype == np.float16
        assert one.meta == {"scores_of": "teacher", "scores_version": teacher.version}
    assert first[-1].reward == 1.0
    assert ROLLOUTS[0].scores is None  # what was given is not changed
    attach(con, teacher, "teacher", ROLLOUTS[:1], k=6)
    attach(con, teacher, "teacher", ROLLOUTS[:1], k=5, prompts={"t0": [9, 9]})
    other = Counting(make_model(TOKENIZER, 3, hidden=tiny_server.HIDDEN))
    attach(con, other, "teacher", ROLLOUTS[:1], k=5)
    assert (teacher.asked, other.asked) == (len(ROLLOUTS) + 2, 1)


def test_an_interruption_keeps_what_was_scored(con: duckdb.DuckDBPyConnection) -> None:
    class Failing(Counting):
        def top_k(self, prompts: Any, completions: Any, k: int) -> list[Scores]:
            if self.asked >= 4:
                raise KeyboardInterrupt
            return super().top_k(prompts, completions, k)

    with pytest.raises(KeyboardInterrupt):
        attach(con, Failing(MODEL, "v"), "teacher", ROLLOUTS, k=5, chunk=2)
    teacher = Counting(MODEL, "v")
    attach(con, teacher, "teacher", ROLLOUTS, k=5)
    assert teacher.asked == len(ROLLOUTS) - 4


def test_a_teacher_reads_its_own_context(con: duckdb.DuckDBPyConnection) -> None:
    """Under another prompt the scores are those of the same completion after that prompt."""
    prompts = prompts_of(TOKENIZER, TASKS, "privileged")
    found = attach(con, LocalTeacher(MODEL), "teacher", ROLLOUTS, k=4, prompts=prompts)
    for rollout in found:
        ids = prompts[rollout.task_id] + rollout.completion_ids
        with torch.no_grad():
            logits = MODEL(input_ids=torch.tensor([ids])).logits[0, len(prompts[rollout.task_id]) - 1 : -1]
        assert rollout.scores is not None
        assert (rollout.scores.ids == logits.topk(4).indices.numpy()).all()
    with pytest.raises(InputError, match="no prompt for the teacher to read for task 't1'"):
        attach(con, LocalTeacher(MODEL), "teacher", ROLLOUTS, k=4, prompts={"t0": [3]})


def test_served_scores_are_the_local_ones_and_cached(con: duckdb.DuckDBPyConnection) -> None:
    server = tiny_server.shared()
    server.plan()
    with Endpoint(server.url, "tiny", timeout_seconds=20) as endpoint:
        served = ServedModel(endpoint, TOKENIZER, probe(endpoint, TOKENIZER, text="w1 w2", k=20))
        found = attach(con, served, "teacher", ROLLOUTS, k=6)
        asked = len(server.bodies())
        assert attach(con, served, "teacher", ROLLOUTS, k=6)[0].meta["scores_version"] == "tiny"
        assert len(server.bodies()) == asked
        # What came along with the teacher's own rollouts needs no request either.
        own = served.roll_out(TASKS, max_tokens=6, k=6, seed=1)
        assert keep(con, served.version, own) == len(own)
        asked = len(server.bodies())
        attached = attach(con, served, "teacher", own, k=6)
        assert len(server.bodies()) == asked
    for rollouts in (found, attached):
        for one, other in zip(rollouts, attach(con, LocalTeacher(MODEL), "t", rollouts, k=6), strict=True):
            assert one.scores is not None
            assert other.scores is not None
            assert (one.scores.ids == other.scores.ids).all()
            np.testing.assert_allclose(one.scores.logprobs, other.scores.logprobs, atol=2e-2)  # float16


def test_the_documentation_runs(con: duckdb.DuckDBPyConnection) -> None:
    """With the test's server, model and a k that its vocabulary has."""
    server = tiny_server.shared()
    server.plan()
    text = (SCHEMA.parents[2] / "docs" / "serving.md").read_text("utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    code = code.replace("http://127.0.0.1:8000/v1", server.url).replace('v1", "teacher"', 'v1", "tiny"')
    names: dict[str, Any] = {"tokenizer": TOKENIZER, "model": MODEL, "tasks": TASKS, "con": con}
    exec(code.replace("k=64", "k=8"), names)
    assert [rollout.scores.ids.shape[1] for rollout in names["scored"]] == [8] * len(TASKS)


# -- training on them ------------------------------------------------------------------------------------------------


def make_trainer(
    folder: Path, term: TokenDivergence, rollouts: Sequence[Rollout], source: Source | None = None, **options: Any
) -> LmTrainer:
    roles = [Role(name="teacher", context=options.pop("context", "prompt"))]
    phase = Phase(name="p", sources={"main": source or Stored("s", with_scores="teacher")}, terms=[term], roles=roles)
    args = make_args(folder, per_device_train_batch_size=8, max_steps=1)
    return LmTrainer(
        make_model(TOKENIZER, 1), args, TOKENIZER, phase, TASKS,
        models={"teacher": MODEL}, stored={"s": {rollout.task_id: [rollout] for rollout in rollouts}},
    )  # fmt: skip


def loss_and_gradient(folder: Path, term: TokenDivergence, rollouts: Sequence[Rollout], **options: Any) -> Any:
    trainer = make_trainer(folder, term, rollouts, **options)
    batch = trainer._generate_and_score_completions([{"task": i} for i in range(len(TASKS))])
    loss = trainer._compute_loss(trainer.accelerator.unwrap_model(trainer.model), batch, None)[0]
    parameters = list(trainer.accelerator.unwrap_model(trainer.model).parameters())
    return float(loss.detach()), torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("context", ["prompt", "privileged"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_all_words_are_worth_the_live_teacher(
    tmp_path: Path, con: duckdb.DuckDBPyConnection, divergence: Any, context: str
) -> None:
    """k = V: loss and gradient are the live teacher's, up to float16; with few words the loss is less."""
    live = TokenDivergence(divergence=divergence)
    stored = TokenDivergence(divergence=divergence, teacher="stored")
    prompts = prompts_of(TOKENIZER, TASKS, context)
    whole = attach(con, LocalTeacher(MODEL), "teacher", ROLLOUTS, k=WORDS, prompts=prompts)
    expected, gradient = loss_and_gradient(tmp_path / "live", live, whole, context=context)
    found, other = loss_and_gradient(tmp_path / "stored", stored, whole)
    assert found == pytest.approx(expected, rel=2e-3)
    assert (other - gradient).norm() < 5e-3 * gradient.norm()
    losses = []
    for k in (1, 2, 4, 8, 16):
        some = attach(con, LocalTeacher(MODEL), "teacher", ROLLOUTS, k=k, prompts=prompts)
        losses.append(loss_and_gradient(tmp_path / f"{k}", stored, some)[0])
    assert losses == sorted(losses)
    assert 0 < losses[0] < 0.9 * expected
    assert losses[-1] < expected * 1.002


def test_training_reads_stored_scores(tmp_path: Path, con: duckdb.DuckDBPyConnection) -> None:
    scored = attach(con, LocalTeacher(MODEL), "teacher", ROLLOUTS, k=8)
    trainer = make_trainer(tmp_path, TokenDivergence(divergence="forward_kl", teacher="stored"), scored)
    trainer.train()  # raises if nothing moves
    assert trainer.state.global_step == 1


def test_no_other_temperature_is_accepted(tmp_path: Path, con: duckdb.DuckDBPyConnection) -> None:
    scored = attach(con, LocalTeacher(MODEL), "teacher", ROLLOUTS, k=8)
    with pytest.raises(InputError, match=r"stored scores are at temperature 1, and a term asks for 2;"):
        make_trainer(tmp_path, TokenDivergence(teacher="stored", temperature=2.0), scored)


def test_scores_that_are_not_there_are_named(tmp_path: Path, con: duckdb.DuckDBPyConnection) -> None:
    stored = TokenDivergence(teacher="stored")
    scored = attach(con, LocalTeacher(MODEL), "teacher", ROLLOUTS, k=8)
    missing = [*scored[:-2], *ROLLOUTS[-2:]]
    with pytest.raises(InputError, match=r"2 of 8 stored .* 's' .*'t6'.* no scores of the teacher 'teacher'.*attach"):
        make_trainer(tmp_path, stored, missing)
    with pytest.raises(InputError, match=r"8 of 8 stored rollouts .* of the teacher 'other'"):
        make_trainer(tmp_path, stored, scored, source=Stored("s", with_scores="other"))
    mixed = [*attach(con, LocalTeacher(MODEL), "teacher", ROLLOUTS[:1], k=4), *scored[1:]]
    with pytest.raises(InputError, match="list 4 or 8 words"):
        make_trainer(tmp_path, stored, mixed)


@pytest.mark.parametrize(
    "source", [Stored("s"), Fresh("student"), Mixed(Stored("s", with_scores="teacher"), Fresh("student"), 0.5)]
)
def test_a_source_without_scores_is_refused(tmp_path: Path, con: duckdb.DuckDBPyConnection, source: Source) -> None:
    scored = attach(con, LocalTeacher(MODEL), "teacher", ROLLOUTS, k=8)
    with pytest.raises(InputError, match=r"a term reads stored scores, and the segment 'main' comes from .*has none"):
        make_trainer(tmp_path, TokenDivergence(teacher="stored"), scored, source=source)
