"""The task of running states: what is stored says what it claims to."""

from __future__ import annotations

import pytest

pytest.importorskip("torch").set_num_threads(1)
pytest.importorskip("trl")

from workbench.evals.running_states import Sizes, answers, make_school  # noqa: E402


def test_rationales_end_in_the_answer_and_shuffled_ones_are_those_of_others() -> None:
    school = make_school(3, Sizes(num_train=60, num_test=80))
    assert not {task.id for task in school.train} & {task.id for task in school.test}
    assert (len(school.train), len(school.test)) == (60, 80)
    texts: dict[str, list[str]] = {}
    for policy in ("labels", "rationales", "shuffled"):
        found = [school.stored[policy][task.id][0].completion_ids for task in school.train]
        assert all(ids[-1] == school.tokenizer.eos_token_id for ids in found)
        texts[policy] = [school.tokenizer.decode(ids[:-1]) for ids in found]
    for task, label, rationale in zip(school.train, texts["labels"], texts["rationales"], strict=True):
        digits = [int(digit) for digit in task.id.removeprefix("digits-")]
        assert rationale.split() == [f"s{sum(digits[: n + 1]) % 3}" for n in range(4)]
        assert label == task.answer == rationale.split()[-1]
    assert sorted(texts["shuffled"]) == sorted(texts["rationales"])
    same = sum(one == other for one, other in zip(texts["shuffled"], texts["rationales"], strict=True))
    assert same < 10  # by chance 1 of 81


def test_an_untrained_student_is_judged_by_its_likeliest_word() -> None:
    school = make_school(0, Sizes(num_train=8, num_test=50))
    right = answers(school.start, school)
    assert right.shape == (50,)
    assert set(right.tolist()) <= {0.0, 1.0}
    assert (answers(make_school(0, Sizes(num_train=8, num_test=50)).start, school) == right).all()
