"""Calibration of a reward model: predicted probability of a preference against its observed frequency."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.functional.clusters import clustered_mean


@dataclass(frozen=True)
class Bin:
    """Pairs whose predicted probability is in [low, high)."""

    low: float
    high: float
    predicted: float  # mean predicted probability of the pairs in the bin
    observed: float  # share of these pairs in which the prediction held
    count: int
    error: float  # standard error of `observed`, clustered; nan for pairs of one cluster


@dataclass(frozen=True)
class Reliability:
    """Calibration curve of a pairwise scorer; bins without pairs are omitted."""

    bins: tuple[Bin, ...]
    ece: float  # expected calibration error: mean of |predicted - observed|, weighted by pairs per bin
    squared: float  # mean of (predicted - observed)^2 less its expectation under perfect calibration; may be negative
    brier: float  # mean squared error of the predicted probability; 0.25 for an uninformative scorer
    pairs: int

    @property
    def rmsce(self) -> float:
        """Root of `squared`, 0 for a negative one: the calibration error without the floor that noise gives `ece`."""
        return math.sqrt(max(0.0, self.squared))

    def to_json(self) -> dict[str, Any]:
        """Return plain containers, in which an undefined standard error (nan) is null."""
        raw = asdict(self)
        raw["bins"] = [one | {"error": None if math.isnan(one["error"]) else one["error"]} for one in raw["bins"]]
        return raw


def reliability(gaps: Tensor, bins: int = 10, clusters: Tensor | None = None) -> Reliability:
    """Compute the calibration of sigmoid(gap) as the probability that the chosen response is preferred.

    Which response a record calls chosen is the outcome and is not known beforehand. Therefore every pair counts in the
    direction that the scorer predicts, p = sigmoid(|gap|) in [0.5, 1], and the prediction held if gap > 0 (counted as
    one half if gap = 0). Bins span [0.5, 1]; a curve over [0, 1] would be this one and its mirror image.

    `ece` of a perfectly calibrated scorer is above 0, because the observed frequency of a bin is noisy; `squared`
    subtracts its squared standard error in each bin (Kumar, Liang and Ma 2019, arXiv 1909.10155, definition 4.1), which
    makes it unbiased for bins of two clusters or more; others are left out of it.

    Args:
        gaps: r_chosen - r_rejected in the units of the training loss (logits), [P].
        bins: Number of bins of equal width.
        clusters: Cluster index of each pair, any integers, [P]; None: every pair is its own cluster.

    Raises:
        ValueError: If there are no pairs.
    """
    if not len(gaps):
        raise ValueError("reliability needs at least one pair")
    gaps = gaps.detach().double().cpu()
    predicted = torch.sigmoid(gaps.abs())
    held = torch.where(gaps > 0, 1.0, torch.where(gaps < 0, 0.0, 0.5)).double()
    clusters = torch.arange(len(gaps)) if clusters is None else clusters.cpu()
    width = 0.5 / bins
    index = ((predicted - 0.5) / width).long().clamp(max=bins - 1)
    made, error, squared, counted = [], 0.0, 0.0, 0
    for number in range(bins):
        inside = index == number
        count = int(inside.sum())
        if not count:
            continue
        p = predicted[inside].mean().item()
        o, standard_error = clustered_mean(held[inside], torch.ones(count), clusters[inside])
        made.append(Bin(0.5 + number * width, 0.5 + (number + 1) * width, p, o, count, standard_error))
        error += count * abs(p - o)
        if not math.isnan(standard_error):
            squared += count * ((p - o) ** 2 - standard_error**2)
            counted += count
    brier = (held * (1 - predicted).square() + (1 - held) * predicted.square()).mean().item()
    return Reliability(tuple(made), error / len(gaps), squared / max(counted, 1), brier, len(gaps))


def histogram(chosen: Tensor, rejected: Tensor, bins: int = 40) -> dict[str, list[float]]:
    """Return histograms of chosen and rejected scores over common bins: edges [bins+1], counts [bins] each."""
    both = torch.cat([chosen, rejected]).detach().double().cpu()
    low, high = both.min().item(), both.max().item()
    high = high if high > low else low + 1.0
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)

    def counts(scores: Tensor) -> list[float]:
        return torch.histc(scores.detach().double().cpu(), bins, low, high).tolist()

    return {"edges": edges.tolist(), "chosen": counts(chosen), "rejected": counts(rejected)}
