"""A model server for tests: a process of its own that serves a tiny Llama as vLLM does, with faults on demand.

    server = shared()                      # one process for all tests of a session
    server.plan(mode={"temperature": "honours"}, faults=["429:0", "500"])
    … Endpoint(server.url, "tiny") …

Modes (what kind of server it is): `extensions` (takes vLLM's fields; else refuses or, with "silent", overlooks them),
`ids` (prompts may be ids), `generated_top_k`, `prompt_top_k` (caps; 0 refuses), `full`, `fixed_ids`, `temperature`
("ignores" or "honours", of prompt_logprobs), `eos_in_ids`, `completions`, `chat`, `shift` (a token too many in front),
`eos` (another end than the tokenizer's), `template` (another chat template), `seed` (of the weights).
Faults are used up by the requests that come, one each, before the answers are good again: "429:SECONDS", "500", "401",
"hang:SECONDS", "html", "cut", "list".
"""

from __future__ import annotations

import atexit
import functools
import json
import threading
import time
from typing import Any

from server_process import JsonHandler, ServerProcess, serve

SEED, HIDDEN = 2, 48
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w25{% endif %}"
USUAL: dict[str, Any] = {
    "extensions": True, "ids": True, "generated_top_k": 64, "prompt_top_k": 64, "full": True, "fixed_ids": True,
    "temperature": "ignores", "eos_in_ids": True, "completions": True, "chat": True, "shift": False, "eos": None,
    "template": TEMPLATE, "seed": SEED,
}  # fmt: skip
EXTRA = ("return_token_ids", "return_tokens_as_token_ids", "top_k", "min_p", "repetition_penalty")


def make_served() -> tuple[Any, Any]:
    """Tokenizer and model as the server has them in its usual mode."""
    from tiny_models import make_model, make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer, make_model(tokenizer, SEED, hidden=HIDDEN)


class Refusal(Exception):
    """Answered with 400, or the status given."""

    def __init__(self, words: str, status: int = 400) -> None:
        super().__init__(words)
        self.status = status


