"""The checks before training, one by one: what does not fit is refused, and what fits is not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from tiny_models import make_model, make_tokenizer  # noqa: E402

from workbench.errors import InputError, TrainingError  # noqa: E402
from workbench.policies.lm.methods.gkd import Gkd  # noqa: E402
from workbench.policies.lm.methods.paced import Paced  # noqa: E402
from workbench.policies.lm.methods.sequence_kd import SequenceKd  # noqa: E402
from workbench.policies.lm.methods.soda import Soda  # noqa: E402
from workbench.policies.lm.methods.step_by_step import StepByStep  # noqa: E402
from workbench.policies.lm.methods.taid import Taid  # noqa: E402
from workbench.policies.lm.preflight import Job, check  # noqa: E402
from workbench.policies.lm.rollout import Rollout  # noqa: E402
from workbench.policies.lm.run import Settings  # noqa: E402
from workbench.policies.nouns import Phase, Role, Stored  # noqa: E402
from workbench.policies.tasks import Task  # noqa: E402
from workbench.policies.terms import CrossEntropy, TokenDivergence  # noqa: E402

TOKENIZER = make_tokenizer()
TASKS = [
    Task(f"t{i}", {"prompt": f"w{i} w9", "explain": f"w20 w{i} w9", "privileged": f"w1 w2 w{i}"}, pass_rate=0.5)
    for i in range(8)
]
CHATS = [Task(f"c{i}", {"prompt": [{"role": "user", "content": f"w{i} w9"}]}) for i in range(8)]
TEMPLATE = "{% for m in messages %}w20 {{ m['content'] }} w21{% endfor %}"


def kept(shift: int, length: int = 3) -> dict[str, list[Rollout]]:
    return {t.id: [Rollout(t.id, [5], [3 + (i + shift + j) % 26 for j in range(length)] + [1])]
            for i, t in enumerate([*TASKS, *CHATS])}  # fmt: skip


def job(method: Any, **changes: Any) -> Job:
    """A job that fits."""
    fields: dict[str, Any] = {
        "student": make_model(TOKENIZER, 1, 16, 1), "tokenizer": TOKENIZER, "method": method, "tasks": TASKS * 1,
        "settings": Settings(steps=4, batch_size=4, max_completion_tokens=6, cpu=True),
        "models": {"teacher": make_model(TOKENIZER, 2, 16, 1)}, "tokenizers": {"teacher": TOKENIZER},
        "stored": {"teacher": kept(0), "labels": kept(1), "rationales": kept(2, 5), "student-base": kept(3)},
    }  # fmt: skip
    return Job(**{**fields, **changes})


@dataclass(frozen=True)
class Fixed:
    """A method of given phases."""

    made: Phase

    def phases(self) -> list[Phase]:
        return [replace(self.made, state=dict(self.made.state))]


def phase(**options: Any) -> Phase:
    return Phase(**{"name": "p", "sources": {"main": Stored("teacher")}, "terms": [CrossEntropy()], **options})


@pytest.mark.parametrize("method", [SequenceKd(), Gkd(), Gkd(on_policy=0.0), Taid(), Paced(), Soda(), StepByStep()])
def test_what_fits_is_not_refused_and_nothing_is_changed(method: Any) -> None:
    chosen = job(method)
    before = [parameter.clone() for parameter in chosen.student.parameters()]
    states = [dict(p.state) for p in method.phases()]
    random_state = torch.get_rng_state()
    check(chosen)
    assert all(torch.equal(a, b) for a, b in zip(before, chosen.student.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in chosen.student.parameters())
    assert [p.state for p in method.phases()] == states
    assert torch.equal(torch.get_rng_state(), random_state)


def test_adapters_are_taken_off_again() -> None:
    chosen = job(Gkd(on_policy=0.0), settings=Settings(steps=2, batch_size=4, lora_rank=2, cpu=True))
    names = [name for name, _ in chosen.student.named_parameters()]
    check(chosen)
    assert [name for name, _ in chosen.student.named_parameters()] == names


def test_a_missing_teacher_is_refused() -> None:
    with pytest.raises(InputError, match=r"needs a model for the role 'teacher'.*Add models\.teacher"):
        check(job(Gkd(), models={}, tokenizers={}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_token": None}, "has no end-of-sequence token"),
        ({"pad_token": "<eos>"}, "they must be two tokens"),
        ({"pad_token": None}, "they must be two tokens"),
    ],
)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_end_and_padding_must_be_two_tokens(role: str, change: dict[str, Any], message: str) -> None:
    broken = make_tokenizer()
    for name, value in change.items():
        setattr(broken, name, value)
    changes = {"tokenizer": broken} if role == "student" else {"tokenizers": {"teacher": broken}}
    with pytest.raises(InputError, match=f"The tokenizer of '{role}' .*{message}"):
        check(job(Gkd(), **changes))


def test_another_end_another_size_and_other_strings_are_refused() -> None:
    other_end = make_tokenizer()
    other_end.eos_token = "w3"
    longer = make_tokenizer([f"w{i}" for i in range(27)])
    shuffled = make_tokenizer(["w1", "w0", *(f"w{i}" for i in range(2, 26))])
    for tokenizer, message in (
        (other_end, r"The student ends with token 1 \('<eos>'\), 'teacher' with 6 \('w3'\)"),
        (longer, "The student's tokenizer has 29 tokens, that of 'teacher' 30"),
        (shuffled, "Token 3 is 'w0' for the student and 'w1' for 'teacher'"),
    ):
        with pytest.raises(InputError, match=message):
            check(job(Gkd(), tokenizers={"teacher": tokenizer}))


def test_a_head_of_another_size_is_refused() -> None:
    wide = make_model(TOKENIZER, 2, 16, 1, vocab_size=64)
    with pytest.raises(InputError, match=r"predicts 29 logits, 'teacher' 64.*resize_token_embeddings\(29\)"):
        check(job(Gkd(), models={"teacher": wide}))


def test_a_model_that_does_not_know_all_tokens_is_refused() -> None:
    with pytest.raises(InputError, match=r"has 29 tokens, and the model of 'student' knows 20"):
        check(job(SequenceKd(), student=make_model(TOKENIZER, 1, 16, 1, vocab_size=20)))


def test_chat_prompts_need_one_template() -> None:
    ours, theirs = make_tokenizer(), make_tokenizer()
    with pytest.raises(InputError, match="tokenizer of 'student' has no chat template"):
        check(job(Gkd(), tasks=CHATS, tokenizer=ours, tokenizers={"teacher": theirs}))
    ours.chat_template = TEMPLATE
    with pytest.raises(InputError, match="tokenizer of 'teacher' has no chat template"):
        check(job(Gkd(), tasks=CHATS, tokenizer=ours, tokenizers={"teacher": theirs}))
    theirs.chat_template = TEMPLATE.replace("w21", "w22")
    with pytest.raises(InputError, match="'c0' becomes other tokens from position 3 on"):
        check(job(Gkd(), tasks=CHATS, tokenizer=ours, tokenizers={"teacher": theirs}))
    theirs.chat_template = "{# another text of the same #}" + TEMPLATE
    check(job(Gkd(), tasks=CHATS, tokenizer=ours, tokenizers={"teacher": theirs}))
    check(job(Gkd(), tokenizers={"teacher": make_tokenizer()}))  # text has no template


@pytest.mark.parametrize("method", [Gkd(temperature=0.0), Gkd(temperature=-1.0), Gkd(temperature=float("nan"))])
def test_a_temperature_must_be_above_zero(method: Gkd) -> None:
    with pytest.raises(InputError, match=r"temperature of TokenDivergence.* must be above 0"):
        check(job(method))


def test_prompt_and_completion_must_fit_the_positions_of_whoever_reads_them() -> None:
    """2 + 6 tokens for the student; the teacher's prompt has one more. Stored rollouts count with their own length."""

    def sized(positions: int) -> Any:
        return make_model(TOKENIZER, 1, 16, 1, max_position_embeddings=positions)

    check(job(Gkd(), student=sized(8)))
    with pytest.raises(InputError, match="has 2 tokens and a completion up to 6; the model of 'student' has 7"):
        check(job(Gkd(), student=sized(7)))
    privileged = Gkd(teacher_context="privileged")
    with pytest.raises(InputError, match=r"prompt 'privileged' of task 't0' has 3 tokens .* 'teacher' has 8 positions"):
        check(job(privileged, models={"teacher": make_model(TOKENIZER, 2, 16, 1, max_position_embeddings=8)}))
    check(job(SequenceKd(), student=sized(6)))
    with pytest.raises(InputError, match="a completion up to 4; the model of 'student' has 5"):
        check(job(SequenceKd(), student=sized(5)))


