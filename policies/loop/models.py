"""Networks of the loop engine's backends as folders: config.json and model.safetensors, known by their contents.

config.json holds the kind of network, the shape of an image, the number of classes, the sizes, and for diffusion the
prediction and the schedule with its parameters: all that is needed to build it again. Nothing is pickled. At import,
this module needs no torch: recipes are checked with it.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from workbench.errors import InputError
from workbench.policies.versions import folder_version, weights_version

if TYPE_CHECKING:
    from torch import nn

    from workbench.policies.loop.roles import Adapted

Family = Literal["rectified-flow", "variance-preserving", "edm", "trigonometric"]
#: Name -> class in `workbench.policies.diffusion.schedules`.
FAMILIES: dict[str, str] = {
    "rectified-flow": "RectifiedFlow", "variance-preserving": "VariancePreserving", "edm": "Edm",
    "trigonometric": "Trigonometric",
}  # fmt: skip
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Of any network; all whole numbers are 1 or more."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise InputError(f"{f.name} must be 1 or more, not {value}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiserSizes(Sizes):
    """What all denoising networks take. Args: second_time, logvar: as in `policies.diffusion.networks.MLP`."""

    schedule: Family = "rectified-flow"
    prediction: Literal["x0", "eps", "v", "flow", "score"] = "flow"
    second_time: bool = False
    logvar: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class MlpSizes(DenoiserSizes):
    """Of `policies.diffusion.networks.MLP`."""

    hidden: int = 96
    depth: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class DitSizes(DenoiserSizes):
    """Of `policies.diffusion.dit.DiT`."""

    patch: int = 2
    width: int = 64
    depth: int = 3
    heads: int = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Unet2dSizes(DenoiserSizes):
    """Of `policies.diffusion.diffusers_networks.unet2d`: a network that stock diffusers can load."""

    width: int = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ResNetSizes(Sizes):
    """Of `policies.vision.networks.ResNet`."""

    width: int = 8
    num_stages: int = 3
    blocks: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class VitSizes(Sizes):
    """Of `policies.vision.networks.ViT`."""

    width: int = 32
    depth: int = 4
    heads: int = 4
    patch: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierMlpSizes(Sizes):
    """Of `policies.vision.networks.MLP`."""

    width: int = 64
    depth: int = 2


class Kind(NamedTuple):
    """A kind of network: its backend, sizes, and where its class (or what makes one) is."""

    backend: str
    sizes: type[Sizes]
    module: str
    cls: str


KINDS = {
    "mlp": Kind("diffusion", MlpSizes, "workbench.policies.diffusion.networks", "MLP"),
    "dit": Kind("diffusion", DitSizes, "workbench.policies.diffusion.dit", "DiT"),
    "unet2d": Kind("diffusion", Unet2dSizes, "workbench.policies.diffusion.diffusers_networks", "unet2d"),
    "dit2d": Kind("diffusion", DitSizes, "workbench.policies.diffusion.diffusers_networks", "dit2d"),
    "resnet": Kind("vision", ResNetSizes, "workbench.policies.vision.networks", "ResNet"),
    "vit": Kind("vision", VitSizes, "workbench.policies.vision.networks", "ViT"),
    "mlp-classifier": Kind("vision", ClassifierMlpSizes, "workbench.policies.vision.networks", "MLP"),
}


@dataclass(frozen=True, slots=True)
class LoopModel:
    """A network. Args: config: as in config.json; version: digest of its contents; source: what people call it."""

    net: Any
    config: Mapping[str, Any]
    version: str
    source: str


def make(kind: str, sizes: Sizes, shape: Sequence[int], num_classes: int, seed: int) -> LoopModel:
    """A network with random weights that the seed decides.

    Args: shape: of one datum; num_classes: of the data, 0 = none (diffusion).

    Raises: InputError for sizes that do not fit each other or the shape.
    """
    import torch

    config = {"kind": kind, "shape": list(shape), "num_classes": num_classes, "sizes": asdict(sizes)}
    if isinstance(sizes, DenoiserSizes):
        schedule = _schedules(FAMILIES[sizes.schedule])()
        config["schedule"] = {"family": sizes.schedule, **asdict(schedule)}
        del config["sizes"]["schedule"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _build(config)
    known = ", ".join(f"{key} {value}" for key, value in config["sizes"].items())
    return LoopModel(net, config, weights_version(net), f"new {kind} ({known}, seed {seed})")


def copy_of(model: LoopModel, name: str) -> LoopModel:
    """A trainable copy of the model that the recipe calls by this name; raises InputError if it has no weights."""
    net = copy.deepcopy(model.net).train()
    parameters = [one for one in net.parameters() if one.is_floating_point()]
    if not parameters:
        raise InputError(f"{name!r} ({model.source}) has no weights to copy. Make a new network.")
    for parameter in parameters:
        parameter.requires_grad_(True)
    return LoopModel(net, model.config, model.version, f"copy of {name}")


def save(net: nn.Module, config: Mapping[str, Any], folder: Path) -> str:
    """Writes a network as a folder, whole or not at all, over what was there; returns its version."""
    from safetensors.torch import save_model

    unfinished = folder.with_name(folder.name + ".part")
    for old in (unfinished, folder):
        shutil.rmtree(old, ignore_errors=True)
    unfinished.mkdir(parents=True)
    (unfinished / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    save_model(net, str(unfinished / _WEIGHTS))
    unfinished.rename(folder)
    return folder_version(folder)


def load(folder: str | Path) -> LoopModel:
    """A saved network, on the CPU; raises InputError for what is no such folder."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder).expanduser()
    for name in ("config.json", _WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is no folder of a network: it has no {name}.")
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        if config.get("kind") not in KINDS:
            raise InputError(f"{folder}: the kind is {config.get('kind')!r}; there are {', '.join(KINDS)}.")
        net = _build(config)
        net.load_state_dict(load_file(folder / _WEIGHTS))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"The network in {folder} cannot be loaded: {' '.join(str(error).split())[:400]}") from error
    return LoopModel(net, config, folder_version(folder), str(folder))


def merged(adapted: Adapted) -> nn.Module:
    """The network that an adapter and its base are together, without either: new weights, the base stays as it is."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    net = copy.deepcopy(adapted.base)
    for path, layer in list(net.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(adapter_names=[adapted.adapter])  # pyright: ignore[reportCallIssue]
            parent, _, name = path.rpartition(".")
            setattr(net.get_submodule(parent), name, layer.get_base_layer())
    return net


def _schedules(name: str) -> Any:
    from workbench.policies.diffusion import schedules

    return getattr(schedules, name)


def _build(config: Mapping[str, Any]) -> Any:
    kind = KINDS[config["kind"]]
    cls = getattr(import_module(kind.module), kind.cls)
    shape = tuple(config["shape"])
    if kind.backend == "vision":
        return cls(num_classes=config["num_classes"], image_shape=shape, **config["sizes"])
    if kind.cls == "DiT" and len(shape) != 3:
        raise InputError(f"A dit is made for images, and the data have the shape {[*shape]}. Take the kind mlp.")
    given = dict(config["schedule"])
    schedule = _schedules(FAMILIES[given.pop("family")])(**given)
    return cls(shape, num_classes=config["num_classes"], schedule=schedule, **config["sizes"])
