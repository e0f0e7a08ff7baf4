"""A served model over real HTTP: what it can do is found out, what it writes and scores is what a local one does."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from threading import Event, Thread
from threading import enumerate as enumerate_threads
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("httpx")
pytest.importorskip("trl")

import tiny_server  # noqa: E402

from workbench.errors import EndpointError, InputError  # noqa: E402
from workbench.policies.lm.endpoint import Endpoint, Refused  # noqa: E402
from workbench.policies.lm.episodes import encode, generate, roll_out  # noqa: E402
from workbench.policies.lm.probe import Capabilities, probe  # noqa: E402
from workbench.policies.lm.scoring import LocalTeacher  # noqa: E402
from workbench.policies.lm.served import ServedModel  # noqa: E402
from workbench.policies.tasks import Task  # noqa: E402

TOKENIZER, MODEL = tiny_server.make_served()
TASKS = [Task(f"t{i}", {"prompt": f"w{i} w{5 * i % 26} w3"}) for i in range(6)]
CHAT = Task("chat", {"prompt": [{"role": "user", "content": "w1 w2"}]})
PROMPTS, COMPLETIONS = [[3, 4, 5], [9], [6, 7]], [[8, 9, 10, 11], [12, 1], []]
IDS = [TOKENIZER(task.prompts["prompt"])["input_ids"] for task in TASKS]


@pytest.fixture
def server() -> tiny_server.TinyServer:
    found = tiny_server.shared()
    found.plan()
    return found


@pytest.fixture
def endpoint(server: tiny_server.TinyServer) -> Iterator[Endpoint]:
    with Endpoint(server.url, "tiny", timeout_seconds=20, max_wait_seconds=0.05) as found:
        yield found


def make_served(server: tiny_server.TinyServer, endpoint: Endpoint, **mode: Any) -> ServedModel:
    server.plan(mode)
    return ServedModel(endpoint, TOKENIZER, probe(endpoint, TOKENIZER, text="w1 w2 w3", k=20))


def logprobs_of(ids: list[int], completion: list[int], temperature: float = 1.0) -> Any:
    """Rows [T, V] that predict the completion."""
    with torch.no_grad():
        logits = MODEL(input_ids=torch.tensor([ids + completion])).logits[0, len(ids) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


BLACK_BOX = {"extensions": False, "ids": False, "full": False, "fixed_ids": False, "prompt_top_k": 0}


@pytest.mark.parametrize(
    ("mode", "level"),
    [
        ({}, "full"),
        ({"full": False}, "fixed ids"),
        ({"full": False, "fixed_ids": False}, "prompt top-k"),
        (BLACK_BOX, "generated top-k"),
        (BLACK_BOX | {"extensions": "silent", "ids": True}, "generated top-k"),
        (BLACK_BOX | {"completions": False}, "generated top-k"),
        (BLACK_BOX | {"generated_top_k": 0}, "text"),
    ],
)
def test_the_level_is_found_by_asking(server: Any, endpoint: Endpoint, mode: dict[str, Any], level: str) -> None:
    served = make_served(server, endpoint, **mode)
    assert served.capabilities.level == level
    assert len(server.bodies()) <= 20


def test_the_probe_finds_what_the_server_is(server: Any, endpoint: Endpoint) -> None:
    assert make_served(server, endpoint).capabilities == Capabilities(
        has_completions=True, has_chat=True, has_extensions=True, accepts_ids=True, returns_ids=True,
        generated_top_k=20, prompt_top_k=20, has_fixed_ids=True, vocabulary=29, generated_temperature="ignored",
        prompt_temperature="ignored", ends_with_eos=True,
    )  # fmt: skip
    capped = make_served(
        server, endpoint, generated_top_k=5, prompt_top_k=7, full=False, temperature="honours", eos_in_ids=False
    ).capabilities
    assert (capped.generated_top_k, capped.prompt_top_k, capped.vocabulary) == (5, 5, None)
    assert capped.prompt_temperature == "honoured"
    assert capped.ends_with_eos is False
    black = make_served(server, endpoint, **BLACK_BOX).capabilities
    assert {black.has_extensions, black.accepts_ids, black.returns_ids} == {False}
    assert black.ends_with_eos is None


def test_what_answers_nothing_is_no_server(server: Any, endpoint: Endpoint) -> None:
    server.plan({"completions": False, "chat": False})
    with pytest.raises(EndpointError, match="neither completes text nor chats"):
        probe(endpoint, TOKENIZER)
    server.plan()
    with Endpoint(server.url, "other") as other, pytest.raises(EndpointError, match="no model other"):
        probe(other, TOKENIZER)


def test_scores_are_those_of_the_local_model(server: Any, endpoint: Endpoint) -> None:
    served = make_served(server, endpoint)
    there, here = served.top_k(PROMPTS, COMPLETIONS, 8), LocalTeacher(MODEL).top_k(PROMPTS, COMPLETIONS, 8)
    for one, other, completion in zip(there, here, COMPLETIONS, strict=True):
        assert one.ids.shape == (len(completion), 8)
        assert (one.ids == other.ids).all()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_a_temperature_that_is_ignored_is_refused(server: Any, endpoint: Endpoint) -> None:
    """The same request is right where the server heeds it."""
    ignoring = make_served(server, endpoint)
    before = len(server.bodies())
    with pytest.raises(InputError, match="ignores the temperature"):
        ignoring.top_k(PROMPTS, COMPLETIONS, 5, temperature=2.0)
    assert len(server.bodies()) == before
    heeding = make_served(server, endpoint, temperature="honours")
    for temperature in (1.0, 2.0):
        scores = heeding.top_k(PROMPTS[:1], COMPLETIONS[:1], 5, temperature=temperature)[0]
        expected = logprobs_of(PROMPTS[0], COMPLETIONS[0], temperature).topk(5)
        np.testing.assert_allclose(scores.logprobs, expected.values.numpy(), atol=1e-4)


def test_more_words_than_the_server_gives_are_refused(server: Any, endpoint: Endpoint) -> None:
    served = make_served(server, endpoint, prompt_top_k=5)
    with pytest.raises(InputError, match="lists 5 words for a token of a prompt; asked was for 6"):
        served.top_k(PROMPTS, COMPLETIONS, 6)
    assert served.top_k(PROMPTS, COMPLETIONS, 5)[0].ids.shape == (4, 5)
    black = make_served(server, endpoint, **BLACK_BOX)
    with pytest.raises(InputError, match="takes no token ids"):
        black.top_k(PROMPTS, COMPLETIONS, 1)
    with pytest.raises(InputError, match="takes no token ids"):
        black.writer()
    with pytest.raises(InputError, match="by their text and not by id"):
        black.roll_out(TASKS, k=3)


def test_scores_of_other_tokens_are_refused(server: Any, endpoint: Endpoint) -> None:
    """A server that puts a token in front of every prompt scores each token in the place of its neighbour."""
    capabilities = make_served(server, endpoint).capabilities
    server.plan({"shift": True})
    with pytest.raises(EndpointError, match=r"3 \+ 4 tokens and described 8"):
        ServedModel(endpoint, TOKENIZER, capabilities).top_k(PROMPTS, COMPLETIONS, 5)


def test_rollouts_have_ids_and_logprobs(server: Any, endpoint: Endpoint) -> None:
    """Greedy rollouts are those of the local model; log-probabilities and top-k are the model's at each token."""
    served = make_served(server, endpoint)
    rollouts = served.roll_out(TASKS, max_tokens=12, temperature=0)
    assert [r.completion_ids for r in rollouts] == generate(MODEL, TOKENIZER, IDS, 12, 0)
    assert [(r.task_id, r.prompt_ids) for r in rollouts] == [(t.id, i) for t, i in zip(TASKS, IDS, strict=True)]
    for rollout in served.roll_out(TASKS, max_tokens=12, k=4, seed=3):
        rows = logprobs_of(rollout.prompt_ids, rollout.completion_ids)
        expected = rows.gather(-1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]
        assert rollout.logprobs is not None
        assert rollout.scores is not None
        np.testing.assert_allclose(rollout.logprobs, expected.numpy(), atol=1e-4)
        np.testing.assert_allclose(rollout.scores.logprobs, rows.topk(4).values.numpy(), atol=1e-4)
        assert (rollout.scores.ids == rows.topk(4).indices.numpy()).all()
        assert rollout.meta["ids"] == "served"


