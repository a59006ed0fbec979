"""Batch sampler whose batch i is a function of (seed, i) alone."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from rlhf.errors import UserError, key


def check_divisible(batch_size: int, divisor: int, name: str) -> None:
    """Raise UserError unless the batch size is a multiple of ``divisor``, which messages call ``name``."""
    if batch_size % divisor:
        raise UserError(
            f"must be a multiple of {name}",
            fix=f"type {key('stage.batch_size', -(-batch_size // divisor) * divisor)}",
            option="stage.batch_size",
            value=batch_size,
        )


class Batches(Sampler[list[int]]):
    """Stateless batch sampler: batch i is the same whether or not batches 0..i-1 were drawn.

    Epoch e visits the records in an order drawn from (seed, e). Records left over at the end of an epoch that do not
    fill a batch are dropped (another order drops others). An exact resume is `start=<batches already done>`.

    Args:
        records: Number of records, or their lengths; lengths give length-grouped batches with little padding (groups
            are drawn inside windows of 16 batches, the order of batches is random).
        batch_size: Records per batch over all ranks.
        seed: Seed of the orders.
        steps: Number of batches in total, counted from 0 (not from `start`); give either `steps` or `epochs`.
        epochs: Number of epochs in total, counted as `steps`.
        start: Number of batches to skip.
        rank: Rank of this process.
        world_size: Number of ranks; each gets its own batch_size / world_size records of every batch.
    """

    WINDOW = 16

    def __init__(
        self,
        records: int | Sequence[int],
        batch_size: int,
        seed: int,
        steps: int | None = None,
        epochs: float | None = None,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.lengths = None if isinstance(records, int) else torch.from_numpy(np.array(records, dtype=np.int64))
        self.n = records if isinstance(records, int) else len(records)
        self.batch_size, self.seed, self.start, self.rank, self.world_size = batch_size, seed, start, rank, world_size
        if (steps is None) == (epochs is None):
            raise UserError(
                f"either {key('stage.steps')} or {key('stage.epochs')} must be set, and the other must be null",
                fix=f"type {key('stage.epochs', 1)} {key('stage.steps', None)}",
            )
        if self.n < batch_size:
            raise UserError(
                f"there are only {self.n} records",
                fix=f"type {key('stage.batch_size', self.n)} or less",
                option="stage.batch_size",
                value=batch_size,
            )
        check_divisible(batch_size, world_size, f"the {world_size} devices")
        self.per_epoch = self.n // batch_size
        self.steps = steps if steps is not None else max(1, round((epochs or 0.0) * self.per_epoch))

    def __len__(self) -> int:
        """Return the number of batches of the whole run, those before `start` included.

        Lightning counts a resumed epoch from its start.
        """
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        for index in range(self.start, self.steps):
            if index // self.per_epoch != epoch:
                epoch = index // self.per_epoch
                order = self._order(epoch)
            first = index % self.per_epoch * self.batch_size
            yield order[first : first + self.batch_size][self.rank :: self.world_size].tolist()

    def _order(self, epoch: int) -> torch.Tensor:
        """Return the records in the order of an epoch, truncated to whole batches: [per_epoch * batch_size] long."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        order = torch.randperm(self.n, generator=generator)[: self.per_epoch * self.batch_size]
        if self.lengths is None:
            return order
        window = self.WINDOW * self.batch_size
        parts = [part[torch.argsort(self.lengths[part], stable=True)] for part in order.split(window)]
        batches = torch.cat(parts).view(self.per_epoch, self.batch_size)
        return batches[torch.randperm(self.per_epoch, generator=generator)].flatten()


def mix_seed(*parts: int) -> int:
    """Return a 63-bit seed from several integers; neighbouring integers give distant seeds (splitmix64)."""
    state = 0
    for part in parts:
        state = (state + (part & (2**64 - 1)) + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1
