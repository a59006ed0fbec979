"""Checkpoints from which an interrupted run resumes, written during training to `<run>/checkpoints`."""

import os
import time
from pathlib import Path
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pydantic import Field
from pytorch_lightning.callbacks import Checkpoint

from rlhf.logger.loggers import MetricsLogger
from rlhf.storage import checkpoint_files
from rlhf.storage.files import sync_folder


def batches_done(trainer: pl.Trainer) -> int:
    """Return the training batches finished since the run began, over all epochs and resumes (not optimizer steps)."""
    return trainer.fit_loop.total_batch_idx + 1


def latest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run directory; None if there is none.

    Raises:
        UserError: There are checkpoints and none is whole.
    """
    return checkpoint_files.newest_whole(folder)[0]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint writer that writes to a scratch file beside the target, flushes it to disk and renames it.

    Lightning's own writer goes through TMPDIR and copies if that is another file system: a kill or a full disk during
    the copy leaves half a checkpoint under its final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; `path` is complete or absent."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            checkpoint_files.remove(path)
        scratch = path.with_name(f".{path.name}")
        try:
            with scratch.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def save(trainer: pl.Trainer, folder: Path, keep: int = 1) -> Path:
    """Write a checkpoint of the batch just finished and remove all but the newest `keep`.

    Call it from `on_train_batch_end`, on every rank: only there are Lightning's counters up to date.
    """
    _write_metrics(trainer)
    path = checkpoint_files.place(folder, batches_done(trainer))
    path.parent.mkdir(parents=True, exist_ok=True)
    trainer.save_checkpoint(path)
    if trainer.is_global_zero:
        found = checkpoint_files.found(folder)
        whole = found[: found.index(path) + 1]  # a later one is left over from before this resume
        for old in found:
            if old not in whole[-keep:]:
                checkpoint_files.remove(old)
        for scratch in path.parent.glob(".step=*.ckpt"):  # left over from a kill
            checkpoint_files.remove(scratch)
    return path


def is_last(trainer: pl.Trainer) -> bool:
    """Return whether the batch just finished is the last of the run.

    Its checkpoint would be worse than the previous one: a run resumed from it skips the validation at the end.
    """
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def _write_metrics(trainer: pl.Trainer) -> None:
    """Write the row of the batch just finished to metrics.csv, which Lightning does only after this hook.

    A kill between the two would leave a checkpoint whose row is missing from metrics.csv.
    """
    row = {name: float(value) for name, value in trainer.logged_metrics.items() if not name.startswith("val/")}
    for logger in trainer.loggers if row else ():
        if isinstance(logger, MetricsLogger):
            logger.log_metrics({**row, "epoch": trainer.current_epoch}, trainer.fit_loop.total_batch_idx)


class Checkpoints(Checkpoint):
    """Callback that saves a checkpoint every n batches or every n minutes, whichever comes first.

    Args:
        every_n_batches: Training batches between checkpoints; None: no limit in batches.
        every_n_minutes: Minutes between checkpoints; None: no limit in time.
        keep: Checkpoints kept, the newest ones.
    """

    def __init__(
        self,
        every_n_batches: Annotated[int | None, Field(gt=0)] = None,
        every_n_minutes: Annotated[float | None, Field(gt=0)] = 10.0,
        keep: Annotated[int, Field(ge=1)] = 1,
    ) -> None:
        self.every_n_batches = every_n_batches
        self.every_n_minutes = every_n_minutes
        self.keep = keep
        self._saved_at = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of `every_n_minutes`."""
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a checkpoint if one is due, except after the last batch."""
        if self._due(trainer) and not is_last(trainer):
            save(trainer, run_directory(pl_module), self.keep)
            self._saved_at = time.monotonic()

    def _due(self, trainer: pl.Trainer) -> bool:
        if trainer.should_stop:  # the run ends here; a kill now resumes from an earlier checkpoint, to the same end
            return False
        if self.every_n_batches is not None and batches_done(trainer) % self.every_n_batches == 0:
            return True
        if self.every_n_minutes is None:
            return False
        late = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        # Clocks differ between ranks, and saving is collective: all must save at the same batch.
        return trainer.strategy.reduce_boolean_decision(late, all=False) if trainer.world_size > 1 else late


def run_directory(module: pl.LightningModule) -> Path:
    """Return the run directory of a stage (its attribute `run_directory`)."""
    return Path(str(module.run_directory))
