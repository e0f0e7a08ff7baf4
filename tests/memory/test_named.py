"""The arms of what a query names: speakers and dates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.memory.fusion import comb_sum
from workbench.memory.named import date_scores, dates_in, speaker_of, speaker_scores

TURNS = ["Ana: I moved", "Ben: where to?", "Ana: to Oslo", "Ben: nice", "so it was said"]
SPEAKERS = [speaker_of(turn) for turn in TURNS]


@pytest.mark.parametrize(
    ("text", "speaker"),
    [
        ("Ana: I moved", "Ana"),
        ("Ana Maria Silva: hello", "Ana Maria Silva"),
        ("Zoë: hi", "Zoë"),
        ("fix: a typo", ""),
        ("see https://example.org", ""),
        ("Ana and Ben: hello", ""),
        ("Ana:hello", ""),
        ("I said: no", ""),
        ("12: no", ""),
        ("", ""),
    ],
)
def test_speaker_is_the_name_before_the_first_colon(text: str, speaker: str) -> None:
    assert speaker_of(text) == speaker


def test_turns_of_the_named_speaker_score_1() -> None:
    assert speaker_scores("Where did Ana move?", SPEAKERS).tolist() == [1, 0, 1, 0, 0]
    assert speaker_scores("What was Ben's answer?", SPEAKERS).tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("query", ["Who moved?", "What did Ana and Ben say?", "an analysis", "Anaconda"])
def test_naming_nobody_or_everybody_says_nothing(query: str) -> None:
    assert not speaker_scores(query, SPEAKERS).any()


def test_all_words_of_a_name_must_be_named() -> None:
    speakers = ["Ana Silva", "Ana Costa"] * 3
    assert speaker_scores("What did Ana say?", speakers).sum() == 0
    assert speaker_scores("What did Ana Costa say?", speakers).tolist() == [0, 1] * 3


def test_a_rare_label_is_no_speaker() -> None:
    speakers = ["Ana"] * 60 + ["Ben"] * 38 + ["Note"] * 2
    assert not speaker_scores("Note that", speakers).any()
    assert speaker_scores("Note that Ben", speakers).sum() == 38


@pytest.mark.parametrize(
    ("query", "dates"),
    [
        ("on 8 May, 2023?", [(2023, 5, 8)]),
        ("the 21st of August 2022", [(2022, 8, 21)]),
        ("on April 10, 2022?", [(2022, 4, 10)]),
        ("in Sept 2023", [(2023, 9, None)]),
        ("in Sep 2023", [(2023, 9, None)]),
        ("in September 2023", [(2023, 9, None)]),
        ("in May", [(None, 5, None)]),
        ("a pride parade in August?", [(None, 8, None)]),
        ("2023-05-08", [(2023, 5, 8)]),
        ("since 2023-05", [(2023, 5, None)]),
        ("what may happen, and a march", [(None, 3, None)]),
        ("between 3 June and 5 July 2021", [(None, 6, 3), (2021, 7, 5)]),
        ("what did he say in 2022?", []),
        ("2023-13-01", []),
        ("45 May", []),
    ],
)
def test_dates_are_read(query: str, dates: list[tuple[int | None, int, int | None]]) -> None:
    assert dates_in(query) == dates


def test_day_counts_more_than_month_and_a_named_year_must_agree() -> None:
    times = ["2023-05-08T10:00:00", "2023-05-09T10:00:00", "2022-05-08T10:00:00", "2023-06-08T10:00:00", "", "8 May"]
    assert date_scores("on 8 May 2023", times).tolist() == [1, 0.5, 0, 0, 0, 0]
    assert date_scores("on 8 May", times).tolist() == [1, 0.5, 1, 0, 0, 0]
    assert date_scores("in May 2022", times).tolist() == [0, 0, 0.5, 0, 0, 0]
    assert date_scores("in June or on 9 May 2023", times).tolist() == [0.5, 1, 0, 0.5, 0, 0]
    assert not date_scores("when was it?", times).any()


def test_no_candidates() -> None:
    assert len(speaker_scores("Ana", [])) == 0
    assert len(date_scores("in May", [])) == 0


@given(st.lists(st.floats(0, 1), min_size=5, max_size=5), st.sampled_from(["Ana", "Who?", "Ana on 8 May"]))
def test_weight_0_is_plain_fusion(scores: list[float], query: str) -> None:
    docs = np.arange(5)
    keyword = (docs, np.array(scores))
    named = [
        (docs, speaker_scores(query, SPEAKERS)),
        (docs, date_scores(query, ["2023-05-08"] * 3 + [""] * 2)),
    ]
    plain, fused = comb_sum([keyword]), comb_sum([keyword, *named], [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(fused[0], plain[0])
    np.testing.assert_array_equal(fused[1], plain[1])


@given(st.text(max_size=60), st.lists(st.text(max_size=12), max_size=6))
def test_any_text_gives_scores_from_0_to_1(query: str, texts: list[str]) -> None:
    for scores in (speaker_scores(query, [speaker_of(text) for text in texts]), date_scores(query, texts)):
        assert len(scores) == len(texts)
        assert np.all((scores >= 0) & (scores <= 1))
