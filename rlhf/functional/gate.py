"""Safety gate of Llama 2 (arXiv 2307.09288, section 3.2.3): select one of two reward models per response."""

import torch
from torch import Tensor


def safety_gate(helpfulness: Tensor, safety: Tensor, unsafe: Tensor, threshold: float = 0.15) -> Tensor:
    """Return `safety` where the prompt is tagged unsafe or safety < `threshold`, else `helpfulness`.

    All tensors are [B]; scores are probabilities in (0, 1). The default `threshold` of 0.15 is the paper's: precision
    0.89 and recall 0.55 on Meta's safety set.
    """
    return torch.where(unsafe.bool() | (safety < threshold), safety, helpfulness)