def test_a_teacher_that_says_what_the_student_says_is_refused() -> None:
    with pytest.raises(TrainingError, match="Are teacher and student the same model"):
        check(job(Gkd(on_policy=0.0), models={"teacher": make_model(TOKENIZER, 1, 16, 1)}))
    with pytest.raises(TrainingError, match=r"'teacher' is the student itself and reads the prompt 'prompt'"):
        check(job(Gkd(teacher_origin="snapshot"), models={}, tokenizers={}))
    check(job(Gkd(teacher_origin="snapshot", teacher_context="privileged"), models={}, tokenizers={}))


def test_every_term_is_looked_at_by_itself() -> None:
    """Labels would train the student, and hide that the teacher does not."""
    terms = [CrossEntropy(), TokenDivergence(divergence="forward_kl", coefficient=0.5)]
    made = phase(terms=terms, roles=[Role(name="teacher")])
    check(job(Fixed(made)))
    with pytest.raises(TrainingError, match=r"the gradient of TokenDivergence.* is zero"):
        check(job(Fixed(made), models={"teacher": make_model(TOKENIZER, 1, 16, 1)}))
    silent = replace(made, terms=[terms[0], replace(terms[1], coefficient=0.0)])
    check(job(Fixed(silent), models={"teacher": make_model(TOKENIZER, 1, 16, 1)}))  # a term that is switched off


