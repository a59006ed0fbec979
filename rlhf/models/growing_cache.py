"""Key-value cache with spare room, so that a decode step writes its tokens and copies no earlier ones."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 64  # columns allocated at a time: the whole cache is copied once for that many decode steps


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Cache of one attention layer; ``keys`` and ``values`` are views of larger buffers.

    Not for passes with gradients, which a write in place would invalidate.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DynamicLayer) -> None:
        """Take over the states of a layer."""
        super().__init__()
        self.__dict__.update(layer.__dict__)
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append states, [B, H, S, d] each; return those of all tokens so far, [B, H, T, d]."""
        start = self.keys.shape[-2]
        stop = start + key_states.shape[-2]
        if self._buffers is None or stop > self._buffers[0].shape[-2]:
            self._buffers = _enlarged(self.keys, stop), _enlarged(self.values, stop)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = new
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self._buffers)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._buffers = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows of these numbers."""
        super().batch_select_indices(indices)
        self._buffers = None


def grow(cache: Any) -> Any:
    """Give the layers of a cache room to grow, and return the cache; layers of other kinds stay as they are."""
    if not torch.is_grad_enabled():
        layers = getattr(cache, "layers", [])
        layers[:] = [GrowingLayer(layer) if type(layer) is DynamicLayer else layer for layer in layers]
    return cache


def _enlarged(states: Tensor, columns: int) -> Tensor:
    """Return a copy of states [B, H, T, d] with room for this many columns, and for some more."""
    batch, heads, length, width = states.shape
    buffer = states.new_empty(batch, heads, columns + ROOM - 1, width)
    buffer[:, :, :length] = states
    return buffer
