"""Attention with its forward-mode derivative: against the math path, finite differences and known identities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from torch.autograd import forward_ad

from workbench.errors import InputError
from workbench.kernels import attention_jvp
from workbench.kernels.attention import attention, explain
from workbench.kernels.attention_jvp import attention_with_tangent
from workbench.kernels.attention_reference import reference_attention

# PyTorch's forward mode compiles its decompositions by torch.jit.script, and warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles both ways at test sizes."""
    monkeypatch.setattr(attention_jvp, "TILE_QUERIES", 5)
    monkeypatch.setattr(attention_jvp, "TILE_KEYS", 3)


def normal(seed, *shapes, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def inputs(seed, batch, key_heads, groups, num_queries, num_keys, width, value_width, dtype=torch.float64):
    """q, k, v and their tangents."""
    queries = (batch, groups * key_heads, num_queries, width)
    keys, values = (batch, key_heads, num_keys, width), (batch, key_heads, num_keys, value_width)
    return normal(seed, *(queries, keys, values) * 2, dtype=dtype)


@st.composite
def calls(draw):
    size = st.integers(1, 13)
    batch, key_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    num_queries, num_keys = draw(size), draw(size)
    tensors = inputs(draw(st.integers(0, 99)), batch, key_heads, groups, num_queries, num_keys, draw(size), draw(size))
    options = {"causal": draw(st.booleans()), "window": draw(st.none() | st.integers(1, 14))}
    options["softcap"] = draw(st.none() | st.floats(0.5, 5.0))
    options["scale"] = draw(st.none() | st.floats(0.1, 2.0))
    if draw(st.booleans()):
        options["key_padding_mask"] = torch.rand(batch, num_keys, generator=torch.Generator().manual_seed(1)) > 0.4
    given_tangents = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any))
    return tensors, options, given_tangents


def math_path(q, k, v, **options):
    """The reference with a mask of its own making, an ordinary differentiable function."""
    position = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    keys = torch.arange(k.shape[2])
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    if options.get("causal"):
        visible = visible & (keys <= position)
    if options.get("window"):
        visible = visible & ((keys - position).abs() < options["window"])
    if options.get("key_padding_mask") is not None:
        visible = visible & options["key_padding_mask"][:, None, None]
    return reference_attention(q, k, v, visible=visible, softcap=options.get("softcap"), scale=options.get("scale"))