def test_a_small_coefficient_is_no_missing_signal() -> None:
    term = TokenDivergence(divergence="forward_kl", coefficient=1e-7)
    check(job(Fixed(phase(terms=[term], roles=[Role(name="teacher")]))))


def test_a_signal_that_begins_later_is_waited_for() -> None:
    """TAID's target is the student itself at t = 0; a clock that never moves would train nothing."""
    check(job(Taid(t_start=0.0)))
    with pytest.raises(TrainingError, match="is zero in 3 batches"):
        check(job(Taid(t_start=0.0, t_end=0.0)))


def test_weights_that_are_all_zero_and_frozen_students_are_refused() -> None:
    masked = {task: [replace(r, mask=[0] * 4) for r in some] for task, some in kept(0).items()}
    with pytest.raises(TrainingError, match=r"the gradient of CrossEntropy.* is zero"):
        check(job(SequenceKd(), stored={"teacher": masked}))
    frozen = job(SequenceKd())
    frozen.student.requires_grad_(False)
    with pytest.raises(TrainingError, match="are all parameters frozen"):
        check(frozen)


def test_modules_of_a_phase_are_taken_off_again() -> None:
    @dataclass(frozen=True)
    class Project:
        coefficient: float = 1.0

        def __call__(self, view: Any) -> Any:
            return view.mean((view.module("projector")(view.hidden()) - view.hidden("teacher")).square().mean(-1))

    made = phase(
        terms=[Project()], roles=[Role(name="teacher")],
        modules=lambda models: {"projector": torch.nn.Linear(16, 16)},
    )  # fmt: skip
    chosen = job(Fixed(made))
    check(chosen)
    assert not hasattr(chosen.student, "workbench_modules")
