"""Best of n: against all subsets, against a simulated policy, and against closed forms."""

import itertools
import math

import pytest
import torch

from rlhf.functional.best_of_n import best_of_n_kl, best_of_n_weights, expected_best, fit_log_law, kl_bound


def test_expected_best_is_the_mean_over_all_subsets():
    torch.manual_seed(0)
    scores = torch.randn(7, 5)
    best = expected_best(scores)
    assert sorted(best) == [1, 2, 4, 5]
    for k, value in best.items():
        subsets = list(itertools.combinations(range(5), k))
        plain = sum(scores[:, list(subset)].max(dim=1).values.mean().item() for subset in subsets) / len(subsets)
        assert value == pytest.approx(plain, abs=1e-6)
    assert best[1] == pytest.approx(scores.mean().item(), abs=1e-6)


def test_the_kl_bound_of_best_of_k():
    """log n - (n-1)/n (Beirami et al. 2024): 0 for one, exact where all scores differ and responses are many."""
    assert kl_bound(1) == 0
    assert kl_bound(8) == pytest.approx(math.log(8) - 7 / 8)
    # Best of n over m equally likely responses in order of score: P(i) = (i/m)^n - ((i-1)/m)^n.
    for n in (2, 4, 8):
        for m, slack in ((10, 0.5), (100000, 1e-3)):
            p = [(i / m) ** n - ((i - 1) / m) ** n for i in range(1, m + 1)]
            kl = sum(q * math.log(q * m) for q in p if q > 0)
            assert kl <= kl_bound(n) + 1e-9 and kl > kl_bound(n) - slack


def test_the_fit_of_gain_against_log_k():
    assert fit_log_law({1: 0.0, 2: 0.3 * math.log(2), 8: 0.3 * math.log(8)}) == pytest.approx((0.3, 1.0))
    assert fit_log_law({1: 0.0, 2: 0.0}) == (0.0, 0.0)
    # Uniform scores: E[max of k] = k/(k+1), which flattens out.
    slope, explained = fit_log_law({k: k / (k + 1) - 0.5 for k in (1, 2, 4, 8, 16)})
    assert 0 < slope < 0.3 and explained < 0.99


def test_equal_scores_share_their_weight():
    """The best of each subset by score, a random one of equals, measured by another number; over all subsets."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 3, (6, 7), generator=generator).float()
    values = torch.randn(6, 7, generator=generator, dtype=torch.float64)
    for n in range(1, 8):
        weights = best_of_n_weights(scores, n)
        assert weights.sum(dim=1).tolist() == pytest.approx([1.0] * 6)
        for prompt in range(6):
            means = []
            for subset in itertools.combinations(range(7), n):
                best = max(scores[prompt, i] for i in subset)
                means.append(sum(values[prompt, i] for i in subset if scores[prompt, i] == best)
                             / sum(scores[prompt, i] == best for i in subset))  # fmt: skip
            expected = sum(means) / len(means)
            assert float((weights[prompt] * values[prompt]).sum()) == pytest.approx(float(expected))


@pytest.mark.parametrize("n", [0, 5])
def test_more_responses_than_were_sampled_have_no_best(n):
    with pytest.raises(ValueError, match=f"n={n} must be between 1 and the 4"):
        best_of_n_weights(torch.zeros(2, 4), n)


def test_the_kl_is_that_of_the_best_of_n_of_a_known_policy():
    """Two levels of score of probability 1/2 each; scores that never repeat; one level."""
    scores = torch.tensor([[1.0] * 4 + [2.0] * 4]).repeat(1, 500)
    for n in (1, 2, 8):
        low = 0.5**n
        expected = low * math.log(low / 0.5) + (1 - low) * math.log((1 - low) / 0.5)
        assert best_of_n_kl(scores, n).item() == pytest.approx(expected)
        assert best_of_n_kl(torch.randperm(4000)[None].float(), n).item() == pytest.approx(kl_bound(n), abs=2e-3)
        assert best_of_n_kl(torch.zeros(1, 10), n).item() == pytest.approx(0.0)  # no choice, no divergence
