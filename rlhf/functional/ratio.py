"""Importance ratios from log-ratios: a bound that keeps them finite, and the clipped surrogate."""

import torch
from torch import Tensor

#: Upper bound of log-ratios: exp(20) is 5e8, and exp overflows float32 beyond 88.
LARGEST = 20.0


def capped(x: Tensor) -> Tensor:
    """Return `min(x, 20)`, any shape, with a slope of 1 everywhere, so that a loss still decreases `x` beyond 20."""
    return x.detach().clamp(max=LARGEST) + (x - x.detach())


def capped_ratio(x: Tensor) -> Tensor:
    """Return `exp(min(x, 20))`, any shape.

    Its slope equals its value everywhere: at most exp(20), and never 0 beyond the bound.
    """
    return torch.exp(capped(x))


def is_gradient_clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Return where clipping a ratio to `[1 - low, 1 + high]` removes the gradient, bool, any shape.

    The gradient is removed where the ratio has left the interval on the side towards which the advantage pushes it (N+
    detail: Huang et al. 2024, arXiv 2403.17031). A ratio outside the interval keeps its gradient if the advantage pulls
    it back.
    """
    return ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Return `max(-A * ratio, -A * clamp(ratio, 1 - low, 1 + high))`, any shape (arXiv 1707.06347, eq. 7, negated).

    The two separate bounds are those of DAPO, section 3.1.
    """
    ratio = capped_ratio(log_ratio)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - low, 1.0 + high))
