"""Whether a reward model's confidence is right: predicted probability of a preference against how often it held."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.functional.clusters import clustered_mean


@dataclass(frozen=True)
class Bin:
    """Pairs whose predicted probability lies in [low, high)."""

    low: float
    high: float
    predicted: float  # mean predicted probability of the pairs in it
    observed: float  # share of them in which the prediction held
    count: int
    error: float  # standard error of `observed`, clustered; nan for pairs of one cluster


@dataclass(frozen=True)
class Reliability:
    """The calibration curve of a pairwise scorer; bins without pairs are left out."""

    bins: tuple[Bin, ...]
    ece: float  # expected calibration error: mean of |predicted - observed|, bins weighed by their pairs
    brier: float  # mean squared error of the predicted probability; 0.25 for a scorer that knows nothing
    pairs: int

    def to_json(self) -> dict[str, Any]:
        """Return plain containers; null for an error that is not known."""
        raw = asdict(self)
        raw["bins"] = [one | {"error": None if math.isnan(one["error"]) else one["error"]} for one in raw["bins"]]
        return raw


def reliability(gaps: Tensor, bins: int = 10, clusters: Tensor | None = None) -> Reliability:
    """Calibration of sigmoid(gap) as the probability that the chosen reply is preferred.

    Which reply a record calls chosen is the outcome, not known beforehand: every pair counts in the direction in which
    the scorer predicts it, p = sigmoid(|gap|) in [0.5, 1], and held if gap > 0 (a half if gap = 0). So bins span
    [0.5, 1]; a curve over [0, 1] would be this one and its mirror image.

    Args:
        gaps: r_chosen - r_rejected in the units the loss was trained in (logits), [P].
        bins: Number of equal bins.
        clusters: Which cluster each pair is of, any integers, [P]; None: every pair is one of its own.

    Raises ValueError without pairs.
    """
    if not len(gaps):
        raise ValueError("reliability: no pairs")
    gaps = gaps.detach().double().cpu()
    predicted = torch.sigmoid(gaps.abs())
    held = torch.where(gaps > 0, 1.0, torch.where(gaps < 0, 0.0, 0.5)).double()
    clusters = torch.arange(len(gaps)) if clusters is None else clusters.cpu()
    width = 0.5 / bins
    index = ((predicted - 0.5) / width).long().clamp(max=bins - 1)
    made, error = [], 0.0
    for number in range(bins):
        inside = index == number
        count = int(inside.sum())
        if not count:
            continue
        p = predicted[inside].mean().item()
        o, standard_error = clustered_mean(held[inside], torch.ones(count), clusters[inside])
        made.append(Bin(0.5 + number * width, 0.5 + (number + 1) * width, p, o, count, standard_error))
        error += count * abs(p - o)
    brier = (held * (1 - predicted).square() + (1 - held) * predicted.square()).mean().item()
    return Reliability(tuple(made), error / len(gaps), brier, len(gaps))


def histogram(chosen: Tensor, rejected: Tensor, bins: int = 40) -> dict[str, list[float]]:
    """Counts of the scores of chosen and of rejected replies over common bins: edges [bins+1], counts [bins]."""
    both = torch.cat([chosen, rejected]).detach().double().cpu()
    low, high = both.min().item(), both.max().item()
    high = high if high > low else low + 1.0
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)

    def counts(scores: Tensor) -> list[float]:
        return torch.histc(scores.detach().double().cpu(), bins, low, high).tolist()

    return {"edges": edges.tolist(), "chosen": counts(chosen), "rejected": counts(rejected)}
