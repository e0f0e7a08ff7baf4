"""Attention dispatch: every path against attention written with loops; refusals; memory; what the record says."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor

from workbench.errors import InputError
from workbench.kernels import attention as module
from workbench.kernels.attention import attention, explain
from workbench.kernels.attention_reference import reference_attention

PATHS = ("auto", "sdpa", "tiled", "reference")


def by_loops(q, k, v, *, causal=False, window=None, softcap=None, scale=None, padding=None, mask=None):
    """The definition, one weight after the other; shares nothing with the implementations."""
    q, k, v = q.detach(), k.detach(), v.detach()
    batch, heads, num_queries, width = q.shape
    key_heads, num_keys = k.shape[1:3]
    scale = 1 / math.sqrt(width) if scale is None else scale
    out = torch.zeros(batch, heads, num_queries, v.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // key_heads)
            for i in range(num_queries):
                position = i + num_keys - num_queries
                weights = {}
                for j in range(num_keys):
                    if causal and j > position:
                        continue
                    if window is not None and abs(position - j) >= window:
                        continue
                    if padding is not None and not padding[b, j]:
                        continue
                    if mask is not None and not mask[b % mask.shape[0], h % mask.shape[1], i, j]:
                        continue
                    score = scale * float(q[b, h, i] @ k[b, kv, j])
                    weights[j] = softcap * math.tanh(score / softcap) if softcap else score
                if weights:
                    top = max(weights.values())
                    total = sum(math.exp(s - top) for s in weights.values())
                    for j, s in weights.items():
                        out[b, h, i] += math.exp(s - top) / total * v[b, kv, j]
    return out


def inputs(seed, batch, key_heads, groups, num_queries, num_keys, width, value_width, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = (
        (groups * key_heads, num_queries, width),
        (key_heads, num_keys, width),
        (key_heads, num_keys, value_width),
    )
    return [torch.randn(batch, *shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


@st.composite
def calls(draw):
    size = st.integers(1, 13)
    batch, key_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    num_queries, num_keys = draw(size), draw(size)
    q, k, v = inputs(draw(st.integers(0, 99)), batch, key_heads, groups, num_queries, num_keys, draw(size), draw(size))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    options = {"causal": draw(st.booleans()), "window": draw(st.none() | st.integers(1, 14))}
    options["scale"] = draw(st.none() | st.floats(0.1, 2.0))
    padding = torch.rand(batch, num_keys, generator=g) > 0.4 if draw(st.booleans()) else None
    mask_heads = draw(st.sampled_from([1, groups * key_heads]))
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(draw(st.sampled_from([1, batch])), mask_heads, num_queries, num_keys, generator=g) > 0.3
    return (q, k, v), options, padding, mask


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40, deadline=None)
@given(call=calls(), softcap=st.none() | st.floats(0.5, 5.0))
def test_every_path_equals_the_loops(path, call, softcap):
    qkv, options, padding, mask = call
    softcap = None if path == "sdpa" else softcap
    found = attention(*qkv, **options, softcap=softcap, key_padding_mask=padding, mask=mask, implementation=path)
    expected = by_loops(*qkv, **options, softcap=softcap, padding=padding, mask=mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", ["sdpa", "tiled"])
@pytest.mark.parametrize(("causal", "num_queries"), [(True, 691), (False, 691), (True, 353)])
def test_long_sliding_windows_equal_the_reference(path, causal, num_queries):
    """Long enough for several bands (SDPA) and several tiles of queries and keys, with prime lengths."""
    q, k, v = (x.requires_grad_() for x in inputs(3, 2, 2, 2, num_queries, 691, 8, 8))
    padding = torch.rand(2, 691, generator=torch.Generator().manual_seed(1)) > 0.2
    distance = torch.arange(num_queries)[:, None] + 691 - num_queries - torch.arange(691)
    visible = (distance.abs() < 37) & padding[:, None, None]
    if causal:
        visible = visible & (distance >= 0)
    found = attention(q, k, v, causal=causal, window=37, key_padding_mask=padding, implementation=path)
    expected = reference_attention(q, k, v, visible=visible)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("path", ["sdpa", "tiled", "reference"])
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(path, causal):
    qkv = [x.requires_grad_() for x in inputs(0, 2, 1, 2, 3, 4, 2, 3)]
    padding = torch.tensor([[False] * 3 + [True], [True, False, True, True]])
    softcap = None if path == "sdpa" else 1.5

    def call(q, k, v):
        return attention(
            q, k, v, causal=causal, key_padding_mask=padding, softcap=softcap, window=3, implementation=path
        )

    assert torch.autograd.gradcheck(call, qkv)


@pytest.mark.parametrize("path", ["sdpa", "tiled", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_that_see_nothing_are_zero_with_zero_gradients(path, dtype):
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 2, 1, 6, 4, 8, 8, dtype))
    padding = torch.tensor([[True, False, True, True], [False] * 4])
    out = attention(q, k, v, causal=True, key_padding_mask=padding, implementation=path)
    assert torch.equal(out[:, :, :2], torch.zeros_like(out[:, :, :2]))  # positions -2 and -1: before the first key
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert out[0, :, 2:].abs().min() > 0
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert all(torch.equal(g[1], torch.zeros_like(g[1])) for g in grads)


@pytest.mark.parametrize("path", ["sdpa", "tiled", "reference"])
def test_extreme_scores_stay_finite(path):
    q, k, v = inputs(2, 1, 1, 1, 9, 11, 4, 4, torch.float32)
    q, k, v = (x.requires_grad_() for x in (q * 1e4, k, v))
    out = attention(q, k, v, causal=True, implementation=path)
    expected = by_loops(*(x.detach().double() for x in (q, k, v)), causal=True)
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("path", ["sdpa", "tiled", "reference"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 2e-6)])
def test_low_precision_is_near_the_float64_result(path, dtype, tolerance):
    qkv = inputs(4, 2, 2, 2, 37, 53, 24, 24, dtype)
    found = attention(*qkv, causal=True, implementation=path)
    assert found.dtype == dtype
    expected = reference_attention(
        *(x.double() for x in qkv), visible=torch.arange(53) <= torch.arange(37)[:, None] + 16
    )
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("path", ["sdpa", "tiled", "reference"])
@pytest.mark.parametrize("window", [None, 3])
def test_packed_sequences_are_the_sequences_one_by_one(path, window):
    q, k, v = (x.requires_grad_() for x in inputs(5, 1, 2, 2, 20, 24, 5, 6))
    starts_q, starts_k = [0, 1, 8, 8, 20], [0, 3, 9, 11, 24]
    packed = [torch.tensor(x, dtype=torch.int32) for x in (starts_q, starts_k)]
    found = attention(
        q, k, v, causal=True, window=window, cu_seqlens_q=packed[0], cu_seqlens_k=packed[1], implementation=path
    )
    spans = list(zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False))
    pieces = [by_loops(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], causal=True, window=window) for a, b, c, d in spans]
    torch.testing.assert_close(found, torch.cat(pieces, dim=2), rtol=0, atol=1e-12)
    assert torch.autograd.grad(found[:, :, :8].sum(), k)[0][:, :, 9:].abs().max() == 0


def test_causal_is_aligned_at_the_end():
    q, k, v = inputs(6, 1, 1, 1, 2, 5, 4, 4)
    out = attention(q, k, v, causal=True)
    torch.testing.assert_close(out[:, :, 1:], attention(q[:, :, 1:], k, v))
    torch.testing.assert_close(out[:, :, :1], attention(q[:, :, :1], k[:, :, :4], v[:, :, :4]))


@pytest.mark.parametrize("path", ["sdpa", "reference"])
def test_bias_is_added_to_the_scores(path):
    q, k, v = inputs(7, 2, 2, 2, 5, 6, 4, 4)
    bias = torch.randn(1, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    padding = torch.tensor([[True] * 6, [False, True] * 3])
    found = attention(q, k, v, bias=bias, key_padding_mask=padding, implementation=path)
    for b in range(2):
        scores = q[b] @ k[b].repeat_interleave(2, 0).transpose(1, 2) / 2 + bias[0]
        weights = scores.masked_fill(~padding[b], -torch.inf).softmax(-1)
        torch.testing.assert_close(found[b], weights @ v[b].repeat_interleave(2, 0))


@pytest.mark.parametrize("path", ["sdpa", "reference"])
def test_dropout_drops_and_keeps_the_mean(path):
    q, k, _ = inputs(8, 1, 1, 1, 64, 512, 4, 4)
    torch.manual_seed(0)
    out = attention(q, k, torch.ones(1, 1, 512, 1, dtype=torch.float64), dropout=0.5, implementation=path)
    assert out.std() > 0.01
    assert abs(out.mean() - 1) < 0.02


@pytest.mark.parametrize("shape", [(2, 4, 300, 1), (1, 1, 1, 300), (1, 4, 1, 1)])
@pytest.mark.parametrize("path", ["sdpa", "tiled"])
def test_a_mask_of_one_query_or_key_goes_with_a_long_window(path, shape):
    """It was cut along with the window's bands, and nothing of it was left from the second on."""
    qkv = inputs(4, 2, 2, 2, 300, 300, 3, 3)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    found = attention(*qkv, causal=True, window=5, mask=mask, implementation=path)
    expected = attention(*qkv, causal=True, window=5, mask=mask, implementation="reference")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_empty_lengths():
    q, k, v = inputs(0, 1, 1, 1, 3, 4, 2, 2)
    assert torch.equal(attention(q, k[:, :, :0], v[:, :, :0]), torch.zeros(1, 1, 3, 2, dtype=torch.float64))
    assert attention(q[:, :, :0], k, v, softcap=1.0).shape == (1, 1, 0, 2)


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("path", PATHS)
def test_an_empty_batch(path, num_queries):
    q, k, v = (x.requires_grad_() for x in inputs(0, 0, 2, 2, num_queries, 4, 2, 3))
    found = attention(q, k, v, causal=True, implementation=path)
    assert found.shape == (0, 4, num_queries, 3)
    found.sum().backward()
    assert q.grad is not None


