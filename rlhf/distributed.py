"""What several processes tell each other."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

#: bytes of gradients that are added up over processes at a time, which is the memory that doing so takes
BUCKET = 25 * 2**20


def processes() -> int:
    """How many work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: Tensor) -> tuple[Tensor, slice]:
    """The rows of all processes in the order of their ranks, without gradient, and where this process's own are.

    [N, ...] -> [sum of N, ...]; processes may have different N. Alone, a process gets its own rows back.
    """
    rows = rows.detach()
    if processes() == 1:
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
    """What every process has, in the order of their ranks. Tensors must be on the CPU: it is pickled."""
    if processes() == 1:
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def add_up(parts: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors of one shape and type added up over processes by name, some of which may be known to some processes only.

    Every process must call it. The names come back in the same order everywhere.
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
    """Makes every gradient its mean over all processes; each must call it, with the same parameters in the same order.

    A parameter without a gradient here, because nothing on this process read it, counts as one of 0. One that has no
    gradient anywhere stays without, so that an optimizer skips it as it would in a single process.
    """
    everyone = list(parameters)
    if processes() == 1 or not everyone:
        return
    used = torch.tensor([float(p.grad is not None) for p in everyone], device=everyone[0].device)
    dist.all_reduce(used)
    for bucket in _buckets([p for p, count in zip(everyone, used.tolist(), strict=True) if count]):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([grad.flatten() for grad in grads]).div_(processes())  # before the sum: 16 bits overflow
        dist.all_reduce(flat)
        pieces = flat.split([grad.numel() for grad in grads])
        for parameter, grad, piece in zip(bucket, grads, pieces, strict=True):
            parameter.grad = grad.copy_(piece.view_as(grad))


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Neighbours of one type, up to ``BUCKET`` bytes of them at a time."""
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
