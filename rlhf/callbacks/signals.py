"""Graceful stop on a signal: finish the batch, save a checkpoint, exit with status 75.

75 is EX_TEMPFAIL of sysexits.h ("try again later"). A scheduler that sees it knows that the run is not finished, and
the same command resumes it. Lightning's own handling exits with 0, and with two DDP ranks it hangs.
"""

import signal
import threading
from types import FrameType
from typing import Any

import pytorch_lightning as pl

from rlhf.callbacks.checkpoints import run_directory, save

EXIT_INTERRUPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Signals(pl.Callback):
    """Callback for SIGTERM and Ctrl-C: all ranks finish the batch, save one checkpoint and raise SystemExit(75).

    A second Ctrl-C stops at once. If the signal comes during the last batch, the run simply finishes.
    """

    def __init__(self) -> None:
        self._received = False
        self._saved = False
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the signal handlers, in the main thread only."""
        if threading.current_thread() is threading.main_thread():
            # Lightning installed its own handlers when the fit began; these replace them.
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a checkpoint if any rank has received a signal."""
        stop = self._received and not trainer.should_stop  # a run that ends here simply finishes
        if trainer.world_size > 1:  # a signal may reach one rank only, and all must stop at the same batch
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop and not self._saved:
            save(trainer, run_directory(pl_module))
            self._saved = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Raise SystemExit(75) once the checkpoint is saved."""
        # Not right after saving: by now the metrics of the saved batch are on disk too, so that no row is lost.
        if self._saved:
            raise SystemExit(EXIT_INTERRUPTED)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the previous signal handlers."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the previous signal handlers."""
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            self._restore()
            raise KeyboardInterrupt
        self._received = True

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
