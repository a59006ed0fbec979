"""Optimizers: each takes parameters (or parameter groups) first, then its hyperparameters.

A group's own ``weight_decay`` overrides the optimizer's: stages give none to vectors (norms, biases).
"""

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch.optim import Optimizer

from rlhf.errors import UserError, key

Parameters = Iterable[Any]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def adamw(
    parameters: Parameters,
    lr: Positive,
    beta1: Decay = 0.9,
    beta2: Decay = 0.95,
    eps: Positive = 1e-8,
    weight_decay: NotNegative = 0.0,
    fused: bool = True,
) -> Optimizer:
    """Build AdamW (Loshchilov & Hutter 2019).

    ``fused`` updates a weight and its moments in one pass over memory. A stage with a gradient scaler (precision=fp16)
    passes False: the fused update would divide out the loss scale itself, after the gradient was clipped.
    """
    return torch.optim.AdamW(
        parameters, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, fused=fused or None
    )


def adamw_8bit(
    parameters: Parameters,
    lr: Positive,
    beta1: Decay = 0.9,
    beta2: Decay = 0.95,
    eps: Positive = 1e-8,
    weight_decay: NotNegative = 0.0,
) -> Optimizer:
    """Build AdamW with both moments in blockwise 8 bits (Dettmers et al. 2022): 2 bytes of state per weight, not 8."""
    return _bitsandbytes().AdamW8bit(parameters, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)


def paged_adamw_8bit(
    parameters: Parameters,
    lr: Positive,
    beta1: Decay = 0.9,
    beta2: Decay = 0.95,
    eps: Positive = 1e-8,
    weight_decay: NotNegative = 0.0,
) -> Optimizer:
    """Build ``adamw_8bit`` with state that is paged to main memory if the GPU's is full (Dettmers et al. 2023)."""
    return _bitsandbytes().PagedAdamW8bit(parameters, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)


def lion_8bit(
    parameters: Parameters,
    lr: Positive,
    beta1: Decay = 0.9,
    beta2: Decay = 0.99,
    weight_decay: NotNegative = 0.0,
) -> Optimizer:
    """Build Lion (Chen et al. 2023) with its one moment in 8 bits.

    It takes learning rates 3 to 10 times smaller than AdamW.
    """
    return _bitsandbytes().Lion8bit(parameters, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay)


def rmsprop(
    parameters: Parameters,
    lr: Positive,
    alpha: Decay = 0.99,
    eps: Positive = 1e-8,
    weight_decay: NotNegative = 0.0,
) -> Optimizer:
    """Build RMSprop, as the DPO paper uses it (Rafailov et al. 2023, appendix B): one moment of state."""
    return torch.optim.RMSprop(parameters, lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.optim
    except ImportError as error:
        raise UserError(
            "8-bit optimizers need the Python package bitsandbytes",
            fix=f"type pip install bitsandbytes, or {key('optimizer', 'adamw')}",
            option="optimizer",
        ) from error
    return bitsandbytes.optim
