"""Large weight matrices in oneDNN's blocked layout, for products with few rows on a CPU.

A decode step multiplies each weight matrix with a few rows. The CPU library of ``torch.nn.functional.linear`` lays the
whole matrix out again for every such product, which takes longer than the product itself once the matrix exceeds the
processor's caches: the projection to the vocabulary, above all. Here it is laid out once per rollout. The values are
those of ``linear``, up to rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_WEIGHTS = 2**20  # smaller matrices stay in the caches (4 MiB in fp32)
MAX_ROWS = 128  # with more rows, laying the matrix out is a small part of the product


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Compute the large linear layers of a model from packed copies of their weights; these must not change meanwhile.

    Layers that it does not fit (another device or dtype, autocast, a quantised or sharded weight) stay as they are.
    """
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and "forward" not in vars(module) and _fits(module.weight)
    ]
    for layer in layers:
        layer.forward = _packed_forward(layer)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def packed_bytes(model: nn.Module) -> int:
    """Return the bytes of the packed copies of a model in fp32 on a CPU."""
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    return sum(4 * layer.weight.numel() for layer in layers if layer.weight.numel() >= MIN_WEIGHTS)


def _fits(weight: Tensor) -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and type(weight) in (nn.Parameter, Tensor)
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() >= MIN_WEIGHTS
        and not torch.is_autocast_enabled("cpu")
    )


def _packed_forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Return the forward pass of a linear layer with a packed copy of its present weight."""
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), MAX_ROWS)
    bias = None if layer.bias is None else layer.bias.detach()
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def forward(rows: Tensor) -> Tensor:
        if rows.numel() == 0 or rows.numel() > MAX_ROWS * layer.in_features:
            return F.linear(rows, layer.weight, layer.bias)
        product: Tensor = multiply(rows, packed, bias, "none", [], "")
        return product

    return forward
