"""The MLP and the DiT: the contract, conditioning, and exact forward-mode derivatives."""

from __future__ import annotations

import pytest
import torch

from workbench.errors import InputError
from workbench.kernels.attention import explain
from workbench.policies.diffusion.dit import DiT, DiTBlock
from workbench.policies.diffusion.networks import MLP
from workbench.policies.diffusion.schedules import Edm, RectifiedFlow, Trigonometric, VariancePreserving, translate

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def randomised(net, seed=0):
    """float64, every parameter drawn, so that nothing that starts at 0 hides an error."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64) * 0.15)
    return net


def made(kind, **options):
    net = MLP((1, 8, 8), hidden=24, depth=2, **options) if kind == "mlp" else DiT(width=16, depth=2, heads=2, **options)
    return randomised(net)


def asked(schedule=None, count=4):
    schedule = schedule or RectifiedFlow()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(count, 1, 8, 8, generator=g, dtype=torch.float64)
    t = schedule.from_snr(torch.logspace(1.5, -1.5, count, dtype=torch.float64))
    return x, t


@pytest.mark.parametrize("kind", ["mlp", "dit"])
@pytest.mark.parametrize("schedule", [RectifiedFlow(), VariancePreserving(), Edm(), Trigonometric()], ids=str)
def test_forward_mode_agrees_with_central_differences(kind, schedule):
    net = made(kind, schedule=schedule, num_classes=3, second_time=True)
    x, t = asked(schedule)
    c, r = torch.tensor([0, 1, 2, 3]), 0.7 * t
    along = (torch.flip(x, [0]), 0.5 * t, 0.3 * t)
    value, tangent = torch.func.jvp(lambda x, t, r: net(x, t, c, r), (x, t, r), along)
    h = 1e-4  # where the fourth-order difference is at its best, near 1e-10

    def difference(e):
        ahead, behind = (net(x + s * along[0], t + s * along[1], c, r + s * along[2]) for s in (e, -e))
        return (ahead - behind) / (2 * e)

    torch.testing.assert_close(tangent, (4 * difference(h) - difference(2 * h)) / 3, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(value, net(x, t, c, r), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "dit"])
def test_gradients_flow_through_the_output_of_forward_mode(kind):
    """The tangent detached, as in sCM and MeanFlow: gradients are those of an ordinary call."""
    net = made(kind)
    x, t = asked()
    value, tangent = torch.func.jvp(net, (x, t), (torch.ones_like(x), torch.ones_like(t)))
    (value * tangent.detach()).sum().backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    (net(x, t) * tangent.detach()).sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_the_attention_of_the_dit_takes_the_tiled_path_under_forward_mode_only(monkeypatch):
    taken = []

    def watch(q, k, v):
        taken.append(explain(q, k, v).implementation)
        return attention(q, k, v)

    from workbench.policies.diffusion import dit

    attention = dit.attention
    monkeypatch.setattr(dit, "attention", watch)
    net, (x, t) = made("dit"), asked()
    net(x, t)
    torch.func.jvp(net, (x, t), (x, t))
    assert taken == ["sdpa"] * 2 + ["tiled"] * 2


@pytest.mark.parametrize("kind", ["mlp", "dit"])
def test_rows_of_a_batch_are_independent(kind):
    net = made(kind, num_classes=3)
    x, t = asked()
    c = torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(net(x, t, c)[1:2], net(x[1:2], t[1:2], c[1:2]))


def test_a_fresh_block_of_the_dit_is_the_identity():
    block, g = DiTBlock(16, 2), torch.Generator().manual_seed(2)
    x, cond = torch.randn(3, 5, 16, generator=g), torch.randn(3, 16, generator=g)
    assert torch.equal(block(x, cond), x)


@pytest.mark.parametrize("kind", ["mlp", "dit"])
@pytest.mark.parametrize("schedule", [VariancePreserving(), Edm(), Trigonometric()], ids=str)
def test_a_network_sees_the_same_on_every_schedule(kind, schedule):
    """Input and condition depend on the sample's direction and signal-to-noise ratio only."""
    x, t = asked()
    there = translate(x, t, RectifiedFlow(), schedule)
    torch.testing.assert_close(made(kind, schedule=schedule)(*there), made(kind)(x, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["mlp", "dit"])
def test_time_class_and_second_time_count(kind):
    net = made(kind, num_classes=3, second_time=True)
    x, t = asked()
    c = torch.tensor([0, 1, 2, 0])
    assert torch.equal(net(x, t), net(x, t, torch.full((4,), 3)))  # None is the null label
    assert torch.equal(net(x, t, c), net(x, t, c, t))  # without r, the instantaneous prediction
    for other in (net(x, 0.5 * t, c), net(x, t), net(x, t, c, 0.5 * t)):
        assert ((other - net(x, t, c)).flatten(1).abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("network", [MLP, DiT])
def test_before_training_r_and_the_log_variance_change_nothing(network):
    net = network((1, 8, 8), second_time=True, logvar=True).double()
    torch.nn.init.normal_(net.output.weight)
    x, t = asked()
    assert torch.equal(net(x, t, None, 0.5 * t), net(x, t))
    assert torch.equal(net.log_variance(t), torch.zeros(4, dtype=torch.float64))
    net.log_variance(t).sum().backward()
    assert net.cond.logvar.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["mlp", "dit"])
def test_what_was_not_built_is_refused(kind):
    net = made(kind)
    x, t = asked()
    with pytest.raises(InputError, match="second_time=True"):
        net(x, t, None, t)
    with pytest.raises(InputError, match="logvar=True"):
        net.log_variance(t)


def test_sizes_and_module_paths():
    assert sum(p.numel() for p in MLP().parameters()) == 62_594
    assert MLP(hidden=8).get_submodule("blocks.1") is not None
    assert DiT().get_submodule("blocks.2") is not None
    with pytest.raises(InputError, match="patch 3"):
        DiT(patch=3)


def test_patches_go_back_to_their_places():
    net = DiT((2, 8, 4))
    image = torch.arange(3 * 2 * 8 * 4, dtype=torch.float32).reshape(3, 2, 8, 4)
    assert torch.equal(net._image(net._patches(image)), image)
    assert net._patches(image).shape == (3, 8, 8)
    # The second patch is the right neighbour of the first.
    assert net._patches(image)[0, 1, 0] == image[0, 0, 0, 2]


@pytest.mark.parametrize("kind", ["mlp", "dit"])
def test_low_precision_data_and_double_times(kind):
    net = made(kind).float()
    x, t = asked()
    assert net(x.float(), t).dtype == torch.float32
