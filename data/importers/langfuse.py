"""Langfuse exports: trace-<id>.json, session-<id>.json, and tables of traces or observations as JSON or JSONL.

An observation is a span: GENERATIONs repeat the history, TOOLs hold results. The conversation is the trace's
sessionId, else the trace. Input and output of the trace itself are told only where no GENERATION of it tells them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from workbench.data.importers._chat_parts import first, loads_or_same, token_counts
from workbench.data.importers._chat_spans import Span, SpanBook
from workbench.data.importers._members import not_understood, read_rows
from workbench.data.importers.base import SHAPE_ERRORS, Probe, Source, as_text
from workbench.data.importers.json_stream import Member
from workbench.data.records import Record, Unreadable, digest, parse_time

FORMAT = "langfuse"

_ARRAYS = ("observations", "traces", "data")
_KINDS = {
    "GENERATION": "llm", "TOOL": "tool", "AGENT": "agent", "SPAN": "other", "EVENT": "other", "CHAIN": "other",
    "RETRIEVER": "other", "EVALUATOR": "other", "EMBEDDING": "other", "GUARDRAIL": "other",
}  # fmt: skip
_SAID_KEYS = ("messages", "input", "question", "query", "prompt", "text", "output", "answer", "content", "response")


def detect(probe: Probe) -> int:
    kinds = any(b'"%s"' % kind.encode() in probe.head for kind in _KINDS)
    # The interface and the API say traceId, the export to blob storage says trace_id.
    if kinds and (probe.has_keys("traceId", "startTime") or probe.has_keys("trace_id", "start_time")):
        return 90
    if probe.has_keys("observations") and any(probe.has_keys(key) for key in ("sessionId", "scores", "htmlPath")):
        return 85
    return 80 if probe.has_keys("parentObservationId") or probe.has_keys("parent_observation_id") else 0


def read(source: Source) -> Iterator[Record]:
    with SpanBook(source) as book:
        whole = _Document(source, book)
        yield from read_rows(source, _ARRAYS, whole.convert)
        whole.end()
        # Spans of one conversation lie anywhere in the file: one that has grown is read again from its beginning.
        source.by_lines = False
        yield from book.records()


class _Document:
    """Takes the members of an export. Fields beside the arrays of a document belong to one trace or session."""

    def __init__(self, source: Source, book: SpanBook) -> None:
        self.source = source
        self.book = book
        self.fields: dict[str, Any] = {}
        self.loose: set[str] = set()  # trace ids of the observations that came one by one
        self.at = (0, 0)

    def convert(self, member: Member) -> Iterator[Record]:
        if member.key is not None and member.index is None:
            self._field(member)
        else:
            for span in _row_spans(member.value, member, self.source):
                if isinstance(span, Unreadable):
                    yield span
                    continue
                self.book.add(span)
                if member.key == "observations":
                    self.loose.add(span.trace_id)

    def _field(self, member: Member) -> None:
        if member.key == "trace" and isinstance(member.value, dict):
            self.fields.update(member.value)
        elif member.key in ("id", "timestamp", "name", "input", "output", "sessionId", "userId", "tags", "metadata"):
            self.fields[member.key] = member.value
        else:
            self.source.skipped[f"document field {as_text(member.key)[:40]}"] += 1
            return
        self.at = (member.offset, member.length)

    def end(self) -> None:
        """Tells the document's own trace, now that all of its fields are known."""
        if self.fields and (self.loose or self.fields.get("input") or self.fields.get("output")):
            trace_id = as_text(self.fields.get("id")) or next(iter(self.loose), "")
            self.book.add(_trace_span({**self.fields, "id": trace_id}, *self.at))
        elif self.fields:
            self.source.skipped["session without messages of its own"] += 1


def _row_spans(row: Any, member: Member, source: Source) -> Iterator[Span | Unreadable]:
    """The spans of a row: an observation, or a trace or session with others inside; a spoilt one is Unreadable."""
    try:
        yield from _spans_inside(row, member, source)
    except SHAPE_ERRORS as error:
        yield not_understood(member.offset, member.length, row, error)


