"""LoCoMo: which turns of a long conversation hold the evidence for a question.

Paper: Maharana et al. 2024, "Evaluating Very Long-Term Conversational Memory of LLM Agents" (2402.17753).
Data: locomo10.json, 10 conversations (CC BY-NC 4.0: evaluation only), and the label audit of dial481/locomo-audit.
Deviations: evidence is read leniently ("D8:6; D9:17", "D:11:26", "D30:05"); turns that do not exist are dropped and
    counted; questions without any evidence are left out. Adversarial questions (category 5, no answer) are left out
    unless asked for. An audit entry that names no turn corrects the answer only; the cited turns stay.
Verified by: tests/evals/test_tasks.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from workbench.evals.tasks.base import Document, Query, RecallTask, Row, read_json, row_of, shared_data

CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
_ADVERSARIAL = 5
_EVIDENCE = re.compile(r"D:?(\d+):(\d+)")
_SESSION = re.compile(r"session_(\d+)")


def load(
    path: Path | None = None, audit_path: Path | None = None, *, audited: bool = True, adversarial: bool = False
) -> RecallTask:
    """LoCoMo as a recall task; one scope a conversation, one document a turn.

    Args: path, audit_path: locomo10.json and locomo_audit_fixes.json, None = the shared data; audited: correct labels
        by the audit; adversarial: with the questions that have no answer (their evidence is what they allude to).
    Raises: InputError that names the conversation and the question or turn.
    """
    path = path or shared_data("locomo10.json")
    fixes = _read_audit(audit_path or shared_data("locomo_audit_fixes.json")) if audited else {}
    notes: Counter[str] = Counter(audit_entries=len(fixes))
    documents: list[Document] = []
    queries: list[Query] = []
    scopes: set[str] = set()
    for number, value in enumerate(read_json(path, list)):
        sample = row_of(f"{path}, conversation {number}", value)
        turns = _turns(sample, sample.new_id("sample_id", scopes))
        documents += turns
        known = {turn.id for turn in turns}
        for at, question in enumerate(sample.get("qa", list)):
            row = row_of(f"{sample.where}, question {at}", question)
            fix = fixes.pop(f"locomo_{number}_qa{at}", None)
            query = _query(sample, row, at, fix, known, notes)
            if query and (adversarial or query.category != CATEGORIES[_ADVERSARIAL]):
                queries.append(query)
    for fix in fixes.values():
        raise fix.error("there is no such question in the data; is it the audit of another file?")
    version = f"2{'+audit' if audited else ''}{'+adversarial' if adversarial else ''}"
    return RecallTask(
        "locomo", version, tuple(documents), tuple(queries), licence="CC BY-NC 4.0", notes=dict(sorted(notes.items()))
    )


def _turns(sample: Row, scope: str) -> list[Document]:
    conversation = sample.get("conversation", dict)
    seen: set[str] = set()
    sessions = sorted(int(m[1]) for key in conversation if (m := _SESSION.fullmatch(key)))
    turns: list[Document] = []
    row = Row(f"{sample.where}, its conversation", conversation)
    for session in sessions:
        previous = None
        time = _iso(str(conversation.get(f"session_{session}_date_time", "")))
        for at, turn in enumerate(row.get(f"session_{session}", list)):
            fields = row_of(f"{sample.where}, session {session}, turn {at}", turn)
            said = f"{fields.get('speaker', str)}: {fields.get('text', str)}"
            if caption := fields.fields.get("blip_caption"):
                said += f" [{caption}]"
            turn_id = f"{scope}/{fields.new_id('dia_id', seen)}"
            turns.append(Document(turn_id, said, scope=scope, previous=previous, time=time))
            previous = turn_id
    return turns


def _iso(written: str) -> str:
    """A time such as 1:56 pm on 8 May, 2023 as 2023-05-08T13:56:00; other forms stay as they are."""
    try:
        return datetime.strptime(written, "%I:%M %p on %d %B, %Y").isoformat()
    except ValueError:
        return written


def _query(sample: Row, row: Row, at: int, fix: Row | None, known: set[str], notes: Counter[str]) -> Query | None:
    scope, category = sample.get("sample_id", str), row.get("category", int)
    if category not in CATEGORIES:
        raise row.error(f"the category must be one of {', '.join(map(str, CATEGORIES))}, not {category}")
    cited, answer = row.texts("evidence"), str(row.fields.get("answer", ""))
    relevant = _relevant(scope, cited, known)
    notes["evidence_malformed"] += sum(not re.fullmatch(r"D[1-9]\d*:[1-9]\d*", item) for item in cited)
    notes["evidence_unknown_turn"] += sum(not _relevant(scope, [item], known) for item in cited)
    if fix:
        text = row.words("question")
        if fix.get("question", str) != text:
            raise fix.error(f"it corrects another question than question {at} of conversation {scope}: {text!r}")
        answer = str(fix.fields.get("correct_answer", answer))
        corrected = _relevant(scope, fix.texts("correct"), known)
        notes["audit_without_turn"] += not corrected
        notes["audit_changed_turns"] += bool(corrected) and corrected != relevant
        relevant = corrected or relevant
    if not relevant:
        notes["questions_without_evidence"] += 1
        return None
    return Query(
        id=f"{scope}/qa{at}", text=row.words("question"), relevance=relevant, scope=scope,
        category=CATEGORIES[category], cluster=scope, answer=answer,
    )  # fmt: skip


def _relevant(scope: str, evidence: list[str], known: set[str]) -> Mapping[str, float]:
    found = (f"{scope}/D{int(s)}:{int(t)}" for item in evidence for s, t in _EVIDENCE.findall(item))
    return {turn: 1.0 for turn in found if turn in known}


def _read_audit(path: Path) -> dict[str, Row]:
    rows = [row_of(f"{path}, entry {at}", value) for at, value in enumerate(read_json(path, list))]
    return {row.get("qid", str): row for row in rows}