class Model:
    """Answers requests; one at a time."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        self.torch = torch
        self.tokenizer, model = make_served()
        self.models, self.lock = {SEED: model}, threading.Lock()

    def logits(self, ids: list[int], seed: int) -> Any:
        from tiny_models import make_model

        if seed not in self.models:
            self.models[seed] = make_model(self.tokenizer, seed, hidden=HIDDEN)
        with self.torch.no_grad():
            return self.models[seed](input_ids=self.torch.tensor([ids])).logits[0].float()

    def answer(self, route: str, body: dict[str, Any], mode: dict[str, Any]) -> dict[str, Any]:
        if not mode[{"/completions": "completions", "/chat/completions": "chat"}[route]]:
            raise Refusal("no such route", 404)
        if body["model"] != "tiny":
            raise Refusal(f"no model {body['model']}", 404)
        if mode["extensions"] is False and (refused := [name for name in EXTRA if name in body]):
            raise Refusal(f"unknown field {refused[0]}")
        speaks = mode["extensions"] is True
        is_chat = route == "/chat/completions"
        prompt = self.prompt_ids(body, mode, is_chat)
        if len(prompt) + body.get("max_tokens", 16) > 128:
            raise Refusal("this model's maximum context length is 128 tokens")
        k = body.get("top_logprobs", 0) if is_chat else body.get("logprobs")
        k = k if not is_chat or body.get("logprobs") else None
        if k is not None and k > mode["generated_top_k"]:
            raise Refusal(f"requested {k} logprobs, the most is {mode['generated_top_k']}")
        with self.lock:
            ids, rows, is_ended = self.generate(prompt, body, mode)
            prompt_rows = self.prompt_rows(prompt, body, mode)
        is_named = speaks and bool(body.get("return_tokens_as_token_ids"))
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop" if is_ended else "length"}
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        choice |= {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        if speaks and body.get("return_token_ids"):
            choice["token_ids"] = ids
        if k is not None:
            wanted = body.get("logprob_token_ids") if speaks and mode["fixed_ids"] else None
            choice["logprobs"] = self.listed(ids, rows, k, is_named, is_chat, wanted)
        if prompt_rows:
            choice["prompt_logprobs"] = prompt_rows
        answer = {"model": "tiny", "choices": [choice], "usage": {"prompt_tokens": len(prompt)}}
        if speaks and body.get("return_token_ids"):
            (answer if is_chat else choice)["prompt_token_ids"] = prompt
        return answer

    def prompt_ids(self, body: dict[str, Any], mode: dict[str, Any], is_chat: bool) -> list[int]:
        if is_chat:
            template = {"chat_template": mode["template"], "add_generation_prompt": True, "return_dict": False}
            return list(self.tokenizer.apply_chat_template(body["messages"], **template))
        if isinstance(body["prompt"], str):
            return list(self.tokenizer(body["prompt"])["input_ids"])
        if not mode["ids"]:
            raise Refusal("prompt must be a string")
        return [5, *body["prompt"]] if mode["shift"] else list(body["prompt"])

    def generate(self, prompt: list[int], body: dict[str, Any], mode: dict[str, Any]) -> tuple[Any, Any, bool]:
        """Ids, the row of log-probabilities of each (not tempered: vLLM's raw_logprobs), whether it came to its end."""
        torch, end = self.torch, mode["eos"] or self.tokenizer.eos_token_id
        generator = torch.Generator().manual_seed(body.get("seed") or 0)
        ids: list[int] = []
        rows = []
        for _ in range(body.get("max_tokens", 16)):
            logits = self.logits(prompt + ids, mode["seed"])[-1].clone()
            for word, bias in (body.get("logit_bias") or {}).items():
                logits[int(word)] += bias
            temperature = body.get("temperature", 1.0)
            greedy = int(logits.argmax())
            one = (
                int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
                if temperature
                else greedy
            )
            is_ended = one == end
            if is_ended and not mode["eos_in_ids"]:
                return ids, rows, True
            ids.append(one)
            rows.append(logits.log_softmax(-1))
            if is_ended:
                return ids, rows, True
        return ids, rows, False

    def prompt_rows(self, prompt: list[int], body: dict[str, Any], mode: dict[str, Any]) -> list[Any] | None:
        k = body.get("prompt_logprobs")
        if k is None or mode["extensions"] == "silent":
            return None
        if mode["extensions"] is False or k > mode["prompt_top_k"] or (k == -1 and not mode["full"]) or k < -1:
            raise Refusal(f"requested {k} prompt logprobs, the most is {mode['prompt_top_k']}")
        temperature = body.get("temperature", 1.0) if mode["temperature"] == "honours" else 1.0
        logprobs = (self.logits(prompt, mode["seed"]) / temperature).log_softmax(-1)
        rows: list[Any] = [None]
        for word, row in zip(prompt[1:], logprobs, strict=False):
            best = row.topk(len(row) if k == -1 else min(k, len(row))).indices.tolist()
            rows.append({str(one): {"logprob": float(row[one]), "rank": 1} for one in {*best, word}})
        return rows

    def listed(
        self, ids: list[int], rows: list[Any], k: int, is_named: bool, is_chat: bool, wanted: list[int] | None
    ) -> dict[str, Any]:
        def name(word: int) -> str:
            return f"token_id:{word}" if is_named else self.tokenizer.decode([word])

        tops = []
        for one, row in zip(ids, rows, strict=True):
            best = wanted or ([*row.topk(min(k, len(row))).indices.tolist(), one] if k else [one])
            tops.append({name(word): float(row[word]) for word in best})
        values = [float(row[one]) for one, row in zip(ids, rows, strict=True)]
        if not is_chat:
            return {"tokens": [name(one) for one in ids], "token_logprobs": values, "top_logprobs": tops}
        content = [
            {"token": name(one), "logprob": value, "top_logprobs": [{"token": t, "logprob": v} for t, v in top.items()]}
            for one, value, top in zip(ids, values, tops, strict=True)
        ]
        return {"content": content}


class State:
    """What the tests have asked for, and what came."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.plan({}, [])

    def plan(self, mode: dict[str, Any], faults: list[str]) -> None:
        self.mode, self.faults = {**USUAL, **mode}, list(faults)
        self.bodies: list[dict[str, Any]] = []
        self.open = self.max_open = 0


STATE = State()


class Handler(JsonHandler):
    model: Model

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/control":
            return self.control(body)
        with STATE.lock:
            STATE.bodies.append(body)
            STATE.open += 1
            STATE.max_open = max(STATE.max_open, STATE.open)
            fault = STATE.faults.pop(0) if STATE.faults else "ok"
        try:
            self.answer(fault, body)
        except OSError:
            self.close_connection = True  # the client has gone
        finally:
            with STATE.lock:
                STATE.open -= 1

    def control(self, command: dict[str, Any]) -> None:
        with STATE.lock:
            report = {"bodies": STATE.bodies, "max_open": STATE.max_open}
            if "mode" in command:
                STATE.plan(command["mode"], command["faults"])
        self.send(200, report)

    def answer(self, fault: str, body: dict[str, Any]) -> None:
        name, _, value = fault.partition(":")
        if name.isdigit():
            words = f"fault {name}, you sent {self.headers.get('Authorization', 'no key')}"
            return self.send(int(name), {"error": {"message": words}}, {"Retry-After": value} if value else {})
        if name == "hang":
            time.sleep(float(value))
            self.close_connection = True
            return None
        if name == "html":
            return self.send(200, b"<html>gateway</html>")
        if name == "list":
            return self.send(200, {"choices": ["no object"]})
        try:
            found = self.model.answer(self.path.removeprefix("/v1"), body, STATE.mode)
        except Refusal as error:
            return self.send(error.status, {"error": {"message": str(error)}})
        if name == "cut":
            data = json.dumps(found).encode()
            self.close_connection = True
            return self.send(200, data[: len(data) // 2], length=len(data))
        return self.send(200, found)


class TinyServer(ServerProcess):
    """The server as the tests see it."""

    def __init__(self) -> None:
        super().__init__(__file__)

    def plan(self, mode: dict[str, Any] | None = None, faults: list[str] | None = None) -> None:
        """Forgets what came; sets what kind of server it is (beside the usual), and the faults to come."""
        self.control(mode=mode or {}, faults=faults or [])

    def bodies(self) -> list[dict[str, Any]]:
        """The requests since the plan."""
        return self.control()["bodies"]

    def max_open(self) -> int:
        """At most so many requests were open at once since the plan."""
        return self.control()["max_open"]


@functools.cache
def shared() -> TinyServer:
    """One server for all tests of this process."""
    server = TinyServer()
    atexit.register(server.close)
    return server


if __name__ == "__main__":
    Handler.model = Model()
    serve(Handler)
