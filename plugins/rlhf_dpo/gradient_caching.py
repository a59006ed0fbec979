"""Gradient caching for losses that couple all examples of a batch (GradCache, Gao et al. 2021, arXiv 2101.06983).

Such a loss cannot be computed by micro-batch. It is computed once on the log-probabilities of the whole batch, without
their graph, together with its derivative by each of them. Every micro-batch then runs a second time, and the derivative
is the factor of its log-probabilities' gradient. The size of a micro-batch changes memory and time, not the gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.objective import Metrics


@dataclass(frozen=True)
class CachedLosses:
    """Losses of a whole batch, split by micro-batch."""

    losses: list[Tensor]  # [N] each, without gradient
    metrics: list[Metrics]  # [N] each
    derivatives: list[tuple[Tensor, ...]]  # of the weighted sum of all losses by each kind of log-probability, [N]

    def slope(self, index: int, *logps: Tensor) -> Tensor:
        """Return values [N] whose gradient by the log-probabilities [N] of a micro-batch is the whole batch's."""
        first, *rest = (d * logp for d, logp in zip(self.derivatives[index], logps, strict=True))
        return sum(rest, first)


def cache_losses(
    objective: Callable[..., tuple[Tensor, Metrics]],
    logps: Sequence[Tensor],
    weight: Tensor,
    own: slice,
    sizes: Sequence[int],
) -> CachedLosses:
    """Compute the losses of a whole batch and their derivatives by its log-probabilities.

    Args:
        objective: Function of the log-probabilities, in the order of ``logps``, that returns losses [B] and metrics.
        logps: Log-probabilities of the whole batch, of all ranks, [B] each.
        weight: Weight of each loss in the sum that is differentiated, [B].
        own: Rows of this rank.
        sizes: Number of rows of each of this rank's micro-batches.
    """
    leaves = [logp.detach().clone().requires_grad_(torch.is_grad_enabled()) for logp in logps]
    losses, metrics = objective(*leaves)
    if torch.is_grad_enabled():
        derivatives = torch.autograd.grad((losses * weight).sum(), leaves)
    else:
        derivatives = tuple(torch.zeros_like(leaf) for leaf in leaves)
    metric_parts = {name: values[own].split(sizes) for name, values in metrics.items()}
    return CachedLosses(
        losses=list(losses.detach()[own].split(sizes)),
        metrics=[{name: values[i] for name, values in metric_parts.items()} for i in range(len(sizes))],
        derivatives=list(zip(*(one[own].split(sizes) for one in derivatives), strict=True)),
    )
