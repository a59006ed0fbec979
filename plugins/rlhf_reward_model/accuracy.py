"""Accuracy of a reward model on pairs, by grade, with standard errors."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.data.encoded_rows import EncodedComparison
from rlhf.data.records import GRADES
from rlhf.functional.clusters import clustered_mean

ALL = "all"  # pairs of every grade, and those without one


@dataclass(frozen=True)
class Accuracy:
    """Share of pairs whose chosen response scores higher, equal scores counted half."""

    accuracy: float
    standard_error: float | None  # clustered, as pairs of one question are correlated; None for one cluster
    pairs: int
    prompts: int
    clusters: int  # different questions; paraphrased prompts are one


def accuracies(comparisons: Sequence[EncodedComparison], right: Tensor) -> dict[str, Accuracy]:
    """Return the accuracy of all pairs and of those of each grade that occurs.

    Over all, a pair weighs 1 / the number of pairs of its comparison, as in ``val/accuracy``; within a grade 1, as in
    ``val/accuracy/GRADE``.

    Args:
        comparisons: The comparisons.
        right: 1, 0 or 1/2 for every pair of every comparison, in their order, [P].
    """
    rows = [(comparison, grade) for comparison in comparisons for *_, grade in comparison.pairs]
    prompt = numbered([tuple(comparison.prompt) for comparison, _ in rows])
    cluster = clusters(comparisons)
    share = torch.tensor([1.0 / len(comparison.pairs) for comparison, _ in rows])
    grades = [grade for _, grade in rows]
    right = right.detach().float().cpu()
    found = {ALL: _accuracy(right, share, prompt, cluster)}
    for grade in GRADES:
        chosen = torch.tensor([one == grade for one in grades])
        if chosen.any():
            found[grade] = _accuracy(right[chosen], torch.ones(int(chosen.sum())), prompt[chosen], cluster[chosen])
    return found


def clusters(comparisons: Sequence[EncodedComparison]) -> Tensor:
    """Return the cluster number of every pair of every comparison, [P]: from the data's cluster, else the prompt."""
    return numbered([one.cluster or tuple(one.prompt) for one in comparisons for _ in one.pairs])


def numbered(names: Sequence[Hashable]) -> Tensor:
    """Return a number for each name, equal for equal names, [N]."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in names])


def _accuracy(right: Tensor, weights: Tensor, prompt: Tensor, cluster: Tensor) -> Accuracy:
    mean, error = clustered_mean(right, weights, cluster)
    of = (len(right), len(prompt.unique()), len(cluster.unique()))
    return Accuracy(mean, None if math.isnan(error) else error, *of)
