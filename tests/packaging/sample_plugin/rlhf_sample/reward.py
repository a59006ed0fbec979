"""A reward of a third party."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rlhf.rollout import Rollout


class Brevity:
    """Minus the words of a reply.

    Args:
        weight: Points for each word.
    """

    def __init__(self, weight: Annotated[float, Field(ge=0)] = 0.1) -> None:
        self.weight = weight

    def __call__(self, rollout: Rollout) -> Tensor:
        """Scores, [B]."""
        return torch.tensor([-self.weight * len(text.split()) for text in rollout.texts], device=rollout.mask.device)