@settings(max_examples=60, deadline=None)
@given(call=calls())
def test_tangents_and_gradients_through_both_equal_the_math_path(call):
    tensors, options, given_tangents = call
    primals, tangents = tensors[:3], [t if g else None for t, g in zip(tensors[3:], given_tangents, strict=True)]
    leaves = [x.requires_grad_() for x in (*primals, *(t for t in tangents if t is not None))]
    found = attention_with_tangent(*primals, *tangents, **options)
    dense = tuple(torch.zeros_like(p) if t is None else t for p, t in zip(primals, tangents, strict=True))
    expected = torch.func.jvp(lambda *x: math_path(*x, **options), tuple(primals), dense)
    weights = normal(7, found[0].shape, found[0].shape)
    grads = []
    for out, tangent in (found, expected):
        total = (out * weights[0]).sum() + (tangent * weights[1]).sum()
        # Where nothing is visible, the expected result does not depend on some inputs at all.
        grads.append(torch.autograd.grad(total, leaves, materialize_grads=True))
    for a, b in zip((*found, *grads[0]), (*expected, *grads[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_tangent_equals_central_differences(causal):
    q, k, v, tq, tk, tv = inputs(1, 2, 2, 2, 11, 13, 6, 5)
    _, tangent = torch.func.jvp(lambda *x: attention(*x, causal=causal), (q, k, v), (tq, tk, tv))
    h = 1e-5
    ahead, behind = (attention(q + s * tq, k + s * tk, v + s * tv, causal=causal) for s in (h, -h))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * h), rtol=0, atol=1e-8)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck_of_output_and_tangent(softcap):
    tensors = [x.requires_grad_() for x in inputs(2, 1, 1, 2, 3, 4, 2, 2)]
    assert torch.autograd.gradcheck(lambda *x: attention_with_tangent(*x, causal=True, softcap=softcap), tensors)


def test_the_tangent_is_linear_in_the_tangents_and_zero_for_zeros():
    q, k, v, *a = inputs(3, 2, 1, 3, 7, 9, 4, 4)
    b = inputs(4, 2, 1, 3, 7, 9, 4, 4)[3:]
    of = lambda t: attention_with_tangent(q, k, v, *t, causal=True)[1]  # noqa: E731
    torch.testing.assert_close(
        of([2 * x - 3 * y for x, y in zip(a, b, strict=True)]), 2 * of(a) - 3 * of(b), rtol=0, atol=1e-13
    )
    assert torch.equal(of([torch.zeros_like(x) for x in a]), torch.zeros_like(q))
    out, tangent = attention_with_tangent(q, k, v, None, None, None, causal=True)
    assert torch.equal(tangent, torch.zeros_like(out))


def test_rows_that_see_nothing_have_zero_output_and_tangent():
    tensors = [x.requires_grad_() for x in inputs(5, 1, 1, 1, 6, 4, 4, 4)]
    out, tangent = attention_with_tangent(*tensors, causal=True)
    assert torch.equal(out[:, :, :2], torch.zeros_like(out[:, :, :2]))
    assert torch.equal(tangent[:, :, :2], torch.zeros_like(out[:, :, :2]))
    assert all(g.isfinite().all() for g in torch.autograd.grad((out + tangent).sum(), tensors))


def test_extreme_scores_stay_finite_and_exact():
    q, k, v, tq, tk, tv = inputs(6, 1, 1, 1, 9, 11, 4, 4, torch.float32)
    primals, tangents = (q * 1e4, k, v), (tq * 1e4, tk, tv)
    out, tangent = attention_with_tangent(*primals, *tangents)
    double = [tuple(x.double() for x in t) for t in (primals, tangents)]
    expected = torch.func.jvp(reference_attention, *double)
    assert tangent.isfinite().all()
    torch.testing.assert_close(out.double(), expected[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(tangent.double(), expected[1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 7e-3), (torch.float32, 1e-5)])
def test_low_precision_is_near_the_float64_result(dtype, tolerance):
    tensors = inputs(7, 2, 2, 2, 23, 29, 16, 16, dtype)
    double = [x.double() for x in tensors]
    expected = torch.func.jvp(lambda *x: math_path(*x, causal=True), tuple(double[:3]), tuple(double[3:]))
    for a, b in zip(attention_with_tangent(*tensors, causal=True), expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance)


class Block(torch.nn.Module):
    """Time-conditioned residual block, the smallest network with the shape of a diffusion transformer's."""

    def __init__(self, path: str) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.path = path
        self.qkv = torch.nn.Parameter(torch.randn(8, 24, generator=g, dtype=torch.float64) / 3)
        self.time = torch.nn.Parameter(torch.randn(8, generator=g, dtype=torch.float64))

    def forward(self, x, t):
        h = torch.nn.functional.layer_norm(x, (8,)) + torch.sin(t[:, None, None] * self.time)
        q, k, v = ((h @ self.qkv).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)).unbind(0)
        return x + attention(q, k, v, implementation=self.path).transpose(1, 2).flatten(2)


def tangent_loss(path: str, through_tangent: bool) -> tuple[torch.Tensor, ...]:
    """Loss and parameter gradients of a continuous-time consistency step (arXiv 2410.11081, eq. 8 without weights)."""
    network = Block(path)
    x, dx = normal(8, (3, 11, 8), (3, 11, 8))
    t, dt = normal(9, (3,), (3,))
    out, tangent = torch.func.jvp(network, (x, t), (dx, dt))
    target = tangent if through_tangent else tangent.detach()
    loss = (out - out.detach() + 0.3 * target).square().sum() + (out * target).sum()
    return (loss, *torch.autograd.grad(loss, list(network.parameters())))


@pytest.mark.parametrize("through_tangent", [False, True])
def test_a_network_under_func_jvp_trains_as_on_the_math_path(through_tangent):
    for a, b in zip(tangent_loss("auto", through_tangent), tangent_loss("reference", through_tangent), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_functional_gradient_over_jvp():
    q, k, v, tq, _, tv = inputs(10, 2, 1, 2, 5, 7, 4, 4)

    def loss(path, k):
        out, tangent = torch.func.jvp(lambda q, v: attention(q, k, v, implementation=path), (q, v), (tq, tv))
        return (out * tangent.sin()).sum()

    found, expected = (torch.func.grad(lambda k, p=path: loss(p, k))(k) for path in ("auto", "reference"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_forward_mode_in_its_other_forms():
    q, k, v, tq, tk, tv = inputs(11, 3, 1, 2, 3, 4, 2, 2)
    reference = torch.func.jvp(lambda *x: math_path(*x, causal=True), (q, k, v), (tq, tk, tv))[1]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in ((q, tq), (k, tk), (v, tv))]
        assert explain(*duals).implementation == "tiled"
        found = forward_ad.unpack_dual(attention(*duals, causal=True)).tangent
    torch.testing.assert_close(found, reference)

    def one(q, k, v, tq, tk, tv):
        add = lambda *x: attention(*(y[None] for y in x), causal=True)[0]  # noqa: E731
        return torch.func.jvp(add, (q, k, v), (tq, tk, tv))[1]

    torch.testing.assert_close(torch.func.vmap(one)(q, k, v, tq, tk, tv), reference)

    def mapped(q, k, v):
        return torch.func.vmap(lambda *x: attention(*(y[None] for y in x), causal=True)[0])(q, k, v)

    torch.testing.assert_close(torch.func.jvp(mapped, (q, k, v), (tq, tk, tv))[1], reference)
    jacobian = torch.func.jacfwd(lambda q: attention(q, k, v, causal=True))(q)
    torch.testing.assert_close(torch.einsum("abcdefgh,efgh->abcd", jacobian, tq),
                               attention_with_tangent(q, k, v, tq, None, None, causal=True)[1])  # fmt: skip


def test_packed_sequences_masks_and_bias_under_jvp():
    q, k, v, tq, tk, tv = inputs(12, 1, 2, 2, 9, 9, 4, 4)
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    rows = torch.tensor([0] * 4 + [1] * 5)
    mask = (rows[:, None] == rows)[None, None]
    bias = normal(13, (1, 4, 9, 9))[0]
    pairs = [
        ({"cu_seqlens_q": starts}, "tiled"),
        ({"mask": mask}, "tiled"),
        ({"mask": mask, "bias": bias}, "reference"),
    ]
    for options, path in pairs:
        taken = []

        def call(q, k, v, options=options, taken=taken):
            taken.append(explain(q, k, v, **options).implementation)
            return attention(q, k, v, **options)

        def expected(q, k, v, options=options):
            return reference_attention(q, k, v, visible=mask, bias=options.get("bias"))

        found = torch.func.jvp(call, (q, k, v), (tq, tk, tv))
        assert taken == [path]
        for a, b in zip(found, torch.func.jvp(expected, (q, k, v), (tq, tk, tv)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_what_is_not_supported_is_refused():
    q, k, v, tq, *_ = inputs(14, 1, 1, 1, 3, 4, 2, 2)
    of = lambda q: attention(q, k, v, implementation="tiled").square().sum()  # noqa: E731
    with pytest.raises(InputError, match="second derivatives"):
        torch.func.grad(lambda q: torch.func.grad(of)(q).sum())(q)
    with pytest.raises(InputError, match="not supported on the tiled path"):
        torch.func.jvp(torch.func.grad(of), (q,), (tq,))
    along = lambda q: torch.func.jvp(of, (q,), (tq,))[1]  # noqa: E731
    with pytest.raises(InputError, match="jvp of jvp"):
        torch.func.jvp(along, (q,), (tq,))
    with pytest.raises(InputError, match="sdpa' has no forward-mode derivative"):
        torch.func.jvp(lambda q: attention(q, k, v, implementation="sdpa"), (q,), (tq,))


@pytest.mark.parametrize("path", ["auto", "reference"])
def test_memory_is_linear_in_length_except_on_the_reference(path, monkeypatch):
    monkeypatch.undo()
    length = 1_543
    tensors = inputs(0, 1, 1, 1, length, length, 16, 16, torch.float32)
    q, k, v = (x.requires_grad_() for x in tensors[:3])
    with LargestTensor() as seen:
        out, tangent = torch.func.jvp(
            lambda *x: attention(*x, causal=True, implementation=path), (q, k, v), tuple(tensors[3:])
        )
        (out * tangent).sum().backward()
    assert (seen.elements < length * length / 8) == (path == "auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_autocast_changes_nothing(softcap, dtype):
    """The sums are in float32 as ever; half of the products in bfloat16 did not even fit together."""
    tensors = inputs(8, 2, 2, 2, 7, 11, 4, 3, dtype=dtype)
    leaves = [x.requires_grad_() for x in tensors]

    def results() -> list[torch.Tensor]:
        capped = attention(*leaves[:3], softcap=2.0)
        plain = attention(*leaves[:3], softcap=softcap, implementation="reference")
        return [*attention_with_tangent(*leaves, softcap=softcap), capped, plain]

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        found = results()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    gradients = [torch.autograd.grad(sum(x.float().square().sum() for x in each), leaves) for each in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
