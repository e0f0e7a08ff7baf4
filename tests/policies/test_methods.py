"""Every method against its closed form, its special cases and the traps that its card names."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tiny_models import make_args, make_model, make_tokenizer  # noqa: E402

from workbench.errors import InputError  # noqa: E402
from workbench.policies.estimators import kl_estimate, preference_loss, ratio_weighted_k3  # noqa: E402
from workbench.policies.lm.engine import LmTrainer  # noqa: E402
from workbench.policies.lm.methods.gkd import Gkd  # noqa: E402
from workbench.policies.lm.methods.paced import Paced, beta_weight  # noqa: E402
from workbench.policies.lm.methods.sequence_kd import SequenceKd  # noqa: E402
from workbench.policies.lm.methods.soda import Soda  # noqa: E402
from workbench.policies.lm.methods.step_by_step import StepByStep  # noqa: E402
from workbench.policies.lm.methods.taid import Taid  # noqa: E402
from workbench.policies.lm.rollout import Rollout  # noqa: E402
from workbench.policies.nouns import Fresh, Mixed, Phase, Stored  # noqa: E402
from workbench.policies.tasks import Task  # noqa: E402

TOKENIZER = make_tokenizer()
TASKS = [
    Task(f"t{i}", {"prompt": f"w{i} w9", "explain": f"w20 w{i} w9", "hint": f"w21 w22 w{i} w9"}, pass_rate=i / 8)
    for i in range(8)
]


def kept(seed: int, length: int = 4) -> dict[str, list[Rollout]]:
    """One rollout a task; the lengths differ."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for number, task in enumerate(TASKS):
        ids = torch.randint(3, 20, (1 + (number * 3) % length,), generator=generator).tolist()
        found[task.id] = [Rollout(task.id, TOKENIZER(task.prompts["prompt"])["input_ids"], [*ids, 1])]
    return found


STORED = {"teacher": kept(0), "labels": kept(1), "rationales": kept(2, length=9), "student-base": kept(3)}


def trainer_of(phase: Phase, folder: Path, tasks: list[Task] | None = None, **args: Any) -> LmTrainer:
    return LmTrainer(
        make_model(TOKENIZER, 1), make_args(folder, **{"per_device_train_batch_size": 8, **args}), TOKENIZER, phase,
        tasks or TASKS, models={"teacher": make_model(TOKENIZER, 2)}, stored=STORED,
    )  # fmt: skip


def loss_and_gradient(phase: Phase, folder: Path, tasks: list[Task] | None = None) -> tuple[float, Any]:
    """Of the first batch: all 8 tasks, or as many as there are, in one batch."""
    trainer = trainer_of(phase, folder, tasks, per_device_train_batch_size=1)
    rows = [{"prompt": "", "task": number} for number in range(len(trainer._tasks))]
    batch = trainer._generate_and_score_completions(rows)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def logits_by_hand(model: Any, prompt: str, completion: list[int]) -> Any:
    """Logits that predict each completion token, from the plain model without padding."""
    ids = TOKENIZER(prompt)["input_ids"] + completion
    return model(torch.tensor([ids])).logits[0, -len(completion) - 1 : -1]


def by_hand(policy: str, context: str, value: Any) -> list[Any]:
    """`value(student logits, teacher logits, ids)` [T] for every task, without any of our machinery."""
    student, teacher = make_model(TOKENIZER, 1), make_model(TOKENIZER, 2)
    found = []
    for task in TASKS:
        ids = STORED[policy][task.id][0].completion_ids
        with torch.no_grad():
            sides = [logits_by_hand(model, task.prompts[context], ids) for model in (student, teacher)]
        found.append(value(*sides, torch.tensor(ids)))
    return found


def nll(student: Any, teacher: Any, ids: Any) -> Any:
    return torch.nn.functional.cross_entropy(student, ids, reduction="none")


