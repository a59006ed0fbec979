"""Checks of a stage once its model is on the device, before the first step."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlhf.errors import RunFailed, UserError, key
from rlhf.functional.masking import masked_mean
from rlhf.models.language_model import LanguageModel


def check_repeatable(trained: Sequence[nn.Module]) -> None:
    """Check that modules trained without dropout compute the same values in every forward pass of training.

    Raises:
        UserError: As ``LanguageModel.check_repeatable``.
    """
    for part in trained:
        for module in part.modules():
            if isinstance(module, LanguageModel):
                module.check_repeatable()


@torch.no_grad()
def check_resolution(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Check that 16-bit weights can change by the learning rate, the size of one update of Adam, Lion or RMSprop.

    Weights that are 0 can change by any rate, until they have grown: they do not count. So a fresh adapter is judged by
    the half of it that has values.

    Raises:
        UserError: Most of the trained weights would be rounded back to their present value.
    """
    lost = count = 0
    lr = 0.0
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        lr = group["lr"]
        for weight in (p for p in group["params"] if p.dtype == torch.bfloat16):
            lost += int(((weight + lr) == weight).sum())
            count += int((weight != 0).sum())
    if lost > count / 2:
        raise UserError(
            f"is too small for {key('precision', 'bf16_true')}: weights of 8 significant bits cannot change by that "
            f"little, so {lost / count:.0%} of the trained ones would stay as they are",
            fix=f"type {key('precision', 'bf16')} (weights in 32 bits), or a larger {key('optimizer.lr')}",
            option="optimizer.lr",
            value=f"{lr:g}",
        )


def check_context(model: LanguageModel, length: int, option: str) -> None:
    """Raise UserError if a length, the value of a config key, exceeds the model's context."""
    if length > model.context_length:
        raise UserError(
            f"is more than the model's context of {model.context_length} tokens",
            fix=f"type {key(option, model.context_length)} or less",
            option=option,
            value=length,
        )


#: In 16 bits single log-probabilities may differ by tenths; their mean gap may be this many times the tolerance.
COARSE = 50


def check_sampler(sampled: Tensor, logp: Tensor, mask: Tensor, tolerance: float, exact: bool) -> None:
    """Check that the sampler drew from the distribution that is scored; otherwise KL and ratio mean nothing.

    Args:
        sampled: Log-probabilities of the sampler, [B, R].
        logp: Log-probabilities of the policy that is trained, [B, R].
        mask: Response mask, [B, R].
        tolerance: Largest difference per token, in nats.
        exact: Whether arithmetic is fp32; otherwise the mean difference is compared, with `COARSE` times the tolerance.

    Raises:
        RunFailed: The log-probabilities differ.
    """
    gaps = (sampled - logp).abs()
    if exact:
        gap, limit, name = (gaps * mask).max(), tolerance, key("stage.tolerance")
    else:
        gap, limit, name = masked_mean(gaps, mask), COARSE * tolerance, f"{COARSE} x {key('stage.tolerance')}"
    if not gap <= limit:  # nan too
        raise RunFailed(
            f"the sampler's log-probabilities differ from the policy's by {gap:.2g} nats, more than "
            f"{name}={limit:g}: the responses were not drawn from the distribution that is scored",
            fix=f"correct the sampler, or type a larger {key('stage.tolerance')}",
        )


def check_ratio(ratio: Tensor, mask: Tensor) -> None:
    """Check that the importance ratio is 1 before the first update of a rollout.

    The policy is then the one that sampled.

    Raises:
        RunFailed: The ratio is not 1.
    """
    gap = ((ratio - 1).abs() * mask).max()
    if not gap <= 1e-4:
        raise RunFailed(
            f"the importance ratio differs from 1 by {gap:.2g} at the first minibatch of a rollout, where the policy "
            "is the one that sampled",
            fix="check the model for dropout, and for outputs that depend on padding",
        )
