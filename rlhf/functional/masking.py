"""Masked reductions and positions. A mask is bool (or 0/1 numbers); 1 selects an element.

Values where the mask is 0 are never read: they may be nan or inf without an effect on the result or its gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor

#: sums a tensor over all ranks; the identity for a world size of 1
SumOver = Callable[[Tensor], Tensor]


def _kept(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool(), x, torch.zeros((), dtype=x.dtype, device=x.device))


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Return the sum of `x` where `mask` is 1, over all elements or over `dim`."""
    kept = _kept(x, mask)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Return the mean of `x` where `mask` is 1, over all elements or over `dim`; 0 where the mask selects none."""
    mask = mask.bool().expand_as(x)
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, sum_over: SumOver | None = None) -> Tensor:
    """Return the unbiased (n - 1) variance of `x` where `mask` is 1; 0 for fewer than two selected elements.

    With `sum_over` the variance is that of the elements of all ranks together.
    """
    combined = sum_over or (lambda part: part)
    mask = mask.bool().expand_as(x)
    x = _kept(x, mask)
    count = combined(mask.sum())
    mean = combined(x.sum()) / count.clamp(min=1)
    return combined(masked_sum((x - mean).square(), mask)) / (count - 1).clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, sum_over: SumOver | None = None) -> Tensor:
    """Return `(x - mean) * rsqrt(var + 1e-8)` over the selected elements, and 0 elsewhere.

    With `shift_mean=False` the mean is added back, so that only the scale changes (the form used for rewards). With
    `sum_over` mean and variance are those of all ranks together, each of which holds a part of the batch. The result
    equals that of `whiten` in openai/summarize-from-feedback, restricted to the mask.
    """
    mask = mask.bool().expand_as(x)
    x = _kept(x, mask)
    combined = sum_over or (lambda part: part)
    count = combined(mask.sum())
    mean = combined(x.sum()) / count.clamp(min=1)
    var = combined(masked_sum((x - mean).square(), mask)) / (count - 1).clamp(min=1)
    whitened = (x - mean) * torch.rsqrt(var + 1e-8)
    return _kept(whitened if shift_mean else whitened + mean, mask)


def first_true_index(mask: Tensor) -> Tensor:
    """Return the index [...] of the first 1 along the last dimension of `mask` [..., T]; T if there is none."""
    length = mask.shape[-1]
    positions = torch.arange(length, device=mask.device).expand(mask.shape)
    return positions.masked_fill(~mask.bool(), length).amin(-1)


def last_index(mask: Tensor) -> Tensor:
    """Return the index [...] of the last 1 along the last dimension of `mask` [..., T]; -1 if there is none."""
    positions = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
    return positions.masked_fill(~mask.bool(), -1).amax(-1)


def response_mask(ids: Tensor, eos_id: int) -> Tensor:
    """Return the mask [B, R] (bool) of the real tokens of responses `ids` [B, R], up to the first `eos_id`.

    The end-of-sequence token itself is included; otherwise a model would never learn to stop. The mask comes from
    positions, so it stays correct where the padding token is the end-of-sequence token.
    """
    end = first_true_index(ids == eos_id)
    return torch.arange(ids.shape[-1], device=ids.device) <= end.unsqueeze(-1)
