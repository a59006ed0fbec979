"""How often the preferred reply scores higher, by grade, and how sure that is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.data.records import GRADES
from rlhf.data.template import EncodedComparison
from rlhf.functional.clusters import clustered_mean

ALL = "all"  # pairs of every grade, and those without one


@dataclass(frozen=True)
class Accuracy:
    """Share of pairs whose chosen reply scores higher, equal scores counted half."""

    accuracy: float
    standard_error: float | None  # clustered by prompt, since its pairs are hard together; None for one prompt
    pairs: int
    prompts: int


def accuracies(comparisons: Sequence[EncodedComparison], right: Tensor) -> dict[str, Accuracy]:
    """Accuracy of all pairs and of those of each grade that occurs.

    Over all, a pair weighs 1 / the number of pairs of its comparison, as in ``val/accuracy``; within a grade 1, as in
    ``val/accuracy/GRADE``.

    Args:
        comparisons: What was compared.
        right: 1, 0 or 1/2 for every pair of every comparison, in their order, [P].
    """
    rows = [(comparison, grade) for comparison in comparisons for *_, grade in comparison.pairs]
    numbers: dict[tuple[int, ...], int] = {}
    prompt = torch.tensor([numbers.setdefault(tuple(comparison.prompt), len(numbers)) for comparison, _ in rows])
    share = torch.tensor([1.0 / len(comparison.pairs) for comparison, _ in rows])
    grades = [grade for _, grade in rows]
    right = right.detach().float().cpu()
    found = {ALL: _accuracy(right, share, prompt)}
    for grade in GRADES:
        chosen = torch.tensor([one == grade for one in grades])
        if chosen.any():
            found[grade] = _accuracy(right[chosen], torch.ones(int(chosen.sum())), prompt[chosen])
    return found


def _accuracy(right: Tensor, weights: Tensor, prompt: Tensor) -> Accuracy:
    mean, error = clustered_mean(right, weights, prompt)
    return Accuracy(mean, None if math.isnan(error) else error, len(right), len(prompt.unique()))
