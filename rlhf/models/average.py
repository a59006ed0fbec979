"""Exponential moving average of weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """`average <- decay * average + (1 - decay) * weights` of a module's trainable parameters, in float32.

    InstructGPT (arXiv 2203.02155, appendix C.4) keeps one with decay 0.992 and releases it. Deliberately no
    ``nn.Module``: the averages are in no optimizer, and move through checkpoints by ``state``.

    Args:
        module: Its trainable parameters are averaged, starting from what they are now.
        decay: Weight of the past, in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.state: dict[str, Tensor] = {name: p.detach().float().clone() for name, p in self._parameters()}

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def update(self) -> None:
        """One step towards the weights as they are now."""
        for name, parameter in self._parameters():
            average = self.state[name]
            average.lerp_(parameter.detach().to(average), 1.0 - self.decay)

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes up averages kept in a checkpoint."""
        for name, average in self.state.items():
            average.copy_(state[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module has the averages as its weights inside, and its own again after, bit for bit."""
        kept = [(parameter, parameter.data) for _, parameter in self._parameters()]
        try:
            for name, parameter in self._parameters():
                parameter.data = self.state[name].to(parameter.dtype)
            yield
        finally:
            for parameter, own in kept:
                parameter.data = own