def _spans_inside(row: Any, member: Member, source: Source) -> Iterator[Span | Unreadable]:
    if not isinstance(row, dict):
        raise TypeError(f"an object was expected, not {type(row).__name__}")
    inside = [key for key in _ARRAYS if isinstance(row.get(key), list)]
    if "type" in row and _KINDS.get(as_text(row["type"]).upper()):
        yield _observation(row, member)
        return
    for key in inside:
        for item in row[key]:
            if isinstance(item, str):
                source.skipped["id of an observation"] += 1
            else:
                yield from _row_spans(item, member, source)
    own = row["trace"] if isinstance(row.get("trace"), dict) else row
    if "id" not in own and not inside:
        raise KeyError("neither an observation (type), nor a trace (id)")
    if "traces" in inside or "id" not in own:
        source.skipped["session or list without messages of its own"] += 1
    else:
        yield _trace_span(own, member.offset, member.length)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _said(value: Any) -> Any:
    """The messages or text of an input or output, which may be JSON in a string, wrapped under a usual name."""
    value = loads_or_same(value)
    if isinstance(value, dict) and not value.keys() & {"role", "kwargs", "tool_calls", "parts"}:
        if isinstance(value.get("choices"), list):
            return [c["message"] if isinstance(c, dict) and "message" in c else c for c in value["choices"]]
        value = next((value[key] for key in _SAID_KEYS if value.get(key)), value or None)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    return value


def _trace_span(trace: dict[str, Any], offset: int, length: int) -> Span:
    """The trace itself, as the root of its observations."""
    trace_id = as_text(trace["id"]) or digest(str(offset))
    start = parse_time(first(trace, "timestamp", "createdAt"))
    values = {"tags": trace.get("tags"), "release": trace.get("release"), "environment": trace.get("environment")}
    return Span(
        span_id=f"trace:{trace_id}",
        trace_id=trace_id,
        kind="chain",
        name=_text(trace.get("name")),
        session_id=as_text(first(trace, "sessionId", "session_id")) or None,
        start=start,
        end=start,
        inputs=_said(trace.get("input")),
        outputs=_said(trace.get("output")),
        about={"title": _text(trace.get("name"))},
        meta={name: value for name, value in values.items() if value and len(as_text(value)) < 1000},
        offset=offset,
        length=length,
    )


def _observation(row: dict[str, Any], member: Member) -> Span:
    """An observation as a Span. Raises TypeError where it belongs to no trace."""
    trace_id = as_text(first(row, "traceId", "trace_id"))
    if not trace_id:
        raise TypeError("an observation without traceId")
    parent = as_text(first(row, "parentObservationId", "parent_observation_id"))
    kind = _KINDS[as_text(row["type"]).upper()]
    if row["type"] in ("SPAN", "CHAIN") and not parent:
        kind = "chain"  # the outermost: an export of observations has no trace that could tell what was said
    inputs, outputs = loads_or_same(row.get("input")), row.get("output")
    metadata = loads_or_same(row.get("metadata"))
    metadata = metadata if isinstance(metadata, dict) else {}
    message = loads_or_same(outputs)
    call_id = first(metadata, "tool_call_id", "toolCallId")
    if kind == "tool" and isinstance(message, dict) and "tool_call_id" in message and "content" in message:
        call_id, outputs = message["tool_call_id"], message["content"]
    elif kind != "tool":
        inputs, outputs = _said(inputs), _said(outputs)
    counts = token_counts(loads_or_same(first(row, "usageDetails", "usage_details", "usage")))
    failed = row.get("level") == "ERROR" and kind != "other"
    return Span(
        span_id=as_text(row.get("id")) or digest(str(member.offset), as_text(row)),
        trace_id=trace_id,
        parent_id=parent or f"trace:{trace_id}",
        kind=kind,
        name=_text(row.get("name")),
        session_id=as_text(first(row, "sessionId", "session_id")) or None,
        start=parse_time(first(row, "startTime", "start_time")),
        end=parse_time(first(row, "endTime", "end_time")),
        model=_text(first(row, "model", "providedModelName", "provided_model_name", "internalModel")),
        tokens_in=counts[0],
        tokens_out=counts[1],
        tokens_cached=counts[2],
        inputs=inputs,
        outputs=outputs,
        call_id=_text(call_id),
        error=as_text(first(row, "statusMessage", "status_message")) or "error" if failed else None,
        about={"title": _text(first(row, "traceName", "trace_name"))},
        meta=_meta(row),
        offset=member.offset,
        length=member.length,
    )


def _meta(row: dict[str, Any]) -> dict[str, Any]:
    values = {
        "level": row.get("level") if row.get("level") != "DEFAULT" else None,
        "cost": loads_or_same(first(row, "costDetails", "cost_details")),
        "parameters": loads_or_same(first(row, "modelParameters", "model_parameters")),
        "prompt": first(row, "promptName", "prompt_name"),
    }
    return {name: value for name, value in values.items() if value and len(as_text(value)) < 1000}
