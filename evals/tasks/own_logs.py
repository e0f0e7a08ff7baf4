"""A recall task made of a person's own store, without a model: what the logs themselves say should be found.

    commit     the subject of a commit -> the exchanges that changed files since the commit before
    error      an error line -> the exchanges where it was met and edited away
    reference  a user turn that returns to earlier work -> the exchanges that did that work
    title      a conversation's title -> its exchanges (off by default: the title tells the whole, not an exchange)
    question   what a chat model asked about an exchange -> that exchange (needs a model)

Documents are the exchanges of the whole store, in one scope: that is where `workbench recall` searches by default, and
projects are named by folders, so that a second checkout would cut one history in two. An exchange whose own words are a
query is no document. A query whose words stand verbatim in a document is dropped: finding it would measure copying; or,
with `mask_copied`, those words are masked with […] in the documents (as the development split of agentlog was made).
Exchanges with the same text answer together.

Verified by: tests/evals/test_own_logs.py.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import duckdb

from workbench.data.records import digest
from workbench.errors import InputError
from workbench.evals.generated_questions import QuestionWriter, Source
from workbench.evals.tasks.base import Document, Query, RecallTask
from workbench.memory.mined_errors import error_queries, without_varying
from workbench.memory.mined_queries import LabelledQuery, commit_queries, copied, plain, title_queries
from workbench.memory.mined_references import reference_queries

VERSION = "1"
MAX_PER_KIND = 200
MASK = "[…]"
KINDS = ("commit", "error", "reference", "title", "question")
DEFAULT_KINDS = ("commit", "error", "reference")
_MINERS: dict[str, Callable[[duckdb.DuckDBPyConnection, Counter[str]], Iterator[LabelledQuery]]] = {
    "commit": partial(commit_queries, keep_copied=True),
    "error": error_queries,
    "reference": reference_queries,
    "title": partial(title_queries, keep_copied=True),
}


class _Exchange(NamedTuple):
    seq: int
    id: str
    conversation: str
    thread: str
    user: str
    assistant: str
    time: str
    files: tuple[str, ...]


def build(
    con: duckdb.DuckDBPyConnection,
    *,
    kinds: Sequence[str] = DEFAULT_KINDS,
    max_per_kind: int = MAX_PER_KIND,
    seed: int = 0,
    mask_copied: bool = False,
    writer: QuestionWriter | None = None,
    progress: Callable[[int], None] | None = None,
) -> RecallTask:
    """The task of a store; the same store, kinds and seed give the same bytes.

    Args:
        kinds: of KINDS, "question" needs a writer; categories of the queries.
        max_per_kind: more queries than that are sampled with the seed.
        mask_copied: keep a query whose words stand in documents, and mask them there.
        writer: asks a chat model; its budget may leave out questions, which `notes` counts.
        progress: called with the number of questions kept, after each.
    Raises: InputError for an unknown kind, an empty store, and one that holds no query of these kinds; EndpointError.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"There is no kind of query {kind!r}; there are {', '.join(KINDS)}.")
    if max_per_kind < 1:
        raise InputError(f"max_per_kind must be 1 or more, not {max_per_kind}.")
    if "question" in kinds and writer is None:
        raise InputError("Queries of the kind question are written by a model; name one, or leave the kind out.")
    exchanges = _exchanges(con)
    if not exchanges:
        raise InputError("The store holds no exchange; read logs into it with `workbench ingest PATH`.")
    notes: Counter[str] = Counter()
    mined = _once([q for kind in KINDS if kind in kinds and kind in _MINERS for q in _MINERS[kind](con, notes)], notes)
    where = _copies(mined, exchanges)
    # A turn that stands in a second exchange was recorded twice; masking would not make it a reference.
    copies = [bool(seqs) and not (mask_copied and q.kind != "reference") for q, seqs in zip(mined, where, strict=True)]
    notes.update(f"{query.kind}_copied" for query, is_copy in zip(mined, copies, strict=True) if is_copy)
    mined = [query for query, is_copy in zip(mined, copies, strict=True) if not is_copy]
    kept = _compatible(_sampled(mined, max_per_kind, seed, notes), notes)
    if mask_copied:
        exchanges = _masked(exchanges, kept, _copies(kept, exchanges), notes)
    if writer is not None and "question" in kinds:
        kept += _written(writer, exchanges, {query.source for query in kept}, max_per_kind, seed, progress)
        notes.update(writer.dropped)
    if not kept:
        found = ", ".join(f"{name} {count}" for name, count in sorted(notes.items()) if count) or "nothing"
        raise InputError(
            f"The store's {len(exchanges)} exchanges hold no query of the kinds {', '.join(kinds)} "
            f"(left out: {found}); ingest more logs, or ask a model for questions."
        )
    sources = {query.source for query in kept if query.source}
    notes["documents_left_out_as_query"] = len(sources)
    documents = _documents(exchanges, sources)
    queries = tuple(_query(query, exchanges, sources) for query in kept)
    counts = Counter(f"queries_{query.category}" for query in queries)
    return RecallTask(
        "own-logs", VERSION, documents, queries, licence="private",
        notes={name: count for name, count in sorted((notes + counts).items()) if count},
    )  # fmt: skip


