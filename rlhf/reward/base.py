"""Reward interface: takes a Rollout of B responses, returns one score per response [B]."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from rlhf.data.records import Prompt
from rlhf.sampler.rollout import Rollout

__all__ = ["Reward", "make_ready"]


class Reward(ABC):
    """Base class of rewards. A reward defines ``__call__``; every other member has a default.

    The defaults of a reward that combines no others do nothing.

    Attributes:
        rewards: The rewards that it combines, by name; none by default. Their models are loaded with the stage's.
        parts: Mean scores of the last call, by name, that stages log as ``reward/NAME``; none by default.
    """

    rewards: Mapping[str, "Reward"] = MappingProxyType({})
    parts: Mapping[str, Tensor] = MappingProxyType({})

    @abstractmethod
    def __call__(self, rollout: Rollout) -> Tensor:
        """Return the scores of the responses, [B] float, on the rollout's device."""

    @property
    def log_odds(self) -> float:
        """Factor that converts a score to log-odds; 1 by default (``GatedReward`` reads it)."""
        return 1.0

    def to(self, device: torch.device) -> None:
        """Move the weights to ``device``; by default those of ``rewards``."""
        for reward in self.rewards.values():
            reward.to(device)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check, before training, that responses to these prompts can be scored; by default by each of ``rewards``.

        Raises:
            UserError: For a prompt that the reward cannot score.
        """
        for reward in self.rewards.values():
            reward.check(prompts)

    def check_length(self, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Check, before training, that a response to each prompt fits; by default into each of ``rewards``.

        Args:
            prompts: All prompts whose responses will be scored.
            max_new_tokens: Longest of these responses, tool results included, in the policy's tokens.

        Raises:
            UserError: For a prompt that leaves too little room for a response.
        """
        for reward in self.rewards.values():
            reward.check_length(prompts, max_new_tokens)


def make_ready(
    reward: Reward, device: torch.device | None, prompts: Sequence[Prompt] = (), max_new_tokens: int = 1
) -> None:
    """Move a reward's weights to ``device``, and let it reject prompts before training.

    Args:
        reward: Any reward.
        device: Target device of the weights; None leaves them where they are.
        prompts: All prompts whose responses it will score.
        max_new_tokens: Longest of these responses, tool results included, in the policy's tokens.
    """
    if device is not None:
        reward.to(device)
    if prompts:
        reward.check(prompts)
        reward.check_length(prompts, max_new_tokens)
