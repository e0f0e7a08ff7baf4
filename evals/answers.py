"""Grades a file of answers: read, grade by rule or by judges, add up with intervals and agreement.

    {"id": "q1", "question": "When did we move?", "answer": "in May", "targets": ["May 2023"]}

JSON lines. `targets` are acceptable answers (a judge of pairs can do without). Where a system gave no answer, `answer`
is "" and `status` says why (truncated, timeout, policy_error, wrong_format). `cluster`: items of one cluster are not
independent (samples of one question, questions of one conversation); default: each its own. A text with template
marks is refused unless "literal": true. Grades hang on what the items say, never on a file that is there already (P8
of evals.md).

Verified by: tests/evals/test_answers.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import InputError
from workbench.evals.graders import Grade, Status, exact_match, judge_agreement, summarise, token_f1
from workbench.evals.judge import Judge, JudgeItem
from workbench.evals.pair_judge import PairItem, PairJudge
from workbench.evals.stats import paired_randomisation, score_interval
from workbench.evals.tasks.base import Row, read_jsonl
from workbench.evals.templates import template_mark

FIELDS = ("id", "question", "answer", "targets", "status", "cluster", "literal")
#: Why a system gave no answer.
NO_ANSWER: tuple[Status, ...] = ("truncated", "timeout", "policy_error", "wrong_format")
RULES: Mapping[str, Callable[[str, Sequence[str]], Grade]] = {"exact": exact_match, "f1": token_f1}


@dataclass(frozen=True, slots=True)
class AnswerItem:
    """One answer; `status` is "ok", or why there is none."""

    id: str
    question: str
    answer: str
    targets: tuple[str, ...]
    status: Status = "ok"
    cluster: str = ""


def read_items(path: str | Path) -> list[AnswerItem]:
    """The items of a file; raises InputError that names file and line for what is wrong."""
    seen: set[str] = set()
    items = [_item(row, seen) for row in read_jsonl(Path(path))]
    if not items:
        raise InputError(f"{path}: holds no item.")
    return items


def _item(row: Row, seen: set[str]) -> AnswerItem:
    if unknown := sorted(row.fields.keys() - set(FIELDS)):
        raise row.error(f"there is no field {unknown[0]!r}; there are {', '.join(FIELDS)}")
    status = row.words("status") if "status" in row.fields else "ok"
    if status != "ok" and status not in NO_ANSWER:
        raise row.error(f"the status must be ok or one of {', '.join(NO_ANSWER)}, not {status!r}")
    item = AnswerItem(
        id=row.new_id("id", seen), question=row.get("question", str) if "question" in row.fields else "",
        answer=row.get("answer", str), targets=tuple(row.texts("targets")) if "targets" in row.fields else (),
        status=status, cluster=row.get("cluster", str) if "cluster" in row.fields else "",
    )  # fmt: skip
    if not (row.get("literal", bool) if "literal" in row.fields else False):
        for name, text in (("question", item.question), *(("target", target) for target in item.targets)):
            if mark := template_mark(text):
                raise row.error(
                    f'the {name} still has the template mark {mark!r}; render it, or add "literal": true if it is meant'
                )
    return item


def grade_by_rule(items: Sequence[AnswerItem], rule: str) -> list[Grade]:
    """Grades by one of RULES or "math", in the order of the items.

    Raises: InputError for an item without targets; MissingExtra for math without math-verify.
    """
    if rule not in RULES and rule != "math":
        raise InputError(f"There is no grader {rule!r}; there are {', '.join(RULES)}, math and judge.")
    for item in items:
        if not any(target.strip() for target in item.targets):
            raise InputError(f"The item {item.id!r} has no target to compare with; add `targets`.")
    if rule == "math":
        from workbench.evals.math_grader import GRADER, MathGrader

        asked = [item for item in items if item.status == "ok"]
        with MathGrader() as grader:
            graded = {i.id: g for i, g in zip(asked, grader.grade([(i.answer, i.targets) for i in asked]), strict=True)}
        return [graded.get(item.id) or _unanswered(item, GRADER) for item in items]
    name = RULES[rule]("x", ["x"]).grader
    grades: list[Grade] = []
    for item in items:
        try:
            grades.append(RULES[rule](item.answer, item.targets) if item.status == "ok" else _unanswered(item, name))
        except InputError as e:
            raise InputError(f"The item {item.id!r}: {e}") from e
    return grades


def _unanswered(item: AnswerItem, grader: str) -> Grade:
    return Grade(None, item.status, grader, explanation="the system gave no answer")


def grade_by_judge(items: Sequence[AnswerItem], judge: Judge) -> Iterator[tuple[AnswerItem, Grade]]:
    """Yields items with their grades as a judge gives them, in any order; errors as of Judge.grade."""
    by_id = {item.id: item for item in items}
    asked = (
        JudgeItem(i.id, i.question, i.targets, i.answer, "" if i.status == "ok" else "the system gave no answer",
                  "policy_error" if i.status == "ok" else i.status)
        for i in items
    )  # fmt: skip
    for judged, grade in judge.grade(asked):
        yield by_id[judged.id], grade


def compare_by_judge(
    items: Sequence[AnswerItem], others: Sequence[AnswerItem], judge: PairJudge
) -> Iterator[tuple[AnswerItem, Grade]]:
    """Yields items with 1 where their answer is better than the other file's in both orders, 0 where it is worse.

    Raises: InputError if the files do not hold the same ids with the same questions and targets.
    """
    theirs = {item.id: item for item in others}
    if theirs.keys() != {item.id for item in items}:
        only = sorted(theirs.keys() ^ {item.id for item in items})
        raise InputError(f"The files must hold the same items; {len(only)} stand in one only, for example {only[0]!r}.")
    for item in items:
        if (item.question, item.targets) != (theirs[item.id].question, theirs[item.id].targets):
            raise InputError(f"The item {item.id!r} has another question or other targets in the second file.")
    by_id = {item.id: item for item in items}
    for pair, grade in judge.compare(_pair(item, theirs[item.id]) for item in items):
        yield by_id[pair.id], grade


def _pair(a: AnswerItem, b: AnswerItem) -> PairItem:
    missing = next((item for item in (a, b) if item.status != "ok"), None)
    failure = f"the {'first' if missing is a else 'second'} file has no answer" if missing else ""
    return PairItem(
        a.id, a.question, a.targets, a.answer, b.answer, failure, missing.status if missing else "policy_error"
    )


def in_order(items: Sequence[AnswerItem], graded: Iterable[tuple[AnswerItem, Grade]]) -> list[Grade]:
    """The grades in the order of the items; every item has exactly one."""
    found = {item.id: grade for item, grade in graded}
    return [found[item.id] for item in items]


def summary(items: Sequence[AnswerItem], grades: Sequence[Grade]) -> dict[str, Any]:
    """Counts by status, the score over all items and over the completed ones, each with its 95 % interval.

    Intervals as of `stats.score_interval`; None for fewer than two clusters. An item without a value counts as 0 in
    `score`, and is left out of `score_completed`.
    """
    clusters = [_cluster(item) for item in items]
    values = [grade.value or 0.0 for grade in grades]
    completed = [(grade.value, c) for grade, c in zip(grades, clusters, strict=True) if grade.value is not None]
    return {
        **summarise(grades).as_json(),
        "score_interval": _interval(values, clusters),
        "score_completed_interval": _interval([v for v, _ in completed], [c for _, c in completed]),
    }


def _interval(values: Sequence[float], clusters: Sequence[str]) -> dict[str, Any] | None:
    if len(set(clusters)) < 2:
        return None
    found = score_interval(values, clusters)
    return {name: getattr(found, name) for name in ("low", "high", "level", "num_units", "method")}


def agreement(grades: Mapping[str, Sequence[Grade]]) -> dict[str, Any] | None:
    """Agreement of judges on the same items; None for a single judge or where no item has two grades."""
    columns = list(zip(*([g.value is not None for g in column] for column in grades.values()), strict=True))
    if len(grades) < 2 or not any(sum(column) > 1 for column in columns):
        return None
    found = judge_agreement(grades)
    pairs = [
        {"judges": list(names), "raw": pair and _finite(pair[0]), "kappa": pair and _finite(pair[1])}
        for names, pair in found.pairs.items()
    ]
    return {
        "num_items": found.num_items, "num_complete": found.num_complete,
        "krippendorff_alpha": _finite(found.alpha), "pairs": pairs,
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None  # NumPy's own numbers are no JSON


def preferences(items: Sequence[AnswerItem], grades: Sequence[Grade], num_by_position: int) -> dict[str, Any]:
    """Wins, ties and losses of the first file, its mean preference with interval, and a sign-flip test by cluster."""
    done = [(g.value, _cluster(item)) for item, g in zip(items, grades, strict=True) if g.value is not None]
    values, clusters = [value for value, _ in done], [cluster for _, cluster in done]
    counts = Counter(values)
    # Sums by cluster, so that what is tested is the mean that is told.
    sums = dict.fromkeys(clusters, 0.0)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - 0.5
    return {
        "by_status": dict(Counter(grade.status for grade in grades)),
        "wins": counts[1.0], "ties": counts[0.5], "losses": counts[0.0], "ties_by_position": num_by_position,
        "preference": math.fsum(values) / len(values) if values else None,
        "interval": _interval(values, clusters),
        "p": paired_randomisation(list(sums.values()), [0.0] * len(sums)).p if sums else None,
    }  # fmt: skip


def _cluster(item: AnswerItem) -> str:
    return f"cluster {item.cluster}" if item.cluster else f"item {item.id}"