class _Kept(NamedTuple):
    """A query on its way into the task."""

    text: str
    relevant: frozenset[int]
    kind: str
    source: int
    answer: str = ""


def _once(mined: Sequence[LabelledQuery], notes: Counter[str]) -> list[_Kept]:
    """Each text once: what answers a commit's subject the first time answers it the second time."""
    first: dict[tuple[str, str], _Kept] = {}
    for query in mined:
        key = (query.kind, query.text)
        if key in first:
            notes[f"{query.kind}_repeated"] += 1
            first[key] = first[key]._replace(relevant=first[key].relevant | query.relevant)
        else:
            first[key] = _Kept(*query)
    return list(first.values())


def _copies(queries: Sequence[_Kept], exchanges: Sequence[_Exchange]) -> list[set[int]]:
    """For each query the exchanges, other than its own, in which its words stand verbatim."""
    texts = [(e.seq, f"{e.user}\n{e.assistant}") for e in exchanges]
    found = copied([query.text for query in queries], texts)
    # An error's query has no places and times any more; so must the text in which it is looked for.
    errors = [at for at, query in enumerate(queries) if query.kind == "error"]
    reduced = ((seq, "\n".join(map(without_varying, text.splitlines()))) for seq, text in texts)
    if errors:
        for at, seqs in zip(errors, copied([queries[at].text for at in errors], reduced), strict=True):
            found[at] |= seqs
    return [seqs - {query.source} for query, seqs in zip(queries, found, strict=True)]


def _masked(
    exchanges: Sequence[_Exchange], queries: Sequence[_Kept], where: Sequence[set[int]], notes: Counter[str]
) -> list[_Exchange]:
    """The exchanges with every verbatim query in them masked."""
    to_mask: dict[int, list[str]] = defaultdict(list)
    for query, seqs in zip(queries, where, strict=True):
        notes[f"{query.kind}_masked"] += bool(seqs)
        for seq in seqs:
            to_mask[seq].append(query.text)
    return [
        e._replace(user=_mask(e.user, to_mask[e.seq]), assistant=_mask(e.assistant, to_mask[e.seq]))
        if e.seq in to_mask
        else e
        for e in exchanges
    ]


def _mask(text: str, queries: Iterable[str]) -> str:
    for query in queries:
        words = r"\W+".join(plain(query).split())
        text = re.sub(rf"\b{words}\b", MASK, text, flags=re.IGNORECASE)
        if plain(query) in plain(without_varying(text)):
            lines = text.split("\n")
            text = "\n".join(MASK if plain(query) in plain(without_varying(line)) else line for line in lines)
    return text


