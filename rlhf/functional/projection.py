"""Projection of hidden states to the vocabulary."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

FEW_ROWS = 32


def project(hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``head(hidden)``, [..., D] -> [..., V].

    A decode step projects a few rows, and reads the whole matrix for them. On a CPU the product of the matrix and the
    transposed rows takes half the time of the rows and the transposed matrix.
    """
    few = hidden.dim() == 2 and hidden.device.type == "cpu" and len(hidden) <= FEW_ROWS
    if not few or torch.is_grad_enabled() or not isinstance(head, nn.Linear) or not is_plain(head):
        return head(hidden)
    logits = (head.weight @ hidden.t()).t().contiguous()
    return logits if head.bias is None else logits + head.bias


def is_plain(head: nn.Linear) -> bool:
    """Return whether calling ``head`` is exactly ``x @ weight.T + bias``: no subclass, no hooks, not sharded."""
    return (
        type(head) is nn.Linear
        and type(head.weight) in (nn.Parameter, Tensor, FakeTensor)
        and head.weight.is_floating_point()
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
    )
