"""REINFORCE with a leave-one-out baseline: the loss, and the advantages of a rollout."""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rlhf.functional.advantages import sequence_kl
from rlhf.functional.groups import (
    EPSILON,
    clipped_surrogate,
    deviation,
    has_spread,
    leave_one_out,
    length_weights,
)
from rlhf.functional.masking import SumOver, masked_sum
from rlhf.functional.ratio import capped_exp, clip_removes
from rlhf.objective import GroupObjective, Metrics, require_same_shape


@dataclass(frozen=True)
class RLOO(GroupObjective):
    """`max(-A ratio, -A clip(ratio))` per reply, `A = R - mean of the other replies' R` (arXiv 2402.14740).

    A reply is one action: its ratio is that of whole sequences, and the KL is part of its reward `R`. At ratio 1 the
    gradient is REINFORCE's, `-A grad log pi(reply)`.
    """

    beta: Annotated[float, Field(ge=0)] = 0.05
    gamma: Annotated[float, Field(ge=0)] = 0.0
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    normalize: bool = False

    def advantages(
        self,
        scores: Tensor,
        logp: Tensor,
        ref_logp: Tensor,
        mask: Tensor,
        samples: int,
        sum_over: SumOver | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Advantages [B] of rewards with the KL in them; every reply counts."""
        rewards = scores - self.beta * sequence_kl(logp, ref_logp, mask)
        advantages = leave_one_out(rewards, samples)
        if self.normalize:
            spread = has_spread(scores, samples).sum()
            # No mean to take off: leave-one-out advantages sum to 0 within a group. Where no scores differ there is
            # only the noise of the KL, which must not be scaled to 1.
            if (spread if sum_over is None else sum_over(spread)) > 0:
                advantages = advantages / (deviation(advantages, sum_over) + EPSILON)
        return advantages, torch.ones_like(scores, dtype=torch.bool)

    def weights(self, mask: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Each reply's loss, which stands at every token of it, counts once."""
        return length_weights(mask, "sequence", longest)

    def __call__(
        self,
        logp: Tensor,
        old_logp: Tensor,
        ref_logp: Tensor,
        advantages: Tensor,
        mask: Tensor,
        entropy: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """The loss of each reply at all its tokens [B, R], and metrics [B, R]; `advantages` [B]."""
        require_same_shape(logp=logp, old_logp=old_logp, mask=mask)
        require_same_shape(advantages=advantages, rows=mask[:, 0])
        log_ratio = masked_sum(logp - old_logp, mask, 1)
        losses = clipped_surrogate(log_ratio, advantages, self.clip_low, self.clip_high).unsqueeze(1).expand_as(logp)
        ratio = capped_exp(log_ratio.detach())
        removed = clip_removes(ratio, advantages, self.clip_low, self.clip_high)
        metrics = {
            "policy_loss": losses,
            "ratio": ratio.unsqueeze(1).expand_as(logp),
            "approx_kl": 0.5 * (logp - old_logp).square(),  # of the update so far, not of the reference
            "clip_fraction": removed.to(logp.dtype).unsqueeze(1).expand_as(logp),
        }
        if entropy is not None:
            metrics["entropy"] = entropy
        return losses, {name: value.detach() for name, value in metrics.items()}
