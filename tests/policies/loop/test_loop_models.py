"""Networks as folders: whole, known by their contents, without pickle, and refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from workbench.errors import InputError  # noqa: E402
from workbench.policies.loop import models  # noqa: E402
from workbench.policies.loop.models import KINDS, load, make, save  # noqa: E402

SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": 8, "schedule": "edm", "prediction": "x0", "second_time": True},
    "dit": {"width": 16, "depth": 1, "schedule": "trigonometric", "prediction": "v", "logvar": True},
    "unet2d": {"width": 8, "schedule": "variance-preserving", "prediction": "eps"},
    "dit2d": {"width": 16, "depth": 1, "prediction": "flow"},
    "resnet": {"width": 4, "num_stages": 2},
    "vit": {"width": 8, "depth": 1},
    "mlp-classifier": {"width": 8},
}


def made(kind: str, seed: int = 0) -> models.LoopModel:
    if kind.endswith("2d"):
        pytest.importorskip("diffusers")
    return make(kind, KINDS[kind].sizes(**SMALL[kind]), (1, 8, 8), 10, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_is_loaded_as_it_was_saved(kind: str, tmp_path: Path) -> None:
    one = made(kind)
    version = save(one.net, one.config, tmp_path / "net")
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == ["config.json", "model.safetensors"]
    loaded = load(tmp_path / "net")
    assert (loaded.version, loaded.config) == (version, one.config)
    assert type(loaded.net) is type(one.net)
    x = torch.randn(3, 1, 8, 8)
    inputs = (x,) if KINDS[kind].backend == "vision" else (x, torch.rand(3), torch.tensor([0, 5, 10]))
    with torch.no_grad():
        assert torch.equal(loaded.net(*inputs), one.net(*inputs))
    if KINDS[kind].backend == "diffusion":
        assert (loaded.net.schedule, loaded.net.prediction) == (one.net.schedule, SMALL[kind]["prediction"])
    assert save(one.net, one.config, tmp_path / "net") == version
    assert save(made(kind, seed=1).net, one.config, tmp_path / "net") != version


def test_the_seed_decides_the_weights_and_the_global_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    assert made("mlp").version == made("mlp").version != made("mlp", seed=1).version
    assert torch.equal(torch.get_rng_state(), before)


def test_a_copy_trains_and_the_original_does_not_follow() -> None:
    one = made("mlp")
    one.net.requires_grad_(False)
    copied = models.copy_of(one, "teacher")
    assert copied.version == one.version
    assert all(parameter.requires_grad for parameter in copied.net.parameters())
    with torch.no_grad():
        next(copied.net.parameters()).add_(1)
    assert not torch.equal(next(copied.net.parameters()), next(one.net.parameters()))


def test_folders_that_are_no_networks_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    one = made("resnet")
    with pytest.raises(InputError, match=r"no folder of a network: it has no config\.json"):
        load(folder)
    save(one.net, one.config, folder)
    for change, message in (
        ({"kind": "unet"}, r"the kind is 'unet'; there are mlp, dit"),
        ({"sizes": {"width": 8}}, r"cannot be loaded: .*size mismatch"),
        ({"sizes": {"depth": 8}}, r"cannot be loaded: .*unexpected keyword"),
    ):
        (folder / "config.json").write_text(json.dumps({**one.config, **change}))
        with pytest.raises(InputError, match=message):
            load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(one.config))
    (folder / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(InputError, match="cannot be loaded"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        load(folder)


def test_sizes_below_1_are_refused() -> None:
    with pytest.raises(InputError, match="depth must be 1 or more, not 0"):
        models.MlpSizes(depth=0)
