"""One way to average a loss, so that splitting a batch over micro-batches or processes does not change it."""

from torch import Tensor


def weighted_mean(losses: Tensor, weights: Tensor, total: Tensor | float | int) -> Tensor:
    """`sum(losses * weights) / total`: a scalar. Losses of weight 0 are not read.

    `total` is the sum of weights over the *whole* batch: every micro-batch and every process, not only this piece.
    The sum of the pieces' results is then the mean over the whole batch, however it was cut.
    """
    counted = weights != 0
    return (losses.masked_fill(~counted, 0.0) * weights).sum() / total
