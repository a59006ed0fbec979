"""Policy gradients without a critic: baselines from the K replies to one prompt. B = prompts * K, R reply tokens.

The K replies to a prompt stand in K consecutive rows.
"""

from typing import Literal

import torch
from torch import Tensor

from rlhf.functional.masking import SumOver, masked_var
from rlhf.functional.ratio import capped_exp

Scale = Literal["group", "batch", "none"]
LengthNormalization = Literal["token", "sequence", "constant"]

EPSILON = 1e-4  # added to a standard deviation that is divided by; TRL, OpenRLHF and verl have 1e-4 to 1e-9
SPREAD = 1e-6  # scores of a group that differ by no more than this are equal


def grouped(scores: Tensor, samples: int) -> Tensor:
    """[B] -> [B / K, K]. Raises ValueError for less than two replies a prompt, which have no baseline."""
    if samples < 2 or scores.dim() != 1 or len(scores) % samples:
        raise ValueError(f"{tuple(scores.shape)} scores are no groups of {samples} (at least 2)")
    return scores.view(-1, samples)


def deviation(scores: Tensor, sum_over: SumOver | None = None) -> Tensor:
    """Unbiased standard deviation of all scores [B], of all processes together where `sum_over` adds up over them."""
    return masked_var(scores, torch.ones_like(scores, dtype=torch.bool), sum_over).sqrt()


def group_advantages(scores: Tensor, samples: int, scale: Scale = "group", sum_over: SumOver | None = None) -> Tensor:
    """`(r - mean of its group) / (std + 1e-4)`, [B] (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    The standard deviation (unbiased) is that of the group, of the whole batch, or 1 with "none": Dr. GRPO (arXiv
    2503.20783), because dividing by the group's makes questions that are nearly always or never solved count more.
    The batch is that of all processes where `sum_over` adds up a tensor over them.
    """
    groups = grouped(scores, samples)
    centred = groups - groups.mean(1, keepdim=True)
    if scale == "group":
        centred = centred / (groups.std(1, keepdim=True) + EPSILON)
    elif scale == "batch":
        centred = centred / (deviation(scores, sum_over) + EPSILON)
    return centred.reshape(-1)


def leave_one_out(scores: Tensor, samples: int) -> Tensor:
    """`r_i - mean of the other K - 1`, [B]: an unbiased baseline (Kool et al. 2019; arXiv 2402.14740)."""
    groups = grouped(scores, samples)
    others = (groups.sum(1, keepdim=True) - groups) / (samples - 1)
    return (groups - others).reshape(-1)


def has_spread(scores: Tensor, samples: int) -> Tensor:
    """[B] bool: whether the replies of the row's group score differently, so that there is something to learn."""
    groups = grouped(scores, samples)
    spread = groups.amax(1) - groups.amin(1) > SPREAD
    return spread.repeat_interleave(samples)


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """`max(-A * ratio, -A * clamp(ratio, 1 - low, 1 + high))`, any shape (two bounds: DAPO, section 3.1)."""
    ratio = capped_exp(log_ratio)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - low, 1.0 + high))


def length_weights(mask: Tensor, normalization: LengthNormalization, longest: int) -> tuple[Tensor, Tensor]:
    """(weight of every token's loss [B, R], what each row adds to the divisor [B]): `loss = sum(w * l) / sum(divisor)`.

    - "token": mean over all tokens, so long replies count more (DAPO, section 3.3);
    - "sequence": mean over replies of the mean over a reply's tokens (GRPO, DeepSeekMath eq. 3), which makes each token
      of a long wrong reply cost less;
    - "constant": sum over tokens divided by replies times `longest`, the same constant for all (Dr. GRPO).
    """
    weights = mask.float()
    if normalization == "token":
        return weights, weights.sum(1)
    ones = torch.ones(len(mask), device=mask.device)
    if normalization == "sequence":
        return weights / weights.sum(1, keepdim=True).clamp(min=1.0), ones
    return weights, ones * float(longest)
