"""ATIF trajectories, the interchange format of Harbor: one JSON document each (v1.0 to 1.7), or JSON lines of them.

A step becomes a message; each result of its observation becomes a tool message after it. Sub-agent trajectories that
are embedded are threads of the same conversation, or conversations of their own where they have another session id.
Documents that share a session id (continuations) are one conversation, in the order in which they are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from workbench.data.importers._chat_parts import call_part, count_or_none, parts_of, result_parts
from workbench.data.importers._members import not_understood, read_rows
from workbench.data.importers.base import SHAPE_ERRORS, Probe, Source, as_text
from workbench.data.importers.json_stream import Member
from workbench.data.records import Conversation, Message, Part, Record, digest, parse_time

FORMAT = "atif"

_ARRAYS = ("steps", "subagent_trajectories")
_ROLES = {"agent": "assistant", "user": "user", "system": "system"}
_TOKEN_FIELDS = ("prompt_token_ids", "completion_token_ids", "logprobs")
#: Token ids and log-probabilities of a step longer than this are not kept.
_MAX_TOKEN_IDS = 256
_SHORT = 2000


def detect(probe: Probe) -> int:
    if re.search(rb'"schema_version"\s*:\s*"ATIF', probe.head):
        return 97
    return 60 if probe.has_keys("steps", "step_id", "source", "agent") else 0


@dataclass
class _Trajectory:
    """What is known of the trajectory whose steps are being read."""

    fields: dict[str, Any] = field(default_factory=dict)
    session_id: str = ""
    agent_id: str | None = None
    num_steps: int = 0

    def name(self, key: str) -> str | None:
        value = self.fields.get(key)
        return value if isinstance(value, str) and value else None


def read(source: Source) -> Iterator[Record]:
    main = _Trajectory()

    def convert(member: Member) -> Iterator[Record]:
        if member.key is None:
            yield from _whole(member.value, source, member, None)
        elif member.key == "steps" and member.index is not None:
            yield from _step(member.value, main, source, member)
        elif member.key == "subagent_trajectories" and member.index is not None:
            yield from _whole(member.value, source, member, main)
        elif member.key in _ARRAYS and member.value is not None:
            raise TypeError(f"{member.key} is no list")
        else:
            main.fields[as_text(member.key)] = member.value

    yield from read_rows(source, _ARRAYS, convert)
    if main.session_id:
        yield _about(main)
    elif main.fields:
        source.skipped["trajectory without steps"] += 1


def _whole(value: Any, source: Source, member: Member, parent: _Trajectory | None) -> Iterator[Record]:
    """All records of a trajectory that is given whole; a parent's step may come later than its sub-agents."""
    if not isinstance(value, dict) or not isinstance(value.get("steps"), list):
        raise TypeError("a trajectory has a list of steps")
    own = _Trajectory({key: v for key, v in value.items() if key not in _ARRAYS})
    meta_parent = None
    if parent is not None:
        parent_session = parent.session_id or parent.name("session_id") or parent.name("trajectory_id") or ""
        if own.name("session_id") in (None, parent_session) and parent_session:
            own.session_id = parent_session
            own.agent_id = own.name("trajectory_id") or f"subagent-{digest(as_text(value))}"
            if not parent.session_id:
                parent.session_id = parent_session
                yield _about(parent)
        else:
            meta_parent = parent_session or None
    for i, step in enumerate(value["steps"]):
        try:
            records = list(
                _step(step, own, source, Member("steps", i, member.offset, member.length, step), meta_parent)
            )
        except SHAPE_ERRORS as error:
            yield not_understood(member.offset, member.length, step, error)
            continue
        yield from records
    if own.session_id and own.agent_id is None:
        yield _about(own, meta_parent)
    subs = value.get("subagent_trajectories")
    for i, sub in enumerate(subs if isinstance(subs, list) else []):
        try:
            yield from _whole(sub, source, Member("subagent_trajectories", i, member.offset, member.length, sub), own)
        except SHAPE_ERRORS as error:
            yield not_understood(member.offset, member.length, sub, error)
    if not value["steps"]:
        source.skipped["trajectory without steps"] += 1


def _about(trajectory: _Trajectory, parent_session: str | None = None) -> Conversation:
    """The Conversation as far as the fields read so far tell."""
    agent = trajectory.fields.get("agent")
    agent = agent if isinstance(agent, dict) else {}
    kept = {key: trajectory.fields.get(key) for key in (
        "schema_version", "trajectory_id", "notes", "final_metrics", "continued_trajectory_ref", "extra")}  # fmt: skip
    kept["agent_version"] = agent.get("version")
    kept["agent_extra"] = agent.get("extra")
    tools = agent.get("tool_definitions")
    if isinstance(tools, list):
        kept["tools"] = [tool["function"].get("name") for tool in tools if _has_function(tool)]
    return Conversation(
        trajectory.session_id,
        agent=agent["name"] if isinstance(agent.get("name"), str) else None,
        model=agent["model_name"] if isinstance(agent.get("model_name"), str) else None,
        parent_session_id=parent_session,
        meta={key: value for key, value in kept.items() if value and len(as_text(value)) < _SHORT},
    )


