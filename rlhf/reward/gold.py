"""Gold reward of the testbed."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rlhf.data.records import Prompt
from rlhf.data.testbed.gold import gold
from rlhf.reward.base import Reward
from rlhf.sampler.rollout import Rollout


class GoldReward(Reward):
    """Gold reward of the testbed: the true score, without error (docs/testbed.md explains its scale).

    Args:
        aspect: Returned score: "total" is safety where the prompt is tagged unsafe, helpfulness elsewhere.
    """

    def __init__(self, aspect: Literal["total", "helpfulness", "safety"] = "total") -> None:
        self.aspect = aspect

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check that all prompts are the testbed's.

        Raises:
            UserError: For a prompt that is not the testbed's.
        """
        for prompt in prompts:
            gold(prompt, "")

    def __call__(self, rollout: Rollout) -> Tensor:
        """Return the gold scores, [B]."""
        pairs = zip(rollout.prompts, rollout.texts, strict=True)
        scores = [getattr(gold(prompt, text), self.aspect) for prompt, text in pairs]
        return torch.tensor(scores, dtype=torch.float32, device=rollout.mask.device)
