"""Loss reduction that does not depend on how a batch is split over micro-batches or ranks."""

from torch import Tensor


def weighted_mean(losses: Tensor, weights: Tensor, total: Tensor | float | int) -> Tensor:
    """Return `sum(losses * weights) / total`, a scalar. Losses of weight 0 are not read.

    `total` is the sum of weights over the *whole* batch: all micro-batches and all ranks, not only this part. The sum
    of the results of the parts is then the mean over the whole batch, however it was split.
    """
    counted = weights != 0
    return (losses.masked_fill(~counted, 0.0) * weights).sum() / total