def test_samples_of_a_task_follow_one_another(server: Any, endpoint: Endpoint) -> None:
    served = make_served(server, endpoint)
    rollouts = served.roll_out(TASKS[:2], num_samples=3, max_tokens=8, seed=0)
    assert [r.task_id for r in rollouts] == ["t0"] * 3 + ["t1"] * 3
    assert len({tuple(r.completion_ids) for r in rollouts[:3]}) > 1
    again = served.roll_out(TASKS[:2], num_samples=3, max_tokens=8, seed=0)
    assert [r.completion_ids for r in again] == [r.completion_ids for r in rollouts]


@pytest.mark.parametrize("mode", [BLACK_BOX, BLACK_BOX | {"completions": False}])
def test_a_text_only_server_is_read_by_the_tokenizer(server: Any, endpoint: Endpoint, mode: dict[str, Any]) -> None:
    """The text is encoded, the end appended where the server stopped, and the rollout says so; no logprobs."""
    served = make_served(server, endpoint, **mode)
    rollouts = served.roll_out(TASKS, max_tokens=40, seed=5)
    assert {r.meta["ids"] for r in rollouts} == {"encoded"}
    assert all(r.logprobs is None and r.scores is None for r in rollouts)
    ended = [r for r in rollouts if r.meta["eos"] == "appended"]
    assert ended
    assert all((r.completion_ids[-1] == 1) == (r in ended) for r in rollouts)
    assert served.sampling(40, 1.0)["token_ids"] == "encoded"


