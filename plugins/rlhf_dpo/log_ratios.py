"""Log-ratios of policy and reference, and the metrics that all losses on pairs share."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rlhf.objective import Metrics, PairLogps, require_same_shape, win_rate

Positive = Annotated[float, Field(gt=0)]


NotNegative = Annotated[float, Field(ge=0)]


FlipRate = Annotated[float, Field(ge=0, lt=0.5)]


def log_ratios(policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
    """Return `u_c` and `u_r`, [P] each.

    Raises:
        ValueError: The reference is missing, or belongs to another batch.
    """
    if reference is None:
        raise ValueError("this objective compares the policy with a reference model, and was given none")
    require_same_shape(policy=policy.chosen, reference=reference.chosen)
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def mean_log_ratios(policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
    """Return `u_c` and `u_r` as means per token, [P] each."""
    chosen, rejected = log_ratios(policy, reference)
    return chosen / policy.chosen_length.clamp(min=1), rejected / policy.rejected_length.clamp(min=1)


def reward_metrics(policy: PairLogps, chosen_reward: Tensor, rejected_reward: Tensor) -> Metrics:
    """Return the metrics [P] that every loss on pairs reports; a reward here is the loss's implicit reward."""
    metrics = {
        "accuracy": win_rate(chosen_reward, rejected_reward),
        "reward_margin": chosen_reward - rejected_reward,
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "chosen_logp": policy.chosen_mean,
        "rejected_logp": policy.rejected_mean,
    }
    return {name: value.detach() for name, value in metrics.items()}


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0 without cancellation; x is clamped to -1e-7, where exp(x) is not yet 1."""
    x = x.clamp(max=-1e-7)
    near = x > -0.6931472
    # Each branch gets harmless values where the other one is used: an infinite slope times 0 is nan.
    return torch.where(
        near,
        torch.log(-torch.expm1(x.masked_fill(~near, -0.5))),
        torch.log1p(-torch.exp(x.masked_fill(near, -1.0))),
    )


def bernoulli_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Return KL(Bernoulli(sigmoid(p_logits)) || Bernoulli(sigmoid(q_logits))), any shape."""
    yes = F.logsigmoid(p_logits) - F.logsigmoid(q_logits)
    no = F.logsigmoid(-p_logits) - F.logsigmoid(-q_logits)
    return torch.sigmoid(p_logits) * yes + torch.sigmoid(-p_logits) * no
