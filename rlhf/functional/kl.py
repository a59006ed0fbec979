"""Per-token estimators of KL(policy || reference) from samples of the policy.

Schulman, "Approximating KL divergence" (2020). All take log-probabilities of the sampled tokens, any shape, and
return that shape. k1 is unbiased and may be negative; k2 is biased, never negative; k3 is unbiased, never negative.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from rlhf.functional.ratio import capped

KLEstimator = Literal["k1", "k2", "k3"]


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log(p / q). Right inside a reward; its gradient as a loss has zero mean and must not be used."""
    return logp - ref_logp


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log(p / q)^2 / 2."""
    return 0.5 * (logp - ref_logp).square()


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """q/p - 1 - log(q / p), by expm1 so that nearly equal models do not cancel to noise; q/p at most exp(20)."""
    log_ratio = ref_logp - logp
    return torch.expm1(capped(log_ratio)) - log_ratio


ESTIMATORS: dict[KLEstimator, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def adaptive_beta(beta: float, kl: float, n: int, target: float, horizon: float) -> float:
    """Next KL coefficient of the proportional controller of Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.

    `beta * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon)`; `kl` in nats per sequence (summed over its tokens,
    mean over sequences), `n` sequences seen since the last call, `horizon` in sequences. `n / horizon` is held to at
    most 1, so that beta stays positive and moves by at most a fifth per call.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return beta * (1.0 + error * min(n / horizon, 1.0))
