"""OFA-KD: every stage of the student is led into the space of logits and meets the teacher's final ones there.

Paper: "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation" (2310.19444,
    seed 77).
Equation: L = CE(z_S, y) + ℓ(z_S; γ) + Σ_k ℓ(z_k; γ) over stages k with logits z_k of a branch each, and
    ℓ(z; γ) = -Σ_c w_c log softmax(z)_c, w = (p + m)^γ - m, p = softmax(z_T), m the one-hot label. γ = 1: w = p.
    The teacher's features are not used, so the two may be CNN, ViT or MLP. Gradient by logits: (Σ w) q - w.
Deviations: tokens are not merged in the branches of a ViT, whose norms are by layer, of a CNN by group.
Verified by: tests/policies/vision/test_vision_ofa_kd.py; benchmarks/bench_vision.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.errors import InputError
from workbench.policies.catalog import Entry
from workbench.policies.nouns import Phase, Role, Stored
from workbench.policies.vision.terms import LOGITS, TABLE, logits, num_classes, outputs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from workbench.policies.loop.view import View


@dataclass(frozen=True, kw_only=True, slots=True)
class EnhancedTargets:
    """Mean of the labels' cross-entropy, ℓ of the student's logits, and ℓ of each branch's, in nats an image."""

    gamma: float
    stages: tuple[int, ...] | None
    coefficient: float = 1.0

    def __call__(self, view: View) -> Tensor:
        """The share of the micro-batch."""
        import torch.nn.functional as F

        from workbench.policies.vision.losses import enhanced_target, soft_cross_entropy

        paths = stage_paths(view.role("student"), self.stages)
        label, mine = view["main"]["label"], outputs(view, "student", paths)
        target = enhanced_target(logits(view, "teacher"), label, self.gamma)
        loss = F.cross_entropy(mine[LOGITS].float(), label, reduction="none")
        loss = loss + soft_cross_entropy(mine[LOGITS], target)
        for path in paths:
            loss = loss + soft_cross_entropy(view.module(branch_name(path))(mine[path]), target)
        return view.mean(loss)


def stage_paths(student: Any, stages: Sequence[int] | None) -> list[str]:
    """Module paths of the stages with these numbers from 1, or of all."""
    found: tuple[str, ...] = student.stages
    numbers = range(1, len(found) + 1) if stages is None else stages
    if wrong := [number for number in numbers if not 1 <= number <= len(found)]:
        raise InputError(f"The student has the stages 1 to {len(found)}, no stage {wrong[0]}.")
    return [found[number - 1] for number in numbers]


def branch_name(path: str) -> str:
    """Of a stage's branch among the modules, where a dot would name a role."""
    return f"branch-{path.replace('.', '/')}"


@dataclass(frozen=True, kw_only=True, slots=True)
class OfaKd:
    """Settings; γ of the paper for CIFAR-100 with a CNN student (1.5 for ImageNet).

    Args:
        gamma: of the target's enhancement; above 1 the label's class gains and the others lose.
        stages: numbers, from 1, of the stages that get a branch; None = all, () = logits only.
    """

    gamma: float = 1.0
    stages: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise InputError(f"gamma must be above 0, not {self.gamma}.")

    def phases(self) -> list[Phase]:
        """One phase; the branches train with the student and are dropped at its end."""
        return [
            Phase(
                name="distil",
                sources={"main": Stored(TABLE)},
                terms=[EnhancedTargets(gamma=self.gamma, stages=self.stages)],
                roles=[Role(name="teacher")],
                modules=self.modules,
            )
        ]

    def modules(self, models: Mapping[str, Any]) -> dict[str, nn.Module]:
        """A branch for each stage."""
        from workbench.policies.vision.connectors import feature_shapes, logit_head

        student = models["student"]
        every = list(student.stages)
        shapes, classes = feature_shapes(student, every), num_classes(student)
        return {
            branch_name(path): logit_head(shapes[path], shapes[every[-1]], classes, len(every) - 1 - every.index(path))
            for path in stage_paths(student, self.stages)
        }


METHOD = OfaKd
ENTRY = Entry(
    name="ofa-kd",
    seed=77,
    title="One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation",
    arxiv="2310.19444",
    backend="vision",
    family="vision-feature",
    signal="logits",
    access="logits",
    granularity="image",
    degree="off-policy",
    needs="a teacher model of any architecture with the student's classes; images with labels",
    evidence="identities; CNN of an MLP teacher on digits, 3 seeds; 30 % wrong labels: accuracy .671 -> .886, FitNets "
    "hint .733, no branches .841, but that is the weight of soft labels: without branches and soft labels x 4, .900; "
    "right labels (120): .889 -> .900, hint .917, KD .927: benchmarks/results/vision.md",
    reading="branches at the size of our small networks; loss and targets were read in the released code",
)
