"""A small model server for tests: a process of its own that speaks chat/completions, with faults on demand.

    with FakeServer() as server:
        server.plan([{"match": "exchange 3", "faults": ["429", "ok"]}])
        … base_url=server.url …
        assert b"secret" not in server.received()

The "model" answers with the first words of the log between the prompt's markers and one token of it, verbatim. A
rule's faults are used up by the requests whose body contains `match`; afterwards the answers are good.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import struct
import threading
import time
from typing import Any

from server_process import JsonHandler, ServerProcess, serve

LOG = re.compile(r"BEGIN LOG (\w+) (\w+)\n(.*?)\nEND LOG \1 \2", re.DOTALL)


def good_answer(prompt: str) -> dict[str, Any]:
    """An honest record of the log in the prompt."""
    texts = [m[2] for m in LOG.findall(prompt)]
    words = re.sub(r"\[REDACTED:[^\]]*\]|\[…[^\]]*…\]", " ", "\n".join(texts)).split()
    details = [w for w in words if re.search(r"\d|/", w)] or words
    return {
        "exchange_core": " ".join(words[:8]) or "nothing was said",
        "specific_context": details[0] if details else "",
        "room_assignments": [
            {"room_type": "concept", "room_key": "test-room", "room_label": "Test room", "relevance": 0.9}
        ],
    }


class State:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        self.rules: list[dict[str, Any]] = []
        self.refuse: list[str] = []
        self.bytes: list[bytes] = []
        self.bodies: list[dict[str, Any]] = []
        self.open = self.max_open = self.dropped = 0


STATE = State()


class Recorder:
    """Keeps every byte that is read from the connection."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def _keep(self, data: bytes) -> bytes:
        with STATE.lock:
            STATE.bytes.append(data)
        return data

    def read(self, n: int = -1) -> bytes:
        return self._keep(self._raw.read(n))

    def readline(self, n: int = -1) -> bytes:
        return self._keep(self._raw.readline(n))


class Handler(JsonHandler):
    def setup(self) -> None:
        super().setup()
        self.rfile = Recorder(self.rfile)  # type: ignore[assignment]

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.startswith("/control"):
            return self.control(json.loads(raw))
        body = json.loads(raw)
        with STATE.lock:
            STATE.bodies.append(body)
            STATE.open += 1
            STATE.max_open = max(STATE.max_open, STATE.open)
            text = raw.decode()
            rule = next((r for r in STATE.rules if r.get("match", "") in text and r["faults"]), None)
            fault = rule["faults"].pop(0) if rule else "ok"
        try:
            self.answer(fault, body)
        except OSError:
            with STATE.lock:
                STATE.dropped += 1
        finally:
            with STATE.lock:
                STATE.open -= 1

    def control(self, command: dict[str, Any]) -> None:
        with STATE.lock:
            if command["do"] == "plan":
                STATE.reset()
                STATE.rules, STATE.refuse = command["rules"], command["refuse"]
            report = {
                "bytes": base64.b64encode(b"".join(STATE.bytes)).decode() if command["do"] == "received" else "",
                "bodies": STATE.bodies if command["do"] == "bodies" else [],
                "open": STATE.open,
                "max_open": STATE.max_open,
                "dropped": STATE.dropped,
            }
        self.send(200, report)

    def refused(self, body: dict[str, Any]) -> str:
        kind = body.get("response_format", {}).get("type", "plain")
        named = [kind, *(k for k in ("max_tokens", "temperature") if k in body)]
        return next((n for n in named if n in STATE.refuse), "")

    def answer(self, fault: str | dict[str, Any], body: dict[str, Any]) -> None:
        refused = self.refused(body)
        if refused:
            words = {"max_tokens": "use max_completion_tokens instead of max_tokens", "temperature": "bad temperature"}
            message = words.get(refused, f"response_format {refused} is not supported")
            return self.send(400, {"error": {"message": message}})
        if isinstance(fault, dict):  # an answer in the test's own words
            return self.send(200, self.completion(body, fault["content"]))
        name, _, value = fault.partition(":")
        if name.isdigit():
            headers = {"Retry-After": value} if value else {}
            echo = self.headers.get("Authorization", "")
            return self.send(int(name), {"error": {"message": f"fault {name}, you sent {echo}"}}, headers)
        if name == "quota":
            return self.send(429, {"error": {"message": "quota", "code": "insufficient_quota"}})
        if name == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return None
        if name in ("slow", "hang"):
            if not self.sleep(float(value)):
                raise ConnectionResetError
            if name == "hang":  # closes without an answer
                self.close_connection = True
                return None
        self.send(200, self.shaped(name, body))

    def sleep(self, seconds: float) -> bool:
        """Waits; False as soon as the client has gone away."""
        self.connection.settimeout(0.02)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                if self.connection.recv(1, socket.MSG_PEEK) == b"":
                    return False
                time.sleep(0.02)
        self.connection.settimeout(None)
        return True

    def shaped(self, name: str, body: dict[str, Any]) -> Any:
        record = good_answer("\n".join(m["content"] for m in body["messages"] if m["role"] == "user"))
        text = json.dumps(record)
        if name == "not_http_json":
            return b"<html>gateway</html>"
        if name == "no_choices":
            return {"choices": []}
        if name == "deep":
            return b"[" * 200_000
        if name == "flood":
            return b" " * 5_000_000
        if name == "error_in_200":
            return {"error": {"message": "the model is overloaded", "code": 503}}
        content = {
            "malformed": "Sure! The exchange was about tests.",
            "truncated": text[: len(text) // 2],
            "wrong_schema": json.dumps({"summary": "x", "room_assignments": "none"}),
            "fences": f"<think>{{hmm}}</think>Here it is:\n```json\n{text}\n```\nAnything else?",
            "commas": text.replace("}]}", "},],}"),
            "empty": "",
            "half_character": "asks \ud83d",
            "invented": json.dumps(record | {"specific_context": "ENOTHERE-4711"}),
        }.get(name, text)
        reply = self.completion(body, content)
        if name == "refusal":
            reply["choices"][0]["message"] = {"role": "assistant", "content": None, "refusal": "I cannot do that"}
        if name == "no_usage":
            del reply["usage"]
        if name == "odd_usage":
            reply["usage"] = {"prompt_tokens": -5, "completion_tokens": 10**30}
        if name == "truncated":
            reply["choices"][0]["finish_reason"] = "length"
        return reply

    def completion(self, body: dict[str, Any], content: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": content}
        return {
            "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
        }


class FakeServer(ServerProcess):
    """The server as the tests see it."""

    def __init__(self) -> None:
        super().__init__(__file__)

    def plan(self, rules: list[dict[str, Any]] | None = None, refuse: list[str] | None = None) -> None:
        """Forgets all that was received and sets the faults to come."""
        self.control(do="plan", rules=rules or [], refuse=refuse or [])

    def received(self) -> bytes:
        """Every byte that clients have sent since the plan."""
        return base64.b64decode(self.control(do="received")["bytes"])

    def bodies(self) -> list[dict[str, Any]]:
        """The chat requests since the plan."""
        return self.control(do="bodies")["bodies"]

    def counts(self) -> dict[str, int]:
        """Requests open now, at most open at once, and given up by the client."""
        report = self.control(do="counts")
        return {k: report[k] for k in ("open", "max_open", "dropped")}


if __name__ == "__main__":
    serve(Handler)
