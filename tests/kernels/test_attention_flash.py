"""How flash-attn is chosen and called, on stand-ins with its interface: the packages themselves need a GPU.

The stand-ins compute by the reference and give NaN in rows that see nothing, so that nothing relies on such rows.
"""

from __future__ import annotations

import pytest
import torch

from workbench.errors import InputError
from workbench.kernels import attention as dispatch
from workbench.kernels import attention_flash
from workbench.kernels.attention import attention, explain
from workbench.kernels.attention_reference import reference_attention

# PyTorch's forward mode compiles its decompositions by torch.jit.script, and warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def one(q, k, v, scale, causal, window_size, softcap):
    """[length, heads, width] each; window_size counts keys (left, right) beside the own one, -1 or None = all."""
    left, right = window_size
    distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
    visible = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        visible &= distance >= 0
    if left not in (-1, None):
        visible &= distance <= left
    if right not in (-1, None):
        visible &= distance >= -right
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = reference_attention(q, k, v, visible=visible, scale=scale, softcap=softcap or None)
    return out[0].transpose(0, 1).masked_fill(~visible.any(1)[:, None, None], torch.nan)


class StandIn:
    """One version of the package; `calls` names the functions called."""

    def __init__(self, version: int, returns_tuple: bool) -> None:
        self.calls, self.version, self.returns_tuple = [], version, returns_tuple

    def result(self, name, out):
        self.calls.append(name)
        return (out, None) if self.returns_tuple else out

    def dense(self, q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, dropout_p=0.0):
        rows = [one(*x, softmax_scale, causal, window_size, softcap) for x in zip(q, k, v, strict=True)]
        return self.result("dense", torch.stack(rows))

    def packed(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
               softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):  # fmt: skip
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        assert max_seqlen_k == int(cu_seqlens_k.diff().max())
        parts = zip(q.split(cu_seqlens_q.diff().tolist()), *(x.split(cu_seqlens_k.diff().tolist()) for x in (k, v)),
                    strict=True)  # fmt: skip
        return self.result("packed", torch.cat([one(*x, softmax_scale, causal, window_size, softcap) for x in parts]))


@pytest.fixture
def installed(monkeypatch):
    """Installs stand-ins of the given versions and lets them run on a CPU in any dtype."""

    def install(*versions: int) -> dict[int, StandIn]:
        packages = {version: StandIn(version, returns_tuple=version == 4) for version in versions}
        built = {version: attention_flash.Package(x.dense, x.packed) for version, x in packages.items()}
        monkeypatch.setattr(attention_flash, "package", built.get)
        monkeypatch.setattr(attention_flash, "_hardware", lambda version, device, dtype: None)
        monkeypatch.setattr(dispatch, "_routes", {})
        return packages

    return install


def inputs(batch=2, num_queries=7, num_keys=7, width=8):
    g = torch.Generator().manual_seed(0)
    shapes = ((batch, 4, num_queries, width), (batch, 2, num_keys, width), (batch, 2, num_keys, width))
    return [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]


LEFT = torch.tensor([[False, False, True, True, True, True, True], [True] * 7])
HOLES = torch.tensor([[True, False, True, True, False, True, False], [False, True, True, False, True, True, True]])
CALLS = [
    ({}, {}, "dense"),
    ({}, {"causal": True, "softcap": 2.0, "scale": 0.7}, "dense"),
    ({"num_queries": 3}, {"causal": True}, "dense"),
    ({"num_queries": 1}, {"causal": True}, "dense"),
    ({}, {"causal": True, "window": 3}, "dense"),
    ({}, {"window": 3}, "dense"),
    ({}, {"causal": True, "key_padding_mask": LEFT}, "packed"),
    ({}, {"causal": True, "key_padding_mask": HOLES}, "packed"),
    ({}, {"key_padding_mask": HOLES}, "packed"),
    ({"num_queries": 1}, {"causal": True, "key_padding_mask": LEFT}, "packed"),
    ({"num_queries": 4}, {"key_padding_mask": HOLES}, "packed"),
    ({"batch": 1}, {"causal": True, "cu_seqlens_q": torch.tensor([0, 2, 7], dtype=torch.int32)}, "packed"),
    ({"batch": 1}, {"window": 2, "cu_seqlens_q": torch.tensor([0, 4, 7], dtype=torch.int32), "max_seqlens": (4, 4)},
     "packed"),
]  # fmt: skip