def _has_function(tool: Any) -> bool:
    return isinstance(tool, dict) and isinstance(tool.get("function"), dict)


def _step(
    step: Any, trajectory: _Trajectory, source: Source, member: Member, parent_session: str | None = None
) -> Iterator[Record]:
    """The messages of a step. Raises: TypeError, KeyError where it is none."""
    if not isinstance(step, dict):
        raise TypeError(f"a step is an object, not {type(step).__name__}")
    role = _ROLES[as_text(step["source"])]
    parts = [part for key, kind in (("reasoning_content", "thinking"), ("message", "text"))
             for part in _texts(step.get(key), kind)]  # fmt: skip
    calls = step.get("tool_calls")
    for call in calls if isinstance(calls, list) else [] if calls is None else [calls]:
        parts.append(call_part(call) if isinstance(call, dict) else Part("event", as_text(call), name="tool_call"))
    step_id = step.get("step_id")
    if isinstance(step_id, bool) or not isinstance(step_id, int | str):
        step_id = f"#{member.index}"
    # Steps are numbered within their document; several documents of one run can share the session (v1.7).
    document = trajectory.agent_id or trajectory.name("trajectory_id")
    native_id = f"{document}/{step_id}" if document else str(step_id)
    message = Message("", role, parts, native_id, created_at=parse_time(step.get("timestamp")))
    if role == "assistant":
        message.model = step["model_name"] if isinstance(step.get("model_name"), str) else None
    message.meta = _metrics(step, message, source) or None
    messages = [message] if parts else []
    messages += _observation(step.get("observation"), message)
    if not messages:
        source.skipped["step without content"] += 1
        return
    first_step = not trajectory.session_id
    if first_step:
        trajectory.session_id = (
            trajectory.name("session_id") or trajectory.name("trajectory_id") or digest(as_text(step))
        )
    if trajectory.num_steps == 0 and trajectory.agent_id is None:
        yield _about(trajectory, parent_session)
    trajectory.num_steps += 1
    for item in messages:
        item.session_id, item.agent_id = trajectory.session_id, trajectory.agent_id
        item.offset, item.length = member.offset, member.length
        if step.get("is_copied_context") is True:
            item.parts = [_copied(part) for part in item.parts]
        yield item


def _texts(value: Any, kind: str) -> list[Part]:
    """The parts of a step's words; those of kind text become `kind`."""
    parts = parts_of(value)
    for part in parts:
        if part.kind == "text":
            part.kind = kind
    return parts


def _copied(part: Part) -> Part:
    """A part that an earlier trajectory told already, as context."""
    text = part.text
    if part.kind == "tool_call":
        text = as_text({"name": part.name, "arguments": part.data})
    return Part("context", text, name=part.name or part.kind, call_id=part.call_id, data=part.data)


def _metrics(step: dict[str, Any], message: Message, source: Source) -> dict[str, Any]:
    """Puts the token counts on the message; returns what else is worth keeping of the step."""
    metrics = step.get("metrics")
    metrics = metrics if isinstance(metrics, dict) else {}
    message.tokens_in = count_or_none(metrics.get("prompt_tokens"))
    message.tokens_out = count_or_none(metrics.get("completion_tokens"))
    message.tokens_cached = count_or_none(metrics.get("cached_tokens"))
    kept = {key: step.get(key) for key in ("reasoning_effort", "llm_call_count", "extra", "is_copied_context")}
    kept.update(cost_usd=metrics.get("cost_usd"), metrics_extra=metrics.get("extra"))
    for name in _TOKEN_FIELDS:
        values = metrics.get(name)
        if isinstance(values, list) and len(values) > _MAX_TOKEN_IDS:
            source.skipped["token ids"] += 1
        else:
            kept[name] = values
    return {key: value for key, value in kept.items() if value is not None and len(as_text(value)) < _SHORT * 4}


def _observation(observation: Any, step: Message) -> Iterator[Message]:
    """A tool message for each result."""
    if observation is None:
        return
    results = observation.get("results") if isinstance(observation, dict) else [observation]
    for i, result in enumerate(results if isinstance(results, list) else [] if results is None else [results]):
        result = result if isinstance(result, dict) else {"content": result}
        part, *media = result_parts({"content": result.get("content")})
        call_id = result.get("source_call_id")
        part.call_id = call_id if isinstance(call_id, str) else None
        called = (p.name for p in step.parts if p.kind == "tool_call" and p.call_id == part.call_id)
        part.name = next(called, None) if part.call_id else None
        data = {key: result[key] for key in ("subagent_trajectory_ref", "extra") if result.get(key)}
        part.data = data or None
        native_id = f"{step.native_id}.{i}"
        yield Message("", "tool", [part, *media], native_id, step.native_id if step.parts else None,
                      created_at=step.created_at)  # fmt: skip
