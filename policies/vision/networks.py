"""Small image classifiers, and timm's by name: every one says what a method needs to know about it.

A classifier is a module `net(image [B, *image_shape]) -> logits [B, num_classes]` with the attributes `num_classes`,
`image_shape` (channels, height, width) and `stages`: module paths of the ends of its stages, in order, whose outputs
are maps [B, channels, height, width], tokens [B, tokens, width] or vectors [B, width].

Normalisation is by group or layer, never by batch: so accumulation and several processes change nothing, and a copy of
a network needs no running statistics.
"""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import InputError, MissingExtra
from workbench.kernels.attention import attention

Shape = tuple[int, int, int]


class Residual(nn.Module):
    """Two 3x3 convolutions around which the input passes, [B, C, H, W] -> [B, out, H / stride, W / stride]."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.GroupNorm(_groups(out), out) for _ in range(2)])
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The block's output, after its ReLU."""
        inner = F.relu(self.norms[0](self.first(x_BCHW)))
        return F.relu(self.norms[1](self.second(inner)) + self.shortcut(x_BCHW))


class ResNet(nn.Module):
    """A residual network whose stages halve the image and double the width, from the second on.

    Args: width: channels of the first stage; num_stages, blocks: how many, and blocks in each.
    """

    def __init__(
        self, *, num_classes: int, image_shape: Shape = (1, 8, 8), width: int = 8, num_stages: int = 3, blocks: int = 1
    ) -> None:
        super().__init__()
        self.num_classes, self.image_shape = num_classes, image_shape
        self.stages = tuple(f"body.{number}" for number in range(num_stages))
        self.stem = nn.Sequential(
            nn.Conv2d(image_shape[0], width, 3, 1, 1, bias=False), nn.GroupNorm(_groups(width), width), nn.ReLU()
        )
        widths = [width * 2**number for number in range(num_stages)]
        self.body = nn.Sequential()
        for number, out in enumerate(widths):
            before = widths[max(number - 1, 0)]
            first = Residual(before, out, 1 if number == 0 else 2)
            self.body.append(nn.Sequential(first, *(Residual(out, out, 1) for _ in range(blocks - 1))))
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        return self.head(self.body(self.stem(image)).mean((2, 3)))


class Block(nn.Module):
    """A transformer block, norms first, [B, tokens, width] -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise InputError(f"A width of {width} cannot be shared out among {heads} heads; give a multiple.")
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """The tokens after attention among themselves and the MLP."""
        qkv = self.qkv(self.norms[0](tokens_BTD)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        tokens_BTD = tokens_BTD + self.out(attention(q, k, v).transpose(1, 2).flatten(2))
        return tokens_BTD + self.mlp(self.norms[1](tokens_BTD))


class ViT(nn.Module):
    """A vision transformer without a class token: the head reads the mean of the tokens. Its stages are its blocks.

    Args: patch: side of a patch in pixels; it divides the image's sides.
    """

    def __init__(
        self, *, num_classes: int, image_shape: Shape = (1, 8, 8), width: int = 32, depth: int = 4, heads: int = 4,
        patch: int = 2,
    ) -> None:  # fmt: skip
        super().__init__()
        channels, height, across = image_shape
        if height % patch or across % patch:
            raise InputError(f"Patches of {patch} pixels do not fill an image of {height} x {across}.")
        self.num_classes, self.image_shape = num_classes, image_shape
        self.stages = tuple(f"blocks.{number}" for number in range(depth))
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(nn.init.trunc_normal_(
            self.patches.weight.new_empty(1, height // patch * (across // patch), width), std=0.02
        ))  # fmt: skip
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        tokens_BTD = self.patches(image).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens_BTD)).mean(1))


class MLP(nn.Module):
    """Layers with GELU on the flat image; each is a stage."""

    def __init__(self, *, num_classes: int, image_shape: Shape = (1, 8, 8), width: int = 64, depth: int = 2) -> None:
        super().__init__()
        channels, height, across = image_shape
        self.num_classes, self.image_shape = num_classes, image_shape
        self.stages = tuple(f"layers.{number}" for number in range(depth))
        sizes = [channels * height * across, *[width] * depth]
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in pairwise(sizes)))
        self.head = nn.Linear(width, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        return self.head(self.layers(image.flatten(1)))


def timm_network(name: str, *, num_classes: int, image_shape: Shape, num_stages: int = 4, **options: Any) -> nn.Module:
    """One of timm's classifiers, with random weights unless `pretrained` is among the options.

    Args: options: of timm.create_model; num_stages: so many of timm's feature modules, evenly spaced, up to the last.

    Raises: MissingExtra if timm, or the torchvision that it imports, is not there; InputError for an unknown name.
    """
    try:
        timm = import_module("timm")
    except (ImportError, RuntimeError) as e:  # torchvision without its operators is a RuntimeError
        if isinstance(e, ImportError) and e.name == "timm":
            raise MissingExtra("timm's networks need the package timm", "vision") from e
        # PyPI's torchvision is built for CUDA: beside the CPU build of torch its import fails, and breaks others'.
        raise MissingExtra(
            f"timm cannot be imported ({e}): the torchvision that it needs runs with CUDA builds of torch only. On a "
            "CPU take ResNet, ViT or MLP of workbench.policies.vision.networks; with a GPU install the extra",
            "vision",
        ) from e
    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:3]
        raise InputError(f"timm has no network {name!r}{'; it has ' + ', '.join(near) if near else ''}.")
    net = timm.create_model(name, num_classes=num_classes, in_chans=image_shape[0], **options)
    info = net.feature_info
    paths = [feature["module"] for feature in (info if isinstance(info, list) else info.info)]
    count = min(num_stages, len(paths))
    net.image_shape = image_shape
    net.stages = tuple(paths[-1 - (count - 1 - number) * len(paths) // count] for number in range(count))
    return net


def _groups(channels: int) -> int:
    """Groups of about four channels."""
    return max(1, channels // 4) if channels % 4 == 0 else 1
