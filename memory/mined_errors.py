"""Error lines of a store as queries: what a person would type -> the exchanges where the error was met and edited away.

An error is taken from the result of a tool (marked as failed, or a shell command's output with an unmistakable line) or
from what the user pasted. Its answer is the exchange in which it came, if its agent then changed a file; else that one
and the following one, if the user goes on with the matter (names it, or says no more than "yes") and the agent changed
a file. An error after which nothing was changed is no query. What differs from run to run (places, times, addresses,
hashes) is taken out, so that the same error is one query however often it came.

Verified by: tests/memory/test_mined_errors.py.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import duckdb
import orjson

from workbench.memory.files import files_from_tool
from workbench.memory.mined_queries import CHANGES, LabelledQuery, plain, shell_commands

MIN_WORDS, MAX_WORDS, MAX_CHARS = 3, 30, 240
MAX_ANSWERS = 6  # an error that comes everywhere distinguishes nothing
MAX_PER_EXCHANGE = 2  # one broken build prints a hundred lines
MAX_GO_AHEAD_WORDS = 5  # "yes", "please go on"
MAX_SCANNED_CHARS = 20_000  # of one output, half from each end

#: Beyond doubt, even in the output of a command that succeeded.
_STRONG = re.compile(r"\s*(?:--- FAIL:|panic:|fatal:|error(?:\[\w+\])?:|(?:[\w.]+\.)?\w*(?:Error|Exception):\s)")
_ERROR = re.compile(
    _STRONG.pattern + r"|\b(?:error|failure|exception)\b\s*:|command not found|no such file|cannot |can't |could not |"
    r"undefined|not defined|no module named|permission denied|connection refused|timed out|not a valid|unexpected |"
    r"unresolved |unknown |invalid |failed to |unable to |not found|does not exist|unused |declared and not used|"
    r"mismatch|not supported|not allowed|is deprecated|already exists",
    re.IGNORECASE,
)
#: Source code, diffs, lists and listings that talk of errors.
_CODE = re.compile(
    r"^\s*(?:\d+\s*(?:→|\||\t)|[+-](?!-- FAIL)|//|#|\*|/\*|>|\d+[.)]\s|@@|\{|at |File \"|func |def |if |for |raise )|"
    r"[{;]\s*$|[=:]=|=>|\bt\.(?:Fatal|Error|Run)|\b(?:fmt|errors|console|logger)\.|throw new|\berr\b|\(ctx\b|"
    r"\breturn |%[svdw]|\$\{|\\n"
)
_GENERIC_WORDS = """
error errors failed fail failure fatal panic exception exit status code file files line not found no such directory
command cannot can t could unable to the a an is in of on for with or and invalid unknown unexpected undefined missing
does exist run running test tests build task lint make go npm
greater less than equal expected actual got want true false nil null none"""
_GENERIC = frozenset(_GENERIC_WORDS.split())
#: What a person writes about an error, not what a program prints.
_PROSE = re.compile(
    r"[?!]\s*$|\b(?:I|we|you|our|my|let's|please|was|when|because|should|need)\b|^[^:]*$|^[-*•]|^(?:current|question|and|continue)\b",
    re.IGNORECASE,
)
_PLACE = re.compile(r"^\s*(?:[\w./\\@+~-]+:\d+(?::\d+)?:?|[\w./\\@+~-]+\(\d+(?:,\d+)?\):?)\s+")
_VARYING = (
    (re.compile(r"^E\s{2,}"), ""),  # pytest
    (re.compile(r"\x1b\[[0-9;]*[A-Za-z]"), ""),
    (re.compile(r"\b\w+://[^\s'\"<>)]+"), ""),
    (re.compile(r"\b\d{4}[-/]\d\d[-/]\d\d(?:[T ]\d\d:\d\d(?::\d\d)?\S*)?|\b\d\d:\d\d:\d\d\S*"), ""),
    (re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{13,}|\b0x[0-9a-f]+|\b(?=[a-f]*\d)[0-9a-f]{7,}\b", re.I), ""),
    (re.compile(r"</?\w+>|\[(?:Line \d+)?(?::\d+)?\]"), ""),
    (re.compile(r"(?:[A-Za-z]:)?[~.\w@+-]*(?:[\\/][\w.@+-]+)*[\\/](?=[\w.@+-])"), ""),  # folders
    (re.compile(r"(?<=\.[a-z]):\d+(?::\d+)?\b|(?<=\.[a-z]{2}):\d+(?::\d+)?\b|(?<=\.[a-z]{3}):\d+(?::\d+)?\b"), ""),
    (re.compile(r"\(?\blines?:? \d+(?:, col(?:umn)?:? \d+)?(?:, idx: \d+)?\)?", re.I), ""),
    (re.compile(r"\(?\b\d+(?:\.\d+)?\s?(?:ns|µs|ms|s|sec|seconds|minutes?)\b\)?"), ""),
    (re.compile(r"\b\d{5,}\b"), ""),
    (re.compile(r"''|\"\"|``|\(\s*\)|\[\s*\]"), ""),
    (re.compile(r"\s+"), " "),
)


class _Met(NamedTuple):
    """An error that waits for a change."""

    key: str
    seq: int
    position: int


def error_query(line: str) -> str:
    """What a person would type of a line of output; "" if it is no error, or tells nothing by itself."""
    text = _PLACE.sub("", line)
    if len(line) > MAX_CHARS or not _ERROR.search(text) or _CODE.search(line) or _CODE.search(text):
        return ""
    text = without_varying(text).strip(" \t-:,;|│✗✘×❌❯").strip()
    words = [word for word in plain(text).split() if re.search(r"[^\W\d]", word)]
    return text if MIN_WORDS <= len(words) <= MAX_WORDS and len(_telling(text)) > 1 else ""


def _telling(text: str) -> set[str]:
    return {word for word in plain(text).split() if word not in _GENERIC and len(word) > 2 and not word.isdecimal()}


def _goes_on(key: str, user_text: str) -> bool:
    """Whether a user's turn is about an error of the turn before."""
    return len(user_text.split()) <= MAX_GO_AHEAD_WORDS or bool(_telling(key) & _telling(user_text))


