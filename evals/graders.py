"""Graders of answers: normalised exact match, token F1, and the sum of grades with nothing left out silently.

A grader says `value` (0 to 1) or, where there is nothing to judge, why: a status. A missing grade is never a 0 by
itself; `summarise` gives the score over all items and the one over completed items side by side (evals.md R5).

Source: exact match and token F1 as in SQuAD (Rajpurkar et al. 2016): lower case, no punctuation, no articles. Unlike
there, signs, decimal points and separators inside numbers and dates stay, so that "1.5" is not "15" nor "-5" "5".
Verified by: tests/evals/test_graders.py.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from workbench.errors import InputError
from workbench.evals.agreement import cohens_kappa, krippendorff_alpha, raw_agreement

Status = Literal["ok", "wrong_format", "truncated", "timeout", "policy_error", "grader_error", "skipped"]
STATUSES: tuple[Status, ...] = get_args(Status)

EXACT_MATCH, TOKEN_F1 = "exact_match/1", "token_f1/1"
_ARTICLES = frozenset(("a", "an", "the"))
#: A number or date with its separators, an abbreviation with dots, or a run of letters and digits.
_TOKEN = re.compile(
    r"(?<![^\W_])[-+]?\d+(?:[.,:/-]\d+)*(?![^\W_])"
    r"|(?<![^\W_])(?:[^\W\d_]\.)+[^\W\d_](?![^\W_])"
    r"|[^\W_]+(?:['’][^\W_]+)*"
)
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Grade:
    """What a grader says of one answer.

    Args:
        value: 0 (wrong) to 1 (right); None exactly where the status is not "ok".
        status: "ok", or why there is no value.
        grader: its name and version; grades of different versions are not compared.
        extracted: what was judged, after extraction or normalisation.
        explanation: the grader's reason, or what went wrong.
        seconds: how long it took, where that is worth knowing; no part of what makes two grades equal.
    """

    value: float | None
    status: Status
    grader: str
    extracted: str = ""
    explanation: str = ""
    seconds: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.status not in STATUSES or (self.value is None) != (self.status != "ok"):
            raise InputError(f"A grade has a value exactly if its status is ok: {self.value!r}, {self.status!r}.")
        if self.value is not None and not 0 <= self.value <= 1:
            raise InputError(f"The value of a grade lies between 0 and 1, not {self.value}.")


def normalise_answer(text: str) -> str:
    """An answer without case, punctuation, articles and thousands commas, single-spaced; articles alone stay ("A")."""
    return " ".join(_words(text))


def _words(text: str) -> list[str]:
    found = _TOKEN.findall(unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-").casefold())
    words = [_clean(token) for token in found]
    return [word for word in words if word not in _ARTICLES] or words


def _clean(token: str) -> str:
    if token[-1].isdigit() and (token[0] in "+-" or token[0].isdigit()):
        return (token.replace(",", "") if _THOUSANDS.fullmatch(token) else token).removeprefix("+")
    return re.sub(r"['’.]", "", token)


def exact_match(answer: str, targets: Sequence[str]) -> Grade:
    """1 if the normalised answer equals a normalised target, else 0; an answer without any word is wrong_format.

    Raises: InputError if no target has a word.
    """
    words, wanted = _sides(answer, targets)
    if not words:
        return _no_answer(EXACT_MATCH)
    return Grade(float(words in wanted), "ok", EXACT_MATCH, " ".join(words))


def token_f1(answer: str, targets: Sequence[str]) -> Grade:
    """The best F1 over targets of the words that answer and target share, counted with repetition.

    Raises: InputError if no target has a word.
    """
    words, wanted = _sides(answer, targets)
    if not words:
        return _no_answer(TOKEN_F1)
    best = max(2 * (Counter(words) & Counter(target)).total() / (len(words) + len(target)) for target in wanted)
    return Grade(best, "ok", TOKEN_F1, " ".join(words))


def _sides(answer: str, targets: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    if isinstance(targets, str):
        raise InputError(f"The targets must be a list of texts, not the text {targets[:60]!r}.")
    wanted = [words for target in targets if (words := _words(target))]
    if not wanted:
        raise InputError(f"No target has a word to compare with: {list(targets)!r}.")
    return _words(answer), wanted


def _no_answer(grader: str) -> Grade:
    return Grade(None, "wrong_format", grader, explanation="the answer holds no word")


@dataclass(frozen=True, slots=True)
class Summary:
    """Grades together.

    Args:
        num_items: all of them.
        by_status: how many have which status; they add up to num_items.
        score: sum of values / all items: an item without a value counts as not solved.
        score_completed: mean value of the items with status ok; None if there is none.
    """

    grader: str
    num_items: int
    by_status: dict[Status, int]
    score: float
    score_completed: float | None

    def as_json(self) -> dict[str, Any]:
        """All fields by name."""
        return {name: getattr(self, name) for name in self.__slots__}


def summarise(grades: Iterable[Grade]) -> Summary:
    """Adds grades up; raises InputError for none, and for grades of different graders or versions."""
    listed = list(grades)
    graders = sorted({grade.grader for grade in listed})
    if len(graders) != 1:
        raise InputError(f"Grades of one grader are needed, not of {', '.join(graders) or 'none'}.")
    counts = Counter(grade.status for grade in listed)
    values = [grade.value for grade in listed if grade.value is not None]
    assert len(values) == counts["ok"]
    total = math.fsum(values)
    return Summary(
        grader=graders[0],
        num_items=len(listed),
        by_status={status: counts[status] for status in STATUSES if counts[status]},
        score=total / len(listed),
        score_completed=total / len(values) if values else None,
    )


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far judges agree on the same items.

    Args:
        num_items: all; num_complete: those that every judge has graded.
        alpha: Krippendorff's, over all judges (interval); nan where all grades are the same value.
        pairs: (judge, judge) -> raw agreement and Cohen's kappa on what both graded; None if they share no item.
    """

    num_items: int
    num_complete: int
    alpha: float
    pairs: dict[tuple[str, str], tuple[float, float] | None]


def judge_agreement(grades: Mapping[str, Sequence[Grade]]) -> Agreement:
    """Agreement of two or more judges; items without a grade are gaps, not disagreement.

    Args: grades: judge's name -> its grades, of the same items in the same order.
    Raises: InputError for fewer than two judges, lists of different length, and no item with two grades.
    """
    if len(grades) < 2 or len({len(column) for column in grades.values()}) != 1:
        raise InputError(f"Two or more judges must grade the same items: { {k: len(v) for k, v in grades.items()} }.")
    values = {name: [grade.value for grade in column] for name, column in grades.items()}
    names = list(values)
    pairs: dict[tuple[str, str], tuple[float, float] | None] = {}
    for at, first in enumerate(names):
        for second in names[at + 1 :]:
            a, b = values[first], values[second]
            shared = any(x is not None and y is not None for x, y in zip(a, b, strict=True))
            pairs[first, second] = (raw_agreement(a, b), cohens_kappa(a, b)) if shared else None
    columns = list(zip(*values.values(), strict=True))
    return Agreement(
        num_items=len(columns),
        num_complete=sum(None not in column for column in columns),
        alpha=krippendorff_alpha(list(values.values()), "interval"),
        pairs=pairs,
    )