def _sampled(queries: Sequence[_Kept], max_per_kind: int, seed: int, notes: Counter[str]) -> list[_Kept]:
    """At most so many of each kind, in the order of the store."""
    by_kind: dict[str, list[_Kept]] = defaultdict(list)
    for query in queries:
        by_kind[query.kind].append(query)
    kept: list[_Kept] = []
    for kind, found in by_kind.items():
        notes[f"{kind}_beyond_the_limit"] += max(0, len(found) - max_per_kind)
        chosen = random.Random(f"{seed}/{kind}").sample(range(len(found)), min(max_per_kind, len(found)))
        kept += [found[at] for at in sorted(chosen)]
    return kept


def _compatible(queries: Sequence[_Kept], notes: Counter[str]) -> list[_Kept]:
    """No exchange may be a query and the answer of another one: the earlier in the list stays."""
    kept: list[_Kept] = []
    answers: set[int] = set()
    sources: set[int] = set()
    for query in queries:
        if query.source in answers or query.relevant & sources:
            notes[f"{query.kind}_asks_with_an_answer"] += 1
            continue
        kept.append(query)
        answers |= query.relevant
        sources |= {query.source} - {0}
    return kept


def _written(
    writer: QuestionWriter,
    exchanges: Sequence[_Exchange],
    taken: set[int],
    num: int,
    seed: int,
    progress: Callable[[int], None] | None,
) -> list[_Kept]:
    """Questions of a model about a sample of the documents, in the order of the store."""
    by_id = {e.id: e for e in exchanges if e.seq not in taken and e.assistant.strip()}
    chosen = random.Random(f"{seed}/question").sample(sorted(by_id), min(num, len(by_id)))
    kept: list[_Kept] = []
    for q in writer.write(Source(id, by_id[id].user, by_id[id].assistant) for id in chosen):
        kept.append(_Kept(q.text, frozenset({by_id[q.source].seq}), "question", 0, q.answer))
        if progress:
            progress(len(kept))
    return sorted(kept, key=lambda query: (min(query.relevant), query.text))


def _documents(exchanges: Sequence[_Exchange], left_out: set[int]) -> tuple[Document, ...]:
    latest: dict[tuple[str, str], str] = {}
    documents = []
    for e in exchanges:
        if e.seq not in left_out:
            thread = (e.conversation, e.thread)
            before = latest.get(thread)
            documents.append(Document(e.id, e.user, e.assistant, previous=before, time=e.time, files=e.files))
            latest[thread] = e.id
    return tuple(documents)


def _query(query: _Kept, exchanges: Sequence[_Exchange], left_out: set[int]) -> Query:
    chosen = [e for e in exchanges if e.seq in query.relevant]
    texts = {(e.user, e.assistant) for e in chosen}
    found = [e for e in exchanges if (e.user, e.assistant) in texts and e.seq not in left_out]
    return Query(
        id=digest("own-logs", query.kind, query.text),
        text=query.text,
        relevance=dict.fromkeys((e.id for e in found), 1.0),
        category=query.kind,
        cluster=min(e.conversation for e in chosen),
        answer=query.answer,
    )


def _exchanges(con: duckdb.DuckDBPyConnection) -> list[_Exchange]:
    rows = con.execute(
        "SELECT seq, exchange_id, conversation_id, thread, user_text, assistant_text, "
        "coalesce(strftime(make_timestamp(epoch_us(started_at)), '%Y-%m-%dT%H:%M:%S'), ''), files FROM exchanges "
        "ORDER BY conversation_id, thread, position"
    ).fetchall()
    return [_Exchange(*row, files=_changed(files)) for *row, files in rows]  # pyright: ignore


def _changed(files: str) -> tuple[str, ...]:
    return tuple(file["path"] for file in json.loads(files) if file["action"] in ("modified", "created"))
