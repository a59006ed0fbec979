"""Masked reductions and positions. A mask is bool (or 0/1 numbers) and 1 means "counts".

Values where the mask is 0 are never read: they may be nan or inf without harm to the result or its gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor

#: adds up a tensor over all processes; the identity where there is one
SumOver = Callable[[Tensor], Tensor]


def _kept(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool(), x, torch.zeros((), dtype=x.dtype, device=x.device))


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `x` where `mask` is 1, over everything or over `dim`."""
    kept = _kept(x, mask)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` where `mask` is 1, over everything or over `dim`; 0 where nothing counts."""
    mask = mask.bool().expand_as(x)
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, sum_over: SumOver | None = None) -> Tensor:
    """Unbiased (n - 1) variance of `x` where `mask` is 1; 0 for fewer than two counted elements.

    With `sum_over` it is that of all processes together, each of which holds a part of the elements.
    """
    combined = sum_over or (lambda part: part)
    mask = mask.bool().expand_as(x)
    x = _kept(x, mask)
    count = combined(mask.sum())
    mean = combined(x.sum()) / count.clamp(min=1)
    return combined(masked_sum((x - mean).square(), mask)) / (count - 1).clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, sum_over: SumOver | None = None) -> Tensor:
    """`(x - mean) * rsqrt(var + 1e-8)` over the counted elements, 0 elsewhere.

    With `shift_mean=False` the mean is added back, so only the scale changes (the form used for rewards). With
    `sum_over` mean and variance are those of all processes together, each of which holds a part of the batch.
    Same numbers as `whiten` of openai/summarize-from-feedback, where it is masked.
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
    """Index [...] of the first 1 along the last dimension of `mask` [..., T]; T where there is none."""
    length = mask.shape[-1]
    positions = torch.arange(length, device=mask.device).expand(mask.shape)
    return positions.masked_fill(~mask.bool(), length).amin(-1)


def last_index(mask: Tensor) -> Tensor:
    """Index [...] of the last 1 along the last dimension of `mask` [..., T]; -1 where there is none."""
    positions = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
    return positions.masked_fill(~mask.bool(), -1).amax(-1)


def response_mask(ids: Tensor, eos_id: int) -> Tensor:
    """Mask [B, R] (bool) of the real tokens of responses `ids` [B, R]: up to and including the first `eos_id`.

    The end-of-sequence token itself counts, or a model would never learn to stop. Found by position, so it stays
    right when the padding token is the end-of-sequence token.
    """
    end = first_true_index(ids == eos_id)
    return torch.arange(ids.shape[-1], device=ids.device) <= end.unsqueeze(-1)
