"""Queries that a store answers by itself, without a label or a model: commits and titles.

A query is the subject of a commit that an agent made in a session; what answers it are the exchanges that changed
files since the commit before, or the one that committed. Titles of conversations are queries too: any exchange of the
conversation answers them. A query whose words stand verbatim in an exchange's text is dropped: finding it would
measure copying. Error lines and back-references: memory/mined_errors.py and memory/mined_references.py.

Verified by: tests/memory/test_mined_queries.py, tests/memory/test_calibrate.py.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import duckdb
import orjson

MIN_WORDS = 4
MAX_RELEVANT = 12  # a query with more answers says nothing about ranking
MAX_TITLES = 200
CHANGES = frozenset(("modified", "created", "deleted"))
SEED_WORDS = 3  # by which copies of a query are looked for

_COMMIT = re.compile(r"git\s+(?:-\S+\s+\S+\s+)*commit\b(.*)", re.DOTALL)
_MESSAGE = re.compile(
    r"(?:-\w*m|--message)[= ]*"
    r"(?:\"?\$\(cat\s+<<-?\s*['\"]?(\w+)['\"]?\s*\n(.*?)\n\s*\1|\"((?:[^\"\\]|\\.)*)\"|'([^']*)')",
    re.DOTALL,
)


class LabelledQuery(NamedTuple):
    """A query and the doc numbers (exchanges.seq) that answer it.

    Args:
        kind: "commit", "title", "error" or "reference".
        source: the doc number of the exchange whose user's words the query is, which must not be searched with it;
            0 where the query's words come from elsewhere.
    """

    text: str
    relevant: frozenset[int]
    kind: str
    source: int = 0


def store_queries(con: duckdb.DuckDBPyConnection) -> list[LabelledQuery]:
    """The commits and titles that the store holds as queries, each with its answers; commits first."""
    return list(commit_queries(con)) + list(title_queries(con))


def commit_subject(command: str) -> str | None:
    """The first line of the message of a `git commit` in a shell command; None if there is none."""
    commit = _COMMIT.search(command)
    message = commit and _MESSAGE.search(commit.group(1))
    if not message:
        return None
    text = (message.group(2) or message.group(3) or message.group(4) or "").strip()
    return text.splitlines()[0].strip() if text else None


def commit_queries(
    con: duckdb.DuckDBPyConnection, dropped: Counter[str] | None = None, *, keep_copied: bool = False
) -> Iterator[LabelledQuery]:
    """Subjects of commits; `dropped` counts by reason what is no query.

    Args: keep_copied: also what stands verbatim in an answer or in the exchange that committed.
    """
    rows = con.execute(
        """
        SELECT e.conversation_id, e.thread, e.position, e.seq, e.user_text || ' ' || e.assistant_text, e.files::VARCHAR,
            (SELECT list(p.data ORDER BY m.ply, p.seq, p.ordinal) FROM messages m JOIN parts p USING (message_id)
             WHERE m.conversation_id = e.conversation_id AND m.thread = e.thread
                AND m.ply BETWEEN e.ply_start AND e.ply_end AND p.kind = 'tool_call' AND contains(p.data, 'commit'))
        FROM exchanges e ORDER BY 1, 2, 3"""
    ).fetchall()
    dropped = Counter() if dropped is None else dropped
    for _, group in groupby(rows, key=lambda r: r[:2]):
        since: dict[int, str] = {}  # exchanges that changed files after the last commit
        for _, _, _, seq, text, files, calls in group:
            if any(f["action"] in CHANGES for f in orjson.loads(files)):
                since[seq] = text
            subjects = [s for data in calls or () for c in shell_commands(data) if (s := commit_subject(c))]
            for subject in subjects:
                answers = since or {seq: text}
                if len(subject.split()) < MIN_WORDS:
                    dropped["commit_too_short"] += 1
                elif len(answers) > MAX_RELEVANT:
                    dropped["commit_too_many_answers"] += 1
                elif not keep_copied and any(plain(subject) in plain(t) for t in (*answers.values(), text)):
                    dropped["commit_copied"] += 1
                else:
                    yield LabelledQuery(subject, frozenset(answers), "commit")
            if subjects:
                since = {}


def title_queries(
    con: duckdb.DuckDBPyConnection, dropped: Counter[str] | None = None, *, keep_copied: bool = False
) -> Iterator[LabelledQuery]:
    """Titles of conversations of at most MAX_RELEVANT exchanges; arguments as of `commit_queries`."""
    rows = con.execute(
        """
        SELECT any_value(c.title), list(e.seq), string_agg(e.user_text || ' ' || e.assistant_text, ' ')
        FROM conversations c JOIN exchanges e USING (conversation_id) WHERE c.title IS NOT NULL
        GROUP BY c.conversation_id HAVING count(*) <= ? ORDER BY min(e.seq) LIMIT ?""",
        [MAX_RELEVANT, MAX_TITLES],
    ).fetchall()
    dropped = Counter() if dropped is None else dropped
    for title, docs, text in rows:
        if len(title.split()) < MIN_WORDS:
            dropped["title_too_short"] += 1
        elif not keep_copied and plain(title) in plain(text):
            dropped["title_copied"] += 1
        else:
            yield LabelledQuery(title, frozenset(docs), "title")


def shell_commands(data: str) -> list[str]:
    """The shell commands among a tool call's arguments (JSON)."""
    arguments = orjson.loads(data)
    if isinstance(arguments, str):
        return [arguments]
    value = arguments.get("command", arguments.get("cmd")) if isinstance(arguments, dict) else None
    return [value] if isinstance(value, str) else [str(value[-1])] if isinstance(value, list) and value else []


def plain(text: str) -> str:
    """The words of a text in lower case, single-spaced: two texts with the same words are the same."""
    return " ".join(re.findall(r"\w+", text.lower()))


def copied(queries: Sequence[str], texts: Iterable[tuple[int, str]]) -> list[set[int]]:
    """For each query the numbers of the texts in which its words stand verbatim, case and punctuation aside.

    Args: texts: number and text; they are read once, whatever the number of queries.
    """
    found: list[set[int]] = [set() for _ in queries]
    by_seed: dict[tuple[str, ...], list[tuple[int, list[str]]]] = defaultdict(list)
    for at, query in enumerate(queries):
        words = plain(query).split()
        by_seed[tuple(words[:SEED_WORDS])].append((at, words))
    lengths = sorted({len(seed) for seed in by_seed if seed})
    for number, text in texts:
        words = plain(text).split()
        for start in range(len(words)):
            for length in lengths:
                for at, wanted in by_seed.get(tuple(words[start : start + length]), ()):
                    if words[start : start + len(wanted)] == wanted:
                        found[at].add(number)
    return found
