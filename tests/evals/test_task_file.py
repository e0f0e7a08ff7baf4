"""The task file: what is written is read again, by hand or by program, and mistakes are named by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.evals.metrics import evaluate
from workbench.evals.tasks.base import Document, Query, RecallTask, judgements, oracle_run, random_run
from workbench.evals.tasks.task_file import load, save

BY_HAND = """\
{"kind": "task", "name": "my-notes", "version": "1", "licence": "private"}

{"kind": "document", "id": "d1", "user": "how do we deploy?", "assistant": "with make ship"}
{"kind": "document", "id": "d2", "user": "the tests hang", "previous": "d1"}
{"kind": "query", "id": "q1", "text": "deployment command", "relevant": ["d1"]}
{"kind": "query", "id": "q2", "text": "trouble", "relevance": {"d2": 2, "d1": 0.5}, "category": "c", "answer": "yes"}
"""


def test_a_file_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(BY_HAND)
    assert load(path) == RecallTask(
        "my-notes",
        "1",
        (Document("d1", "how do we deploy?", "with make ship"), Document("d2", "the tests hang", previous="d1")),
        (
            Query("q1", "deployment command", {"d1": 1.0}),
            Query("q2", "trouble", {"d2": 2, "d1": 0.5}, category="c", answer="yes"),
        ),
        licence="private",
    )


texts = st.text(st.characters(codec=None), max_size=20)  # surrogates and line separators included
ids = st.lists(texts.filter(str.strip), min_size=1, max_size=6, unique=True)


@st.composite
def made_tasks(draw: Any) -> RecallTask:
    scopes = draw(st.lists(texts, min_size=1, max_size=2, unique=True))
    documents: list[Document] = []
    for id in draw(ids):
        scope = draw(st.sampled_from(scopes))
        before = [d.id for d in documents if d.scope == scope]
        previous = draw(st.sampled_from([None, *before]))
        documents.append(Document(id, draw(texts), draw(texts), scope, previous, draw(texts)))
    queries = []
    for id in draw(ids):
        scope = draw(st.sampled_from(sorted({d.scope for d in documents})))
        found = [d.id for d in documents if d.scope == scope]
        grade = st.one_of(st.integers(1, 3), st.floats(0.001, 9))
        relevance = {doc: draw(grade) for doc in found if draw(st.booleans())}
        words = draw(st.sampled_from(["{{ question }}", "what {% if x %}", "why {answer}"]) | texts.filter(str.strip))
        queries.append(Query(id, words, relevance, scope, draw(texts), draw(texts), draw(texts)))
    return RecallTask(
        "n",
        draw(texts.filter(str.strip)),
        tuple(documents),
        tuple(queries),
        relevant_from=draw(st.sampled_from([1.0, 1, 2.5])),
        licence=draw(texts),
        notes=draw(st.dictionaries(texts, st.integers(0, 9), max_size=2)),
    )


@settings(max_examples=150, deadline=None)
@given(made_tasks(), st.sampled_from(["t.jsonl", "t.jsonl.gz"]))
def test_the_round_trip_changes_nothing(tmp_path_factory: pytest.TempPathFactory, task: RecallTask, name: str) -> None:
    path = tmp_path_factory.mktemp("t") / name
    save(task, path)
    first = path.read_bytes()
    again = load(path)
    assert again == task
    assert again.fingerprint == task.fingerprint
    save(again, path)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == [name]


def test_a_task_file_has_the_scores_of_chance_and_of_knowing_the_answers(tmp_path: Path) -> None:
    """Silent failure P2, for task files: an oracle has 1, a random order k / documents."""
    rows: list[dict[str, Any]] = [{"kind": "task", "name": "t", "version": "1"}]
    rows += [{"kind": "document", "id": f"d{i}", "user": f"text {i}"} for i in range(40)]
    rows += [{"kind": "query", "id": f"q{i}", "text": f"query {i}", "relevant": [f"d{i % 40}"]} for i in range(400)]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load(path)
    best = evaluate(oracle_run(task.queries), judgements(task.queries), ["ndcg@10", "mrr"]).means()
    assert best == {"ndcg@10": 1.0, "mrr": 1.0}
    chance = evaluate(random_run(task, task.queries), judgements(task.queries), ["recall@10"]).means()
    assert chance["recall@10"] == pytest.approx(10 / 40, abs=0.09)  # standard deviation 0.022


HEAD = '{"kind": "task", "name": "t", "version": "1"}'
DOC = '{"kind": "document", "id": "d1", "user": "x"}'
QUERY = '{"kind": "query", "id": "q1", "text": "x", "relevant": ["d1"]}'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"t\.jsonl: is empty"),
        ([DOC], r"line 1: the first line must be"),
        (['{"kind": "task", "name": "t"}', DOC, QUERY], r"line 1: the field 'version' is missing"),
        (['{"kind": "task", "name": " ", "version": "1"}', DOC, QUERY], r"line 1: the field 'name' is empty"),
        ([HEAD, DOC], r"t\.jsonl: holds no query"),
        ([HEAD, DOC, QUERY, HEAD], r"line 4: there is a second task"),
        ([HEAD, "{nope", QUERY], r"line 2: not valid JSON"),
        ([HEAD, '{"id": "d1"}', QUERY], r"line 2: the field 'kind' is missing"),
        ([HEAD, '{"kind": "doc", "id": "d1"}', QUERY], r"line 2: the kind must be one of task, document, query"),
        ([HEAD, '{"kind": "document", "id": "d1", "text": "x"}'], r"line 2: a document has no field 'text'"),
        ([HEAD, DOC, '{"kind": "query", "id": "q", "txt": "x"}'], r"line 3: .*'txt'; did you mean 'text'"),
        ([HEAD, '{"kind": "document", "id": "d1"}', QUERY], r"line 2: the field 'user' is missing"),
        ([HEAD, '{"kind": "document", "id": 1, "user": "x"}', QUERY], r"line 2: the field 'id' must be a text, not 1"),
        ([HEAD, DOC, DOC, QUERY], r"line 3: the document 'd1' comes twice"),
        ([HEAD, DOC, QUERY, QUERY], r"line 4: the id 'q1' comes twice"),
        (
            [HEAD, '{"kind": "document", "id": "d2", "user": "x", "previous": "d1"}', DOC, QUERY],
            r"line 2: its previous document 'd1' does not stand before it",
        ),
        ([HEAD, DOC, QUERY.replace('["d1"]', '["d2"]')], r"line 3: the relevant document 'd2' does not exist\."),
        (
            [HEAD, DOC.replace("d1", "note-17"), QUERY.replace('"d1"', '"note17"')],
            r"line 3: the relevant document 'note17' does not exist; did you mean 'note-17'\?",
        ),
        ([HEAD, DOC, QUERY.replace('["d1"]', '["d1", "d1"]')], r"line 3: a document stands twice"),
        ([HEAD, DOC, QUERY.replace("}", ', "scope": "s"}')], r"line 3: .*'d1' is in scope '', the query in 's'"),
        (
            [HEAD, DOC.replace("}", ', "scope": "main"}'), QUERY.replace('["d1"]', '[], "scope": "mian"')],
            r"line 3: its scope 'mian' holds no document; did you mean 'main'\?",
        ),
        ([HEAD, DOC, '{"kind": "query", "id": "q", "text": "x"}'], r"line 3: a query needs `relevant`"),
        ([HEAD, DOC, QUERY.replace("}", ', "relevance": {}}')], r"line 3: a query needs .* not both"),
        ([HEAD, DOC, QUERY.replace('"relevant": ["d1"]', '"relevance": {"d1": 0}')], r"line 3: the grade of 'd1'"),
        ([HEAD, DOC, QUERY.replace('"relevant": ["d1"]', '"relevance": {"d1": NaN}')], r"line 3: the grade of 'd1'"),
        ([HEAD, DOC, QUERY.replace('"relevant": ["d1"]', '"relevance": {"d1": true}')], r"line 3: the grade of 'd1'"),
        ([HEAD, DOC, QUERY.replace('"x"', '" "')], r"line 3: the field 'text' is empty"),
        ([HEAD.replace("}", ', "relevant_from": "2"}'), DOC, QUERY], r"line 1: the field 'relevant_from' must be"),
        (
            [HEAD.replace("}", ', "relevant_from": 0}'), DOC, QUERY],
            r"line 1: the field 'relevant_from' must be .* above 0",
        ),
        ([HEAD.replace("}", f', "relevant_from": 1{"0" * 400}}}'), DOC, QUERY], r"line 1: the field 'relevant_from'"),
        (
            [HEAD, DOC, QUERY.replace('"relevant": ["d1"]', f'"relevance": {{"d1": 1{"0" * 400}}}')],
            r"line 3: the grade",
        ),
        ([HEAD, DOC, QUERY.replace('"x"', "1" * 5000)], r"line 3: cannot be read as JSON"),
        ([HEAD, DOC, "[" * 100_000], r"line 3: cannot be read as JSON"),
        ([HEAD.replace("}", ', "notes": {"a": 1.5}}'), DOC, QUERY], r"line 1: the note 'a' must be a whole number"),
    ],
)
def test_mistakes_are_named_by_file_and_line(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(InputError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["{{ question }}", "Choose {{choices[0]}}", "{% for x in y %}", "Q: {question}"])
def test_a_query_that_was_not_rendered_is_refused_unless_it_is_meant(tmp_path: Path, text: str) -> None:
    """Silent failure P2: template text that was scored gave an untrained model 100 %."""
    path = tmp_path / "t.jsonl"
    row = {"kind": "query", "id": "q", "text": text, "relevant": ["d1"]}
    path.write_text(f"{HEAD}\n{DOC}\n{json.dumps(row)}\n")
    with pytest.raises(InputError, match=r"line 3: the text still has the template mark"):
        load(path)
    path.write_text(f"{HEAD}\n{DOC}\n{json.dumps(row | {'literal': True})}\n")
    assert load(path).queries[0].text == text


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(BY_HAND)
    task = load(path)
    with pytest.raises(InputError, match="cannot be written"):
        save(task, tmp_path / "absent" / "t.jsonl")
    blocked = tmp_path / "folder"
    blocked.mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        save(task, blocked)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "t.jsonl"]


def test_files_of_a_document_come_back(tmp_path: Path) -> None:
    task = RecallTask(
        "t",
        "1",
        (Document("d", "words", files=("a.py", "b.py")), Document("e", "more")),
        (Query("q", "x", {"d": 1.0}),),
    )
    save(task, tmp_path / "t.jsonl")
    assert load(tmp_path / "t.jsonl") == task
