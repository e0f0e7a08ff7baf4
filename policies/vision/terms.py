"""Terms that methods for image classifiers share. A batch has `image` [B, C, H, W] and, for most, `label` [B].

torch is imported when a term is called, so that a method's phases can be listed without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from workbench.policies.loop.view import View

#: Where every method of this backend reads its batch: the table handed to the run under this name.
TABLE = "train"
#: The key of a network's logits among its outputs: the path of the network itself.
LOGITS = ""


def outputs(view: View, role: str, paths: Sequence[str] = ()) -> Mapping[str, Tensor]:
    """A role's logits (`LOGITS`) and what its modules at `paths` put out, in one pass that all terms share.

    Only the role whose turn it is has a graph.
    """
    import torch

    from workbench.policies.taps import Taps

    def run() -> dict[str, Tensor]:
        model = view.role(role)
        with nullcontext() if role == view.trains else torch.no_grad(), Taps(model, paths) as taps:
            return {LOGITS: model(view["main"]["image"]), **taps.outputs()}

    return view.shared(f"outputs/{role}/{','.join(paths)}", run)


def logits(view: View, role: str) -> Tensor:
    """[B, C]."""
    return outputs(view, role)[LOGITS]


def num_classes(model: nn.Module) -> int:
    """Of a network of this backend."""
    return int(getattr(model, "num_classes"))  # noqa: B009 (a module's attributes are typed as modules)


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """Mean cross-entropy with the labels, in nats an image."""

    coefficient: float = 1.0

    def __call__(self, view: View) -> Tensor:
        """The share of the micro-batch."""
        import torch.nn.functional as F

        return view.mean(F.cross_entropy(logits(view, "student").float(), view["main"]["label"], reduction="none"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation:
    """Mean of temperature² KL(teacher ‖ student), in nats an image (arXiv 1503.02531); needs no labels.

    Args: standardise: z-score both sides' logits first (arXiv 2403.01427).
    """

    temperature: float = 4.0
    standardise: bool = False
    teacher: str = "teacher"
    coefficient: float = 1.0

    def __call__(self, view: View) -> Tensor:
        """The share of the micro-batch."""
        from workbench.policies.vision.losses import distillation

        student, teacher = logits(view, "student"), logits(view, self.teacher)
        return view.mean(distillation(student, teacher, self.temperature, self.standardise))


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureMatch:
    """A feature of the student, through a connector, against one of the teacher.

    Args:
        student, teacher: module paths.
        loss: "l2" (FitNets), "attention" (maps only), "relational" (within the micro-batch).
    `modules` makes the connector; give it to the phase.
    """

    student: str
    teacher: str
    loss: Literal["l2", "attention", "relational"] = "l2"
    coefficient: float = 1.0

    def modules(self, models: Mapping[str, Any]) -> dict[str, nn.Module]:
        """The connector; the losses that compare any two widths need none."""
        from workbench.policies.vision.connectors import align, feature_shapes

        if self.loss != "l2":
            return {}
        shapes = [feature_shapes(models[role], [path])[path] for role, path in self._taps()]
        return {self._name(): align(*shapes)}

    def _taps(self) -> list[tuple[str, str]]:
        return [("student", self.student), ("teacher", self.teacher)]

    def _name(self) -> str:
        return f"align-{self.student}-{self.teacher}".replace(".", "/")

    def __call__(self, view: View) -> Tensor:
        """The share of the micro-batch."""
        from workbench.policies.vision import losses

        mine, theirs = (outputs(view, role, [path])[path] for role, path in self._taps())
        if self.loss == "l2":
            return view.mean(losses.feature_l2(view.module(self._name())(mine), theirs))
        return view.mean((losses.attention_transfer if self.loss == "attention" else losses.relational)(mine, theirs))
