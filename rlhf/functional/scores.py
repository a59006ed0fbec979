"""Transformations of response scores [B] before they become rewards."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf.functional.masking import SumOver

MissingEOS = Literal["replace", "subtract", "none"]
ScoreScale = Literal["none", "batch", "running"]

SPREAD = 1e-6  # scores whose deviation is no more than this count as equal


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of the numbers seen so far, as floats for a checkpoint."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 0 for fewer than two numbers."""
        return (self.squares / (self.count - 1)) ** 0.5 if self.count > 1 else 0.0

    def updated(self, scores: Tensor, sum_over: SumOver | None = None) -> "Moments":
        """Return the moments after `scores` [N] as well, in float64 (Chan et al. 1979).

        `sum_over` sums a tensor over all ranks.
        """
        combined = sum_over or (lambda part: part)
        scores = scores.detach().double()
        count = float(combined(scores.new_tensor(len(scores))))
        mean = float(combined(scores.sum())) / count
        squares = float(combined((scores - mean).square().sum()))
        total, gap = self.count + count, mean - self.mean
        return Moments(
            total,
            self.mean + gap * count / total,
            self.squares + squares + gap * gap * self.count * count / total,
        )

    def normalize(self, scores: Tensor) -> Tensor:
        """Return `(scores - mean) / sqrt(var + 1e-8)`.

        The result has mean 0 and deviation 1 for the numbers that these moments describe. Where all of these are equal
        there is no deviation to divide by, and only the mean is subtracted.
        """
        scale = (self.std**2 + 1e-8) ** -0.5 if self.std > SPREAD else 1.0
        return (scores - self.mean) * scale


def missing_eos(scores: Tensor, ended: Tensor, penalty: float, how: MissingEOS) -> Tensor:
    """Return scores [B] in which responses without EOS (`ended` [B] false) get the missing-EOS penalty.

    "replace" sets the score to `-penalty` whatever the reward gave (Huang et al. 2024, arXiv 2403.17031: -1);
    "subtract" subtracts `penalty` (TRL's missing_eos_penalty); "none" leaves the scores unchanged.
    """
    if how == "none":
        return scores
    worse = scores - penalty if how == "subtract" else torch.full_like(scores, -penalty)
    return torch.where(ended.bool(), scores, worse)
