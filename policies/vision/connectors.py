"""Small trainable modules between a student's features and what they are compared with.

They are built from shapes, which a pass of one empty image finds (`feature_shapes`), so in `Phase.modules`, before the
optimiser is made: what is built at the first batch is in no optimiser and stays as it was drawn.

A feature is a map (C, H, W), tokens (T, D) or a vector (D,), without the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.policies.taps import Taps
from workbench.policies.vision.networks import Block

FeatureShape = tuple[int, ...]


def feature_shapes(model: nn.Module, paths: Sequence[str]) -> dict[str, FeatureShape]:
    """Shape of what each module puts out for one image (`model.image_shape`); the model's mode is left as it was."""
    first = next(model.parameters())
    image = torch.zeros(1, *cast(Any, model).image_shape, device=first.device, dtype=first.dtype)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), Taps(model, paths) as taps:
            model(image)
            return {path: tuple(output.shape[1:]) for path, output in taps.outputs().items()}
    finally:
        model.train(was_training)


class Pooled(nn.Module):
    """Maps to the mean over places [B, C], tokens to their mean [B, D]; vectors as they are."""

    def forward(self, feature: Tensor) -> Tensor:
        """[B, width]."""
        if feature.ndim == 4:
            return feature.mean((2, 3))
        return feature.mean(1) if feature.ndim == 3 else feature


class Tokens(nn.Module):
    """Maps [B, C, H, W] to tokens [B, H x W, C]."""

    def forward(self, feature: Tensor) -> Tensor:
        """[B, T, D]."""
        return feature.flatten(2).transpose(1, 2)


def align(student: FeatureShape, teacher: FeatureShape) -> nn.Module:
    """A module from a student's feature to the shape of a teacher's.

    Equal shapes: the identity. Map to map: 1x1 convolution, then pooled (or repeated) to the teacher's places.
    Tokens, or a map as tokens, to equally many tokens: linear. Anything to a vector: mean, then linear.
    Raises: InputError for other pairs: there is no plain way from a vector to places.
    """
    if student == teacher:
        return nn.Identity()
    if len(teacher) == 1:
        return nn.Sequential(Pooled(), nn.Linear(_width(student), teacher[0]))
    if len(student) == len(teacher) == 3:
        convolution = nn.Conv2d(student[0], teacher[0], 1)
        if student[1:] == teacher[1:]:
            return convolution
        return nn.Sequential(convolution, nn.AdaptiveAvgPool2d(cast(tuple[int, int], teacher[1:])))
    if len(teacher) == 2:
        if len(student) == 3 and student[1] * student[2] == teacher[0]:
            return nn.Sequential(Tokens(), nn.Linear(student[0], teacher[1]))
        if len(student) == 2 and student[0] == teacher[0]:
            return nn.Linear(student[1], teacher[1])
    raise InputError(f"No connector leads from a feature of shape {student} to {teacher}; choose another pair of taps.")


def logit_head(feature: FeatureShape, last: FeatureShape, num_classes: int, num_later: int) -> nn.Module:
    """A branch from a stage into the space of logits, [B, *feature] -> [B, num_classes].

    Args: last: shape of the last stage's feature; num_later: stages that follow this one.
    Maps are halved by separable convolutions, which double the channels, until they are as small as the last stage's;
    tokens pass as many blocks as stages follow, one at least. Then mean and linear.
    Source: arXiv 2310.19444; as in the released code, without its merging of patches and its batch norms.
    """
    if len(feature) == 3:
        blocks, channels, height = [], feature[0], feature[1]
        while height > last[1]:
            blocks.append(separable_halving(channels, 2 * channels))
            channels, height = 2 * channels, (height + 1) // 2
        if not blocks:
            blocks.append(nn.Conv2d(channels, channels, 1))
        return nn.Sequential(*blocks, Pooled(), nn.Linear(channels, num_classes))
    width = feature[-1]
    if len(feature) == 2:
        heads = next(count for count in (4, 2, 1) if width % count == 0)
        tokens = [Block(width, heads) for _ in range(max(num_later, 1))]
        return nn.Sequential(*tokens, Pooled(), nn.LayerNorm(width), nn.Linear(width, num_classes))
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))


def separable_halving(channels: int, out: int) -> nn.Module:
    """Two depthwise-separable 3x3 convolutions, the first with stride 2, [B, C, H, W] -> [B, out, H / 2, W / 2]."""
    layers: list[nn.Module] = []
    for width, stride in ((channels, 2), (out, 1)):
        layers += [
            nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
            nn.Conv2d(channels, width, 1, bias=False),
            nn.GroupNorm(1, width),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


def _width(shape: FeatureShape) -> int:
    return shape[0] if len(shape) == 3 else shape[-1]
