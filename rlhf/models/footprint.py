"""Memory of a stage's weights by role: bytes that each role holds alone and bytes that roles share."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rlhf.models.reference import Reference

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Footprint:
    """Bytes of weights.

    Args:
        roles: Role -> (bytes that the role reads, bytes of these that no other role reads).
        held: Bytes that all roles hold together; shared bytes count once.
    """

    roles: dict[str, tuple[int, int]]
    held: int

    @property
    def copies(self) -> int:
        """Bytes if every role held its own copy of the weights."""
        return sum(read for read, _ in self.roles.values())

    def numbers(self) -> dict[str, float]:
        """Return the numbers for summary.json, as ``weights_bytes/NAME`` -> bytes."""
        found = {"held": self.held, "as_copies": self.copies}
        for role, (read, own) in self.roles.items():
            found |= {f"{role}": read, f"{role}_own": own}
        return {f"weights_bytes/{name}": float(value) for name, value in found.items()}

    def __str__(self) -> str:
        count = len(self.roles)
        copies = f"{_NUMBERS[count] if count < len(_NUMBERS) else count} {'copies' if count != 1 else 'copy'}"
        own = ", ".join(f"{role} {_size(own)}" for role, (_, own) in self.roles.items())
        return f"weights held: {_size(self.held)} ({copies}: {_size(self.copies)}; not shared: {own})"


def measure_footprint(roles: Mapping[str, Any]) -> Footprint:
    """Count the bytes of the tensors of each role, which is a module or a reference.

    A reference that is the policy with its adapter off reads all of the policy except the adapter.
    """
    storages: dict[str, dict[int, int]] = {}
    for role, model in roles.items():
        if isinstance(model, Reference):
            module, without_adapter = model.modules
        else:
            module, without_adapter = model, False
        storages[role] = dict(_storages(module, without_adapter))
    readers = Counter(place for found in storages.values() for place in found)
    everything = {place: size for found in storages.values() for place, size in found.items()}
    counted = {
        role: (sum(found.values()), sum(size for place, size in found.items() if readers[place] == 1))
        for role, found in storages.items()
    }
    return Footprint(counted, sum(everything.values()))


def _storages(module: nn.Module, without_adapter: bool) -> Iterator[tuple[int, int]]:
    """Yield address and bytes of every storage that a module holds, including the scales of quantised layers."""
    for name, part in module.named_modules():
        if without_adapter and "lora_" in name:
            continue
        held: list[Any] = [*part._parameters.values(), *part._buffers.values()]
        for owner in (getattr(part._parameters.get("weight"), "quant_state", None), getattr(part, "state", None)):
            held += list(_tensors_of(owner)) if owner is not None else []
        for tensor in held:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                storage = tensor.untyped_storage()
                yield storage.data_ptr(), storage.nbytes()


def _tensors_of(owner: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors among the attributes of an object that bitsandbytes stores beside a weight."""
    for value in getattr(owner, "__dict__", {}).values():
        if isinstance(value, torch.Tensor):
            yield value
        elif type(value).__module__.startswith("bitsandbytes"):
            yield from _tensors_of(value)


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= 0.1 * size:
            return f"{count / size:.2g} {unit}" if count < 10 * size else f"{count / size:.0f} {unit}"
    return f"{count / 1000:.0f} kB"
