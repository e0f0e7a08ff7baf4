"""LangSmith runs: a JSON array, JSON lines, or an object with "runs", as the API and the exports give them.

A run is a span: runs of type llm repeat the history, tool runs hold results. The thread is what the metadata name as
thread_id, session_id or conversation_id, else the trace (a run's own session_id is the LangSmith project).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from workbench.data.importers._chat_parts import first, loads_or_same, token_counts
from workbench.data.importers._chat_spans import Span, SpanBook
from workbench.data.importers._members import not_understood, read_rows
from workbench.data.importers.base import SHAPE_ERRORS, Probe, Source, as_text
from workbench.data.importers.json_stream import Member
from workbench.data.records import Record, parse_time

FORMAT = "langsmith"

_ARRAYS = ("runs", "data", "results", "traces")
_THREAD_KEYS = ("thread_id", "session_id", "conversation_id")
#: Where the runs of chains and of other libraries keep what was said.
_SAID_KEYS = ("messages", "input", "question", "query", "prompt", "text", "output", "answer", "content", "result")


def detect(probe: Probe) -> int:
    if not probe.has_keys("run_type"):
        return 0
    return 90 if any(probe.has_keys(key) for key in ("dotted_order", "trace_id", "parent_run_id", "inputs")) else 30


def read(source: Source) -> Iterator[Record]:
    with SpanBook(source) as book:

        def convert(member: Member) -> Iterator[Record]:
            if member.key is not None and member.index is None:
                source.skipped[f"document field {member.key[:40]}"] += 1
                return
            row = member.value
            runs = next((row[key] for key in _ARRAYS if isinstance(row.get(key), list)), None)
            runs = [row] if runs is None or "run_type" in row else runs
            if not runs:
                source.skipped["row without runs"] += 1
            for run, parent in _with_children(runs):
                try:
                    book.add(_span(run, member, parent))
                except SHAPE_ERRORS as error:
                    yield not_understood(member.offset, member.length, run, error)

        yield from read_rows(source, _ARRAYS, convert)
        # Spans of one conversation lie anywhere in the file: one that has grown is read again from its beginning.
        source.by_lines = False
        yield from book.records()


def _with_children(runs: list[Any]) -> Iterator[tuple[Any, str | None]]:
    """Each run and its parent's id, the runs that stand inside others (child_runs) included."""
    waiting: list[tuple[Any, str | None]] = [(run, None) for run in reversed(runs)]
    while waiting:
        run, parent = waiting.pop()
        yield run, parent
        children = run.get("child_runs") if isinstance(run, dict) else None
        if isinstance(children, list):
            waiting += [(child, as_text(first(run, "id", "run_id")) or None) for child in reversed(children)]


def _dict(value: Any) -> dict[str, Any]:
    """The value where it is an object, or a string that holds one; else an empty one."""
    value = loads_or_same(value)
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _span(run: Any, member: Member, parent: str | None) -> Span:
    """A run as a Span. Raises KeyError or TypeError where it has no run_type or no id."""
    run_type, run_id = run["run_type"], as_text(first(run, "id", "run_id"))  # run_id: LangSmith's command line
    if not isinstance(run_type, str) or not run_id:
        raise TypeError("run_type and id of a run must be strings")
    inputs, outputs = loads_or_same(run.get("inputs")), loads_or_same(run.get("outputs"))
    extra = _dict(run.get("extra"))
    metadata = {**_dict(first(run, "metadata", "custom_metadata")), **_dict(extra.get("metadata"))}
    parent = _parent(run) or parent
    call_id = None
    if run_type == "llm":
        inputs, (outputs, told) = _model_inputs(inputs), _model_outputs(outputs)
        kind = "llm"
    elif run_type == "tool":
        told, kind = {}, "tool"
        inputs, (outputs, call_id) = _tool_inputs(inputs), _tool_outputs(outputs)
    else:
        told, kind = {}, "chain" if run_type == "chain" and parent is None else "other"
        inputs, outputs = _said(inputs), _said(outputs)
    counts = token_counts(told.get("usage") or metadata.get("usage_metadata") or run.get("token_usage") or run)
    return Span(
        span_id=run_id,
        trace_id=as_text(run.get("trace_id")) or run_id,
        parent_id=parent,
        kind=kind,
        name=_text(run.get("name")),
        session_id=as_text(first(metadata, *_THREAD_KEYS)) or None,
        start=parse_time(run.get("start_time")),
        end=parse_time(run.get("end_time")),
        model=_text(told.get("model")) or _text(metadata.get("ls_model_name")) or _model_asked_for(extra),
        tokens_in=counts[0],
        tokens_out=counts[1],
        tokens_cached=counts[2],
        inputs=inputs,
        outputs=outputs,
        call_id=_text(call_id) or _text(metadata.get("tool_call_id")),
        error=as_text(run.get("error")) or None if kind != "other" else None,
        about={"agent": None if parent else _text(run.get("name")), "project": _text(run.get("session_name"))},
        meta=_meta(run),
        offset=member.offset,
        length=member.length,
    )


