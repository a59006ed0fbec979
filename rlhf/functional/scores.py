"""What may be done to the scores of replies before they become rewards. All take scores [B]."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf.functional.masking import SumOver

MissingEnd = Literal["replace", "subtract", "none"]
ScoreScale = Literal["none", "batch", "running"]

SPREAD = 1e-6  # scores whose deviation is no more than this are equal


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of numbers seen so far, as plain floats that a checkpoint can hold."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 0 for fewer than two numbers."""
        return (self.squares / (self.count - 1)) ** 0.5 if self.count > 1 else 0.0

    def updated(self, scores: Tensor, sum_over: SumOver | None = None) -> "Moments":
        """These and `scores` together (Chan et al. 1979), in float64; `sum_over` adds up over all processes."""
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
        """`(scores - mean) / sqrt(var + 1e-8)`: mean 0 and deviation 1 for the numbers these are the moments of.

        Without two different numbers there is no deviation to divide by: then only the mean is taken off.
        """
        scale = (self.std**2 + 1e-8) ** -0.5 if self.std > SPREAD else 1.0
        return (scores - self.mean) * scale


def missing_end(scores: Tensor, ended: Tensor, penalty: float, how: MissingEnd) -> Tensor:
    """Return scores [B] in which responses without EOS (`ended` [B] false) get the missing-EOS penalty.

    "replace" makes the score `-penalty` whatever the reward said (Huang et al. 2024, arXiv 2403.17031: -1); "subtract"
    takes `penalty` off (TRL's missing_eos_penalty); "none" leaves the scores as they are.
    """
    if how == "none":
        return scores
    worse = scores - penalty if how == "subtract" else torch.full_like(scores, -penalty)
    return torch.where(ended.bool(), scores, worse)
