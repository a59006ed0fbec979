"""Safety gate of Llama 2 (arXiv 2307.09288, section 3.2.3): which of two reward models speaks for a response."""

import torch
from torch import Tensor

from rlhf.functional.masking import masked_whiten


def safety_gate(helpfulness: Tensor, safety: Tensor, unsafe: Tensor, threshold: float = 0.15) -> Tensor:
    """Safety where the prompt is tagged unsafe or safety < `threshold`, else helpfulness. All [B], in (0, 1).

    `threshold` 0.15 is the paper's: precision 0.89, recall 0.55 on Meta's safety set.
    """
    return torch.where(unsafe.bool() | (safety < threshold), safety, helpfulness)


def whitened_logit(probability: Tensor, eps: float = 1e-6) -> Tensor:
    """`whiten(logit(p))` [B]: undoes the sigmoid, then mean 0 and standard deviation 1 over the batch.

    `p` is clamped to [eps, 1 - eps]; a sigmoid that saturated would give an infinite reward.
    """
    logits = torch.logit(probability.float(), eps=eps)
    return masked_whiten(logits, torch.ones_like(logits))
