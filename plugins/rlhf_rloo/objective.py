"""REINFORCE with a leave-one-out baseline: the loss, and the advantages of a rollout."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlhf.functional.advantages import sequence_kl
from rlhf.functional.groups import EPSILON, deviation, has_spread, leave_one_out, length_weights
from rlhf.functional.masking import SumOver, masked_sum
from rlhf.functional.ratio import capped_ratio, clipped_surrogate, is_gradient_clipped
from rlhf.objective import GroupObjective, Metrics, require_same_shape
from rlhf.sampler.correction import CorrectsSampler


@dataclass(frozen=True)
class RLOO(CorrectsSampler, GroupObjective):
    """RLOO loss per response: `max(-A ratio, -A clip(ratio))`, `A = R - mean of the other responses' R`.

    Ahmadian et al. 2024 (arXiv 2402.14740). A response is one action: its importance ratio is that of the whole
    sequence, and the KL is part of its reward `R`. At ratio 1 the gradient is REINFORCE's, `-A grad log pi(response)`.
    """

    beta: Annotated[float, Field(ge=0)] = 0.05
    gamma: Annotated[float, Field(ge=0)] = 0.0
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    normalize: bool = False
    # A response is one action, whose importance ratio is a product over its tokens.
    sampler_correction: Literal["none", "sequence_truncate", "sequence_mask"] = field(default="none", kw_only=True)

    def advantages(
        self,
        scores: Tensor,
        logp: Tensor,
        ref_logp: Tensor,
        mask: Tensor,
        samples: int,
        sum_over: SumOver | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the advantages [B] of rewards that include the KL penalty; every response counts."""
        rewards = scores - self.beta * sequence_kl(logp, ref_logp, mask)
        advantages = leave_one_out(rewards, samples)
        if self.normalize:
            spread = has_spread(scores, samples).sum()
            # No mean is subtracted: leave-one-out advantages sum to 0 within a group. If no scores differ, only the
            # noise of the KL remains, which must not be scaled to 1.
            if (spread if sum_over is None else sum_over(spread)) > 0:
                advantages = advantages / (deviation(advantages, sum_over) + EPSILON)
        return advantages, torch.ones_like(scores, dtype=torch.bool)

    def weights(self, mask: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Return token weights [B, R] and divisors [B] under which each response's loss counts once.

        The loss of a response is repeated at all its tokens.
        """
        return length_weights(mask, "sequence", longest)

    def __call__(
        self,
        logp: Tensor,
        old_logp: Tensor,
        ref_logp: Tensor,
        advantages: Tensor,
        mask: Tensor,
        entropy: Tensor | None = None,
        sampler_weights: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """Return the loss of each response, repeated at all its tokens [B, R], and metrics [B, R].

        `advantages` [B]; `sampler_weights` [B, R], equal for all tokens of a response, multiply the loss.
        """
        require_same_shape(logp=logp, old_logp=old_logp, mask=mask)
        require_same_shape(advantages=advantages, rows=mask[:, 0])
        log_ratio = masked_sum(logp - old_logp, mask, 1)
        losses = clipped_surrogate(log_ratio, advantages, self.clip_low, self.clip_high).unsqueeze(1).expand_as(logp)
        if sampler_weights is not None:
            losses = losses * sampler_weights
        ratio = capped_ratio(log_ratio.detach())
        removed = is_gradient_clipped(ratio, advantages, self.clip_low, self.clip_high)
        metrics = {
            "policy_loss": losses,
            "ratio": ratio.unsqueeze(1).expand_as(logp),
            "approx_kl": 0.5 * (logp - old_logp).square(),  # from the sampling policy, not from the reference
            "clip_fraction": removed.to(logp.dtype).unsqueeze(1).expand_as(logp),
        }
        if entropy is not None:
            metrics["entropy"] = entropy
        return losses, {name: value.detach() for name, value in metrics.items()}
