"""SWE-agent trajectories (.traj) and mini-swe-agent's (.traj.json, or the bare list of its messages).

The conversation is `history` where there is one; of the steps in `trajectory` only what it lacks is told: times and
states go to the messages' meta, steps that it does not hold become messages. The files have no session id: it is a
hash of what stands before the model's first answer, and of the first step.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import orjson

from workbench.data.importers._chat_parts import chat_messages, first, loads_or_same, parts_of, token_counts
from workbench.data.importers._members import convert_members, without_end
from workbench.data.importers.base import Probe, Source, as_text
from workbench.data.importers.json_stream import Member, read_members
from workbench.data.records import Conversation, Message, Part, Record, Unreadable, digest, parse_time

FORMAT = "swe_agent"

_ARRAYS = ("trajectory", "history", "messages")
_SPOOL_BYTES_IN_MEMORY = 8 << 20
_SHORT = 1000
#: Commands of SWE-agent's own interface; any other action is a line for the shell.
_COMMANDS = frozenset({
    "open", "goto", "scroll_up", "scroll_down", "create", "edit", "insert", "search_dir", "search_file", "find_file",
    "submit", "str_replace_editor", "view_image", "filemap", "exit_forfeit", "set_cursors",
})  # fmt: skip
#: Keys of OpenHands' events, which share most of the names below.
_OPENHANDS = (("extras",), ("tool_call_metadata",), ("args", "source"), ("kind", "source"))
_FENCED = re.compile(r"```(?:mswea_bash_command|bash|sh)\s*\n(.*?)\n?```", re.DOTALL)


def detect(probe: Probe) -> int:
    if any(probe.has_keys(*keys) for keys in _OPENHANDS):
        return 0
    if b'"mini-swe-agent' in probe.head and probe.has_keys("messages", "role"):
        return 95
    if probe.document == "{" and (
        probe.has_keys("trajectory", "observation", "response")
        or probe.has_keys("history", "role", "agent", "message_type")
        or probe.has_keys("history", "role", "agent", "thought", "action")
    ):
        return 90
    bare = probe.document == "[" and probe.has_keys("role", "content")
    return 70 if bare and b"mswea_bash_command" in probe.head else 0


def read(source: Source) -> Iterator[Record]:
    with tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES_IN_MEMORY) as spool:
        run = _Run(source, spool)
        is_cut = False
        for record in convert_members(source, read_members(source, _ARRAYS), run.member):
            is_cut |= isinstance(record, Unreadable) and record.unfinished
            yield record
        if is_cut and (run.num_steps or not run.session_id):
            # What is still to come may tell the steps, and makes the session id.
            yield without_end(0, 0, run.fields)
        else:
            yield from run.end()


def _dict(value: Any) -> dict[str, Any]:
    value = loads_or_same(value)
    return value if isinstance(value, dict) else {}


def _step_key(action: Any, said: Any) -> str:
    """What joins a step to its message in the history: the action (the words may differ), else the words."""
    return digest(as_text(action).strip() or as_text(said).strip())


def _state(step: dict[str, Any]) -> dict[str, Any]:
    """What the messages of a step carry as meta: time taken and the short values of the state."""
    state = {k: v for k, v in _dict(step.get("state")).items() if isinstance(v, str) and len(v) < _SHORT}
    seconds = step.get("execution_time")
    return {**({"execution_seconds": seconds} if isinstance(seconds, int | float) else {}), **state}


class _Run:
    """The trajectory of one file."""

    def __init__(self, source: Source, spool: Any) -> None:
        self.source = source
        self.spool = spool  # the steps as JSON lines, until it is known which of them `history` tells
        self.fields: dict[str, Any] = {}
        self.session_id = ""
        self.waiting: list[Message] = []
        self.seed: list[str] = []
        self.main_agent: str | None = None
        self.is_mini = False
        self.project: str | None = None
        self.answered = False
        self.num_steps = 0
        self.states: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.told: Counter[str] = Counter()
        self.last_action = ""  # key of the action with which the history ends
        self.call_id: str | None = None

    def member(self, member: Member) -> Iterator[Record]:
        value = member.value
        if member.key in (None, "history", "messages") and (member.key is None or member.index is not None):
            self.is_mini = member.key != "history"
            yield from self._pass_on(self._history(value, member, f"#{member.index}"), value)
        elif member.key == "trajectory" and member.index is not None:
            self._put_aside(value, member)
        elif member.key in _ARRAYS and value is not None:
            raise TypeError(f"{member.key} is no list")
        else:
            self.fields[as_text(member.key)] = value
            if member.key not in ("environment", "info", "replay_config", "instance_id", "trajectory_format"):
                self.source.skipped[f"document field {as_text(member.key)[:40]}"] += 1

    def _put_aside(self, step: Any, member: Member) -> None:
        """Keeps a step for the end. Raises: TypeError where it is none."""
        if not isinstance(step, dict) or not step.keys() & {"action", "observation", "response", "thought"}:
            raise TypeError("a step has action, observation, response or thought")
        kept = {key: step.get(key) for key in ("action", "observation", "response", "thought", "execution_time")}
        kept["state"] = _state(step)
        kept["at"] = [member.index, member.offset, member.length]
        if self.num_steps == 0:
            self.seed.append(digest(as_text(kept)))
            kept["query"] = first(step, "query", "messages")
            directory = kept["state"].get("working_dir")
            self.project = directory if directory and directory.startswith("/") else None
        line = orjson.dumps(kept)
        self.states[_step_key(step.get("action"), step.get("response"))].append(kept["state"])
        self.num_steps += 1
        self.spool.write(line + b"\n")

    def _pass_on(self, messages: Iterator[Message], raw: Any) -> Iterator[Record]:
        """Holds messages back until the first answer, with which the session id is known."""
        new = list(messages)
        if not self.session_id:
            self.seed.append(digest(as_text(raw)))
            self.waiting += new
            if self.answered:
                yield from self._begin()
            return
        for message in new:
            message.session_id = self.session_id
            yield message

    def _begin(self) -> Iterator[Record]:
        name = self.fields.get("environment") or self.fields.get("instance_id")
        prefix = f"{name}-" if isinstance(name, str) and name else ""
        self.session_id = prefix + digest(*self.seed)
        agent = "mini-swe-agent" if self.is_mini else "swe-agent"
        yield Conversation(self.session_id, agent=agent, project=self.project)
        for message in self.waiting:
            message.session_id = self.session_id
            yield message
        self.waiting = []

    def _history(self, row: Any, member: Member, native_id: str) -> Iterator[Message]:
        """The message of an element of history. Raises: TypeError, KeyError where it is none."""
        if not isinstance(row, dict) or not (isinstance(row.get("role"), str) or "type" in row):
            raise TypeError("a message has a role")
        extra = _dict(row.get("extra"))
        role = row.get("role")
        agent = row.get("agent") if isinstance(row.get("agent"), str) else None
        self.main_agent = self.main_agent or agent
        when = parse_time(first(extra, "timestamp"))
        message = Message(
            "", "user", [], native_id, created_at=when, offset=member.offset, length=member.length,
            agent_id=agent if agent != self.main_agent else None,
        )  # fmt: skip
        if row.get("message_type") == "demonstration" or row.get("is_demo"):
            message.role = {"assistant": "assistant", "system": "system"}.get(as_text(role), "user")
            message.parts = [Part("context", p.text, name="demonstration") for p in parts_of(row.get("content"))]
        elif role == "exit":
            message.role = "system"
            message.parts = [Part("event", as_text(row.get("content")), name="exit", data=extra or None)]
        elif role in ("assistant", "ai") or role is None:
            self._action(row, extra, message)
        elif role == "tool" or (role == "user" and self.answered and not self._is_person(extra)):
            self._observation(row, extra, message)
        else:
            message.role = "system" if role in ("system", "developer") else "user"
            message.parts = parts_of(row.get("content"))
        if not message.parts:
            self.source.skipped["empty message"] += 1
            return
        yield message

    @staticmethod
    def _is_person(extra: dict[str, Any]) -> bool:
        return as_text(extra.get("interrupt_type")).startswith("User")

    def _action(self, row: dict[str, Any], extra: dict[str, Any], message: Message) -> None:
        self.answered = True
        thought, action, content = row.get("thought"), row.get("action"), row.get("content")
        key = _step_key(action, content)
        # The answer is thought + fenced action: told as text and call, not twice.
        if isinstance(thought, str) and isinstance(action, str) and isinstance(content, str) and thought.strip():
            rest = content.replace(thought, "", 1)
            content = thought if thought in content and action.strip() in rest else content
        parts = parts_of(row.get("thinking_blocks"))
        said = {**row, "content": content}
        if row.get("role") is None and isinstance(row.get("output"), list):
            said = {"role": "assistant", "content": row["output"]}
        for _, found in chat_messages(said, "assistant"):
            parts += found
        if not any(part.kind == "tool_call" for part in parts):
            parts += self._calls(action, content, extra, message.native_id)
        self.call_id = next((part.call_id for part in parts if part.kind == "tool_call"), None)
        response = _dict(extra.get("response"))
        message.role, message.parts = "assistant", parts
        message.model = response["model"] if isinstance(response.get("model"), str) else None
        message.tokens_in, message.tokens_out, message.tokens_cached = token_counts(response.get("usage"))
        states = self.states.get(key)
        message.meta = (states.pop(0) if states else None) or None
        if isinstance(extra.get("cost"), int | float):
            message.meta = {**(message.meta or {}), "cost_usd": extra["cost"]}
        if isinstance(action, str):
            self.told[key] += 1
        self.last_action = key

    def _calls(self, action: Any, content: Any, extra: dict[str, Any], native_id: str) -> Iterator[Part]:
        """The action as a tool call: SWE-agent's `action`, or mini-swe-agent's commands."""
        if isinstance(action, str) and action.strip():
            command = action.split(maxsplit=1)[0]
            name = command if command in _COMMANDS else "bash"
            yield Part("tool_call", name=name, call_id=f"call{native_id}", data={"command": action})
            return
        if not self.is_mini:
            return
        actions = extra.get("actions")
        commands = [_dict(a).get("command") for a in actions] if isinstance(actions, list) else []
        if not commands and isinstance(content, str):
            commands = _FENCED.findall(content)
        for i, command in enumerate(c for c in commands if isinstance(c, str)):
            yield Part("tool_call", name="bash", call_id=f"call{native_id}.{i}", data={"command": command})

    def _observation(self, row: dict[str, Any], extra: dict[str, Any], message: Message) -> None:
        ids = row.get("tool_call_ids")
        call_id = ids[0] if isinstance(ids, list) and ids else first(row, "tool_call_id", "call_id")
        inside = parts_of(first(row, "content", "output"))
        text = "\n".join(part.text for part in inside if part.kind != "image")
        code = extra.get("returncode")
        if code is None and (found := re.match(r"<returncode>(-?\d{1,9})</returncode>", text)):
            code = int(found[1])
        is_error = code != 0 if isinstance(code, int) else True if extra.get("interrupt_type") else None
        call_id = call_id if isinstance(call_id, str) else self.call_id
        result = Part("tool_result", text, call_id=call_id, is_error=is_error)
        message.role = "tool"
        message.parts = [result, *(part for part in inside if part.kind == "image")]
        self.last_action = ""

    def end(self) -> Iterator[Record]:
        """The steps that the history does not tell, the submission, and what is known of the whole run."""
        self.spool.seek(0)
        for number, line in enumerate(self.spool):
            step = orjson.loads(line)
            index, offset, length = step["at"]
            member = Member("trajectory", index, offset, length, None)
            key = _step_key(step["action"], step["response"])
            if self.told[key] > 0:
                self.told[key] -= 1
                self.source.skipped["trajectory step (history tells it)"] += 1
                if key == self.last_action and self.told[key] == 0 and step["observation"]:
                    yield from self._pass_on(self._step_observation(step, member, self.call_id), None)
                continue
            if number == 0 and not self.session_id and not self.waiting:
                yield from self._prompts(step.get("query"), member)
            yield from self._pass_on(self._step(step, member), None)
        yield from self._epilogue()

    def _prompts(self, query: Any, member: Member) -> Iterator[Record]:
        """What was asked before the first step, where there is no history."""
        for i, row in enumerate(query if isinstance(query, list) else []):
            if not isinstance(row, dict) or row.get("role") not in ("system", "user"):
                break
            yield from self._pass_on(self._history(row, member, f"query#{i}"), row)

    def _step(self, step: dict[str, Any], member: Member) -> Iterator[Message]:
        row = {"role": "assistant", "content": step["response"] or step["thought"], **step}
        yield from self._history(row, member, f"step#{member.index}")
        yield from self._step_observation(step, member, self.call_id)

    def _step_observation(self, step: dict[str, Any], member: Member, call_id: str | None) -> Iterator[Message]:
        if step["observation"]:
            part = Part("tool_result", as_text(step["observation"]), call_id=call_id)
            native_id = f"step#{member.index}.observation"
            yield Message("", "tool", [part], native_id, offset=member.offset, length=member.length)

    def _epilogue(self) -> Iterator[Record]:
        if not self.session_id and self.waiting:
            yield from self._begin()
        if not self.session_id:
            if self.fields:
                self.source.skipped["document without messages"] += 1
            return
        info, config = _dict(self.fields.get("info")), _dict(self.fields.get("replay_config"))
        if isinstance(info.get("submission"), str) and info["submission"].strip():
            part = Part("event", info["submission"], name="submission")
            yield Message(self.session_id, "system", [part], "submission")
        repository = _dict(_dict(config.get("env")).get("repo"))
        model = _dict(_dict(config.get("agent")).get("model"))
        mini = _dict(info.get("config"))
        title = first(_dict(config.get("problem_statement")), "id") or self.fields.get("instance_id")
        meta = {k: v for k, v in info.items() if k != "submission" and v and len(as_text(v)) < _SHORT}
        if isinstance(self.fields.get("environment"), str):
            meta["environment"] = self.fields["environment"]
        where = first(repository, "github_url", "repo_name", "path") or _dict(mini.get("environment")).get("cwd")
        name = first(model, "name") or _dict(mini.get("model")).get("model_name")
        yield Conversation(
            self.session_id,
            project=where if isinstance(where, str) else None,
            title=title if isinstance(title, str) else None,
            model=name if isinstance(name, str) else None,
            meta=meta,
        )