def without_varying(text: str) -> str:
    """A text without the places, times, addresses and hashes that differ from run to run, on one line."""
    for pattern, replacement in _VARYING:
        text = pattern.sub(replacement, text)
    return text


def error_queries(con: duckdb.DuckDBPyConnection, dropped: Counter[str] | None = None) -> Iterator[LabelledQuery]:
    """Error lines with the exchanges that met and resolved them; `dropped` counts by reason what is no query."""
    dropped = Counter() if dropped is None else dropped
    texts: dict[str, str] = {}
    answers: dict[str, set[int]] = defaultdict(set)
    for _, group in groupby(_parts(con), key=lambda row: row[:2]):
        waiting: list[_Met] = []
        typed: dict[int, str] = defaultdict(str)
        calls: dict[str, str] = {}
        for _, _, seq, position, kind, text, name, is_error, call_id, data in group:
            if kind == "tool_call":
                calls[call_id or ""] = data or "null"
                if waiting and _changes(name or "", orjson.loads(data or "null")):
                    for met in waiting:
                        if met.seq == seq or (met.position == position - 1 and _goes_on(met.key, typed[seq])):
                            answers[met.key] |= {met.seq, seq}
                    waiting = []
                continue
            if kind == "text":
                typed[seq] += f"\n{text}"
            if kind == "text" or shell_commands(calls.get(call_id or "", "null")):
                for query in _lines(text, is_error is True, kind == "text"):
                    texts.setdefault(plain(query), query)
                    waiting.append(_Met(plain(query), seq, position))
    dropped["error_without_change"] = len(texts.keys() - answers.keys())
    per_exchange: Counter[int] = Counter()
    for key, relevant in answers.items():
        if len(relevant) > MAX_ANSWERS:
            dropped["error_too_common"] += 1
        elif per_exchange[min(relevant)] >= MAX_PER_EXCHANGE:
            dropped["error_beyond_two_an_exchange"] += 1
        else:
            per_exchange[min(relevant)] += 1
            yield LabelledQuery(texts[key], frozenset(relevant), "error")


def _lines(text: str, is_failed: bool, is_typed: bool) -> list[str]:
    """The error lines of an output or of what a user typed; of a command that may have succeeded the certain ones."""
    if len(text) > MAX_SCANNED_CHARS:
        text = f"{text[: MAX_SCANNED_CHARS // 2]}\n{text[-MAX_SCANNED_CHARS // 2 :]}"
    found: list[str] = []
    for line in text.splitlines():
        if (is_typed and _PROSE.search(line)) or not (is_typed or is_failed or _STRONG.match(line)):
            continue
        query = error_query(line)
        if query and not any(plain(query) in plain(other) or plain(other) in plain(query) for other in found):
            found.append(query)
    return found


def _changes(name: str, arguments: Any) -> bool:
    """Whether a tool call changes a file that is not a temporary one."""
    touched = files_from_tool(name, arguments)
    return any(touch.action in CHANGES and not touch.path.startswith(("/tmp/", "/dev/")) for touch in touched)


def _parts(con: duckdb.DuckDBPyConnection) -> Iterator[tuple[Any, ...]]:
    """What happened in each exchange, in the order of the log."""
    result = con.execute(
        """
        SELECT e.conversation_id, e.thread, e.seq, e.position, p.kind, p.text, p.name, p.is_error, p.call_id,
            p.data
        FROM exchanges e
        JOIN messages m ON m.conversation_id = e.conversation_id AND m.thread = e.thread
            AND m.ply BETWEEN e.ply_start AND e.ply_end
        JOIN parts p ON p.message_id = m.message_id
        WHERE p.kind IN ('tool_call', 'tool_result') OR (p.kind = 'text' AND m.role = 'user')
        ORDER BY e.conversation_id, e.thread, e.position, m.ply, p.seq, p.ordinal"""
    )
    while rows := result.fetchmany(2000):
        yield from rows
