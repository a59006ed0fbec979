"""Exponential moving average (EMA) of weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlhf.models.sharding import is_sharded, local_shard, reshard


class EMA:
    """EMA of a module's trainable parameters: `average <- decay * average + (1 - decay) * weights`, in float32.

    InstructGPT (arXiv 2203.02155, appendix C.4) keeps an EMA with decay 0.992 and releases it. This is deliberately not
    an ``nn.Module``: the averages belong to no optimizer, and checkpoints store them through ``state``. Each rank
    averages its own shards of a sharded module.

    Args:
        module: Module whose trainable parameters are averaged, starting from their current values.
        decay: Weight of the past, in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.state: dict[str, Tensor] = {
            name: local_shard(p.detach()).float().clone() for name, p in self._parameters()
        }

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        reshard(self.module)
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages with the current weights, once per optimizer step."""
        for name, parameter in self._parameters():
            average = self.state[name]
            average.lerp_(local_shard(parameter.detach()).to(average), 1.0 - self.decay)

    def load(self, state: dict[str, Tensor]) -> None:
        """Load averages from a checkpoint's ``state``."""
        for name, average in self.state.items():
            average.copy_(state[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the averages as the module's weights inside the context; then restore its own weights bit for bit."""
        if is_sharded(self.module):
            with self._copied():
                yield
            return
        kept = [(parameter, parameter.data) for _, parameter in self._parameters()]
        try:
            for name, parameter in self._parameters():
                parameter.data = self.state[name].to(parameter.dtype)
            yield
        finally:
            for parameter, own in kept:
                parameter.data = own

    @contextmanager
    def _copied(self) -> Iterator[None]:
        """Do the same in the shards' own memory, which FSDP gathers weights from."""
        shards = {name: local_shard(p.detach()) for name, p in self._parameters()}
        kept = {name: shard.clone() for name, shard in shards.items()}
        try:
            for name, shard in shards.items():
                shard.copy_(self.state[name])
            yield
        finally:
            reshard(self.module)
            for name, shard in shards.items():
                shard.copy_(kept[name])
