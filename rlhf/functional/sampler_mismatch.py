"""Difference between a sampler's log-probabilities and the policy's, and importance weights that correct it.

A sampler in another precision or engine draws from a distribution that is not quite the policy's, so that a policy
gradient on its responses is biased (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
training"). Shapes: B responses, R tokens.
"""

from typing import Literal

import torch
from torch import Tensor

from rlhf.functional.ratio import capped_ratio

SamplerCorrection = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

SEQUENCE_LEVEL = ("sequence_truncate", "sequence_mask")
TRUNCATES = ("token_truncate", "sequence_truncate")


def correction_weights(
    logp: Tensor, sampler_logp: Tensor, mask: Tensor, mode: SamplerCorrection, low: float | None, high: float | None
) -> tuple[Tensor, Tensor]:
    """Return weights [B, R] of the policy-gradient term, without gradient, and where a bound changed them [B, R].

    The weight is `pi(token) / pi_sampler(token)` with the policy before the updates, or the product over a response for
    all its tokens (``sequence_*``). Beyond the bounds it is truncated to them (truncated importance sampling, Yao et
    al. 2025), or 0 (``*_mask``; IcePop, Ling team 2025). These are TRL's `vllm_importance_sampling_mode`.

    Args:
        logp: Log-probabilities of the policy before the updates, [B, R].
        sampler_logp: Log-probabilities of the sampler, [B, R].
        mask: Response mask, [B, R].
        mode: Level of the ratio, and what happens beyond the bounds; "none": the ratio of each token, unbounded.
        low: Lower bound of the ratio, None: none.
        high: Upper bound of the ratio, None: none.
    """
    gap = torch.where(mask.bool(), logp - sampler_logp, 0.0).detach()
    if mode in SEQUENCE_LEVEL:
        gap = gap.sum(dim=1, keepdim=True).expand_as(gap)
    ratio = capped_ratio(gap)
    beyond = torch.zeros_like(mask, dtype=torch.bool)
    if mode != "none" and low is not None:
        beyond = beyond | (ratio < low)
    if mode != "none" and high is not None:
        beyond = beyond | (ratio > high)
    if mode in TRUNCATES:
        return ratio.clamp(min=low, max=high), beyond
    return ratio.masked_fill(beyond, 0.0), beyond


def probability_errors(logp: Tensor, sampler_logp: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return `exp(|logp - sampler_logp|)` and `|logp - sampler_logp|` of each token, [B, R]; 1 and 0 where masked.

    The mean over tokens of the first is NeMo RL's `token_mult_prob_error`.
    """
    gap = torch.where(mask.bool(), (logp - sampler_logp).abs(), 0.0)
    return capped_ratio(gap), gap
