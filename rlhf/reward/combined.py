"""Combined rewards: functions of several other rewards."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlhf.errors import UserError, key, suggest
from rlhf.functional.gate import safety_gate
from rlhf.reward.base import Reward
from rlhf.sampler.rollout import Rollout


class Combination(Reward):
    """Base class of rewards over several named rewards; their last mean scores are in ``parts`` for the log."""

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        self.rewards = dict(rewards)
        self.parts: dict[str, Tensor] = {}

    def each(self, rollout: Rollout) -> dict[str, Tensor]:
        """Return the scores of each reward by name, [B], and update ``parts``."""
        scores = {name: reward(rollout).float() for name, reward in self.rewards.items()}
        self.parts = {name: values.mean() for name, values in scores.items()}
        return scores


class GatedReward(Combination):
    """Gated reward of two reward models: safety where it matters, helpfulness elsewhere.

    `R_c = R_s if the prompt is tagged unsafe or R_s < threshold else R_h`, on probabilities, and the score is
    `logit(R_c)` (Llama 2, arXiv 2307.09288, section 3.2.3). The paper then whitens it: `stage.normalize_scores=batch`.

    A reward model's probability is the one that its loss trained. Its scores are therefore converted to the units of
    the loss, whatever deviation they were normalised to. The loss leaves the level undetermined, so the level is that
    of the normalisation: 1/2 is the average training response.

    Args:
        helpfulness: Reward that scores how helpful a response is.
        safety: Reward that scores how safe a response is.
        threshold: Safety below this decides for every prompt; a probability.
        eps: Distance that probabilities keep from 0 and 1, where the logit is infinite.
        scale: Scale of the two rewards: "logit" (the gate applies the sigmoid) or "probability".
    """

    def __init__(
        self,
        helpfulness: Reward,
        safety: Reward,
        threshold: Annotated[float, Field(ge=0, le=1)] = 0.15,
        eps: Annotated[float, Field(gt=0, lt=0.5)] = 1e-6,
        scale: Literal["logit", "probability"] = "logit",
    ) -> None:
        super().__init__({"helpfulness": helpfulness, "safety": safety})
        self.threshold, self.eps, self.scale = threshold, eps, scale

    def __call__(self, rollout: Rollout) -> Tensor:
        """Return the gated scores, [B]."""
        scores = {name: self._probability(name, values) for name, values in self.each(rollout).items()}
        unsafe = torch.tensor([prompt.unsafe for prompt in rollout.prompts], device=rollout.mask.device)
        chosen = safety_gate(scores["helpfulness"], scores["safety"], unsafe, self.threshold)
        self.parts["gated"] = (unsafe | (scores["safety"] < self.threshold)).float().mean()
        return torch.logit(chosen, eps=self.eps)

    def _probability(self, name: str, scores: Tensor) -> Tensor:
        if self.scale == "logit":
            return (scores * self.rewards[name].log_odds).sigmoid()
        if ((scores < 0) | (scores > 1)).any():
            raise UserError(
                f"its scores, from {scores.min():.3g} to {scores.max():.3g}, are not probabilities",
                fix=f"type {key('reward.scale', 'logit')}",
                option=f"reward.{name}",
            )
        return scores


class WeightedReward(Combination):
    """Weighted sum `sum_i w_i R_i` of named rewards.

    Args:
        rewards: The rewards by name.
        weights: Weight of each reward; 1 where none is given.
    """

    def __init__(self, rewards: dict[str, Reward], weights: dict[str, float]) -> None:
        super().__init__(rewards)
        self.check_hyperparameters(rewards, weights)
        self.weights = {name: float(weights.get(name, 1.0)) for name in self.rewards}

    @staticmethod
    def check_hyperparameters(rewards: Mapping[str, Any], weights: Mapping[str, float]) -> None:
        """Validate the names alone.

        Raises:
            UserError: If there is no reward, or for a weight without a reward.
        """
        if not rewards:
            raise UserError(
                "is empty", fix=f"type {key('+reward@reward.rewards.NAME', 'model')}", option="reward.rewards"
            )
        for name in weights:
            if name not in rewards:
                raise UserError(f"no such reward{suggest(name, rewards)}", option=f"reward.weights.{name}")

    def __call__(self, rollout: Rollout) -> Tensor:
        """Return the weighted sum of the scores, [B]."""
        scores = self.each(rollout)
        return torch.stack([self.weights[name] * values for name, values in scores.items()]).sum(0)