def test_vmap_and_functional_gradients():
    """On the tiles; SDPA on a CPU has no batching rule, and PyTorch warns of the loop that it runs instead."""
    q, k, v = inputs(9, 6, 1, 2, 5, 7, 4, 4)

    def loss(q, k, v):
        return attention(q[None], k[None], v[None], causal=True, implementation="tiled").square().sum()

    grads = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(attention(*leaves, causal=True, implementation="reference").square().sum(), leaves)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def largest(**options) -> int:
    length = 1_543
    q, k, v = (x.requires_grad_() for x in inputs(0, 1, 1, 1, length, length, 16, 16, torch.float32))
    with LargestTensor() as seen:
        attention(q, k, v, **options).sum().backward()
    return seen.elements


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "implementation": "tiled"},
        {"softcap": 3.0},
        {"causal": True, "window": 64},
        {"causal": True, "cu_seqlens_q": torch.tensor([0, 500, 1400, 1543], dtype=torch.int32)},
        {"causal": True},
    ],
)
def test_no_tensor_of_queries_times_keys(options):
    assert largest(**options) < 1_543 * 1_543 / 8


def test_the_memory_test_sees_the_reference():
    assert largest(implementation="reference") >= 1_543 * 1_543


def test_the_record_says_which_path_and_why():
    q, k, v = inputs(0, 1, 1, 1, 3, 3, 4, 4)
    route = explain(q, k, v, causal=True)
    assert route.implementation == "sdpa"
    assert "flash_2 runs on CUDA only, not on cpu" in route.reason
    route = explain(q, k, v, softcap=2.0)
    assert route.implementation == "tiled"
    assert "sdpa has no soft-capping" in route.reason
    bias = torch.zeros(1, 1, 3, 3)
    assert explain(q, k, v, softcap=2.0, bias=bias).implementation == "reference"
    assert explain(q, k, v, implementation="tiled") == ("tiled", "it was asked for")


