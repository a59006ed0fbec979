"""Best-of-n as a policy: expectations over all subsets of n of N samples, and the KL to the sampling policy.

P prompts with N responses each, drawn from one policy. The best of n is the response with the highest of n scores,
chosen at random among equal ones.
"""

import math

import torch
from torch import Tensor


def powers(most: int) -> list[int]:
    """Return n = 1, 2, 4, ... and ``most``."""
    return sorted({2**power for power in range(most.bit_length())} | {most})


def best_of_n_weights(scores: Tensor, n: int) -> Tensor:
    """Return the probability that a response is the best of a random subset of n, [P, N] float64.

    With h responses that score at most as much as this one, and l that score less, it is

        (C(h, n) - C(l, n)) / C(N, n) / (h - l)

    so a mean with these weights is unbiased: it is the mean over all C(N, n) subsets.

    Args:
        scores: Scores of the responses, [P, N].
        n: Size of the subsets, 1 to N.

    Raises:
        ValueError: For n outside 1 to N.
    """
    total = scores.shape[1]
    if not 1 <= n <= total:
        raise ValueError(f"n={n} must be between 1 and the {total} responses to a prompt")
    low, high = _ranks(scores)
    subsets = torch.tensor([math.comb(i, n) / math.comb(total, n) for i in range(total + 1)], dtype=torch.float64)
    subsets = subsets.to(scores.device)
    return (subsets[high] - subsets[low]) / (high - low)


def best_of_n_kl(scores: Tensor, n: int) -> Tensor:
    """Estimate KL(best of n || policy) of each prompt from the ranks of its scores, in nats, [P] float64.

    The best of n has a score of at most s with probability F(s)^n, so its density ratio to the policy is
    (F(s)^n - F(s-)^n) / (F(s) - F(s-)); F is the distribution of the N scores. Scores that are all different give
    nearly log n - (n - 1)/n, the bound; equal ones, such as those of equal responses, give less.

    Args:
        scores: Scores of the responses, [P, N]. Equal responses must have equal scores.
        n: Number of responses that the policy chooses from.
    """
    low, high = (rank.double() / scores.shape[1] for rank in _ranks(scores))
    mass = high**n - low**n
    share = high - low
    # A level of c equal scores is counted c times, each time with 1/c of its mass.
    return (mass / (share * scores.shape[1]) * (mass / share).log()).sum(dim=1)


def kl_bound(n: int) -> float:
    """Return log n - (n-1)/n, an upper bound of KL(best of n || policy) in nats per response.

    Source: Beirami et al. 2024 (arXiv 2401.01879), theorem 1.
    """
    return math.log(n) - (n - 1) / n


def expected_best(scores: Tensor) -> dict[int, float]:
    """Return the mean over prompts of the expected best of n responses, for n of ``powers``, from scores [P, N]."""
    scores = scores.double()
    return {n: float((best_of_n_weights(scores, n) * scores).sum(dim=1).mean()) for n in powers(scores.shape[1])}


def fit_log_law(gains: dict[int, float]) -> tuple[float, float]:
    """Fit the least-squares line gain = a log n through n = 1.

    Args:
        gains: n -> expected best of n minus the mean response.

    Returns:
        Slope a, and the share of the gains' variance that the line explains.
    """
    points = [(math.log(n), gain) for n, gain in gains.items()]
    slope = sum(x * y for x, y in points) / max(sum(x * x for x, _ in points), 1e-12)
    mean = sum(y for _, y in points) / len(points)
    spread = sum((y - mean) ** 2 for _, y in points)
    left = sum((y - slope * x) ** 2 for x, y in points)
    return slope, 1.0 - left / spread if spread > 0 else 0.0


def _ranks(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many responses to the same prompt score less, and how many at most as much, [P, N] long each."""
    ordered = scores.sort(dim=1).values.contiguous()
    scores = scores.contiguous()
    return torch.searchsorted(ordered, scores), torch.searchsorted(ordered, scores, right=True)
