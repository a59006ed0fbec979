"""Means, paired differences and their standard errors, for everything that reports one. No torch here.

Observations that repeat or paraphrase each other form one cluster. Standard errors are those of cluster totals (Cochran
1977, eq. 6.13; Miller 2024, arXiv 2411.00640, eq. 4); intervals use Student's t with one degree of freedom fewer than
clusters.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

LEVEL = 0.95  # confidence level of intervals
FEW = 30  # clusters; below this z is misleading, and the interval by Student's t is shown


@dataclass(frozen=True)
class Estimate:
    """Mean with its standard error, number of observations and number of clusters."""

    mean: float
    se: float
    count: int
    clusters: int

    def interval(self) -> tuple[float, float]:
        """Return the 95% confidence interval by Student's t; nan for a single cluster."""
        return _interval(self.mean, self.se, self.clusters)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.se:.3f}"


@dataclass(frozen=True)
class Difference:
    """Difference after minus before, paired by prompt.

    `z` is the mean in standard errors (beyond about 2 it is unlikely to be chance; with fewer than 30 clusters use
    `interval`). `wins` is the share of prompts on which `after` is better; ties count half.
    """

    mean: float
    se: float
    z: float
    wins: float
    clusters: int

    def interval(self) -> tuple[float, float]:
        """Return the 95% confidence interval by Student's t; nan for a single cluster."""
        return _interval(self.mean, self.se, self.clusters)

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.se:.3f} ({self.surely()})"

    def surely(self) -> str:
        """Return the significance as text: z, or the 95% interval for fewer than 30 clusters.

        Beside a difference that may be chance is the smallest one that would have been found (`minimum_detectable`).
        """
        low, high = self.interval()
        text = f"95% {low:+.3f} to {high:+.3f}" if 1 < self.clusters < FEW else f"z {self.z:+.1f}"
        return f"{text}; detectable: {minimum_detectable(self):.2g}" if self.se > 0 and low < 0 < high else text


def _interval(mean: float, se: float, clusters: int) -> tuple[float, float]:
    half = t_quantile(clusters - 1) * se if clusters > 1 else math.nan
    return mean - half, mean + half


def clustered(values: Sequence[float], weights: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Return the weighted mean and its standard error where values of one cluster are not independent.

    With S_c = sum of w v and W_c = sum of w over cluster c, the mean is the ratio m = sum S_c / sum W_c, and its error
    is that of the ratio's linearisation over n clusters:

        se = sqrt(n / (n - 1) * sum (S_c - m W_c)^2) / sum W_c

    With equal weights and one cluster per value this is the standard deviation over sqrt(n). It is nan for one cluster.

    Raises:
        ValueError: If the weights do not sum to more than 0.
    """
    parts: dict[Hashable, list[tuple[float, float]]] = {}
    for value, weight, cluster in zip(values, weights, clusters, strict=True):
        parts.setdefault(cluster, []).append((value, weight))
    total = math.fsum(weights)
    if not total > 0:
        raise ValueError("clustered needs an observation with a positive weight")
    mean = math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / total
    n = len(parts)
    if n == 1:
        return Estimate(mean, math.nan, len(values), 1)
    residuals = (math.fsum((value - mean) * weight for value, weight in part) for part in parts.values())
    squares = math.fsum(residual**2 for residual in residuals)
    return Estimate(mean, math.sqrt(n / (n - 1) * squares) / total, len(values), n)


def estimate(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Return the mean and its standard error.

    Without ``clusters`` the values are independent. A single value has no standard error (nan).
    """
    n = len(values)
    if clusters is not None or n < 2:
        return clustered(values, [1.0] * n, range(n) if clusters is None else clusters)
    return Estimate(*mean_and_error(values), n, n)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard error of two or more independent values.

    This is `estimate` for curves, which need it at each step.
    """
    n = len(values)
    mean = math.fsum(values) / n
    squares = math.fsum([(value - mean) ** 2 for value in values])
    return mean, math.sqrt(squares / (n - 1) / n)


def paired(before: Sequence[float], after: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Difference:
    """Return the difference of two series over the same prompts."""
    gaps = [b - a for a, b in zip(before, after, strict=True)]
    gap = estimate(gaps, clusters)
    if gap.mean == 0:
        z = 0.0
    elif gap.se == 0:
        z = math.copysign(math.inf, gap.mean)
    else:
        z = gap.mean / gap.se
    wins = sum(1.0 if value > 0 else 0.5 if value == 0 else 0.0 for value in gaps) / len(gaps)
    return Difference(gap.mean, gap.se, z, wins, gap.clusters)


def minimum_detectable(difference: Estimate | Difference, power: float = 0.8) -> float:
    """Return the smallest true effect that a test at 95% confidence finds with a probability of ``power``.

    (t_{0.975} + t_{power}) standard errors, by Student's t with one degree of freedom fewer than clusters (Cohen 1988;
    Miller 2024, arXiv 2411.00640, section 5); nan for one cluster. A null result says nothing of smaller effects.
    """
    freedom = difference.clusters - 1
    if freedom < 1:
        return math.nan
    return (t_quantile(freedom) + t_quantile(freedom, 2 * power - 1)) * difference.se


def hierarchical_bootstrap(
    values: Sequence[Sequence[float]],
    clusters: Sequence[Hashable] | None = None,
    draws: int = 10_000,
    seed: int = 0,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Return the percentile interval of the mean over training seeds and prompts, both drawn with replacement.

    The prompts are the same for all seeds, so that a draw takes the same prompts from each (the crossed bootstrap of
    Owen 2007, whose variance is not too small). Resampling prompts alone would give an interval for these seeds only.

    Args:
        values: One row for each of S seeds, of one value for each of P prompts, such as paired differences.
        clusters: Cluster of each prompt, P; clusters are drawn whole. None: every prompt is its own.
        draws: Number of bootstrap samples.
        seed: Seed of the draws.
        level: Confidence level.

    Raises:
        ValueError: For rows of different lengths, or none.
    """
    import numpy as np

    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise ValueError("hierarchical_bootstrap needs one row of values for each seed")
    names = list(range(table.shape[1])) if clusters is None else list(clusters)
    index = {name: number for number, name in enumerate(dict.fromkeys(names))}
    member = np.zeros((len(names), len(index)))
    member[np.arange(len(names)), [index[name] for name in names]] = 1
    sums, sizes = table @ member, member.sum(axis=0)  # [S, C] and [C]
    generator = np.random.default_rng(seed)
    seeds, groups = sums.shape
    by_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)  # how often each is drawn
    by_group = generator.multinomial(groups, np.full(groups, 1 / groups), size=draws)
    means = ((by_seed @ sums) * by_group).sum(axis=1) / (seeds * (by_group @ sizes))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@lru_cache
def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """Return the half-width of an interval of that level in standard errors: 12.71, 4.30, ..., 1.96 at 95%.

    Found by bisection of `t_within`.
    """
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def t_within(t: float, freedom: int) -> float:
    """Return P(|T| <= t) of Student's t with integer degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    if freedom == 1:
        total = 0.0
    for k in range(3 if odd else 2, freedom, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
