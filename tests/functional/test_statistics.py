"""Standard errors of means: by hand, against tables, and against the naive ones where nothing repeats."""

import math
import statistics

import pytest

from rlhf.data.data import Data
from rlhf.data.records import cluster_key
from rlhf.functional.statistics import clustered, estimate, paired, t_quantile, t_within


def test_a_cluster_robust_error_by_hand():
    """Mean 4; sums of residuals -5, -1 and +6; sqrt(3/2 * 62) / 5."""
    found = estimate([1, 2, 3, 4, 10], ["a", "a", "b", "b", "c"])
    assert found.mean == 4 and (found.count, found.clusters) == (5, 3)
    assert found.se == pytest.approx(math.sqrt(93) / 5)
    low, high = found.interval()
    assert (low, high) == pytest.approx((4 - 4.302653 * found.se, 4 + 4.302653 * found.se))


def test_singletons_give_the_naive_error():
    values = [0.3, -1.2, 4.0, 2.5, 0.0, 7.7]
    naive = statistics.stdev(values) / math.sqrt(6)
    for found in (estimate(values), estimate(values, list("abcdef"))):
        assert (found.mean, found.se, found.clusters) == pytest.approx((statistics.mean(values), naive, 6))


def test_duplicated_rows_do_not_reduce_the_error():
    values, names = [0.3, -1.2, 4.0], ["x", "y", "z"]
    once, thrice = estimate(values, names), estimate(values * 3, names * 3)
    assert (thrice.mean, thrice.se, thrice.clusters) == pytest.approx((once.mean, once.se, 3))
    assert estimate(values * 3).se < once.se / 1.9  # the naive error, which ignores the repetition


def test_a_weighted_mean_is_a_ratio_estimate():
    """(1*1 + 3*0 + 2*0.5) / 6 = 1/3; residuals 2/3, -1 and 1/3."""
    found = clustered([1, 0, 0.5], [1, 3, 2], [4, 9, 2])
    assert found.mean == pytest.approx(1 / 3)
    assert found.se == pytest.approx(math.sqrt(3 / 2 * (4 / 9 + 1 + 1 / 9)) / 6)


def test_a_paired_difference_is_clustered():
    gap = paired([0, 0, 0, 1], [1, 2, 0, 0], ["a", "a", "b", "b"])  # gaps 1, 2, 0, -1; sums of residuals 2 and -2
    assert gap.mean == 0.5 and gap.se == pytest.approx(math.sqrt(2 * 8) / 4) and gap.clusters == 2
    assert gap.z == pytest.approx(0.5) and gap.wins == 0.625
    assert math.isnan(paired([0, 0], [1, 2], ["a", "a"]).se)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (29, 2.0452), (120, 1.9799), (100_000, 1.96)],
)
def test_quantiles_equal_those_of_tables(freedom: int, quantile: float):
    assert t_quantile(freedom) == pytest.approx(quantile, abs=1e-4)
    assert t_within(t_quantile(freedom), freedom) == pytest.approx(0.95)


def test_quantiles_at_another_confidence_level():
    assert t_quantile(10, 0.99) == pytest.approx(3.1693, abs=1e-4)
    assert t_quantile(1, 0.5) == pytest.approx(1.0)


def test_held_out_prompts_of_the_testbed_repeat_their_questions():
    """Under several prefixes: 400 prompts of the default world are 157 pairs of person and topic."""
    asked = Data("prompt", "testbed", 1, 400, 96).load().validation
    assert len({prompt.messages for prompt in asked}) == 400
    assert len({cluster_key(prompt) for prompt in asked}) == 157
