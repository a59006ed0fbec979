"""Standard errors of means: by hand, against tables, and against the naive ones where nothing repeats."""

import math
import statistics

import pytest

from rlhf.data.data import Data
from rlhf.data.records import cluster_key
from rlhf.functional.statistics import (
    Estimate,
    clustered,
    estimate,
    hierarchical_bootstrap,
    minimum_detectable,
    paired,
    t_quantile,
    t_within,
)


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


def test_the_minimum_detectable_effect_equals_that_of_tables():
    """9 degrees of freedom: 2.2622 for 95%, 0.8834 for a power of 80%; 2.8016 in the limit."""
    assert minimum_detectable(Estimate(0.1, 0.5, 10, 10)) == pytest.approx(0.5 * (2.2622 + 0.8834), abs=1e-3)
    assert minimum_detectable(paired([0.0] * 5000, [1.0, -1.0] * 2500)) == pytest.approx(2.8016 / 5000**0.5, rel=2e-3)
    assert math.isnan(minimum_detectable(estimate([1.0])))
    assert str(paired([0.0] * 5000, [1.0, -1.0] * 2500)) == "+0.000 ± 0.014 (z +0.0; detectable: 0.04)"
    assert str(paired([0.0] * 50, [1.0] * 49 + [0.9])) == "+0.998 ± 0.002 (z +499.0)"


def test_a_bootstrap_over_one_seed_is_that_over_prompts():
    """A mean of n values: the interval is nearly +-1.96 standard deviations (divisor n) over sqrt(n)."""
    values = [math.sin(7 * i) for i in range(200)]
    low, high = hierarchical_bootstrap([values])
    half = 1.96 * statistics.pstdev(values) / math.sqrt(200)
    assert (low, high) == pytest.approx(
        (statistics.mean(values) - half, statistics.mean(values) + half), abs=0.1 * half
    )
    # Values that repeat add nothing if their cluster is drawn whole.
    repeated = hierarchical_bootstrap([values * 3], [*range(200)] * 3)
    assert repeated == pytest.approx((low, high), abs=1e-9)


def test_a_bootstrap_covers_both_seeds_and_prompts():
    """value = seed effect + prompt effect: variance of the mean s^2/S + p^2/P (divisors S and P), from both alone."""
    seeds, prompts = [math.cos(3 * i) for i in range(12)], [math.sin(5 * i) for i in range(150)]
    low, high = hierarchical_bootstrap([[a + b for b in prompts] for a in seeds], draws=20_000)
    expected = math.sqrt(statistics.pvariance(seeds) / 12 + statistics.pvariance(prompts) / 150)
    assert (high - low) / 2 / 1.96 == pytest.approx(expected, rel=0.05)
    with pytest.raises(ValueError, match="one row of values for each seed"):
        hierarchical_bootstrap([])
