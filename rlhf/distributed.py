"""What several processes tell each other."""

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(rows: Tensor) -> tuple[Tensor, slice]:
    """The rows of all processes in the order of their ranks, without gradient, and where this process's own are.

    [N, ...] -> [sum of N, ...]; processes may have different N. Alone, a process gets its own rows back.
    """
    rows = rows.detach()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
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
