"""Collectives: gather rows and objects, average gradients and sum named tensors across ranks."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

#: bytes of gradients that are reduced at a time; bounds the extra memory
BUCKET = 25 * 2**20


def world_size() -> int:
    """Return the world size; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: Tensor) -> tuple[Tensor, slice]:
    """Return the rows of all ranks in rank order, without gradient, and the slice of this rank's own rows.

    [N, ...] -> [sum of N, ...]; ranks may have different N. With world size 1 the rows are returned as they are.
    """
    rows = rows.detach()
    if world_size() == 1:
        return rows, slice(0, len(rows))
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = [int(size) for size in counts]
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    start = sum(sizes[: dist.get_rank()])
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]), slice(start, start + len(rows))


def gather_objects(value: Any) -> list[Any]:
    """Return the objects of all ranks in rank order.

    Objects are pickled, so tensors must be on the CPU.
    """
    if world_size() == 1:
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def sum_named_tensors(parts: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Sum named tensors of one shape and dtype across ranks; a name may be missing on some ranks.

    Every rank must call it. The names are returned in the same order on every rank.
    """
    known = gather_objects({name: (tuple(part.shape), part.dtype) for name, part in parts.items()})
    if len(known) == 1:
        return dict(parts)
    wanted = {name: form for names in known for name, form in names.items()}
    if not wanted:
        return {}
    rows = [
        parts[name].to(device) if name in parts else torch.zeros(shape, dtype=dtype, device=device)
        for name, (shape, dtype) in wanted.items()
    ]
    together = torch.stack(rows)
    dist.all_reduce(together)
    return dict(zip(wanted, together, strict=True))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all ranks, in place.

    Every rank must call it with the same parameters in the same order. A parameter without a gradient on this rank
    counts as a gradient of 0. A parameter without a gradient on any rank stays without one, so that an optimizer skips
    it as in a single process.
    """
    everyone = list(parameters)
    if world_size() == 1 or not everyone:
        return
    used = torch.tensor([float(p.grad is not None) for p in everyone], device=everyone[0].device)
    dist.all_reduce(used)
    for bucket in _buckets([p for p, count in zip(everyone, used.tolist(), strict=True) if count]):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([grad.flatten() for grad in grads]).div_(world_size())  # before the sum: 16-bit sums overflow
        dist.all_reduce(flat)
        pieces = flat.split([grad.numel() for grad in grads])
        for parameter, grad, piece in zip(bucket, grads, pieces, strict=True):
            parameter.grad = grad.copy_(piece.view_as(grad))


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield runs of consecutive parameters of one dtype, closed once they reach ``BUCKET`` bytes."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (bucket[-1].dtype != parameter.dtype or size >= BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel() * parameter.element_size()
    if bucket:
        yield bucket
