"""Clustered means of tensors: observations come in groups, such as several pairs of one prompt."""

from torch import Tensor

from rlhf.functional.statistics import clustered


def clustered_mean(values: Tensor, weights: Tensor, clusters: Tensor) -> tuple[float, float]:
    """Return the weighted mean of ``values`` and its standard error (see ``statistics.clustered``).

    Args:
        values: Observations, [N].
        weights: Weight of each observation, not negative, [N].
        clusters: Cluster index of each observation, any integers, [N].

    Returns:
        Mean and standard error; the error is nan for a single cluster.

    Raises:
        ValueError: If the weights sum to 0.
    """
    found = clustered(values.double().tolist(), weights.double().tolist(), clusters.tolist())
    return found.mean, found.se
