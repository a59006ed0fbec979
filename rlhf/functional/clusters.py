"""Means over observations that come in groups, such as several pairs of one prompt, and how sure they are."""

import math

import torch
from torch import Tensor


def clustered_mean(values: Tensor, weights: Tensor, clusters: Tensor) -> tuple[float, float]:
    """Weighted mean of ``values`` and its standard error, where values of one cluster are not independent.

    With S_c = sum of w v and W_c = sum of w over cluster c, the mean is the ratio m = sum S_c / sum W_c, and its error
    that of the ratio's linearisation over n clusters (Cochran 1977, eq. 6.13; Miller 2024, arXiv 2411.00640, eq. 4):

        se = sqrt(n / (n - 1) * sum (S_c - m W_c)^2) / sum W_c

    Without weights and with a cluster each, that is the standard deviation over sqrt(n).

    Args:
        values: Observations, [N].
        weights: What each weighs, not negative, [N].
        clusters: Which cluster each is of, any integers, [N].

    Returns:
        Mean and standard error; the error is nan for a single cluster.

    Raises ValueError where nothing weighs anything.
    """
    _, index = torch.unique(clusters, return_inverse=True)
    n = int(index.max()) + 1 if len(index) else 0
    sums = torch.zeros(n, dtype=torch.float64).index_add_(0, index.cpu(), (values * weights).double().cpu())
    totals = torch.zeros(n, dtype=torch.float64).index_add_(0, index.cpu(), weights.double().cpu())
    total = totals.sum().item()
    if not total > 0:
        raise ValueError("clustered_mean: no observation has a weight")
    mean = sums.sum().item() / total
    if n == 1:
        return mean, math.nan
    residual = (sums - mean * totals).square().sum().item()
    return mean, math.sqrt(n / (n - 1) * residual) / total
