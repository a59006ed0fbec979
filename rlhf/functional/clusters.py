"""Means over observations that come in groups, such as several pairs of one prompt, and how sure they are."""

from torch import Tensor

from rlhf.functional.statistics import clustered


def clustered_mean(values: Tensor, weights: Tensor, clusters: Tensor) -> tuple[float, float]:
    """Return the weighted mean of ``values`` and its standard error, as ``statistics.clustered``, of tensors.

    Args:
        values: Observations, [N].
        weights: What each weighs, not negative, [N].
        clusters: Which cluster each is of, any integers, [N].

    Returns:
        Mean and standard error; the error is nan for a single cluster.

    Raises ValueError where nothing weighs anything.
    """
    found = clustered(values.double().tolist(), weights.double().tolist(), clusters.tolist())
    return found.mean, found.se
