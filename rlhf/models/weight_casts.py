"""16-bit copies of float32 weights, made once per optimizer step and not in every pass.

Under autocast a linear layer casts its weight in each forward pass: 6 bytes are moved per weight before the product
reads 2. A decode step moves little else, and each micro-batch and each recomputed layer casts again. ``keep_casts``
makes the layers of a trained model keep the 16-bit copy until the weight changes, and stores the weights of a frozen
model in 16 bits. A trained weight stays a float32 parameter: optimizer, gradient (accumulated in float32), clipping,
EMA, checkpoint and saved model are those of autocast, bit for bit.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable


@dataclass
class WeightCopy16:
    """16-bit copy of a weight, an attribute ``copy16`` of the weight, so that layers that share it share the copy.

    Attributes:
        values: The copy.
        source: Version and address of the weight that it was made from; None: to be made anew.
    """

    values: Tensor
    source: tuple[int, int] | None


class _Copied(torch.autograd.Function):
    """Autograd function that returns the copy of a weight, and gives the weight its gradient in its own format."""

    @staticmethod
    def forward(ctx, weight, copy):  # type: ignore[no-untyped-def]
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient.to(ctx.dtype), None


class CachedLinear(nn.Linear):
    """Linear layer that under autocast computes with the kept 16-bit copy of its weight.

    The copy is renewed where the weight's version or address has changed. Fused and 8-bit optimizers change a weight
    without its version, so ``forget_casts`` is called after every optimizer step. Without autocast the layer computes
    in the format of its input.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Compute ``input @ weight.T + bias``."""
        weight = self.computed_weight()
        if weight.dtype is not input.dtype and not torch.is_autocast_enabled(input.device.type):
            weight = weight.to(input.dtype)  # a frozen weight in 16 bits
        return nn.functional.linear(input, weight, self.bias)

    def computed_weight(self) -> Tensor:
        """Return the copy in the format of autocast, differentiable in the weight; without autocast the weight."""
        weight: Tensor = self.weight
        device = weight.device.type
        if weight.dtype is not torch.float32 or not torch.is_autocast_enabled(device):
            return weight
        copy = _copy(weight, torch.get_autocast_dtype(device))
        return _Copied.apply(weight, copy) if torch.is_grad_enabled() and weight.requires_grad else copy


def keep_casts(models: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Keep 16-bit copies of the linear layers' weights of some models, instead of casting them in each pass.

    A model without trained weights and without a shared base gets its weights in 16 bits in place. Weights that an
    embedding shares keep their format, because it is not cast under autocast. The copies are made on first use.

    Args:
        models: Models whose passes run under autocast.
        dtype: Format of autocast.
    """
    for model in models:
        layers = [part for part in model.modules() if type(part) is nn.Linear]
        is_frozen = not any(weight.requires_grad for weight in model.parameters())
        in_place = is_frozen and not any(getattr(part, "shared", None) for part in model.modules())
        chosen = set(map(id, layers))
        kept = {id(w) for part in model.modules() if id(part) not in chosen for w in part._parameters.values()}
        stored: dict[int, nn.Parameter] = {}
        for part in layers:
            part.__class__ = CachedLinear
            weight = part.weight
            if in_place and weight.dtype is torch.float32 and id(weight) not in kept:
                if id(weight) not in stored:
                    stored[id(weight)] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
                part.weight = stored[id(weight)]


def forget_casts(model: nn.Module) -> None:
    """Renew the copies of a model's weights at its next pass."""
    for weight in model.parameters():
        copy: WeightCopy16 | None = getattr(weight, "copy16", None)
        if copy is not None:
            copy.source = None


def drop_casts(model: nn.Module) -> None:
    """Free the copies of a model's weights; its next pass under autocast makes them again."""
    for weight in model.parameters():
        vars(weight).pop("copy16", None)


def kept_casts(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """Return the copies that the passes of a model under autocast keep, made now where they are missing."""
    weights: dict[int, Any] = {id(part.weight): part.weight for part in model.modules() if type(part) is CachedLinear}
    return [_copy(weight, dtype) for weight in weights.values() if weight.dtype is torch.float32]


@torch.no_grad()
def _copy(weight: Any, dtype: torch.dtype) -> Tensor:
    """Return the present copy of a weight."""
    source = (weight._version, 0 if isinstance(weight, FakeTensor) else weight.data_ptr())
    copy: WeightCopy16 | None = getattr(weight, "copy16", None)
    if copy is None or copy.values.dtype is not dtype or copy.values.device != weight.device:
        copy = weight.copy16 = WeightCopy16(weight.detach().to(dtype), source)
    elif copy.source != source:
        copy.values.copy_(weight)
        copy.source = source
    return copy.values
