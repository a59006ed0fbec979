"""Size of optimizer state per weight, measured on small weights because only the optimizer's code determines it."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

LARGE = (64 * 256, 128 * 256)  # numbers per weight; two sizes determine the slope and the constant
SMALL = (256, 512)  # 8-bit optimizers keep small weights in 32 bits
QUANTISED_FROM = 4096  # numbers; bitsandbytes' min_8bit_size


class StateSize:
    """Bytes of optimizer state of weights.

    Optimizer steps are run on a few small weights; the size of the state grows linearly with theirs. The result is
    exact for optimizers that keep tensors of the weight's shape; 8-bit optimizers keep scales of blocks, so it is
    accurate to one block per weight.

    Args:
        make: Builds the optimizer from parameters; None for a stage without training.
    """

    def __init__(self, make: Callable[..., torch.optim.Optimizer] | None) -> None:
        self._make = make
        self._line = cache(self._measure)
        self._shared = 0.0  # bytes of shared state counted so far

    @property
    def trains(self) -> bool:
        """Return whether there is an optimizer."""
        return self._make is not None

    def of(self, weights: Iterable[nn.Parameter]) -> int:
        """Return the bytes of state of these weights, which may be fake tensors.

        State that all weights share counts once.
        """
        total = 0.0
        for weight in weights if self._make else ():
            slope, constant, shared = self._line(weight.numel() >= QUANTISED_FROM, weight.dtype)
            total += slope * weight.numel() + constant + max(0.0, shared - self._shared)
            self._shared = max(shared, self._shared)
        return round(total)

    def _measure(self, large: bool, dtype: torch.dtype) -> tuple[float, float, float]:
        """Return (bytes per number, bytes per weight, bytes shared by all weights)."""
        first, second = LARGE if large else SMALL
        one, other, twice = (self._bytes(counts, dtype) for counts in ([first], [second], [first, first]))
        slope = (other - one) / (second - first)
        return slope, twice - one - slope * first, 2 * one - twice

    def _bytes(self, counts: list[int], dtype: torch.dtype) -> int:
        assert self._make is not None
        weights = [nn.Parameter(torch.zeros(count, dtype=dtype)) for count in counts]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
            optimizer = self._make(weights)
            for weight in weights:
                weight.grad = torch.zeros_like(weight)
            optimizer.step()
        return state_bytes(optimizer)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors in an optimizer's state; one that several weights share counts once."""
    tensors: dict[int, Tensor] = {id(value): value for state in optimizer.state.values() for value in _tensors(state)}
    return sum(value.numel() * value.element_size() for value in tensors.values())


def _tensors(node: Any) -> Iterator[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from _tensors(value)
