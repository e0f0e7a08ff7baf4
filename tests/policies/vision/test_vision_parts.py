"""Losses against closed forms, taps, connectors, networks and the small tasks."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

import torch.nn.functional as F  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402
from vision_made import made, step_of  # noqa: E402

from workbench.errors import InputError, MissingExtra  # noqa: E402
from workbench.policies.nouns import Phase, Role, Stored  # noqa: E402
from workbench.policies.taps import Taps  # noqa: E402
from workbench.policies.vision import losses, testbeds  # noqa: E402
from workbench.policies.vision.connectors import align, feature_shapes, logit_head  # noqa: E402
from workbench.policies.vision.networks import MLP, Block, ResNet, ViT, timm_network  # noqa: E402
from workbench.policies.vision.terms import FeatureMatch, Labels  # noqa: E402


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Any:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- losses --------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.floats(0.5, 8), st.booleans())
@settings(max_examples=25, deadline=None)
def test_distillation_is_the_tempered_kl_of_torch(seed: int, temperature: float, standardise: bool) -> None:
    student, teacher = drawn(4, 6, seed=seed), drawn(4, 6, seed=seed + 1, scale=3)
    mine = losses.distillation(student, teacher, temperature, standardise)
    if standardise:
        student, teacher = (
            (z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True) + 1e-7) for z in (student, teacher)
        )
    q, p = (torch.distributions.Categorical(logits=z / temperature) for z in (student, teacher))
    torch.testing.assert_close(mine, temperature**2 * torch.distributions.kl_divergence(p, q))


def test_soft_cross_entropy_has_the_gradient_of_a_weight_that_need_not_be_one() -> None:
    logits, target = drawn(3, 5).requires_grad_(), drawn(3, 5, seed=1).abs()
    losses.soft_cross_entropy(logits, target.requires_grad_()).sum().backward()
    expected = target.sum(-1, keepdim=True) * logits.softmax(-1) - target
    torch.testing.assert_close(logits.grad, expected.detach())
    assert target.grad is None


def test_teachers_are_averaged_as_probabilities() -> None:
    logits = [drawn(4, 5, seed=seed, scale=3) for seed in range(3)]
    mean = losses.mean_probabilities(logits)
    torch.testing.assert_close(mean, sum(z.softmax(-1) for z in logits) / 3)
    assert (mean - (sum(logits) / 3).softmax(-1)).abs().max() > 0.01


def test_enhanced_target_of_the_card() -> None:
    p = torch.tensor([[0.6, 0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
    label = torch.tensor([0])
    for gamma, own, other in ((1.0, 0.6, 0.1), (1.5, 1.0238577, 0.0316228), (2.0, 1.56, 0.01)):
        found = losses.enhanced_target(p.log() + 3.0, label, gamma)
        torch.testing.assert_close(found, torch.tensor([[own, *[other] * 4]], dtype=torch.float64), atol=1e-6, rtol=0)


def test_feature_l2_and_its_shapes() -> None:
    a, b = drawn(3, 2, 4, 4), drawn(3, 2, 4, 4, seed=1)
    torch.testing.assert_close(losses.feature_l2(a, b).mean(), F.mse_loss(a, b))
    with pytest.raises(InputError, match="align"):
        losses.feature_l2(a, b[:, :1])


def test_attention_transfer_sees_places_not_channels_or_scale() -> None:
    map_ = drawn(2, 3, 4, 4)
    wide = torch.cat([map_, map_], 1) * 7
    torch.testing.assert_close(losses.attention_transfer(map_, wide), torch.zeros(2, dtype=torch.float64))
    corner, other = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    corner[..., 0, 0], other[..., 1, 1] = 3.0, 2.0
    torch.testing.assert_close(losses.attention_transfer(corner, other), torch.tensor([2.0]))
    assert losses.attention_transfer(drawn(2, 3, 8, 8), drawn(2, 5, 4, 4)).shape == (2,)
    with pytest.raises(InputError, match="maps"):
        losses.attention_transfer(map_, drawn(2, 4))


def test_relations_survive_similarity_and_nothing_else() -> None:
    features = drawn(6, 5)
    turn = torch.linalg.qr(drawn(5, 5, seed=1)).Q
    similar = 3 * features @ turn + 2
    torch.testing.assert_close(losses.relational(similar, features), torch.zeros(6, dtype=torch.float64))
    moved = features.clone()
    moved[0] += 1
    assert losses.relational(moved, features)[0] > 0.01
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    line = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    # at image 1 of the line the two others lie opposite each other (cosine -1), of the corner at 45 degrees
    by_angle = losses.relational(line, corner, distance_weight=0, angle_weight=1)
    gap = 1 + math.sqrt(0.5)
    assert by_angle[1].item() == pytest.approx(2 * (gap - 0.5) / 4, abs=1e-6)
    same = torch.zeros(3, 2, requires_grad=True)
    losses.relational(same, corner).sum().backward()
    assert torch.isfinite(same.grad).all()


def test_cka_is_one_for_turned_and_scaled_copies() -> None:
    a = drawn(40, 6)
    turned = 4 * a @ torch.linalg.qr(drawn(6, 6, seed=2)).Q
    assert losses.linear_cka(a, turned).item() == pytest.approx(1, abs=1e-9)
    b = drawn(40, 9, seed=3)
    centred = [z - z.mean(0) for z in (a, b)]
    grams = [z @ z.T for z in centred]
    expected = (grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm())
    torch.testing.assert_close(losses.linear_cka(a, b), expected)


# -- taps and connectors -------------------------------------------------------------------------------------


def test_taps_give_outputs_with_gradient_and_let_go() -> None:
    net = made(ResNet, 0)
    image = torch.randn(2, 1, 8, 8)
    with Taps(net, net.stages) as taps:
        with pytest.raises(InputError, match="has not run"):
            taps["body.0"]
        logits = net(image)
        torch.testing.assert_close(net.head(taps["body.2"].mean((2, 3))), logits)
        taps["body.0"].sum().backward()
        assert net.stem[0].weight.grad is not None
    assert not any(module._forward_hooks for module in net.modules())
    with pytest.raises(RuntimeError), Taps(net, ["body.1"]):
        net(torch.randn(2, 3, 8, 8))
    assert not any(module._forward_hooks for module in net.modules())


def test_two_taps_of_one_model_do_not_meet() -> None:
    net = made(MLP, 0)
    with Taps(net, ["layers.0"]) as outer:
        with Taps(net, ["layers.0"]) as inner:
            net(torch.zeros(1, 1, 8, 8))
            assert torch.equal(outer["layers.0"], inner["layers.0"])
        net(torch.ones(3, 1, 8, 8))
        assert len(outer["layers.0"]) == 3


def test_taps_name_what_is_wrong() -> None:
    net = made(MLP, 0)
    with pytest.raises(InputError, match=r"no module 'layer.0'; it has layers.0"):
        Taps(net, ["layer.0"])
    with pytest.raises(InputError, match="no module ''"):
        Taps(net, [""])
    pair = nn.Sequential(nn.LSTM(4, 4))
    with Taps(pair, ["0"]) as taps:
        pair(torch.zeros(2, 4))
        with pytest.raises(InputError, match="tuple, not a tensor"):
            taps["0"]
        with pytest.raises(InputError, match="open already"):
            taps.__enter__()


SHAPES = [(4, 8, 8), (6, 8, 8), (6, 4, 4), (16, 6), (16, 3), (7,)]


@pytest.mark.parametrize("student", SHAPES)
@pytest.mark.parametrize("teacher", SHAPES)
def test_a_connector_leads_to_the_teachers_shape_or_says_that_none_does(student: Any, teacher: Any) -> None:
    impossible = len(teacher) > 1 and (
        len(student) == 1
        or (len(student) == 2 and len(teacher) == 3)
        or (len(student) == 3 and len(teacher) == 2 and student[1] * student[2] != teacher[0])
    )
    if impossible:
        with pytest.raises(InputError, match="No connector"):
            align(student, teacher)
        return
    connector = align(student, teacher)
    assert connector(torch.randn(2, *student)).shape == (2, *teacher)
    assert (not list(connector.parameters())) == (student == teacher)


@pytest.mark.parametrize("network", [ResNet, ViT, MLP])
@pytest.mark.parametrize("side", [8, 16])
def test_networks_say_their_shapes_and_every_stage_has_a_branch(network: Any, side: int) -> None:
    net = made(network, 0, image_shape=(1, side, side), num_classes=8).train()
    shapes = feature_shapes(net, net.stages)
    assert net.training
    assert 5_000 < sum(p.numel() for p in net.parameters()) < 50_000
    assert net(torch.randn(3, 1, side, side)).shape == (3, 8)
    for number, path in enumerate(net.stages):
        head = logit_head(shapes[path], shapes[net.stages[-1]], 8, len(net.stages) - 1 - number)
        assert head(torch.randn(3, *shapes[path])).shape == (3, 8)


@pytest.mark.parametrize("network", [ResNet, ViT, MLP])
def test_an_image_is_judged_by_itself(network: Any) -> None:
    net = made(network, 0).train()
    image = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(net(image)[2:3], net(image[2:3]))


def test_a_block_equals_torchs_own() -> None:
    block = Block(8, 2).double()
    peer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True).double()
    pairs = {
        "self_attn.in_proj": block.qkv, "self_attn.out_proj.": block.out, "linear1.": block.mlp[0],
        "linear2.": block.mlp[2], "norm1.": block.norms[0], "norm2.": block.norms[1],
    }  # fmt: skip
    weights = {}
    for name, layer in pairs.items():
        joint = "_" if name == "self_attn.in_proj" else ""
        weights |= {f"{name}{joint}weight": layer.weight, f"{name}{joint}bias": layer.bias}
    peer.load_state_dict(weights)
    tokens = drawn(3, 5, 8)
    torch.testing.assert_close(block(tokens), peer(tokens))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="3 pixels"):
        ViT(num_classes=2, patch=3)
    with pytest.raises(InputError, match="shared out"):
        ViT(num_classes=2, width=30)


# -- terms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "teacher"), [("l2", "layers.1"), ("attention", "body.1"), ("relational", "layers.1")])
def test_a_feature_match_trains_the_student_below_its_tap_and_the_connector(loss: Any, teacher: str) -> None:
    table = {key: value[:20] for key, value in testbeds.digits(0).pool.items()}
    model = made(MLP if teacher == "layers.1" else ResNet, 5)
    term = FeatureMatch(student="body.1", teacher=teacher, loss=loss)
    phase = Phase(
        name="hint", sources={"main": Stored("train")}, terms=[term], roles=[Role(name="teacher")],
        modules=term.modules,
    )  # fmt: skip
    student = made(ResNet, 1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    torch.manual_seed(0)
    trainer, _ = step_of(phase, table, {"teacher": model}, student)
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert {"stem.0.weight", "body.0.0.first.weight", "body.1.0.first.weight"} <= moved
    assert not any(name.startswith(("body.2", "head")) for name in moved)
    assert bool(trainer.modules) == (loss == "l2")
    connected = {name.split("/")[0] for name in trainer.trained["student"] if "/" in name}
    assert bool(connected) == (loss == "l2")


def test_accumulation_changes_nothing() -> None:
    from workbench.policies.loop.engine import LoopTrainer
    from workbench.policies.loop.settings import LoopSettings

    table = {key: value[:24] for key, value in testbeds.digits(0).pool.items()}
    ends = []
    for size, accumulation in ((24, 1), (6, 4)):
        student = made(ResNet, 1)
        phase = Phase(name="ce", sources={"main": Stored("train")}, terms=[Labels()])
        chosen = LoopSettings(steps=3, batch_size=size, accumulation=accumulation, optimizer="sgd", cpu=True)
        LoopTrainer(student, phase, {"train": table}, chosen, {}).train()
        ends.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    torch.testing.assert_close(*ends, atol=1e-6, rtol=1e-5)


# -- small tasks ---------------------------------------------------------------------------------------------


def test_digits_are_split_by_seed_and_spoilt_as_asked() -> None:
    split = testbeds.digits(3, num_labels=200, noise=0.15)
    again, other = testbeds.digits(3, num_labels=200, noise=0.15), testbeds.digits(4)
    assert all(torch.equal(split.train[key], again.train[key]) for key in split.train)
    assert not torch.equal(split.test["image"], other.test["image"])
    assert split.train["image"].shape == (200, 1, 8, 8)
    assert len(split.pool["label"]) == 1200
    assert len(split.test["label"]) == 597
    assert split.train["image"].min() == -1
    assert split.train["image"].max() == 1
    assert torch.equal(split.train["image"], split.pool["image"][:200])
    assert (split.train["label"] != split.pool["label"][:200]).sum() == 30
    assert (testbeds.digits(3, missing=3).train["label"] == 3).sum() == 0
    rows = {tuple(image.flatten().tolist()) for image in split.test["image"]}
    assert not any(tuple(image.flatten().tolist()) in rows for image in split.train["image"])
    with pytest.raises(InputError, match="wrong labels"):
        testbeds.digits(0, noise=1.0)


def test_shapes_can_be_told_apart_by_a_small_network() -> None:
    train, test = testbeds.shapes(1200, 0), testbeds.shapes(300, 1)
    assert train["image"].shape == (1200, 1, 16, 16)
    assert train["image"].abs().max() <= 1
    assert set(train["label"].tolist()) == set(range(8))
    net = testbeds.fit(made(ResNet, 0, image_shape=(1, 16, 16), num_classes=8), train, steps=160, seed=0)
    assert testbeds.measure(net, test).accuracy > 0.5
    assert testbeds.measure(made(ResNet, 0, image_shape=(1, 16, 16), num_classes=8), test).accuracy < 0.25


# -- timm ----------------------------------------------------------------------------------------------------


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match="timm"):
        timm_network("resnet10t", num_classes=2, image_shape=(1, 8, 8))


@pytest.mark.parametrize(
    "broken",
    [
        "raise ImportError('no torchvision', name='torchvision')",
        "raise RuntimeError('operator torchvision::nms does not exist')",
    ],
)
def test_a_timm_that_cannot_be_imported_says_what_to_take_instead(
    broken: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "timm.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(MissingExtra, match=r"torchvision.*take ResNet, ViT or MLP"):
        timm_network("resnet10t", num_classes=2, image_shape=(1, 8, 8))


def test_timms_feature_modules_become_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(name: str, num_classes: int, in_chans: int) -> Any:
        net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)), nn.Linear(4, num_classes))
        net.feature_info = [{"module": str(number)} for number in range(6)]  # pyright: ignore
        net.num_classes = num_classes  # pyright: ignore
        return net

    fake: Any = ModuleType("timm")
    fake.create_model, fake.is_model = create_model, lambda name: name == "tiny"
    fake.list_models = lambda pattern: ["tiny"]
    monkeypatch.setitem(sys.modules, "timm", fake)
    net: Any = timm_network("tiny", num_classes=3, image_shape=(1, 2, 2), num_stages=3)
    assert net.stages == ("1", "3", "5")
    assert net.image_shape == (1, 2, 2)
    with pytest.raises(InputError, match="it has tiny"):
        timm_network("tin", num_classes=3, image_shape=(1, 2, 2))
