"""Shaped rewards, advantages and returns of sampled responses. Shapes: B sequences, R response tokens.

Masks [B, R] are 1 on a response's tokens, its end-of-sequence token included; responses start at column 0.
"""

import torch
from torch import Tensor

from rlhf.functional.kl import ESTIMATORS, KLEstimator
from rlhf.functional.masking import SumOver, last_index, masked_var


def shaped_rewards(
    score: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float, kl_estimator: KLEstimator = "k1"
) -> Tensor:
    """Return per-token rewards [B, R]: `-beta * KL_t`, plus the score [B] at the last real token.

    This is the reward of InstructGPT (arXiv 2203.02155, eq. 2) written per token, as in Ziegler et al. 2019. The last
    real token is the end-of-sequence token, or the last sampled token of a truncated response. `logp` and `ref_logp`
    [B, R] come from the same forward path at the sampling temperature. A row without tokens gets no reward.
    """
    mask = mask.bool()
    penalty = ESTIMATORS[kl_estimator](logp, ref_logp) * beta
    at_last = torch.arange(mask.shape[-1], device=mask.device) == last_index(mask).unsqueeze(-1)
    rewards = torch.where(at_last, score.to(logp.dtype).unsqueeze(-1) - penalty, -penalty)
    return torch.where(mask, rewards, torch.zeros_like(rewards))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, discount: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Return advantages and returns [B, R] by generalised advantage estimation (arXiv 1506.02438, eq. 16).

    `delta_t = r_t + discount * V_{t+1} - V_t` with `V = 0` after the last real token, and
    `A_t = delta_t + discount * gae_lambda * A_{t+1}`; returns are `A + V`. Both are 0 where `mask` is 0. Masked tokens
    in the middle of a response (a tool's result) are skipped: they are not time steps.
    """
    mask = mask.bool()
    zeros = torch.zeros_like(values)
    rewards, values = torch.where(mask, rewards, zeros), torch.where(mask, values, zeros)
    advantages = torch.zeros_like(values)
    running = next_value = values.new_zeros(len(values))
    for t in range(values.shape[1] - 1, -1, -1):
        real = mask[:, t]
        delta = rewards[:, t] + discount * next_value - values[:, t]
        running = torch.where(real, delta + discount * gae_lambda * running, running)
        next_value = torch.where(real, values[:, t], next_value)
        advantages[:, t] = torch.where(real, running, zeros[:, t])
    return advantages, advantages + values


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, sum_over: SumOver | None = None) -> Tensor:
    """Return `1 - var(returns - values) / var(returns)` over the masked tokens: a scalar.

    It is 1 for a perfect critic and 0 for a constant one. With `sum_over` the variances are taken over all ranks.
    """
    left, whole = (masked_var(x, mask, sum_over) for x in (returns - values, returns))
    return 1.0 - left / whole.clamp(min=1e-8)


def sequence_kl(logp: Tensor, ref_logp: Tensor, mask: Tensor, kl_estimator: KLEstimator = "k1") -> Tensor:
    """Return the KL estimate of each sequence [B] in nats: the sum over its tokens."""
    per_token = ESTIMATORS[kl_estimator](logp, ref_logp)
    return torch.where(mask.bool(), per_token, torch.zeros_like(per_token)).sum(-1)
