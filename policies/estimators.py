"""Estimators of KL divergences from the log-probabilities of sampled tokens alone, and the preference loss.

With x ~ student and r = log p_student(x) - log p_teacher(x) (natural logs, per token):
    k1 = r                   unbiased for reverse KL = KL(student‖teacher); may be negative; the expectation of its
                             gradient is 0: as a loss it trains nothing
    k2 = r² / 2              biased; its gradient is that of reverse KL (at fixed prefixes)
    k3 = exp(-r) - 1 + r     unbiased for reverse KL, >= 0; its gradient is that of FORWARD KL
    k3 weighted by the ratio p_student / p_sampler (stop gradient off): gradient of reverse KL, also off-policy
Sources: Schulman 2020, "Approximating KL divergence"; card 143 and 151 (gradients).
Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Kind = Literal["k1", "k2", "k3"]
# exp(88) is the last float32; a ratio beyond e^20 says that the sample is no sample of this policy.
_MAX_LOG_RATIO = 20.0


def kl_estimate(student_BT: Tensor, teacher_BT: Tensor, kind: Kind = "k3") -> Tensor:
    """k1, k2 or k3 of each token [B, T], in nats.

    Args: log-probabilities of tokens that the student sampled; the teacher's should carry no gradient.
    """
    log_ratio = student_BT - teacher_BT
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    return torch.expm1((-log_ratio).clamp(max=_MAX_LOG_RATIO)) + log_ratio


def ratio_weighted_k3(student_BT: Tensor, teacher_BT: Tensor, sampler_BT: Tensor, max_ratio: float = 10.0) -> Tensor:
    """k3 times p_student / p_sampler [B, T]: its gradient is that of reverse KL, also for an older sampler's tokens.

    Args: sampler_BT: log-probabilities under the policy that sampled; max_ratio: larger ratios are cut (bias, for less
        variance).
    """
    ratio = (student_BT - sampler_BT.detach()).clamp(max=_MAX_LOG_RATIO).exp().clamp(max=max_ratio)
    return ratio * kl_estimate(student_BT, teacher_BT, "k3")


def preference_loss(
    chosen_B: Tensor, rejected_B: Tensor, chosen_reference_B: Tensor, rejected_reference_B: Tensor, beta: float
) -> Tensor:
    """-log sigmoid(beta * (log-ratio of the chosen - log-ratio of the rejected)) [B] (DPO, 2305.18290, eq. 7).

    Args: summed log-probabilities of whole completions under the policy and under the frozen reference.
    """
    margin = (chosen_B - chosen_reference_B) - (rejected_B - rejected_reference_B)
    return -F.logsigmoid(beta * margin)
