"""Back-references of a store as queries: a user turn that returns to earlier work -> the exchanges that did that work.

A turn returns to something if it names a rare file or identifier that an earlier exchange of the same project changed
(or several that are rare together): a file by its path, an identifier in the text of an edit. So the answers come from
what tools did, not from the words that are searched. The turn's own exchange is left out of the documents
(`LabelledQuery.source`): it holds the query. All other exchanges of the project that changed the same are answers, also
later ones, but one must be earlier and not the turn's direct predecessor.

Verified by: tests/memory/test_mined_references.py.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import duckdb
import orjson

from workbench.memory.files import files_from_tool, paths_in_text
from workbench.memory.mined_queries import CHANGES, LabelledQuery

MIN_WORDS, MAX_WORDS = 5, 40
MAX_ANSWERS = 4  # what more exchanges than that changed is not rare
MAX_PER_ANSWERS = 2  # turns that return to the same work
MIN_STEPS_BACK = 2  # in the same session: the turn before is still in view

#: Files that every project has and every session touches.
_COMMON_FILES = frozenset((
    "readme.md", "changelog.md", "claude.md", "agents.md", "gemini.md", "makefile", "dockerfile", "package.json",
    "package-lock.json", "go.mod", "go.sum", "pyproject.toml", "cargo.toml", ".gitignore", "settings.json", "main.go",
    "index.js", "index.ts", "index.html", "__init__.py", "main.py", "app.py", "mod.rs", "lib.rs", "config.json",
))  # fmt: skip
_SHOUTED = re.compile(r"[A-Z_-]+\.md$")  # TODO.md, REVIEW.md: notes that tools pass around
#: camelCase, snake_case, CONSTANT_CASE and calls; in prose none of them is an ordinary word.
_IDENTIFIER = re.compile(r"\b(?:[a-z]+[A-Z]\w{3,}|[A-Z][a-z]+[A-Z]\w{2,}|[A-Za-z]\w*_\w{3,})\b")
_BRANDS = frozenset(
    ("GitHub", "GitLab", "JavaScript", "TypeScript", "OpenAI", "ChatGPT", "DuckDB", "PostHog", "OpenCode")
)
#: What a program wrote in the user's place.
_NOT_TYPED = re.compile(
    r"\s*(?:<|\[|Caveat:|This session is being continued|System:|Base directory for|Implement the following plan|"
    r"Unknown skill|❯|Stop hook|Your task|You are |##? )"
)
#: Pasted logs, terminals and secrets among the words.
_PASTED = re.compile(r"\d\d:\d\d:\d\d|[⎿❯⏺]|--- (?:FAIL|PASS)|System: |(?:\.\w+:\d+: .*){2}|(\S)\1{9}|\S{80}")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z`'\"])|\n+")
_WORKTREE = re.compile(r"/\.(?:claude/)?worktrees/.*")


class _Exchange(NamedTuple):
    seq: int
    conversation: str
    thread: str
    position: int
    project: str
    started_at: int
    user_text: str
    changed: frozenset[str]  # names of files


def reference_queries(con: duckdb.DuckDBPyConnection, dropped: Counter[str] | None = None) -> Iterator[LabelledQuery]:
    """Turns that return to earlier work, with that work; `dropped` counts by reason what is no query."""
    dropped = Counter() if dropped is None else dropped
    exchanges = _exchanges(con)
    turns = {e.seq: _anchors(e.user_text) for e in exchanges if e.thread == "" and not _NOT_TYPED.match(e.user_text)}
    wanted = {anchor for anchors in turns.values() for anchor in anchors}
    edited = _identifiers_in_edits(con, wanted)
    touched: dict[tuple[str, str], list[_Exchange]] = defaultdict(list)
    for exchange in exchanges:
        for anchor in (exchange.changed & wanted) | edited.get(exchange.seq, set()):
            touched[exchange.project, anchor].append(exchange)
    by_seq = {exchange.seq: exchange for exchange in exchanges}
    uses: Counter[frozenset[int]] = Counter()
    seen: set[str] = set()
    for turn in exchanges:
        named = {a: {e.seq for e in touched[turn.project, a]} - {turn.seq} for a in turns.get(turn.seq, ())}
        rare = _rare({anchor: answers for anchor, answers in named.items() if answers})
        back = [(a, answers) for a, answers in rare if any(_is_back(by_seq[e], turn) for e in answers)]
        if not back:
            reason = "reference_to_nothing_earlier" if rare or not any(named.values()) else "reference_common"
            dropped[reason] += bool(named)
            continue
        anchor, answers = back[0]
        text = _query(turn.user_text, anchor)
        if not text or _PASTED.search(text):
            dropped["reference_of_unfit_words"] += 1
        elif text in seen or uses[answers] >= MAX_PER_ANSWERS:
            dropped["reference_repeated"] += 1
        else:
            seen.add(text)
            uses[answers] += 1
            yield LabelledQuery(text, answers, "reference", turn.seq)


def _rare(named: dict[str, set[int]]) -> list[tuple[str, frozenset[int]]]:
    """Anchors that few exchanges changed, the rarest first, then the one that is rare together with all others."""
    # Of two equally rare anchors the longer says more.
    ordered = sorted(named, key=lambda anchor: (len(named[anchor]), -len(anchor), anchor))
    rare = [(anchor, frozenset(named[anchor])) for anchor in ordered if len(named[anchor]) <= MAX_ANSWERS]
    together = frozenset(set.intersection(*named.values())) if len(named) > 1 else frozenset()
    if not rare and 0 < len(together) <= MAX_ANSWERS:
        rare.append((ordered[0], together))
    return rare


def _is_back(earlier: _Exchange, turn: _Exchange) -> bool:
    """Whether an exchange is earlier than a turn, and not in view any more."""
    if (earlier.conversation, earlier.thread) == (turn.conversation, turn.thread):
        return earlier.position <= turn.position - MIN_STEPS_BACK
    return earlier.conversation != turn.conversation and earlier.started_at < turn.started_at


def _anchors(text: str) -> list[str]:
    """The file names and identifiers that a user names."""
    names = [path.rpartition("/")[2] for path in paths_in_text(text)]
    files = [name for name in names if name.lower() not in _COMMON_FILES and not _SHOUTED.match(name)]
    return list(dict.fromkeys([*files, *(name for name in _IDENTIFIER.findall(text) if name not in _BRANDS)]))


def _query(text: str, anchor: str) -> str:
    """The user's words, or of a longer turn the sentences around the anchor; "" if they are too few or too many."""
    words = " ".join(text.split())
    if MIN_WORDS <= len(words.split()) <= MAX_WORDS:
        return words
    sentences = [" ".join(sentence.split()) for sentence in _SENTENCE.split(text) if sentence.strip()]
    for at, sentence in enumerate(sentences):
        if anchor in sentence:
            with_next = " ".join(sentences[at : at + 2])
            for candidate in (with_next, sentence):
                if MIN_WORDS <= len(candidate.split()) <= MAX_WORDS:
                    return candidate
    return ""


