"""Per-token estimators of KL(policy || reference) from samples of the policy.

Source: Schulman, "Approximating KL divergence" (2020). All estimators take log-probabilities of the sampled tokens, any
shape, and return that shape. k1 is unbiased and may be negative; k2 is biased and never negative; k3 is unbiased and
never negative.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from rlhf.functional.ratio import capped

KLEstimator = Literal["k1", "k2", "k3"]


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Return log(p / q).

    It is correct inside a reward. Its gradient as a loss has zero mean, so it must not be used as a loss.
    """
    return logp - ref_logp


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Return log(p / q)^2 / 2."""
    return 0.5 * (logp - ref_logp).square()


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Return q/p - 1 - log(q / p), where q/p is at most exp(20).

    It uses expm1, so that nearly equal models do not lose all precision to cancellation.
    """
    log_ratio = ref_logp - logp
    return torch.expm1(capped(log_ratio)) - log_ratio


ESTIMATORS: dict[KLEstimator, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def adaptive_beta(beta: float, kl: float, n: int, target: float, horizon: float) -> float:
    """Return the next KL coefficient of the proportional controller of Ziegler et al. 2019, section 2.2.

    The rule is `beta * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon)` (arXiv 1909.08593). `n / horizon` is
    bounded by 1, so that beta stays positive and changes by at most a fifth per call.

    Args:
        beta: Current coefficient.
        kl: KL in nats per sequence (summed over tokens, mean over sequences).
        n: Sequences since the last call.
        target: KL to hold, in nats per sequence.
        horizon: Time constant, in sequences.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return beta * (1.0 + error * min(n / horizon, 1.0))