def test_an_end_that_the_server_keeps_back_is_appended(server: Any, endpoint: Endpoint) -> None:
    """With ids but without the end: the completion is the local one; what is known of its tokens would not fit."""
    served = make_served(server, endpoint, eos_in_ids=False)
    rollouts = served.roll_out(TASKS, max_tokens=60, seed=5, k=2)
    ended = [r for r in rollouts if r.meta["eos"] == "appended"]
    assert ended
    assert all(r.completion_ids[-1] == 1 and r.logprobs is None and r.scores is None for r in ended)
    whole = make_served(server, endpoint).roll_out(TASKS, max_tokens=60, seed=5)
    assert [r.completion_ids for r in whole] == [r.completion_ids for r in rollouts]


def test_scores_that_follow_the_temperature_are_refused(server: Any, endpoint: Endpoint) -> None:
    """Raw log-probabilities are at temperature 1 whatever was sampled at; others only at 1."""
    served = make_served(server, endpoint)
    assert served.roll_out(TASKS[:1], max_tokens=4, temperature=0.7, k=2)[0].meta["logprobs_temperature"] == 1.0
    heeding = Capabilities(accepts_ids=True, returns_ids=True, generated_top_k=5, generated_temperature="honoured")
    with pytest.raises(InputError, match=r"kept at temperature 1.*\(0\.7\)"):
        ServedModel(endpoint, TOKENIZER, heeding).roll_out(TASKS[:1], temperature=0.7, k=2)


def test_chats_are_sent_as_ids_or_as_messages(server: Any, endpoint: Endpoint) -> None:
    ids = encode(TOKENIZER, CHAT.prompts["prompt"])
    expected = generate(MODEL, TOKENIZER, [ids], 6, 0)
    for mode in ({}, {"ids": False}):
        rollout = make_served(server, endpoint, **mode).roll_out([CHAT], max_tokens=6, temperature=0)[0]
        assert (rollout.prompt_ids, [rollout.completion_ids]) == (ids, expected)
        assert ("messages" in server.bodies()[-1]) == ("ids" in mode)


def test_a_served_policy_plays_episodes(server: Any, endpoint: Endpoint) -> None:
    """The environment's words enter between the turns, as for a local policy."""

    class Echo:
        max_turns, max_turn_tokens = 3, 2

        def reset(self, task: Task) -> list[str]:
            return []

        def step(self, state: list[str], said: str) -> tuple[str, bool]:
            state.append(said)
            return "w9", False

        def reward(self, state: list[str]) -> float:
            return float(len(state))

    served = make_served(server, endpoint)
    found = roll_out(served.writer(0), TOKENIZER, TASKS[:2], IDS[:2], 20, Echo())

    def local(ids: Any, most: int) -> list[list[int]]:
        return generate(MODEL, TOKENIZER, ids, most, 0)

    assert found == roll_out(local, TOKENIZER, TASKS[:2], IDS[:2], 20, Echo())
    assert 0 in (found[0].mask or [])


# -- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["429:0", "429", "500", "html", "cut", "hang:2"])
def test_a_fault_that_passes_changes_nothing(server: Any, fault: str) -> None:
    server.plan()
    with Endpoint(server.url, "tiny", timeout_seconds=1.5, max_wait_seconds=0.6) as endpoint:
        expected = endpoint.post("/completions", {"prompt": [3, 4], "max_tokens": 1, "seed": 1})
        server.plan(faults=[fault])
        assert endpoint.post("/completions", {"prompt": [3, 4], "max_tokens": 1, "seed": 1}) == expected
        assert len(server.bodies()) == 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("500", r"answered 500: .*\(3 requests\)\. Look at the server's log"),
        ("429:30", "asks to wait 30 s.*lower the concurrency"),
        ("html", r"answered 200 with what is no JSON object: '<html>"),
        ("cut", r"the connection to .* broke \(RemoteProtocolError\)"),
    ],
)
def test_a_fault_that_lasts_says_what_to_do(server: Any, fault: str, words: str) -> None:
    server.plan(faults=[fault] * 3)
    with (
        Endpoint(server.url, "tiny", max_retries=2, max_wait_seconds=0.01) as endpoint,
        pytest.raises(EndpointError, match=words),
    ):
        endpoint.post("/completions", {"prompt": [3]})


