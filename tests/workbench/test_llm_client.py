"""The chat client against a real server process, with every fault that the server knows."""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any

import pytest
from fake_llm_server import FakeServer

from workbench.errors import EndpointError, InputError, MissingExtra
from workbench.llm_client import ChatReply, OpenAIChat, estimate_tokens

SCHEMA = {"type": "object", "properties": {"exchange_core": {"type": "string"}}}
MESSAGES = [{"role": "user", "content": "BEGIN LOG a user\nfixed bug 17 in a/b.py\nEND LOG a user"}]
KEY = "made-up-key-4711-abcdef"


def ask(server: Any, num: int = 1, **options: Any) -> list[ChatReply]:
    """Asks `num` times with one client."""

    async def run() -> list[ChatReply]:
        defaults = {"max_wait_seconds": 1.0, "timeout_seconds": 10.0}
        client = OpenAIChat(server.url, "tiny", **(defaults | options))
        try:
            return [await client.complete(MESSAGES, SCHEMA) for _ in range(num)]
        finally:
            await client.aclose()

    return asyncio.run(run())


def faults(server: Any, *names: Any, refuse: tuple[str, ...] = ()) -> None:
    server.plan([{"match": "", "faults": list(names)}], refuse=list(refuse))


def test_answer_and_usage(server: Any) -> None:
    faults(server)
    (reply,) = ask(server)
    assert "fixed bug 17" in reply.text
    assert (reply.tokens_in, reply.tokens_out, reply.is_estimated, reply.num_requests) == (100, 20, False, 1)
    (body,) = server.bodies()
    assert body["response_format"]["json_schema"]["schema"] == SCHEMA
    assert body["max_tokens"] == 600
    assert body["temperature"] == 0.0
    assert b"authorization" not in server.received().lower()


@pytest.mark.parametrize(
    "names",
    [["429:0.05"], ["500"], ["503", "502"], ["reset"], ["reset", "529:0", "408"], ["hang:0.05"],
     ["429:Thu, 01 Jan 1970 00:00:00 GMT"]],
    ids=lambda n: "+".join(n),
)  # fmt: skip
def test_passing_faults_are_retried(server: Any, names: list[str]) -> None:
    faults(server, *names)
    (reply,) = ask(server)
    assert reply.failure == ""
    assert "fixed bug 17" in reply.text
    assert reply.num_requests == len(names) + 1 == len(server.bodies())


def test_timeout_is_retried_then_reported(server: Any) -> None:
    faults(server, "slow:20", "slow:20")
    (reply,) = ask(server, timeout_seconds=0.3, max_retries=1)
    assert "no answer within 0.3 s" in reply.failure
    assert reply.num_requests == 2


def test_lasting_fault_ends_after_the_retries(server: Any) -> None:
    faults(server, *["500"] * 9)
    (reply,) = ask(server, max_retries=2, max_wait_seconds=0.05)
    assert "answered 500" in reply.failure
    assert "fault 500" in reply.failure
    assert len(server.bodies()) == 3


def test_a_wait_that_is_too_long_is_no_wait(server: Any) -> None:
    faults(server, "429:3600")
    (reply,) = ask(server)
    assert "429" in reply.failure
    assert "asks to wait 3600 s" in reply.failure
    assert len(server.bodies()) == 1


def test_refused_formats_are_learnt_once(server: Any) -> None:
    faults(server, refuse=("json_schema",))
    replies = ask(server, num=3)
    assert [r.failure for r in replies] == ["", "", ""]
    sent = [b.get("response_format", {}).get("type") for b in server.bodies()]
    assert sent == ["json_schema", "json_object", "json_object", "json_object"]


def test_all_refusals_together_end_in_plain_prompting(server: Any) -> None:
    faults(server, refuse=("json_schema", "json_object", "max_tokens", "temperature"))
    replies = ask(server, num=2)
    assert [r.failure for r in replies] == ["", ""]
    last = server.bodies()[-1]
    assert "response_format" not in last
    assert "temperature" not in last
    assert last["max_completion_tokens"] == 600
    assert len(server.bodies()) == 4 + 2


@pytest.mark.parametrize("name", ["no_usage", "odd_usage"])
def test_usage_that_is_missing_or_impossible_is_estimated_and_marked(server: Any, name: str) -> None:
    faults(server, name)
    (reply,) = ask(server)
    assert reply.is_estimated
    assert reply.tokens_in == estimate_tokens(len(MESSAGES[0]["content"]))
    assert reply.tokens_out == estimate_tokens(len(reply.text))


