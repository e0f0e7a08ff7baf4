"""A student classifier beside its teacher: same decisions, similar features, errors where it is unsure.

A student can be as accurate as its teacher and still decide otherwise on many inputs (Stanton et al. 2021, arXiv
2106.05945): accuracy and agreement are two figures. Calibration error is in `calibration_error`.

Verified by: tests/evals/test_student_quality.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from workbench.errors import InputError
from workbench.evals.generation import as_rows, as_vector

Rows = NDArray[np.float64]


def top1_agreement(student: Any, teacher: Any) -> float:
    """Share of inputs on which both score the same class highest; of equal scores the first class counts.

    Args: student, teacher: logits or probabilities [N, C] of the same inputs in the same order.
    Raises: InputError for different shapes, values that are not finite.
    """
    a, b = as_rows(student, "The student's scores"), as_rows(teacher, "The teacher's scores")
    if a.shape != b.shape or a.shape[1] < 2:
        raise InputError(f"Scores must be [N, C] with 2 classes or more on both sides, not {a.shape} and {b.shape}.")
    return float((a.argmax(axis=1) == b.argmax(axis=1)).mean())


def linear_cka(a: Any, b: Any) -> float:
    """Linear centred kernel alignment of features [N, D] and [N, E] of the same inputs, 0 to 1.

    1 for features that differ by a rotation, a shift and one scale. It is biased: with fewer inputs than features it is
    high for unrelated features too.
    Raises: InputError for different numbers of inputs, features without any spread.
    Source: Kornblith et al. 2019 (arXiv 1905.00414) sec. 3: |B^T A|^2 / (|A^T A| |B^T B|), Frobenius, centred.
    """
    first, second = as_rows(a, "The first features", at_least=2), as_rows(b, "The second features", at_least=2)
    if len(first) != len(second):
        raise InputError(f"Both features must be of the same inputs: {len(first)} and {len(second)} rows.")
    centred = []
    for rows, name in ((first, "first"), (second, "second")):
        spread = rows - rows.mean(axis=0)
        largest = float(np.abs(spread).max())
        if largest <= 1e-12 * float(np.abs(rows).max()):
            raise InputError(f"The {name} features are the same for all {len(rows)} inputs: no similarity is defined.")
        centred.append(spread / largest)  # the fourth powers below stay in range
    x, y = centred
    across, own_x, own_y = (float(np.linalg.norm(left.T @ right)) for left, right in ((y, x), (x, x), (y, y)))
    return across**2 / (own_x * own_y)


class RiskCoverage(NamedTuple):
    """Selective prediction: answer only the inputs of highest confidence.

    Args:
        aurc: area under the risk-coverage curve, 0 to 1 (papers often print it times 1,000).
        excess: what it is above the same errors in the best order, all errors last.
        risks: [N] error share of the 1, 2, … N most confident inputs.
    """

    aurc: float
    excess: float
    risks: Rows


def risk_coverage(confidences: Any, correct: Any) -> RiskCoverage:
    """The risk-coverage curve of a classifier and the mean of its N risks.

    Args: confidences: [N], any scale, e.g. the highest probability; correct: [N], 0 or 1. Inputs of equal confidence
        count as in the mean over all their orders, so that the order of the input decides nothing.
    Raises: InputError for different lengths, none, or correctness other than 0 and 1.
    Source: Geifman et al. 2019 (arXiv 1805.08206) sec. 3; the excess is exact, not their approximation.
    """
    confidence, right = as_vector(confidences, "The confidences"), as_vector(correct, "The correctness")
    if len(confidence) != len(right) or not np.isin(right, (0, 1)).all():
        raise InputError(f"{len(confidence)} confidences need as many answers that are 0 or 1, not {len(right)}.")
    num = np.arange(1, len(right) + 1)
    _, group, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    errors_within = np.bincount(group, 1 - right) / sizes
    risks = np.cumsum(np.repeat(errors_within, sizes)) / num
    best = np.maximum(num - right.sum(), 0) / num
    return RiskCoverage(float(risks.mean()), float(risks.mean() - best.mean()), risks)
