"""Frozen models that are in main memory except while they score."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlhf.models.weight_casts import drop_casts


class Offload:
    """Frozen models whose weights stay in main memory; inside ``loaded`` they have a copy on the device.

    Frozen weights do not change, so nothing is copied back. With a GPU the main memory is page-locked, so that the copy
    runs at the speed of the bus.

    Args:
        models: Frozen models, which share no weights with trained ones.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self.models = list(models)
        tensors = {id(t): t for model in self.models for t in (*model.parameters(), *model.buffers())}
        self._homes = [(tensor, _home(tensor)) for tensor in tensors.values()]
        self._free()

    @contextmanager
    def loaded(self, device: torch.device) -> Iterator[None]:
        """Hold the weights on a device inside the context. Not to be nested."""
        for tensor, home in self._homes:
            tensor.data = copy_to(home, device)
        try:
            yield
        finally:
            self._free()

    def _free(self) -> None:
        for tensor, home in self._homes:
            tensor.data = home
        for model in self.models:
            drop_casts(model)


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; a page-locked one is copied without waiting, in the order of the device's work."""
    return tensor.to(device, non_blocking=True)


def _home(tensor: Tensor) -> Tensor:
    value = tensor.detach().cpu()
    return value.pin_memory() if torch.cuda.is_available() else value
