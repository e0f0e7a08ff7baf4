"""A served teacher that is the local one passes; each way of being another one is named."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("httpx")
pytest.importorskip("trl")

import tiny_server  # noqa: E402

from workbench.errors import EndpointError, InputError  # noqa: E402
from workbench.policies.lm.agreement import check_served_teacher  # noqa: E402
from workbench.policies.lm.endpoint import Endpoint  # noqa: E402
from workbench.policies.lm.probe import probe  # noqa: E402
from workbench.policies.lm.rollout import Rollout  # noqa: E402
from workbench.policies.lm.served import ServedModel  # noqa: E402

TOKENIZER, MODEL = tiny_server.make_served()
SAMPLE = [Rollout("a", [3, 4, 5], [6, 7, 8, 9, 1]), Rollout("b", [10], [11, 12]), Rollout("c", [10], [])]
PROMPTS = ["w1 w2 w3", [{"role": "user", "content": "w4 w5"}]]


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint(tiny_server.shared().url, "tiny", timeout_seconds=20) as found:
        yield found


def make_served(endpoint: Endpoint, **mode: Any) -> ServedModel:
    tiny_server.shared().plan(mode)
    return ServedModel(endpoint, TOKENIZER, probe(endpoint, TOKENIZER, text="w1 w2 w3", k=20))


def test_the_same_model_agrees(endpoint: Endpoint) -> None:
    found = check_served_teacher(MODEL, make_served(endpoint), SAMPLE, PROMPTS)
    assert found.max_delta_nats < 1e-4
    assert found.mean_delta_nats <= found.max_delta_nats
    assert (found.num_tokens, found.unchecked) == (7, ())


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ({"seed": 7}, r"log-probabilities differ by up to .* nats \(allowed: 0\.25"),
        ({"eos": 9}, r"a completion does not end at token 1 \('<eos>'\)"),
        ({"template": "{% for m in messages %}{{ m['content'] }} {% endfor %}w24"}, r"from position 2 on: there 'w24'"),
        ({"template": "w24 {% for m in messages %}{{ m['content'] }} {% endfor %}w25"}, r"from position 0 on"),
    ],
)
def test_another_model_is_refused(endpoint: Endpoint, mode: dict[str, Any], words: str) -> None:
    with pytest.raises(EndpointError, match=words) as caught:
        check_served_teacher(MODEL, make_served(endpoint, **mode), SAMPLE, PROMPTS)
    assert str(caught.value).count(";") == 0  # nothing else is said to differ
    assert "Serve the same folder" in str(caught.value)


def test_another_vocabulary_is_refused(endpoint: Endpoint) -> None:
    from tiny_models import make_model

    larger = make_model(TOKENIZER, tiny_server.SEED, hidden=tiny_server.HIDDEN, vocab_size=32)
    with pytest.raises(EndpointError, match="it predicts 29 words, here there are 32"):
        check_served_teacher(larger, make_served(endpoint), SAMPLE, PROMPTS)


def test_the_tolerance_is_the_callers(endpoint: Endpoint) -> None:
    """A small change of the weights passes a wide tolerance and not a narrow one."""
    from tiny_models import make_model

    near = make_model(TOKENIZER, tiny_server.SEED, hidden=tiny_server.HIDDEN)
    with torch.no_grad():
        near.lm_head.weight.add_(0.002 * torch.randn(near.lm_head.weight.shape, generator=torch.manual_seed(0)))
    served = make_served(endpoint)
    found = check_served_teacher(near, served, SAMPLE)
    assert 1e-4 < found.max_delta_nats < 0.25
    with pytest.raises(EndpointError, match="log-probabilities differ"):
        check_served_teacher(near, served, SAMPLE, tolerance_nats=found.max_delta_nats / 2)


def test_what_cannot_be_compared_is_named(endpoint: Endpoint) -> None:
    black = make_served(endpoint, extensions=False, ids=False, prompt_top_k=0, full=False, fixed_ids=False)
    found = check_served_teacher(MODEL, black, SAMPLE, PROMPTS)
    assert found.unchecked == ("vocabulary", "template", "log-probabilities")
    assert math.isnan(found.max_delta_nats)
    with pytest.raises(InputError, match="no completion tokens"):
        check_served_teacher(MODEL, black, SAMPLE[2:])