def test_each_combination_is_logged_once_and_the_fallback_as_a_warning(caplog, monkeypatch):
    monkeypatch.setattr(module, "_routes", {})
    q, k, v = inputs(0, 1, 1, 1, 3, 3, 4, 4)
    with caplog.at_level(logging.INFO, logger=module.__name__):
        for _ in range(3):
            attention(q, k, v, causal=True)
            attention(q, k, v, softcap=2.0, bias=torch.zeros(1, 1, 3, 3))
    assert [(r.levelname, r.args[0]) for r in caplog.records] == [("INFO", "sdpa"), ("WARNING", "reference")]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch.compile itself
@pytest.mark.parametrize("options", [{"causal": True}, {"softcap": 2.0}, {"window": 2}])
def test_compiles_into_one_graph(options):
    qkv = inputs(0, 1, 2, 2, 6, 6, 4, 4)
    compiled = torch.compile(lambda *x: attention(*x, **options), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*qkv), attention(*qkv, **options))


X = torch.zeros(2, 4, 3, 8)
STARTS = torch.tensor([0, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    ("qkv", "options", "message"),
    [
        ((X[0], X, X), {}, "must be"),
        ((X, X[:, :3], X[:, :3]), {}, "3 key heads do not divide 4 query heads"),
        ((X, X, X[:, :, :2]), {}, "differ in length"),
        ((X, X[..., :4], X), {}, "width"),
        ((X, X.double(), X), {}, "torch.float64 on cpu"),
        ((X.int(), X.int(), X.int()), {}, "torch.int32"),
        ((X, X, X), {"window": 0}, "window=0"),
        ((X, X, X), {"softcap": -1.0}, "softcap=-1.0"),
        ((X, X, X), {"dropout": 1.0}, "dropout=1.0"),
        ((X, X, X), {"key_padding_mask": torch.ones(2, 3)}, "key_padding_mask must be bool"),
        ((X, X, X), {"mask": torch.ones(2, 3, 3, 3, dtype=torch.bool)}, "does not broadcast"),
        ((X, X, X), {"mask": torch.zeros(1, 1, 3, 3)}, "add it as bias"),
        ((X, X, X), {"cu_seqlens_q": STARTS}, "batch 1"),
        ((X[:1], X[:1], X[:1]), {"cu_seqlens_q": STARTS.long()}, "int32"),
        ((X[:1], X[:1], X[:1]), {"cu_seqlens_q": STARTS - 1}, "must rise from 0 to 3"),
        ((X[:1], X[:1], X[:1]), {"cu_seqlens_k": STARTS}, "without cu_seqlens_q"),
        ((X[:1], X[:1], X[:1]), {"cu_seqlens_q": STARTS, "mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}, "take no"),
        ((X, X, X), {"implementation": "fast"}, "implementation='fast'"),
        ((X, X, X), {"implementation": "flash_2"}, "runs on CUDA only"),
        ((X, X, X), {"implementation": "sdpa", "softcap": 1.0}, "has no soft-capping"),
        ((X, X, X), {"implementation": "tiled", "dropout": 0.1}, "has no dropout"),
        ((X, X, X), {"implementation": "tiled", "bias": torch.zeros(1, 1, 3, 3)}, "takes no bias"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_value(qkv, options, message):
    with pytest.raises(InputError, match=message):
        attention(*qkv, **options)