@pytest.mark.parametrize(("sizes", "options", "function"), CALLS)
def test_calls_equal_the_reference_path(installed, sizes, options, function):
    packages = installed(2)
    qkv = inputs(**sizes)
    assert explain(*qkv, **options).implementation == "flash_2"
    found = attention(*qkv, **options)
    assert packages[2].calls == [function]
    expected = attention(*qkv, **options, implementation="reference")
    padding = options.get("key_padding_mask")
    if padding is not None and qkv[0].shape[2] == 7:
        expected = expected.masked_fill(~padding[:, None, :, None], 0.0)  # rows of padded queries
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(found)
    grads = [torch.autograd.grad((x * weight).sum(), qkv) for x in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("versions", "sizes", "options", "path", "reason"),
    [
        ((2, 3, 4), {}, {}, "flash_4", ""),
        ((2, 3), {}, {}, "flash_3", "flash_4 is not installed"),
        ((2, 3, 4), {"width": 256}, {}, "flash_3", "equal widths up to 128"),
        ((2, 3, 4), {}, {"softcap": 1.0}, "flash_3", "flash_4 has no soft-capping with gradients"),
        ((2, 3, 4), {}, {"dropout": 0.1}, "flash_2", "flash_3 has no dropout"),
        ((2,), {"width": 12}, {}, "sdpa", "multiples of 8"),
        ((2,), {}, {"mask": torch.ones(1, 1, 7, 7, dtype=torch.bool)}, "sdpa", "no dense mask or bias"),
        ((2,), {}, {"bias": torch.zeros(1, 1, 7, 7)}, "sdpa", "no dense mask or bias"),
        ((2,), {"num_keys": 5}, {"causal": True}, "sdpa", "rows without visible keys"),
        ((2,), {"num_keys": 5}, {}, "flash_2", "flash_3 is not installed"),
        ((2,), {}, {"window": 3, "key_padding_mask": LEFT}, "sdpa", "a window without the padding"),
        ((2,), {"num_queries": 3}, {"causal": True, "key_padding_mask": LEFT}, "sdpa", "aligns causal masks"),
    ],
)
def test_the_best_installed_version_that_can(installed, versions, sizes, options, path, reason):
    installed(*versions)
    route = explain(*inputs(**sizes), **options)
    assert route.implementation == path
    assert reason in route.reason


def test_no_forward_mode_on_flash(installed):
    installed(2)
    q, k, v = inputs()
    with torch.autograd.forward_ad.dual_level():
        route = explain(torch.autograd.forward_ad.make_dual(q, q), k, v)
    assert route.implementation == "tiled"
    assert "flash_2 has no forward-mode derivative" in route.reason


def test_without_the_package_asking_for_it_is_an_error(installed):
    installed(3)
    with pytest.raises(InputError, match="'flash_2' is not installed"):
        attention(*inputs(), implementation="flash_2")


def test_on_this_machine_a_missing_package_is_found_missing():
    if torch.cuda.is_available():
        pytest.skip("flash-attn may be installed here")
    assert not attention_flash.ready(torch.device("cpu"), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("version", attention_flash.VERSIONS)
@pytest.mark.parametrize(("sizes", "options", "function"), CALLS)
def test_the_packages_themselves(version, sizes, options, function):
    qkv = [x.detach().to("cuda", torch.bfloat16) for x in inputs(**{"width": 64} | sizes)]
    options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    if explain(*qkv, **options, implementation="auto").implementation == "sdpa":
        pytest.skip("flash-attn is not installed")
    try:
        found = attention(*qkv, **options, implementation=f"flash_{version}")
    except InputError as refusal:
        pytest.skip(str(refusal))
    expected = attention(*(x.double() for x in qkv), **options, implementation="reference")
    padding = options.get("key_padding_mask")
    if padding is not None and qkv[0].shape[2] == 7:
        expected = expected.masked_fill(~padding[:, None, :, None], 0.0)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-2)
