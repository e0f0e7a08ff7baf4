"""What a query names beside its topic: who speaks, and when. Pure functions over the candidates of a recall.

A chat between people writes the speaker before the words ("Dana: I moved to Oslo"), and a question names one of them.
To BM25 such a name is a frequent word and weighs next to nothing; as an arm of its own it tells the turns of one
speaker from those of the other. The same holds for a date: it stands in a candidate's time, not in its words. Where no
candidate is labelled, or the query names nobody and no date, both arms are 0 everywhere and fusion is what it was.
Measured by benchmarks/recall_study.py. Verified by: tests/memory/test_named.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_LABEL = re.compile(r"([^\W\d_]\w{0,39}(?: [^\W\d_]\w{0,39}){0,2}): ")
_WORD = re.compile(r"\w+")
#: A label speaks for itself only if this share of the labelled candidates bears it ("Note: " is no speaker).
_MIN_SHARE = 0.05
_MONTHS = ("january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
           "december")  # fmt: skip
_MONTH_NAMES = "|".join(f"{name}|{name[:3]}" for name in _MONTHS) + "|sept"
_YEAR = r"(?P<year>(?:19|20)\d\d)"
_DAY = r"(?P<day>[0-3]?\d)(?:st|nd|rd|th)?"
#: "8 May, 2023", "the 8th of May", "May 8, 2023", "May 2023", "in May", "2023-05-08", "2023-05". The word "may" by
#: itself is no month: it needs a day, a year or a preposition beside it.
_DATES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\b{_YEAR}-(?P<number>[01]\d)(?:-(?P<day>[0-3]\d))?\b",
        rf"\b{_DAY} (?:of )?(?P<month>{_MONTH_NAMES})\b\.?(?:,? {_YEAR}\b)?",
        rf"\b(?P<month>{_MONTH_NAMES})\b\.? {_DAY}\b(?:,? {_YEAR}\b)?",
        rf"\b(?P<month>{_MONTH_NAMES})\b\.?,? {_YEAR}\b",
        rf"\b(?:in|during|since|until|by|of|early|late|mid|last|this) (?P<month>{_MONTH_NAMES})\b",
        rf"\b(?P<month>{'|'.join(name for name in _MONTHS if name != 'may')})\b",
    )
)


def speaker_of(text: str) -> str:
    """The name before the first colon of a text ("Dana: I moved"), one to three capitalised words; "" without one."""
    match = _LABEL.match(text)
    return match[1] if match and all(word[0].isupper() for word in match[1].split()) else ""


def speaker_scores(query: str, speakers: Sequence[str]) -> NDArray[np.float64]:
    """1 for candidates whose speaker the query names, 0 for the others; all 0 if it names every speaker or none.

    Args: speakers: `speaker_of` each candidate, "" where there is none. A name counts in the query's spelling of it.
    """
    counts = Counter(speaker for speaker in speakers if speaker)
    least = max(2.0, _MIN_SHARE * counts.total())
    names = {name for name, count in counts.items() if count >= least}
    words = set(_WORD.findall(query))
    named = {name for name in names if words.issuperset(name.split())}
    if not named or named == names:
        return np.zeros(len(speakers))
    return np.array([float(speaker in named) for speaker in speakers])


def dates_in(query: str) -> list[tuple[int | None, int, int | None]]:
    """The dates that a text names, as (year, month, day), None for a part that it does not; each place once."""
    found: list[tuple[int | None, int, int | None]] = []
    taken = np.zeros(len(query) + 1, bool)
    for pattern in _DATES:
        for match in pattern.finditer(query):
            if taken[match.start() : match.end()].any():
                continue
            parts = match.groupdict()
            year, day = (int(parts[name]) if parts.get(name) else None for name in ("year", "day"))
            month = int(parts["number"]) if parts.get("number") else _month(parts["month"])
            if 1 <= month <= 12 and (day is None or 1 <= day <= 31):
                taken[match.start() : match.end()] = True
                found.append((year, month, day))
    return found


def date_scores(query: str, times: Sequence[str]) -> NDArray[np.float64]:
    """How well each candidate's time agrees with the dates that the query names, the best of them counting.

    1 for the same day, 1/2 for the same month where the query names no day or another one; a year that the query names
    must agree. 0 for a candidate without a time.

    Args: times: ISO 8601, of each candidate; anything else counts as unknown.
    """
    scores = np.zeros(len(times))
    dates = dates_in(query)
    if not dates:
        return scores
    parts = np.array([_ymd(time) for time in times]).reshape(-1, 3)
    for year, month, day in dates:
        agrees = (parts[:, 1] == month) & (year is None or parts[:, 0] == year)
        scores = np.maximum(scores, agrees * np.where(parts[:, 2] == day, 1.0, 0.5))
    return scores


def _month(name: str) -> int:
    return next(at for at, month in enumerate(_MONTHS, 1) if month.startswith(name.lower()[:3]))


def _ymd(time: str) -> tuple[int, int, int]:
    match = re.match(r"(\d{4})-(\d\d)-(\d\d)", time)
    return (int(match[1]), int(match[2]), int(match[3])) if match else (0, 0, 0)
