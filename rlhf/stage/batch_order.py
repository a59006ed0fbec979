"""Batch order of a stage: batch i and the randomness of step i are functions of (seed, i)."""

from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar
from zlib import crc32

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from rlhf.data.batches import Batches, mix_seed
from rlhf.errors import UserError, key
from rlhf.stage.experience import chunks

__all__ = ["Parts", "derive_seed"]


T = TypeVar("T")


def derive_seed(*parts: int | str) -> int:
    """Derive a seed from numbers and names, such as (seed, purpose, count).

    The streams are independent and there is no generator state to save.
    """
    return mix_seed(*(crc32(part.encode()) if isinstance(part, str) else part for part in parts))


class Parts(Generic[T]):
    """Batch as a list of its micro-batches.

    Opaque to Lightning, which would otherwise take records and batches apart.
    """

    def __init__(self, parts: Sequence[T]) -> None:
        self.parts = list(parts)

    def __iter__(self) -> Iterator[T]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Parts[T]":
        """Return the batch on a device; parts without a ``to`` method (records) are returned unchanged."""
        return Parts([part.to(device, non_blocking) if hasattr(part, "to") else part for part in self.parts])


class BatchOrder(pl.LightningModule):
    """Part of a stage that orders its batches and seeds its steps, so that a resumed run ends with the same bits."""

    seed: int  # set by build from (seed, stage, round); every seed of the stage derives from it
    batch_size: int
    micro_batch_size: int | None
    examples: Sequence[Any] = ()
    held_out: Sequence[Any] = ()
    batches: Batches

    def collate(self, examples: list[Any]) -> Any:
        """Return a micro-batch of examples as tensors."""
        raise NotImplementedError

    def parts(self, examples: list[Any]) -> Parts[Any]:
        """Return a batch as its micro-batches."""
        return Parts([self.collate(examples[rows]) for rows in chunks(len(examples), self.micro_batch_size)])

    def order(self, examples: int | Sequence[int], *, epochs: float | None = None, steps: int | None = None) -> Batches:
        """Build the batch sampler of the run.

        Args:
            examples: Number of examples, or their lengths; with lengths the batches are length-grouped.
            epochs: Passes over the examples.
            steps: Number of batches, in place of ``epochs``.
        """
        return Batches(
            examples,
            self.batch_size,
            seed=self.seed,
            epochs=epochs,
            steps=steps,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    def train_dataloader(self) -> DataLoader:
        """Return the training batches, in the order fixed by (seed, index), starting where a checkpoint left off."""
        self.batches.start = self.batches_done
        return DataLoader(self.examples, batch_sampler=self.batches, collate_fn=self.parts)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader | list:
        """Return this rank's share of the held-out examples, in their original order."""
        if not self.held_out:
            return []
        if len(self.held_out) < self.trainer.world_size:  # a rank without batches would hang the others
            needed = key("data.validation", self.trainer.world_size)
            raise UserError(
                f"{len(self.held_out)} held-out examples are too few for {self.trainer.world_size} devices, each of "
                "which needs one",
                fix=f"type {needed} or more, or {key('trainer.limit_val_batches', 0)}",
                option="data.validation",
            )
        mine = self.held_out[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(mine, batch_size=self.batch_size, collate_fn=self.parts)  # type: ignore[arg-type]

    @property
    def batches_done(self) -> int:
        """Training batches finished, over all resumes; Lightning stores the count in its checkpoint."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]

    def step_seed(self, purpose: str, index: int | None = None) -> int:
        """Return the seed of one purpose at this batch; it differs between ranks."""
        return derive_seed(self.seed, purpose, self.batches_done if index is None else index, self.trainer.global_rank)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed torch, so that dropout depends on (seed, step, rank) alone."""
        seed = self.step_seed("train")
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # manual_seed formats the stack for each type of GPU not yet used
        else:
            torch.manual_seed(seed)
