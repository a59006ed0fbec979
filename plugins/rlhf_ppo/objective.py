"""Proximal policy optimization for language models: the loss and the hyperparameters of its estimates."""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rlhf.errors import UserError, key
from rlhf.functional.advantages import gae, shaped_rewards
from rlhf.functional.kl import KLEstimator, adaptive_beta
from rlhf.functional.masking import SumOver, masked_whiten
from rlhf.functional.ratio import capped_ratio, clipped_surrogate, is_gradient_clipped
from rlhf.objective import Metrics, PolicyObjective, require_same_shape
from rlhf.sampler.correction import CorrectsSampler


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Return `max((V - R)^2, (clamp(V, V_old +- clip) - R)^2) / 2`, any shape; `(V - R)^2 / 2` if `clip` is None."""
    errors = (values - returns).square()
    if clip is not None:
        clipped = torch.clamp(values, old_values - clip, old_values + clip)
        errors = torch.maximum(errors, (clipped - returns).square())
    return 0.5 * errors


@dataclass(frozen=True)
class PPO(CorrectsSampler, PolicyObjective):
    """PPO loss per sampled token: `max(-A ratio, -A clip(ratio)) + c_v * value loss - c_e * entropy`.

    Schulman et al. 2017 (arXiv 1707.06347, eq. 7 and 9) with the clipped value loss of openai/lm-human-preferences.
    `estimate` computes rewards, advantages and returns of a rollout (InstructGPT, arXiv 2203.02155, eq. 2). The stage
    adds the `gamma` term: one optimizer step on `loss + gamma * cross-entropy on pretraining text`.
    """

    beta: Annotated[float, Field(ge=0)] = 0.05
    gamma: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] = 0.2
    value_clip: Annotated[float, Field(gt=0)] | None = 0.2
    value_coefficient: Annotated[float, Field(ge=0)] = 0.1
    discount: Annotated[float, Field(ge=0, le=1)] = 1.0
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    entropy_coefficient: Annotated[float, Field(ge=0)] = 0.0
    whiten_rewards: bool = False
    kl_estimator: KLEstimator = "k1"
    kl_target: Annotated[float, Field(gt=0)] | None = None
    kl_horizon: Annotated[float, Field(gt=0)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_target is not None and self.beta == 0:
            raise UserError(
                f"multiplies beta by factors, and {key('objective.beta', 0)} stays 0",
                fix=f"type {key('objective.beta', 0.05)} (the initial beta), or {key('objective.kl_target', None)}",
                option="objective.kl_target",
                value=f"{self.kl_target:g}",
            )

    def estimate(
        self,
        score: Tensor,
        logp: Tensor,
        ref_logp: Tensor,
        values: Tensor,
        mask: Tensor,
        beta: float | None = None,
        sum_over: SumOver | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return rewards, whitened advantages and returns, each [B, R], of one whole rollout batch.

        `score` [B]; the rest [B, R]. `beta` is the current coefficient when it adapts, else the field's. Returns come
        from the advantages before whitening. With `sum_over`, which sums a tensor over all ranks, whitening covers the
        parts of all ranks.
        """
        require_same_shape(logp=logp, ref_logp=ref_logp, values=values, mask=mask)
        beta = self.beta if beta is None else beta
        rewards = shaped_rewards(score, logp, ref_logp, mask, beta, self.kl_estimator)
        if self.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False, sum_over=sum_over)
        advantages, returns = gae(rewards, values, mask, self.discount, self.gae_lambda)
        return rewards, masked_whiten(advantages, mask, sum_over=sum_over), returns

    def next_beta(self, beta: float, kl: float, n: int, total: int | None = None) -> float:
        """Return the KL coefficient after `n` of `total` sequences; constant without `kl_target`.

        `kl` is the mean summed KL of the `n` sequences, nats. Without `kl_horizon` the horizon is a twentieth of the
        run: the 10000 sequences of lm-human-preferences would hardly change beta in a short run.
        """
        if self.kl_target is None:
            return beta
        horizon = self.kl_horizon or (10000.0 if total is None else total / 20)
        return adaptive_beta(beta, kl, n, self.kl_target, horizon)

    def __call__(
        self,
        logp: Tensor,
        old_logp: Tensor,
        advantages: Tensor,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        entropy: Tensor | None = None,
        sampler_weights: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """Return the losses [B, R] and metrics [B, R].

        `entropy` [B, R] in nats is required when `entropy_coefficient` > 0. `sampler_weights` [B, R] multiply the
        policy loss.
        """
        require_same_shape(
            logp=logp, old_logp=old_logp, advantages=advantages, values=values, old_values=old_values, returns=returns
        )
        policy_loss = clipped_surrogate(logp - old_logp, advantages, self.clip, self.clip)
        if sampler_weights is not None:
            policy_loss = policy_loss * sampler_weights
        value_loss = clipped_value_loss(values, old_values, returns, self.value_clip)
        losses = policy_loss + self.value_coefficient * value_loss
        if self.entropy_coefficient:
            if entropy is None:
                raise ValueError("entropy_coefficient > 0 needs the entropy of the policy at every token")
            losses = losses - self.entropy_coefficient * entropy

        log_ratio = (logp - old_logp).detach()
        ratio = capped_ratio(log_ratio)
        metrics = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "ratio": ratio,
            "ratio_variance": (ratio - 1.0).square(),  # around 1, the ratio's mean under the sampling policy
            "approx_kl": 0.5 * log_ratio.square(),  # from the sampling policy, not from the reference
            "clip_fraction": is_gradient_clipped(ratio, advantages, self.clip, self.clip).to(ratio.dtype),
        }
        if self.value_clip is not None:
            metrics["value_clip_fraction"] = ((values - old_values).abs() > self.value_clip).to(ratio.dtype)
        if entropy is not None:
            metrics["entropy"] = entropy
        return losses, {name: value.detach() for name, value in metrics.items()}
