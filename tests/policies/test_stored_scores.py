"""Methods on stored scores: loss and gradient are those of the live teacher's top-k, with the rest as one word."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from tiny_models import make_args, make_model, make_tokenizer  # noqa: E402

from workbench.errors import InputError  # noqa: E402
from workbench.kernels.divergences import Divergence, DivergenceSpec, TopK, divergence  # noqa: E402
from workbench.policies.lm import preflight  # noqa: E402
from workbench.policies.lm.engine import LmTrainer, asked_roles  # noqa: E402
from workbench.policies.lm.methods.gkd import Gkd  # noqa: E402
from workbench.policies.lm.methods.taid import Taid  # noqa: E402
from workbench.policies.lm.rollout import Rollout  # noqa: E402
from workbench.policies.lm.scoring import LocalTeacher, keyed, prompts_of, score, with_scores  # noqa: E402
from workbench.policies.lm.settings import Settings  # noqa: E402
from workbench.policies.nouns import Method, Phase  # noqa: E402
from workbench.policies.tasks import Task  # noqa: E402

TOKENIZER = make_tokenizer()
WORDS = len(TOKENIZER)
TASKS = [Task(f"t{i}", {"prompt": f"w{i} w9", "hint": f"w21 w22 w{i} w9"}) for i in range(8)]
TEACHER = make_model(TOKENIZER, 2)

GKDS = [("forward_kl", None), ("reverse_kl", None), ("jsd", 0.3), ("total_variation", None)]


def scored(k: int, context: str = "prompt") -> dict[str, list[Rollout]]:
    """A rollout a task, of different lengths, with the teacher's scores."""
    generator = torch.Generator().manual_seed(0)
    rollouts = []
    for number, task in enumerate(TASKS):
        ids = torch.randint(3, 20, (1 + number * 3 % 5,), generator=generator).tolist()
        rollouts.append(Rollout(task.id, TOKENIZER(task.prompts["prompt"])["input_ids"], [*ids, 1]))
    keys, pairs = keyed("v", rollouts, k, prompts_of(TOKENIZER, TASKS, context))
    found = score(LocalTeacher(TEACHER, "v"), pairs, k)
    return {r.task_id: [r] for r in with_scores(rollouts, [found[key] for key in keys], "teacher", "v")}


def engine(phase: Phase, folder: Path, stock: dict[str, list[Rollout]], **models: Any) -> LmTrainer:
    args = make_args(folder, per_device_train_batch_size=1)
    return LmTrainer(make_model(TOKENIZER, 1), args, TOKENIZER, phase, TASKS, models=models, stored={"teacher": stock})


def loss_and_gradient(phase: Phase, folder: Path, stock: dict[str, list[Rollout]], **models: Any) -> tuple[float, Any]:
    trainer: Any = engine(phase, folder, stock, **models)
    batch = trainer._generate_and_score_completions([{"prompt": "", "task": number} for number in range(8)])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def by_hand(spec: DivergenceSpec, k: int, context: str) -> tuple[float, Any]:
    """The live teacher's top-k from its logits, the student's logits, and no machinery of ours but the reference."""
    student = make_model(TOKENIZER, 1)
    losses = []
    for task in TASKS:
        ids = scored(1)[task.id][0].completion_ids
        logits = []
        for model, name in ((student, "prompt"), (TEACHER, context)):
            prompt = TOKENIZER(task.prompts[name])["input_ids"]
            logits.append(model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1])
        top = logits[1].detach().log_softmax(-1).topk(k)
        targets = TopK(top.indices, top.values.half().float())
        losses.append(divergence(logits[0], targets, spec))
    loss = torch.cat(losses).mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in student.parameters()])


