import math

import pytest
import torch

from rlhf.functional.clusters import clustered_mean

generator = torch.Generator().manual_seed(0)


def test_singleton_clusters_give_the_usual_standard_error():
    values = torch.randn(50, generator=generator, dtype=torch.float64)
    mean, error = clustered_mean(values, torch.ones(50), torch.arange(50))
    assert mean == pytest.approx(values.mean().item())
    assert error == pytest.approx(values.std().item() / math.sqrt(50))


def test_duplicated_values_do_not_reduce_the_error():
    values, index = torch.randn(20, generator=generator), torch.arange(20)
    once = clustered_mean(values, torch.ones(20), index)
    twice = clustered_mean(values.repeat(2), torch.ones(40), index.repeat(2))
    assert twice == pytest.approx(once)


def test_weights_are_counts():
    values, counts = torch.tensor([1.0, 0.0, 0.5]), torch.tensor([1, 3, 2])
    by_weight = clustered_mean(values, counts.float(), torch.tensor([4, 9, 2]))
    by_count = clustered_mean(
        values.repeat_interleave(counts), torch.ones(6), torch.arange(3).repeat_interleave(counts)
    )
    assert by_weight == pytest.approx(by_count)


def test_the_error_is_that_of_repeated_experiments():
    """A thousand experiments of 60 clusters of one to four values that share a term: the deviation of their means."""
    means, errors = [], []
    for _ in range(1000):
        sizes = torch.randint(1, 5, (60,), generator=generator)
        clusters = torch.arange(60).repeat_interleave(sizes)
        shared = torch.randn(60, generator=generator)[clusters]
        values = shared + 0.5 * torch.randn(len(clusters), generator=generator)
        mean, error = clustered_mean(values, torch.ones(len(clusters)), clusters)
        means.append(mean)
        errors.append(error)
    assert sum(errors) / len(errors) == pytest.approx(torch.tensor(means).std().item(), rel=0.1)


def test_one_cluster_has_no_error_and_no_cluster_has_no_mean():
    mean, error = clustered_mean(torch.tensor([1.0, 0.0]), torch.ones(2), torch.zeros(2))
    assert mean == 0.5 and math.isnan(error)
    for weights in (torch.ones(0), torch.zeros(1)):
        with pytest.raises(ValueError, match="needs an observation with a positive weight"):
            clustered_mean(torch.ones(len(weights)), weights, torch.zeros(len(weights)))
