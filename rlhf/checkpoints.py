"""Checkpoints from which a run resumes: written while it trains, in `<run>/checkpoints`."""

import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import pytorch_lightning as pl
from pydantic import Field
from pytorch_lightning.callbacks import Checkpoint


def batches_done(trainer: pl.Trainer) -> int:
    """Training batches finished since the run began, over all epochs and resumes (not optimizer steps)."""
    return trainer.fit_loop.total_batch_idx + 1


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder; None when there is none."""
    found = sorted((Path(folder) / "checkpoints").glob("step=*.ckpt"), key=_step)
    return found[-1] if found else None


def save(trainer: pl.Trainer, folder: Path, keep: int = 1) -> Path:
    """Writes a checkpoint of the batch just finished and removes all but the newest `keep`.

    Call it from `on_train_batch_end`, on every rank: only there do Lightning's counters say what was done.
    """
    path = Path(folder) / "checkpoints" / f"step={batches_done(trainer):08d}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    trainer.save_checkpoint(path)  # one file through a transaction: it is there as a whole or not at all
    if trainer.is_global_zero:
        for old in sorted(path.parent.glob("step=*.ckpt"), key=_step)[:-keep]:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    return path


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step="))


class Checkpoints(Checkpoint):
    """Saves a checkpoint every so many batches, or when so much time has gone by, whichever comes first."""

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
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._due(trainer):
            save(trainer, run_folder(pl_module), self.keep)
            self._saved_at = time.monotonic()

    def _due(self, trainer: pl.Trainer) -> bool:
        if trainer.should_stop:  # the run ends itself here; one that is killed now goes on from before, to the same end
            return False
        if self.every_n_batches is not None and batches_done(trainer) % self.every_n_batches == 0:
            return True
        if self.every_n_minutes is None:
            return False
        late = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        # Clocks differ between ranks, and saving is collective: all must save at the same batch.
        return trainer.strategy.reduce_boolean_decision(late, all=False) if trainer.world_size > 1 else late


def run_folder(module: pl.LightningModule) -> Path:
    """The run folder of a stage (its attribute `run_folder`)."""
    return Path(str(module.run_folder))