@pytest.mark.parametrize("k", [1, 4, WORDS])
@pytest.mark.parametrize("context", ["prompt", "hint"])
@pytest.mark.parametrize(("kind", "parameter"), GKDS)
def test_gkd_learns_the_live_top_k_and_a_tail(
    tmp_path: Path, kind: Any, parameter: float | None, context: str, k: int
) -> None:
    method = Gkd(
        divergence=kind, parameter=parameter, on_policy=0.0, teacher_scores="stored", teacher_context=context
    )  # fmt: skip
    spec = DivergenceSpec(terms=(Divergence(kind, parameter),))
    expected, gradient = by_hand(spec, k, context)
    loss, found = loss_and_gradient(method.phases()[0], tmp_path, scored(k, context))
    assert loss == pytest.approx(expected, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(found, gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("k", [4, WORDS])
def test_taid_mixes_the_same_outcomes(tmp_path: Path, k: int) -> None:
    method = Taid(t_start=0.3, adaptive=False, teacher_scores="stored")
    spec = DivergenceSpec(terms=(Divergence("cross_entropy"),), interpolation=0.3)
    expected, gradient = by_hand(spec, k, "prompt")
    loss, found = loss_and_gradient(method.phases()[0], tmp_path, scored(k))
    assert loss == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(found, gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("stored", "live"),
    [
        (Gkd(divergence="reverse_kl", on_policy=0.0, teacher_scores="stored"), Gkd(on_policy=0.0)),
        (Taid(t_start=0.3, teacher_scores="stored"), Taid(t_start=0.3)),
    ],
    ids=["gkd", "taid"],
)
def test_with_all_words_nothing_is_lost(tmp_path: Path, stored: Method, live: Method) -> None:
    """k = V against the live teacher, up to the store's float16."""
    expected, gradient = loss_and_gradient(live.phases()[0], tmp_path / "live", scored(WORDS), teacher=TEACHER)
    loss, found = loss_and_gradient(stored.phases()[0], tmp_path / "stored", scored(WORDS))
    assert loss == pytest.approx(expected, rel=2e-3)
    assert (found - gradient).norm() < 5e-3 * gradient.norm()


def test_only_a_role_that_is_asked_needs_a_model(tmp_path: Path) -> None:
    stored, live = Gkd(on_policy=0.0, teacher_scores="stored"), Gkd(on_policy=0.0)
    assert asked_roles(stored.phases()) == set()
    assert asked_roles([*stored.phases(), *live.phases()]) == {"teacher"}
    trainer = engine(stored.phases()[0], tmp_path, scored(4))
    assert list(trainer._readers) == []
    with pytest.raises(InputError, match="needs a model for the role 'teacher'"):
        engine(live.phases()[0], tmp_path, scored(4))


def test_before_training_scores_are_checked(tmp_path: Path) -> None:
    """Without the teacher's model; its tokenizer, where it is known, must be the student's."""
    method = Gkd(divergence="forward_kl", on_policy=0.0, teacher_scores="stored", teacher_context="hint")
    settings = Settings(steps=1, batch_size=4, max_completion_tokens=8, cpu=True)
    job = preflight.Job(
        make_model(TOKENIZER, 1), TOKENIZER, method, TASKS, settings, {}, {"teacher": TOKENIZER},
        {"teacher": scored(4, "hint")},
    )  # fmt: skip
    preflight.check(job)
    preflight.check(replace(job, tokenizers={}))
    words = make_tokenizer([f"w{i}" for i in reversed(range(26))])
    with pytest.raises(InputError, match=r"Token 3 is 'w0' for the student and 'w25' for 'teacher'"):
        preflight.check(replace(job, tokenizers={"teacher": words}))
    foreign = scored(4)
    scores = foreign["t3"][0].scores
    assert scores is not None
    scores.ids[0, 0] = 5000
    with pytest.raises(InputError, match=f"list word 5000, and the student predicts {WORDS}"):
        preflight.check(replace(job, stored={"teacher": foreign}))
    with pytest.raises(InputError, match="no scores of the teacher 'teacher'"):
        preflight.check(replace(job, stored={"teacher": {k: [replace(v[0], scores=None)] for k, v in foreign.items()}}))