def test_a_hanging_server_is_left(server: Any) -> None:
    server.plan(faults=["hang:0.5"])
    with (
        Endpoint(server.url, "tiny", max_retries=0, timeout_seconds=0.2) as endpoint,
        pytest.raises(EndpointError, match=r"no answer within 0\.2 s.*longer timeout_seconds"),
    ):
        endpoint.post("/completions", {"prompt": [3]})


def test_interrupting_waits_for_no_request() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with Endpoint(url, "tiny", timeout_seconds=5, max_retries=0, concurrency=2) as endpoint:

            def interrupt() -> None:
                with silent.accept()[0], silent.accept()[0]:  # both requests are open
                    os.kill(os.getpid(), signal.SIGINT)
                    is_checked.wait()

            is_checked = Event()
            Thread(target=interrupt).start()
            with pytest.raises(KeyboardInterrupt):
                endpoint.map("/completions", [{"prompt": [3]}] * 4)
            assert len([t for t in enumerate_threads() if t.name == "request"]) == 2, "nobody waited for them"
            is_checked.set()


def test_an_answer_that_is_built_wrongly_is_no_traceback(server: Any, endpoint: Endpoint) -> None:
    capabilities = make_served(server, endpoint).capabilities
    server.plan(faults=["list"])
    with pytest.raises(EndpointError, match="not built as OpenAI's API says"):
        ServedModel(endpoint, TOKENIZER, capabilities).roll_out(TASKS[:1])


def test_what_is_refused_is_not_asked_again(server: Any, endpoint: Endpoint) -> None:
    with pytest.raises(Refused, match="maximum context length is 128"):
        endpoint.post("/completions", {"prompt": [3] * 127, "max_tokens": 9})
    assert len(server.bodies()) == 1


def test_the_key_is_sent_and_never_shown(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server repeats the header in its error."""
    monkeypatch.setenv("TINY_KEY", "sk-very-secret")
    server.plan(faults=["401"])
    with Endpoint(server.url, "tiny", api_key_env="TINY_KEY") as endpoint, pytest.raises(Refused) as caught:
        endpoint.post("/completions", {"prompt": [3]})
    assert "Bearer [REDACTED:api-key]" in str(caught.value)
    assert "secret" not in str(caught.value)
    monkeypatch.delenv("TINY_KEY")
    with (
        Endpoint(server.url, "tiny", api_key_env="TINY_KEY") as endpoint,
        pytest.raises(EndpointError, match=r"TINY_KEY .*is not set"),
    ):
        endpoint.post("/completions", {"prompt": [3]})


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with Endpoint(url, "tiny") as endpoint, pytest.raises(EndpointError, match="Start the server"):
            endpoint.post("/completions", {"prompt": [3]})


def test_requests_are_bounded_and_in_order(server: Any) -> None:
    bodies = [{"prompt": [3 + i], "max_tokens": 1, "return_token_ids": True} for i in range(12)]
    with Endpoint(server.url, "tiny", concurrency=3) as endpoint:
        answers = endpoint.map("/completions", bodies)
        assert [a["choices"][0]["prompt_token_ids"] for a in answers] == [body["prompt"] for body in bodies]
        assert 1 < server.max_open() <= 3
        server.plan(faults=["400"])
        with pytest.raises(Refused, match="fault 400"):
            endpoint.map("/completions", [{**body, "max_tokens": 40} for body in bodies])
        assert len(server.bodies()) < 12  # the rest was not begun


@pytest.mark.parametrize("url", ["", "ftp://a/v1", "http://user:word@host/v1", "localhost:8000/v1"])
def test_no_address(url: str) -> None:
    with pytest.raises(InputError):
        Endpoint(url, "tiny")


def test_a_writers_requests_have_seeds_in_order(server: Any, endpoint: Endpoint) -> None:
    """The same seed writes the same, another one something else; without one none is sent."""
    served = make_served(server, endpoint)
    before = len(server.bodies())
    write = served.writer(1.0, seed=7)
    first = [*write(IDS[:2], 8), *write(IDS[:2], 8)]
    sent = [body["seed"] for body in server.bodies()[before:]]
    assert sorted(sent) == [7, 8, 9, 10]
    again = served.writer(1.0, seed=7)
    assert [*again(IDS[:2], 8), *again(IDS[:2], 8)] == first
    assert served.writer(1.0, seed=99)(IDS[:2], 8) != first[:2]
    before = len(server.bodies())
    served.writer(1.0)(IDS[:1], 8)
    assert "seed" not in server.bodies()[before]
