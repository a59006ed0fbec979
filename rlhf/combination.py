"""Rewards made of other rewards."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlhf.data.records import Prompt
from rlhf.errors import UserError, suggest
from rlhf.functional.gate import safety_gate
from rlhf.rollout import Rollout
from rlhf.scoring import Reward, make_ready


class Combination:
    """Several named rewards as one; what each said last is in ``parts`` for the log."""

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        self.rewards = dict(rewards)
        self.parts: dict[str, Tensor] = {}

    def to(self, device: torch.device) -> "Combination":
        """Moves the weights of all of them to ``device``."""
        for reward in self.rewards.values():
            make_ready(reward, device)
        return self

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError for a prompt that one of them cannot score."""
        for reward in self.rewards.values():
            if hasattr(reward, "check"):
                reward.check(prompts)

    def check_length(self, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Raises UserError for a prompt that is too long for one of them."""
        for reward in self.rewards.values():
            if hasattr(reward, "check_length"):
                reward.check_length(prompts, max_new_tokens)

    def each(self, rollout: Rollout) -> dict[str, Tensor]:
        """The scores of each, [B]."""
        scores = {name: reward(rollout).float() for name, reward in self.rewards.items()}
        self.parts = {name: values.mean() for name, values in scores.items()}
        return scores


class GatedReward(Combination):
    """Two reward models and a gate: safety speaks for a reply where it matters, helpfulness elsewhere.

    `R_c = R_s if the prompt is tagged unsafe or R_s < threshold else R_h`, on probabilities, and the score is
    `logit(R_c)` (Llama 2, arXiv 2307.09288, section 3.2.3). The paper then whitens it: `stage.normalize_scores=batch`.

    A reward model's probability is the one that its loss trained, so its scores are read in the units of the loss,
    whatever deviation they were normalised to; the level, which the loss leaves open, is that of the normalisation: 1/2
    is the average training reply.

    Args:
        helpfulness: Scores how helpful a reply is.
        safety: Scores how safe it is.
        threshold: Safety below this speaks whatever the prompt; a probability.
        eps: Probabilities are kept this far from 0 and 1, where the logit is infinite.
        scale: What the two rewards give: "logit" (the gate reads the sigmoid) or "probability".
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
        """Scores, [B]."""
        scores = {name: self._probability(name, values) for name, values in self.each(rollout).items()}
        unsafe = torch.tensor([prompt.unsafe for prompt in rollout.prompts], device=rollout.mask.device)
        chosen = safety_gate(scores["helpfulness"], scores["safety"], unsafe, self.threshold)
        self.parts["gated"] = (unsafe | (scores["safety"] < self.threshold)).float().mean()
        return torch.logit(chosen, eps=self.eps)

    def _probability(self, name: str, scores: Tensor) -> Tensor:
        if self.scale == "logit":
            return (scores * getattr(self.rewards[name], "log_odds", 1.0)).sigmoid()
        if ((scores < 0) | (scores > 1)).any():
            raise UserError(
                f"reward.{name} gives {scores.min():.3g} to {scores.max():.3g}: no probabilities, "
                "type reward.scale=logit"
            )
        return scores


class WeightedReward(Combination):
    """`sum_i w_i R_i` over named rewards.

    Args:
        rewards: The rewards by name.
        weights: Weight of each; 1 where none is given.
    """

    def __init__(self, rewards: dict[str, Reward], weights: dict[str, float]) -> None:
        super().__init__(rewards)
        self.check_knobs(rewards, weights)
        self.weights = {name: float(weights.get(name, 1.0)) for name in self.rewards}

    @staticmethod
    def check_knobs(rewards: Mapping[str, Any], weights: Mapping[str, float]) -> None:
        """What can be told from the names alone. Raises UserError for none, and for a weight of no reward."""
        if not rewards:
            raise UserError("reward.rewards is empty: type +reward@reward.rewards.NAME=model")
        for name in weights:
            if name not in rewards:
                raise UserError(f"reward.weights.{name}: there is no such reward{suggest(name, rewards)}")

    def __call__(self, rollout: Rollout) -> Tensor:
        """Scores, [B]."""
        scores = self.each(rollout)
        return torch.stack([self.weights[name] * values for name, values in scores.items()]).sum(0)
