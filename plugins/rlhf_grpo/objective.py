"""Group relative policy optimization: the loss, and the normalizations in which its variants differ."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlhf.functional.advantages import sequence_kl
from rlhf.functional.groups import LengthNormalization, Scale, group_advantages, has_spread, length_weights
from rlhf.functional.kl import k3
from rlhf.functional.masking import SumOver, masked_mean
from rlhf.functional.ratio import capped_ratio, clipped_surrogate, is_gradient_clipped
from rlhf.objective import GroupObjective, Metrics, require_same_shape
from rlhf.sampler.correction import CorrectsSampler


@dataclass(frozen=True)
class GRPO(CorrectsSampler, GroupObjective):
    """GRPO loss per sampled token: `max(-A ratio, -A clip(ratio, 1 - low, 1 + high)) + beta KL`.

    DeepSeekMath (arXiv 2402.03300, eq. 3). `A = (r - mean) / (std + 1e-4)` over the responses to one prompt, the same
    for every token of a response. With `kl_in="reward"` the KL of the response minus its group's mean is subtracted
    from the advantage: `A - beta (KL - mean KL)`.
    """

    beta: Annotated[float, Field(ge=0)] = 0.04
    gamma: Annotated[float, Field(ge=0)] = 0.0
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    scale: Scale = "group"
    length_normalization: LengthNormalization = "sequence"
    importance: Literal["token", "sequence"] = "token"
    kl_in: Literal["loss", "reward"] = "loss"
    drop_zero_spread: bool = False

    def advantages(
        self,
        scores: Tensor,
        logp: Tensor,
        ref_logp: Tensor,
        mask: Tensor,
        samples: int,
        sum_over: SumOver | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the advantages [B], and which responses count [B]: all, or those of groups whose scores differ."""
        advantages = group_advantages(scores, samples, self.scale, sum_over)
        if self.kl_in == "reward":
            # Subtracted after scaling, as the KL in the loss is: scaling by a deviation of scores and KL together would
            # amplify the KL's noise to advantages of 1 in a group whose scores are equal.
            kl = sequence_kl(logp, ref_logp, mask)
            advantages = advantages - self.beta * group_advantages(kl, samples, "none")
        spread = has_spread(scores, samples)
        keep = spread if self.drop_zero_spread else torch.ones_like(spread)
        return advantages, keep

    def weights(self, mask: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Return token weights [B, R] and divisors [B], as `rlhf.functional.groups.length_weights`."""
        return length_weights(mask, self.length_normalization, longest)

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
        """Return the losses [B, R] and metrics [B, R]; `advantages` [B]; `sampler_weights` multiply the policy loss."""
        require_same_shape(logp=logp, old_logp=old_logp, ref_logp=ref_logp, mask=mask)
        require_same_shape(advantages=advantages, rows=mask[:, 0])
        log_ratio = logp - old_logp
        if self.importance == "sequence":  # GSPO: the geometric mean of a response's ratios, for all its tokens
            log_ratio = masked_mean(log_ratio, mask, 1).unsqueeze(1).expand_as(logp)
        spread_out = advantages.unsqueeze(1).expand_as(logp)
        policy_loss = clipped_surrogate(log_ratio, spread_out, self.clip_low, self.clip_high)
        if sampler_weights is not None:
            policy_loss = policy_loss * sampler_weights
        kl = k3(logp, ref_logp)
        losses = policy_loss + self.beta * kl if self.kl_in == "loss" else policy_loss

        ratio = capped_ratio(log_ratio.detach())
        metrics = {
            "policy_loss": policy_loss,
            "kl_loss": kl,
            "ratio": ratio,
            "approx_kl": 0.5 * (logp - old_logp).square(),  # from the sampling policy, not from the reference
            "clip_fraction": is_gradient_clipped(ratio, spread_out, self.clip_low, self.clip_high).to(ratio.dtype),
        }
        if entropy is not None:
            metrics["entropy"] = entropy
        return losses, {name: value.detach() for name, value in metrics.items()}


@dataclass(frozen=True)
class DrGRPO(GRPO):
    """GRPO without division by the group's spread or the response's length.

    "GRPO done right", Liu et al. 2025 (arXiv 2503.20783).
    """

    beta: Annotated[float, Field(ge=0)] = 0.0
    scale: Scale = "none"
    length_normalization: LengthNormalization = "constant"


@dataclass(frozen=True)
class DAPO(GRPO):
    """DAPO: higher upper clip bound, mean over tokens, no groups without spread, no KL.

    Yu et al. 2025 (arXiv 2503.14476).
    """

    beta: Annotated[float, Field(ge=0)] = 0.0
    clip_high: Annotated[float, Field(gt=0)] = 0.28
    length_normalization: LengthNormalization = "token"
    drop_zero_spread: bool = True


@dataclass(frozen=True)
class GSPO(GRPO):
    """Group sequence policy optimization: one importance ratio per response, narrow clipping.

    Zheng et al. 2025 (arXiv 2507.18071).
    """

    beta: Annotated[float, Field(ge=0)] = 0.0
    clip_low: Annotated[float, Field(gt=0, le=1)] = 3e-4
    clip_high: Annotated[float, Field(gt=0)] = 4e-4
    importance: Literal["token", "sequence"] = "sequence"
