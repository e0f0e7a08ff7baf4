"""Losses between a student's and a teacher's logits or features: pure functions, one value for each image.

Letters: B images, C classes; a feature is [B, …] as `connectors` says. Logarithms are natural; the teacher's side
gets no gradient. A term takes the mean over the step with `view.mean`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.errors import InputError
from workbench.kernels.divergences import Divergence, DivergenceSpec, divergence, log_probs

_KL = (Divergence("forward_kl"),)


def distillation(student_BC: Tensor, teacher_BC: Tensor, temperature: float, standardise: bool = False) -> Tensor:
    """temperature² KL(teacher ‖ student) of the tempered distributions, [B] nats.

    Args: standardise: z-score each row of both sides' logits before the temperature (arXiv 2403.01427).
    Source: Hinton et al. 2015 (arXiv 1503.02531), sec. 2; the square keeps the gradient's scale.
    """
    spec = DivergenceSpec(terms=_KL, temperature=temperature, standardise=standardise)
    return temperature**2 * divergence(student_BC, teacher_BC, spec)


def soft_cross_entropy(student_BC: Tensor, target_BC: Tensor) -> Tensor:
    """-Σ target ln q, [B] nats; the target's rows need not sum to 1. Gradient (Σ target) q - target."""
    return -(target_BC.detach() * log_probs(student_BC)).sum(-1)


def mean_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """Mean over teachers of their softmax, [B, C]; not the softmax of the mean logits."""
    return torch.stack([log_probs(one).exp() for one in logits]).mean(0)


def enhanced_target(teacher_BC: Tensor, label_B: Tensor, gamma: float) -> Tensor:
    """(p + m)^gamma - m, [B, C], with p the teacher's probabilities and m the one-hot label.

    The label's class has (1 + p)^gamma - 1, the others p^gamma; p itself at gamma = 1.
    Source: arXiv 2310.19444; as in the released code.
    """
    p = log_probs(teacher_BC).exp()
    mask = F.one_hot(label_B, p.shape[-1]).to(p.dtype)
    return (p + mask).pow(gamma) - mask


def feature_l2(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of equally shaped features, [B]. Source: FitNets (arXiv 1412.6550), eq. 3."""
    if student.shape != teacher.shape:
        raise InputError(f"Features of shapes {[*student.shape]} and {[*teacher.shape]}: connect them first (`align`).")
    return (student - teacher.detach()).square().flatten(1).mean(1)


def attention_transfer(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Squared distance of the spatial attention maps, [B], in 0 to 2; channels may differ.

    A map is the mean over channels of the squares, scaled to length 1; the larger one is pooled to the smaller.
    Source: arXiv 1612.03928, eq. 2 with p = 2 (squared norm, as in the released code, but summed over places).
    """
    if student_BCHW.ndim != 4 or teacher_BCHW.ndim != 4:
        shapes = f"{[*student_BCHW.shape]} and {[*teacher_BCHW.shape]}"
        raise InputError(f"Attention transfer compares maps [B, C, H, W], not features of shapes {shapes}.")
    size = (min(student_BCHW.shape[2], teacher_BCHW.shape[2]), min(student_BCHW.shape[3], teacher_BCHW.shape[3]))
    maps = [
        F.normalize(F.adaptive_avg_pool2d(feature.square().mean(1), size).flatten(1), dim=1)
        for feature in (student_BCHW, teacher_BCHW.detach())
    ]
    return (maps[0] - maps[1]).square().sum(1)


def relational(student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Tensor:
    """Relational distillation: distances between images, and angles at each, are to be alike, [B].

    The value of an image is the mean over its pairs (and its angles) with the others of this micro-batch, so that,
    unlike the other losses, it depends on who is in the micro-batch. Features are flattened; their widths may differ.
    Source: arXiv 1904.05068 (Huber with threshold 1; mean distance of the micro-batch as unit).
    """
    rows = [feature.flatten(1) for feature in (student, teacher.detach())]
    num = len(rows[0])
    if num < 2:
        raise InputError("Relational distillation needs two images or more in a micro-batch.")
    others = ~torch.eye(num, dtype=torch.bool, device=student.device)
    distances, angles = zip(*(_relations(one, others) for one in rows), strict=True)
    by_distance = F.smooth_l1_loss(*distances, reduction="none").sum(1) / (num - 1)
    by_angle = F.smooth_l1_loss(*angles, reduction="none").sum((1, 2)) / (num - 1) ** 2
    return distance_weight * by_distance + angle_weight * by_angle


def _relations(rows_BD: Tensor, others_BB: Tensor) -> tuple[Tensor, Tensor]:
    """Distances [B, B] in units of their mean, and cosines [B, B, B] of the angle at the first of three images."""
    differences = rows_BD[None] - rows_BD[:, None]
    # The derivative of a length is infinite at 0, so on the diagonal: it is kept out of the graph.
    squares = differences.square().sum(-1).masked_fill(~others_BB, 1.0).clamp(min=1e-12)
    distances = squares.sqrt().masked_fill(~others_BB, 0.0)
    units = differences / squares.sqrt()[..., None]
    return distances / (distances.sum() / others_BB.sum()), units @ units.transpose(1, 2)


def linear_cka(a: Tensor, b: Tensor) -> Tensor:
    """Linear centred kernel alignment of two features over the same images, a scalar in 0 to 1.

    1 for features that are orthogonal maps and multiples of each other, whatever their widths.
    Source: arXiv 1905.00414, linear kernels.
    """
    x, y = (feature.flatten(1) - feature.flatten(1).mean(0) for feature in (a, b))
    return (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