def forward_kl(student: Any, teacher: Any, ids: Any) -> Any:
    p, q = (torch.distributions.Categorical(logits=logits) for logits in (teacher, student))
    return torch.distributions.kl_divergence(p, q)


# -- sequence-level distillation (160) ------------------------------------------------------------------------------


def test_sequence_kd_is_the_mean_nll_of_the_teachers_tokens(tmp_path: Path) -> None:
    expected = torch.cat(by_hand("teacher", "prompt", nll)).mean()
    loss, _ = loss_and_gradient(SequenceKd().phases()[0], tmp_path)
    assert loss == pytest.approx(float(expected), abs=1e-5)


def test_sequence_kd_never_shows_the_student_the_teachers_prompt(tmp_path: Path) -> None:
    """Prompt switching: the fresh teacher reads the hint, the student's batch holds its own prompt only."""
    trainer = trainer_of(SequenceKd(fresh=True, teacher_context="hint").phases()[0], tmp_path)
    written = []
    trainer._keep = lambda segment, policy, rollouts: written.extend(rollouts)
    batch = trainer._generate_and_score_completions([{"prompt": "", "task": n} for n in range(8)])
    hint = TOKENIZER("w21 w22")["input_ids"]
    assert all(rollout.prompt_ids[:2] == hint for rollout in written)
    assert not set(hint) & set(batch["main.prompt_ids"].flatten().tolist())


# -- GKD (151) ------------------------------------------------------------------------------------------------------


def test_gkd_on_stored_rollouts_is_the_mean_divergence(tmp_path: Path) -> None:
    expected = torch.cat(by_hand("teacher", "prompt", forward_kl)).mean()
    phase = Gkd(divergence="forward_kl", on_policy=0.0).phases()[0]
    assert loss_and_gradient(phase, tmp_path)[0] == pytest.approx(float(expected), abs=1e-5)


def test_gkd_equals_trls_generalised_jsd(tmp_path: Path) -> None:
    from trl.experimental.gkd import GKDTrainer

    def theirs(student: Any, teacher: Any, ids: Any) -> Any:
        # sum over tokens, so that the mean over all tokens can be taken afterwards
        value = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=0.3, reduction="sum")
        return torch.cat([value[None], torch.zeros(len(ids) - 1)])

    expected = torch.cat(by_hand("teacher", "prompt", theirs)).mean()
    phase = Gkd(divergence="jsd", parameter=0.3, on_policy=0.0).phases()[0]
    assert loss_and_gradient(phase, tmp_path)[0] == pytest.approx(float(expected), abs=1e-5)


def test_gkd_members_differ_by_their_source() -> None:
    assert Gkd(on_policy=1.0).phases()[0].sources["main"] == Fresh("student")
    assert Gkd(on_policy=0.0).phases()[0].sources["main"] == Stored("teacher")
    assert Gkd(on_policy=0.0, off_policy_source="teacher").phases()[0].sources["main"] == Fresh("teacher")
    assert Gkd(on_policy=0.5).phases()[0].sources["main"] == Mixed(Fresh("student"), Stored("teacher"), 0.5)
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        Gkd(on_policy=1.5).phases()