def _parent(run: dict[str, Any]) -> str | None:
    """parent_run_id, else the last but one id of dotted_order ("<time>Z<id>.<time>Z<id>")."""
    parent = as_text(run.get("parent_run_id"))
    if not parent:
        *above, _ = as_text(run.get("dotted_order")).split(".")
        parent = above[-1].partition("Z")[2] if above else ""
    return parent or None


def _model_asked_for(extra: dict[str, Any]) -> str | None:
    asked = _dict(extra.get("invocation_params"))
    return _text(first(asked, "model", "model_name"))


def _meta(run: dict[str, Any]) -> dict[str, Any]:
    values = {
        "status": run.get("status"), "tags": run.get("tags"), "cost": run.get("total_cost") or run.get("cost"),
        "feedback": run.get("feedback_stats"),
    }  # fmt: skip
    return {name: value for name, value in values.items() if value and len(as_text(value)) < 1000}


def _said(value: Any) -> Any:
    """The messages, or the text, of a chain's inputs or outputs."""
    if isinstance(value, dict):
        return _one_list(next((value[key] for key in _SAID_KEYS if value.get(key)), value or None))
    return value


def _one_list(value: Any) -> Any:
    """LangChain logs a batch of one conversation as a list in a list."""
    value = loads_or_same(value)
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list) else value


def _model_inputs(inputs: Any) -> Any:
    if not isinstance(inputs, dict):
        return inputs
    if inputs.get("prompts"):
        return _one_list(inputs["prompts"])
    said = _said(inputs)
    system = first(inputs, "system", "instructions")
    return [{"role": "system", "content": system}, *said] if system and isinstance(said, list) else said


def _model_outputs(outputs: Any) -> tuple[Any, dict[str, Any]]:
    """(the messages that the model gave, {"usage", "model"} as far as they are told there)."""
    if not isinstance(outputs, dict):
        return outputs, {}
    told: dict[str, Any] = {"usage": first(outputs, "usage", "usage_metadata"), "model": outputs.get("model")}
    total = _dict(outputs.get("llm_output"))
    told["usage"] = told["usage"] or first(total, "token_usage", "usage")
    told["model"] = told["model"] or first(total, "model_name", "model")
    if isinstance(outputs.get("generations"), list):
        found = [_generation(item, told) for item in _one_list(outputs["generations"])]
    elif isinstance(outputs.get("choices"), list):
        found = [choice.get("message", choice) for choice in outputs["choices"]]
    elif "role" in outputs or "kwargs" in outputs:
        found = [outputs]
    elif isinstance(outputs.get("message"), dict):
        found = [_generation(outputs, told)]
    else:
        found = _said(outputs)
    return found, told


def _generation(item: Any, told: dict[str, Any]) -> Any:
    """The message of {"text", "message"}; what it says of usage and model goes to `told`."""
    message = item.get("message") if isinstance(item, dict) else None
    if not isinstance(message, dict):
        return item["text"] if isinstance(item, dict) and "text" in item else item
    fields = _dict(message.get("kwargs")) or message
    response = _dict(fields.get("response_metadata"))
    told["usage"] = fields.get("usage_metadata") or told["usage"] or first(response, "token_usage", "usage")
    told["model"] = told["model"] or first(response, "model_name", "model")
    return message


def _tool_inputs(inputs: Any) -> Any:
    value = inputs.get("input", inputs) if isinstance(inputs, dict) and len(inputs) == 1 else inputs
    return loads_or_same(value)


def _tool_outputs(outputs: Any) -> tuple[Any, Any]:
    """(the result, the id of the call): of a ToolMessage, or of any other value."""
    value = outputs.get("output", outputs) if isinstance(outputs, dict) and len(outputs) == 1 else outputs
    if isinstance(value, dict):
        fields = value.get("kwargs") if isinstance(value.get("kwargs"), dict) else value
        if isinstance(fields, dict) and "content" in fields and ("tool_call_id" in fields or fields is not value):
            return fields["content"], fields.get("tool_call_id")
    return value, None