@pytest.mark.parametrize(
    ("name", "words"),
    [("refusal", "refused: I cannot"), ("not_http_json", "no chat completion"), ("no_choices", "no chat completion"),
     ("deep", "no chat completion"), ("flood", "more than 4 MB"), ("error_in_200", "the model is overloaded"),
     ("empty", "empty"), ("413", "answered 413"), ("400", "answered 400")],
)  # fmt: skip
def test_answers_without_words_fail_alone(server: Any, name: str, words: str) -> None:
    faults(server, name)
    first, second = ask(server, num=2)
    assert words in first.failure
    assert first.text == ""
    assert second.failure == ""


def test_half_a_character_is_no_text(server: Any) -> None:
    faults(server, "half_character")
    assert ask(server)[0].text == "asks ?"


def test_truncated_answer_is_marked(server: Any) -> None:
    faults(server, "truncated")
    assert ask(server)[0].is_cut


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("401", "API key"),
        ("403", "may not use"),
        ("404", "no model 'tiny'"),
        ("301", "redirects"),
        ("quota", "no quota"),
    ],
)
def test_what_no_retry_can_help_is_an_endpoint_error(server: Any, name: str, words: str) -> None:
    faults(server, name, "ok")
    with pytest.raises(EndpointError, match=words):
        ask(server)
    assert len(server.bodies()) == 1


def test_key_is_sent_but_never_shown_or_stored(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WB_TEST_KEY", KEY + "\n")
    faults(server, "500", "401")
    with pytest.raises(EndpointError, match="WB_TEST_KEY") as caught:
        ask(server, api_key_env="WB_TEST_KEY", max_wait_seconds=0.05)
    assert f"Bearer {KEY}".encode() in server.received()
    assert "[REDACTED:api-key]" in str(caught.value)
    assert KEY not in str(caught.value)
    client = OpenAIChat(server.url, "tiny", api_key_env="WB_TEST_KEY")
    assert KEY not in repr(vars(client))


@pytest.mark.parametrize("value", ["", "  ", "two words", "schlüssel", "a\x00b"])
def test_unusable_keys_are_named_by_their_variable(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "\x00" in value:
        monkeypatch.setattr("os.environ", {"WB_TEST_KEY": value})
    else:
        monkeypatch.setenv("WB_TEST_KEY", value)
    with pytest.raises(EndpointError, match="WB_TEST_KEY") as caught:
        OpenAIChat("http://127.0.0.1:1/v1", "tiny", api_key_env="WB_TEST_KEY")
    if value.strip():
        assert value not in str(caught.value)


def test_nothing_listens() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}/v1"

    async def run() -> None:
        client = OpenAIChat(url, "tiny")
        try:
            await client.complete(MESSAGES, SCHEMA)
        finally:
            await client.aclose()

    with pytest.raises(EndpointError, match=r"Cannot connect to http://127\.0\.0\.1") as caught:
        asyncio.run(run())
    assert caught.value.exit_code == 6


def test_server_that_goes_away_is_an_endpoint_error() -> None:
    async def run() -> None:
        with FakeServer() as gone:
            client = OpenAIChat(gone.url, "tiny", max_retries=1, max_wait_seconds=0.05)
            assert (await client.complete(MESSAGES, SCHEMA)).failure == ""
        try:
            await client.complete(MESSAGES, SCHEMA)
        finally:
            await client.aclose()

    with pytest.raises(EndpointError, match="cannot connect"):
        asyncio.run(run())


@pytest.mark.parametrize(
    ("url", "model", "error", "words"),
    [
        (None, "m", EndpointError, "base URL"),
        ("", "m", EndpointError, "base URL"),
        ("http://127.0.0.1/v1", None, EndpointError, "No model"),
        ("127.0.0.1:8000", "m", InputError, "no http"),
        ("ftp://127.0.0.1", "m", InputError, "no http"),
        ("http://[::1", "m", InputError, "look at its host and port"),
        ("http://localhost:99999/v1", "m", InputError, "look at its host and port"),
        ("http://user:pw@127.0.0.1/v1", "m", InputError, "environment variable"),
        ("http://127.0.0.1:8o00/v1", "m", InputError, "no http"),
        ("http://[::1/v1", "m", InputError, "no http"),
        ("http://127.0.0.1/v1\nx", "m", InputError, "no http"),
    ],
)
def test_what_is_not_set_is_said(url: str | None, model: str | None, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        OpenAIChat(url, model)
    assert "pw@" not in str(caught.value)


def test_base_url_with_the_path_is_understood() -> None:
    assert OpenAIChat("http://127.0.0.1:8/v1/chat/completions/", "m").endpoint == "http://127.0.0.1:8/v1"


def test_proxies_do_not_come_between_us_and_this_machine(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    faults(server)
    assert ask(server)[0].failure == ""


def test_missing_httpx_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(MissingExtra, match=r"\[llm\]"):
        OpenAIChat("http://127.0.0.1/v1", "m")
