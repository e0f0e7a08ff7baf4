"""Cases for the Triton kernel of attention with tangents; `test_attention_jvp_triton.py` runs them.

Not collected by themselves: Triton decides at its first import, anywhere in the process, whether to interpret kernels.
"""

from __future__ import annotations

import pytest
import torch

from workbench.kernels import attention_jvp_triton
from workbench.kernels.attention_jvp import attention_with_tangent
from workbench.kernels.attention_tiles import TileOptions, forward_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [
    # batch, key heads, groups, queries, keys, width, value width, causal
    (1, 1, 1, 1, 1, 1, 1, False),
    (2, 2, 2, 70, 70, 32, 32, True),
    (1, 1, 3, 131, 67, 20, 24, False),
    (1, 2, 1, 13, 97, 64, 64, True),
    (1, 1, 1, 97, 13, 16, 16, True),  # the first 84 queries see nothing
    (1, 1, 1, 40, 33, 128, 72, False),
]


def inputs(batch, key_heads, groups, num_queries, num_keys, width, value_width, dtype):
    g = torch.Generator().manual_seed(0)
    queries = (batch, groups * key_heads, num_queries, width)
    keys, values = (batch, key_heads, num_keys, width), (batch, key_heads, num_keys, value_width)
    return [torch.randn(s, generator=g).to(DEVICE, dtype) for s in (queries, keys, values) * 2]


def compare(tensors, causal: bool, tolerance: float) -> None:
    options = TileOptions(0.3, causal, None, None, 64, 64)
    found = attention_jvp_triton.forward(*tensors, options.scale, causal)
    double = [None if x is None else x.double() for x in tensors]
    for a, b in zip(found, forward_tiles(*double, None, None, options), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.float16, 1e-2)])
def test_equals_the_tiles_in_float64(shape, dtype, tolerance):
    compare(inputs(*shape[:-1], dtype), shape[-1], tolerance)


@pytest.mark.parametrize("given", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
def test_missing_tangents_are_zero(given):
    tensors = inputs(1, 1, 2, 37, 41, 16, 16, torch.float32)
    compare([*tensors[:3], *(t if there else None for t, there in zip(tensors[3:], given, strict=True))], True, 1e-5)


def test_extreme_scores_stay_finite():
    q, k, v, tq, tk, tv = inputs(1, 1, 1, 33, 35, 16, 16, torch.float32)
    found = attention_jvp_triton.forward(1e4 * q, k, v, 1e4 * tq, tk, tv, 0.25, False)
    assert all(x.isfinite().all() for x in found)


def test_the_kernel_takes_what_it_serves_and_leaves_the_rest():
    plain = TileOptions(1.0, True, None, None, 64, 64)
    narrow, wide = torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 1, 200)
    supports = attention_jvp_triton.supports
    assert supports(narrow, narrow, plain)
    assert supports(wide.half(), wide.half(), plain)
    assert not supports(wide, wide, plain)
    assert not supports(narrow.double(), narrow.double(), plain)
    assert not supports(narrow, narrow, plain._replace(window=4))
    assert not supports(narrow, narrow, plain._replace(softcap=4.0))


def test_smaller_devices_get_smaller_tiles():
    launch = attention_jvp_triton.launch
    large, small = (launch(torch.float16, 128, shared) for shared in (232_448, 101_376))
    assert large is not None
    assert small is not None
    assert large.queries * large.keys > small.queries * small.keys
    assert launch(torch.float32, 64, 101_376) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("causal", [False, True])
def test_on_a_gpu_the_public_function_takes_the_kernel_and_trains(causal, monkeypatch):
    calls = []
    inner = attention_jvp_triton.forward
    monkeypatch.setattr(attention_jvp_triton, "forward", lambda *a: calls.append(1) or inner(*a))
    tensors = [x.requires_grad_() for x in inputs(2, 2, 2, 300, 300, 64, 64, torch.bfloat16)]
    double = [x.detach().double().requires_grad_() for x in tensors]
    found, expected = (attention_with_tangent(*x, causal=causal) for x in (tensors, double))
    assert calls == [1]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=0.1)
    grads = [torch.autograd.grad(a.sum() + (a * b).sum(), x) for (a, b), x in ((found, tensors), (expected, double))]
    for a, b in zip(*grads, strict=True):
        assert (a.double() - b).norm() < 0.03 * b.norm()