def _exchanges(con: duckdb.DuckDBPyConnection) -> list[_Exchange]:
    rows = con.execute(
        """
        SELECT e.seq, e.conversation_id, e.thread, e.position, coalesce(c.project, ''),
            coalesce(epoch_us(e.started_at), 0), e.user_text, e.files::VARCHAR
        FROM exchanges e JOIN conversations c USING (conversation_id) ORDER BY e.seq"""
    ).fetchall()
    return [
        _Exchange(seq, conversation, thread, position, _project(project), started_at, text, _changed(files))
        for seq, conversation, thread, position, project, started_at, text, files in rows
    ]


def _project(folder: str) -> str:
    """The name of a project's folder: its checkouts and worktrees are one project."""
    return _WORKTREE.sub("", folder).rstrip("/").rpartition("/")[2]


def _changed(files: str) -> frozenset[str]:
    return frozenset(f["path"].rpartition("/")[2] for f in orjson.loads(files) if f["action"] in CHANGES)


def _identifiers_in_edits(con: duckdb.DuckDBPyConnection, wanted: set[str]) -> dict[int, set[str]]:
    """Doc number -> the wanted identifiers that its edits hold, in what they put in or took out."""
    result = con.execute(
        """
        SELECT e.seq, p.name, p.data FROM exchanges e
        JOIN messages m ON m.conversation_id = e.conversation_id AND m.thread = e.thread
            AND m.ply BETWEEN e.ply_start AND e.ply_end
        JOIN parts p ON p.message_id = m.message_id WHERE p.kind = 'tool_call' AND p.data IS NOT NULL"""
    )
    found: dict[int, set[str]] = defaultdict(set)
    while rows := result.fetchmany(500):
        for seq, name, data in rows:
            present = wanted & set(_IDENTIFIER.findall(data.replace("\\n", " ").replace("\\t", " ")))
            if present and _is_edit(name or "", orjson.loads(data)):
                found[seq] |= present
    return found


def _is_edit(name: str, arguments: Any) -> bool:
    return any(touch.action in CHANGES for touch in files_from_tool(name, arguments))
