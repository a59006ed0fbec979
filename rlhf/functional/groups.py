"""Critic-free policy gradients: baselines from the K responses to one prompt. B = prompts * K, R response tokens.

The K responses to a prompt are K consecutive rows.
"""

from typing import Literal

import torch
from torch import Tensor

from rlhf.functional.masking import SumOver, masked_var

Scale = Literal["group", "batch", "none"]
LengthNormalization = Literal["token", "sequence", "constant"]

EPSILON = 1e-4  # added to standard deviations before division; TRL, OpenRLHF and verl use 1e-4 to 1e-9
SPREAD = 1e-6  # scores of a group that differ by no more than this count as equal


def grouped(scores: Tensor, samples: int) -> Tensor:
    """Reshape scores [B] to groups [B / K, K].

    Raises:
        ValueError: For fewer than two responses per prompt, which have no baseline, or a size that K does not divide.
    """
    if samples < 2 or scores.dim() != 1 or len(scores) % samples:
        raise ValueError(f"scores of shape {tuple(scores.shape)} must be groups of {samples} (at least 2)")
    return scores.view(-1, samples)


def deviation(scores: Tensor, sum_over: SumOver | None = None) -> Tensor:
    """Return the unbiased standard deviation of all scores [B]; with `sum_over` over all ranks."""
    return masked_var(scores, torch.ones_like(scores, dtype=torch.bool), sum_over).sqrt()


def group_advantages(scores: Tensor, samples: int, scale: Scale = "group", sum_over: SumOver | None = None) -> Tensor:
    """Return `(r - mean of its group) / (std + 1e-4)`, [B] (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    `scale` selects the unbiased standard deviation: of the group, of the whole batch, or 1 with "none". "none" is Dr.
    GRPO (arXiv 2503.20783): dividing by the group's deviation gives more weight to questions that are nearly always or
    never solved. With `sum_over` the batch is that of all ranks.
    """
    groups = grouped(scores, samples)
    centred = groups - groups.mean(1, keepdim=True)
    if scale == "group":
        centred = centred / (groups.std(1, keepdim=True) + EPSILON)
    elif scale == "batch":
        centred = centred / (deviation(scores, sum_over) + EPSILON)
    return centred.reshape(-1)


def leave_one_out(scores: Tensor, samples: int) -> Tensor:
    """Return `r_i - mean of the other K - 1`, [B]: an unbiased baseline (Kool et al. 2019; arXiv 2402.14740)."""
    groups = grouped(scores, samples)
    others = (groups.sum(1, keepdim=True) - groups) / (samples - 1)
    return (groups - others).reshape(-1)


def has_spread(scores: Tensor, samples: int) -> Tensor:
    """Return whether the responses of each row's group have different scores, [B] bool.

    A group without spread has advantage 0 and gives no gradient.
    """
    groups = grouped(scores, samples)
    spread = groups.amax(1) - groups.amin(1) > SPREAD
    return spread.repeat_interleave(samples)


def length_weights(mask: Tensor, normalization: LengthNormalization, longest: int) -> tuple[Tensor, Tensor]:
    """Return the weight of each token's loss [B, R] and each row's share of the denominator [B].

    The loss is `sum(weight * loss) / sum(denominator)`.

    - "token": mean over all tokens, so long responses have more weight (DAPO, section 3.3);
    - "sequence": mean over responses of the mean over a response's tokens (GRPO, DeepSeekMath eq. 3), so each token of
      a long wrong response is penalised less;
    - "constant": sum over tokens divided by responses times `longest`, the same constant for all (Dr. GRPO).
    """
    weights = mask.float()
    if normalization == "token":
        return weights, weights.sum(1)
    ones = torch.ones(len(mask), device=mask.device)
    if normalization == "sequence":
        return weights / weights.sum(1, keepdim=True).clamp(min=1.0), ones
    return weights, ones * float(longest)
