"""Reward of a third party."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rlhf.sampler.rollout import Rollout


class Brevity:
    """Negative word count of a response.

    Args:
        weight: Points for each word.
    """

    def __init__(self, weight: Annotated[float, Field(ge=0)] = 0.1) -> None:
        self.weight = weight

    def __call__(self, rollout: Rollout) -> Tensor:
        """Return scores, [B]."""
        return torch.tensor([-self.weight * len(text.split()) for text in rollout.texts], device=rollout.mask.device)
