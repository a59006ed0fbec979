import math

import pytest
import torch

from rlhf.functional.calibration import histogram, reliability


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_calibration_error_by_hand():
    """Four pairs predicted at 0.8, of which three held; two at 0.6, of which none did: ECE (4*0.05 + 2*0.6) / 6."""
    gaps = torch.tensor([logit(0.8)] * 3 + [-logit(0.8)] + [-logit(0.6)] * 2, dtype=torch.float64)
    found = reliability(gaps, bins=5)
    assert [(one.count, round(one.predicted, 6), round(one.observed, 6)) for one in found.bins] == [
        (2, 0.6, 0.0),
        (4, 0.8, 0.75),
    ]
    assert found.ece == pytest.approx((4 * 0.05 + 2 * 0.6) / 6)
    # Squared standard errors: 3/16 / 3 of the four pairs, 0 of the two.
    assert found.squared == pytest.approx((4 * (0.0025 - 1 / 16) + 2 * 0.36) / 6)
    assert found.rmsce == pytest.approx(math.sqrt(found.squared))
    assert found.brier == pytest.approx((3 * 0.04 + 0.64 + 2 * 0.36) / 6)
    assert found.pairs == 6
    assert [one.error for one in found.bins] == pytest.approx([0.0, math.sqrt(4 / 3 * (3 / 16 + 9 / 16)) / 4])
    # The four pairs are of two questions: 2 - 2 * 3/4 of the first, 1 - 2 * 3/4 of the second.
    together = reliability(gaps, 5, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert together.bins[1].error == pytest.approx(math.sqrt(2 * (1 / 4 + 1 / 4)) / 4)
    assert math.isnan(together.bins[0].error) and together.to_json()["bins"][0]["error"] is None


def test_a_calibrated_scorer_has_no_error_and_an_overconfident_one_has():
    generator = torch.Generator().manual_seed(0)
    gaps = 2 * torch.randn(40000, generator=generator)
    held = torch.rand(40000, generator=generator) < torch.sigmoid(gaps)
    outcome = torch.where(held, gaps, -gaps)  # the winning response is the chosen one
    assert reliability(outcome).ece < 0.01
    assert reliability(3 * outcome).ece > 0.08


def test_the_debiased_error_of_a_calibrated_scorer_is_zero_on_average():
    """200 data sets of 200 pairs: the plain error has a floor, the debiased square is 0, or that of known bins."""
    generator = torch.Generator().manual_seed(0)

    def mean_errors(bias: float) -> tuple[float, float]:
        found = []
        for _ in range(200):
            gaps = torch.where(torch.rand(200, generator=generator) < 0.5, logit(0.6), logit(0.9)).double()
            held = torch.rand(200, generator=generator) < torch.sigmoid(gaps) - bias
            found.append(reliability(torch.where(held, gaps, -gaps), bins=5))
        return sum(one.ece for one in found) / 200, sum(one.squared for one in found) / 200

    ece, squared = mean_errors(0.0)
    assert ece > 0.025 and abs(squared) < 3e-4
    ece, squared = mean_errors(0.1)
    assert squared == pytest.approx(0.01, abs=1.5e-3)  # |predicted - observed| is 0.1 in both bins


def test_an_uninformative_scorer():
    found = reliability(torch.zeros(7))
    assert (found.ece, found.brier) == (0.0, 0.25) and found.bins[0].observed == 0.5


def test_large_gaps_and_no_pairs():
    assert reliability(torch.tensor([1e4, -1e4])).bins[-1].count == 2
    with pytest.raises(ValueError, match="^reliability needs at least one pair$"):
        reliability(torch.zeros(0))


def test_histogram_counts_every_response_once():
    counts = histogram(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([-1.0, 0.5]), bins=4)
    assert counts["edges"] == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert counts["chosen"] == [0, 0, 1, 2] and counts["rejected"] == [1, 0, 0, 1]
    assert sum(histogram(torch.ones(3), torch.ones(3))["chosen"]) == 3  # all equal
