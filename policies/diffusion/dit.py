"""A tiny diffusion transformer for 8x8 images; its attention is the house's, so that it also runs in forward mode."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.kernels.attention import attention
from workbench.policies.diffusion.networks import Conditioning, scaled, zeroed
from workbench.policies.diffusion.schedules import Prediction, RectifiedFlow, Schedule


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-Zero): [B, L, width].

    Source: Peebles and Xie 2023, arXiv 2212.09748, sec. 3.2; the gates start at 0, the block as the identity.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = zeroed(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(F.silu(cond))[:, None].chunk(6, -1)
        x = x + gate * self._attend(self.norm_attention(x) * (1 + scale) + shift)
        return x + gate_mlp * self.mlp(self.norm_mlp(x) * (1 + scale_mlp) + shift_mlp)

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, L, width / H]
        return self.attention_out(attention(q, k, v).transpose(1, 2).flatten(2))


class DiT(nn.Module):
    """A transformer over patches with adaLN-Zero, learned positions and class embedding; 8x8x1 by default.

    Args: shape: [channels, height, width] of an image, both sides multiples of `patch`; width, depth, heads: of the
        transformer ("blocks.0" ... are the module paths of its blocks); the rest as `networks.MLP`.
    Raises: InputError for sides or heads that do not divide.
    """

    def __init__(
        self,
        shape: Sequence[int] = (1, 8, 8),
        patch: int = 2,
        width: int = 64,
        depth: int = 3,
        heads: int = 4,
        schedule: Schedule | None = None,
        prediction: Prediction = "flow",
        num_classes: int = 0,
        second_time: bool = False,
        logvar: bool = False,
    ) -> None:
        super().__init__()
        channels, height, breadth = shape
        if height % patch or breadth % patch or width % heads:
            raise InputError(
                f"A DiT of shape {shape}: patch {patch} must divide its sides, {heads} heads width {width}."
            )
        self.shape, self.patch = tuple(shape), patch
        self.schedule: Schedule = schedule or RectifiedFlow()
        self.prediction: Prediction = prediction
        self.num_classes = num_classes
        self.cond = Conditioning(width, self.schedule, num_classes, second_time, logvar)
        self.input = nn.Linear(channels * patch**2, width)
        self.positions = nn.Parameter(0.02 * torch.randn(height * breadth // patch**2, width))
        self.blocks = nn.ModuleList([DiTBlock(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.output = zeroed(nn.Linear(width, channels * patch**2))

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        """x [B, channels, height, width], t [B], c [B] long, r [B] -> like x."""
        cond = self.cond(t, c, r)
        h = self.input(self._patches(scaled(x, t, self.schedule))) + self.positions
        for block in self.blocks:
            h = block(h, cond)
        shift, scale = self.modulation(F.silu(cond))[:, None].chunk(2, -1)
        return self._image(self.output(self.norm(h) * (1 + scale) + shift))

    def log_variance(self, t: Tensor) -> Tensor:
        """Of the learned loss weight, [B]."""
        return self.cond.log_variance(t)

    def _patches(self, x: Tensor) -> Tensor:
        """[B, channels, height, width] -> [B, L, channels patch patch], rows first."""
        return F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)

    def _image(self, patches: Tensor) -> Tensor:
        return F.fold(patches.transpose(1, 2), self.shape[1:], self.patch, stride=self.patch)