def test_gkd_moves_the_student_to_the_teacher(tmp_path: Path) -> None:
    """On-policy reverse KL falls, and so does the divergence on prompts' own continuations."""
    trainer = trainer_of(Gkd().phases()[0], tmp_path, max_steps=25)
    trainer.train()
    found = [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
    assert sum(found[-5:]) < 0.7 * sum(found[:5])


# -- TAID (61) ------------------------------------------------------------------------------------------------------


def taid_phase(t: float) -> Phase:
    return Taid(t_start=t, adaptive=False).phases()[0]


def test_taid_at_one_has_the_gradient_of_forward_kl_and_at_zero_none(tmp_path: Path) -> None:
    _, at_one = loss_and_gradient(taid_phase(1.0), tmp_path / "one")
    _, plain = loss_and_gradient(Gkd(divergence="forward_kl", on_policy=0.0).phases()[0], tmp_path / "plain")
    torch.testing.assert_close(at_one, plain, atol=1e-5, rtol=1e-3)
    _, at_zero = loss_and_gradient(taid_phase(0.0), tmp_path / "zero")
    assert at_zero.abs().max() < 1e-5 * plain.abs().max() + 1e-7


def test_taid_target_is_mixed_in_logit_space(tmp_path: Path) -> None:
    """A public list says probabilities; the released code mixes logits."""

    def expected(student: Any, teacher: Any, ids: Any) -> Any:
        target = ((1 - 0.3) * student + 0.3 * teacher).softmax(-1)
        return -(target * student.log_softmax(-1)).sum(-1)

    loss, _ = loss_and_gradient(taid_phase(0.3), tmp_path)
    assert loss == pytest.approx(float(torch.cat(by_hand("teacher", "prompt", expected)).mean()), abs=1e-5)


@given(st.lists(st.floats(0.0, 10.0), min_size=2, max_size=40), st.floats(0, 1), st.floats(1e-4, 1.0))
def test_taids_clock_never_goes_back_and_never_past_the_end(losses: list[float], start: float, alpha: float) -> None:
    method = Taid(t_start=start, alpha=alpha)
    state = dict(method.phases()[0].state)
    seen = [state["t"]]
    for step, loss in enumerate(losses, 1):
        method.advance(state, loss, step, len(losses))
        seen.append(state["t"])
    assert seen == sorted(seen)
    assert all(math.isfinite(value) for value in state.values())
    line = [start + (1 - start) * step / len(losses) for step in range(len(losses) + 1)]
    assert all(line[0] - 1e-12 <= t <= 1.0 for t in seen)
    assert all(t >= low - 1e-9 for t, low in zip(seen[2:], line[2:], strict=True))


def test_taids_clock_by_hand() -> None:
    method = Taid(t_start=0.4, alpha=0.1, beta=0.5)
    state = dict(method.phases()[0].state)
    method.advance(state, 2.0, 1, 1_000_000)
    assert state["t"] == 0.4  # the first step only stores the loss
    method.advance(state, 1.0, 2, 1_000_000)
    momentum = 0.5 * 0.5
    assert state["momentum"] == pytest.approx(momentum)
    assert state["t"] == pytest.approx(0.4 + 0.1 / (1 + math.exp(-momentum)) * 0.6)
    constant = dict(method.phases()[0].state)
    for step in (1, 2):
        method.advance(constant, 1.0, step, 1_000_000)
    assert constant["t"] == pytest.approx(0.4 + 0.1 * 0.5 * 0.6)


# -- PACED (24) -----------------------------------------------------------------------------------------------------


@given(st.floats(0.0, 1.0), st.floats(0.1, 4.0), st.floats(0.1, 4.0))
def test_paceds_weight_peaks_at_its_mode_and_ends_at_zero(p: float, alpha: float, beta: float) -> None:
    mode = alpha / (alpha + beta)
    assert beta_weight(p, alpha, beta) <= beta_weight(mode, alpha, beta) + 1e-12
    assert beta_weight(0.0, alpha, beta) == beta_weight(1.0, alpha, beta) == 0.0
    assert beta_weight(p, 0.0, 0.0) == 1.0


@given(st.integers(2, 30), st.floats(0.0, 1.0))
def test_k_rollouts_understate_the_weight_by_a_known_factor(k: int, p: float) -> None:
    """E[p̂(1-p̂)] = p(1-p)(K-1)/K exactly."""
    expected = sum(math.comb(k, c) * p**c * (1 - p) ** (k - c) * beta_weight(c / k, 1, 1) for c in range(k + 1))
    assert expected == pytest.approx(p * (1 - p) * (k - 1) / k, abs=1e-9)


def test_paced_is_the_weighted_mean_of_sequence_means(tmp_path: Path) -> None:
    means = [float(values.mean()) for values in by_hand("teacher", "prompt", forward_kl)]
    weights = [beta_weight(task.pass_rate or 0.0, 1, 1) for task in TASKS]
    phase = Paced(stages=("forward_kl",)).phases()[0]
    expected = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
    assert loss_and_gradient(phase, tmp_path / "a", TASKS)[0] == pytest.approx(expected, abs=1e-5)
    uniform = Paced(alpha=0.0, beta=0.0, stages=("forward_kl",)).phases()[0]
    assert loss_and_gradient(uniform, tmp_path / "b")[0] == pytest.approx(sum(means) / 8, abs=1e-5)


def test_paced_leaves_out_what_is_solved_and_asks_for_pass_rates(tmp_path: Path) -> None:
    tasks = [replace(task, pass_rate=1.0 if n % 2 else 0.5) for n, task in enumerate(TASKS)]
    trainer = LmTrainer(
        make_model(TOKENIZER, 1), make_args(tmp_path), TOKENIZER, Paced().phases()[0], tasks,
        models={"teacher": make_model(TOKENIZER, 2)}, stored=STORED,
    )  # fmt: skip
    assert [task.id for task in trainer._tasks] == ["t0", "t2", "t4", "t6"]
    with pytest.raises(InputError, match="'t0' has none"):
        trainer_of(Paced().phases()[0], tmp_path, [replace(task, pass_rate=None) for task in TASKS])


# -- SODA (156) -----------------------------------------------------------------------------------------------------


def test_soda_begins_at_ln_2_and_swapping_the_pair_negates_its_gradient(tmp_path: Path) -> None:
    phase = Soda(warm_up=0.0).phases()[0]
    loss, gradient = loss_and_gradient(phase, tmp_path / "a")
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    swapped = Soda(warm_up=0.0, policy="student-base", base_policy="teacher").phases()[0]
    _, other = loss_and_gradient(swapped, tmp_path / "b")
    torch.testing.assert_close(gradient, -other, atol=1e-6, rtol=1e-3)
    assert gradient.abs().max() > 1e-4
    same = Soda(warm_up=0.0, base_policy="teacher").phases()[0]
    assert loss_and_gradient(same, tmp_path / "c")[1].abs().max() < 1e-6


def test_sodas_warm_up_becomes_its_reference(tmp_path: Path) -> None:
    """The reference is the student after the warm-up, and stays so while the student moves."""
    warm_up, preference = Soda(warm_up=0.4).phases()
    assert (warm_up.share, preference.share) == (0.4, 0.6)
    first = trainer_of(warm_up, tmp_path / "a")
    first.train()
    second = LmTrainer(
        first.model, make_args(tmp_path / "b", per_device_train_batch_size=8), TOKENIZER, preference, TASKS,
        stored=STORED,
    )  # fmt: skip
    reference = second._readers["reference"].model
    pairs = list(zip(reference.parameters(), first.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    second.train()
    assert not any(torch.equal(a, b) for a, b in pairs[:1])
    assert not any(parameter.requires_grad for parameter in reference.parameters())


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_sodas_population_optimum(beta: float) -> None:
    """q* ∝ q_w (p_T / q_0)^(1/beta), for all pairs of a vocabulary of five (the card's identity)."""
    generator = torch.Generator().manual_seed(0)
    p, q0, qw = (torch.randn(5, generator=generator, dtype=torch.float64).softmax(-1) for _ in range(3))
    z = qw.log().clone().requires_grad_()
    optimiser = torch.optim.LBFGS([z], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure() -> Any:
        optimiser.zero_grad()
        q, w = z.log_softmax(-1), qw.log()
        losses = preference_loss(q[:, None], q[None, :], w[:, None], w[None, :], beta)
        loss = (p[:, None] * q0[None, :] * losses).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    expected = (qw.log() + (p.log() - q0.log()) / beta).softmax(-1)
    torch.testing.assert_close(z.detach().softmax(-1), expected, atol=1e-5, rtol=1e-4)


# -- distilling step-by-step (128) ----------------------------------------------------------------------------------


def test_step_by_step_takes_two_means_apart(tmp_path: Path) -> None:
    """Rationales are longer: one mean over both would weight them by their length (the card's trap)."""
    label = torch.cat(by_hand("labels", "prompt", nll))
    rationale = torch.cat(by_hand("rationales", "explain", nll))
    assert len(rationale) > 1.2 * len(label)
    loss, _ = loss_and_gradient(StepByStep(alpha=0.3).phases()[0], tmp_path)
    expected = 0.3 * float(label.mean()) + 0.7 * float(rationale.mean())
    assert loss == pytest.approx(expected, abs=1e-5)
    trap = float(torch.cat([label, rationale]).mean())
    assert abs(expected - trap) > 1e-3


def test_step_by_steps_gradient_is_linear_in_alpha_and_alpha_1_is_plain_fine_tuning(tmp_path: Path) -> None:
    found = {
        alpha: loss_and_gradient(StepByStep(alpha=alpha).phases()[0], tmp_path / str(alpha))[1]
        for alpha in (0.0, 0.25, 1.0)
    }
    torch.testing.assert_close(found[0.25], 0.25 * found[1.0] + 0.75 * found[0.0], atol=1e-6, rtol=1e-3)
    _, plain = loss_and_gradient(SequenceKd(policy="labels").phases()[0], tmp_path / "plain")
    torch.testing.assert_close(found[1.0], plain, atol=1e-6, rtol=1e-3)


def test_step_by_steps_prefix_is_in_every_rationales_prompt_and_in_no_target(tmp_path: Path) -> None:
    trainer = trainer_of(StepByStep().phases()[0], tmp_path)
    batch = trainer._generate_and_score_completions([{"prompt": "", "task": n} for n in range(8)])
    prefix = TOKENIZER("w20")["input_ids"][0]
    assert (batch["rationale.explain_ids"] == prefix).any(-1).all()
    assert not (batch["label.prompt_ids"] == prefix).any()
    assert not (batch["rationale.completion_ids"] == prefix).any()


# -- estimators -----------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_estimators_have_the_expectations_and_gradients_that_they_claim(seed: int) -> None:
    """By enumerating the vocabulary: k1 and k3 unbiased; gradients of k1: 0, k2: reverse KL, k3: forward KL, weighted
    k3: reverse KL, also with tokens of another sampler."""
    generator = torch.Generator().manual_seed(seed)
    z, t, s = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(3))
    z.requires_grad_()
    p, sampler = t.log_softmax(-1), s.log_softmax(-1)

    def gradient(value: Any) -> Any:
        return torch.autograd.grad(value, z, retain_graph=True)[0]

    q = z.log_softmax(-1)
    q_fixed = q.detach().exp()
    reverse = (q.exp() * (q - p)).sum()
    forward = (p.exp() * (p - q)).sum()
    for kind in ("k1", "k3"):
        found = (q_fixed * kl_estimate(q, p, kind)).sum()  # pyright: ignore
        assert found.item() == pytest.approx(reverse.item(), abs=1e-9)
    expected = {"k1": torch.zeros(6, dtype=torch.float64), "k2": gradient(reverse), "k3": gradient(forward)}
    for kind, wanted in expected.items():
        found = gradient((q_fixed * kl_estimate(q, p, kind)).sum())  # pyright: ignore
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-7)
    weighted = (sampler.exp() * ratio_weighted_k3(q, p, sampler, max_ratio=1e9)).sum()
    assert weighted.item() == pytest.approx(reverse.item(), abs=1e-9)
    torch.testing.assert_close(gradient(weighted), gradient(reverse), atol=1e-9, rtol=1e-7)
