"""Importance ratios from log-ratios: finite whatever the log-ratio, and what clipping them does to the gradient."""

import torch
from torch import Tensor

#: Log-ratios above this have the ratio of this: exp(20) is 5e8, and float32 overflows beyond 88.
LARGEST = 20.0


def capped(x: Tensor) -> Tensor:
    """Return `min(x, 20)`, any shape, with a slope of 1 everywhere: beyond 20 a loss still pulls `x` down."""
    return x.detach().clamp(max=LARGEST) + (x - x.detach())


def capped_exp(x: Tensor) -> Tensor:
    """Return `exp(min(x, 20))`, any shape; its slope is itself everywhere, so at most exp(20) and never 0 beyond."""
    return torch.exp(capped(x))


def clip_removes(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Return where clipping a ratio to `[1 - low, 1 + high]` removes the gradient, bool, any shape.

    That is where the ratio has left the interval on the side to which the advantage pushes it (N+ detail: Huang et al.
    2024, arXiv 2403.17031): a ratio outside whose advantage pulls it back keeps its gradient.
    """
    return ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
