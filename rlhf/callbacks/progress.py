"""Progress of long work: one live line on a terminal, periodic plain lines in a pipe or a log file.

`Meter` serves any loop; `Progress` is the Lightning callback that drives a `Meter` during training.
"""

import io
import math
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Annotated, Any, TextIO, cast

import pytorch_lightning as pl
from pydantic import Field
from pytorch_lightning.callbacks import ProgressBar
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

from rlhf.callbacks.checkpoints import batches_done
from rlhf.console import CleanStream, Screen, raw

REFRESH_S = 0.25  # shortest time between redraws; reading a metric waits for the device, so not after every batch


class Meter:
    """Progress line of a loop: units done, speed, time left, and current metrics.

        with Meter("collect", total=2000) as meter:
            for batch in batches:
                ...
                meter.advance(len(batch), score=score)

    Args:
        name: Name of the work.
        total: Units of work; None if unknown.
        unit: Name of a unit, as in "12.3 step/s".
        every_s: Seconds between plain lines where there is no terminal.
        start: Units already done by an earlier, interrupted run; they do not count towards the speed.
        stream: Output stream; standard output by default.
        always: Whether a final line is printed even if the work ended before the first line was due.
    """

    def __init__(
        self,
        name: str,
        total: int | None,
        unit: str = "step",
        every_s: float = 10.0,
        start: int = 0,
        stream: TextIO | None = None,
        always: bool = True,
    ) -> None:
        self.always = always
        self.name, self.total, self.unit, self.every_s = name, total, unit, every_s
        self.done = self._start = start
        self.note = ""
        self._numbers: dict[str, float] = {}
        self._stream = stream if stream is not None else sys.stdout
        self._live: Live | None = None
        self._began = self._shown = 0.0
        self._over = False

    def __enter__(self) -> "Meter":
        self._began = self._shown = time.monotonic()
        console = Screen(file=raw(self._stream))
        if console.is_terminal:
            self._live = Live(self._render(), console=console, auto_refresh=False, transient=True)
            self._live.start()
            # Rich interprets colour escapes in text printed beside the bar; untrusted text must not contain any.
            sys.stdout, sys.stderr = (cast(TextIO, CleanStream(stream)) for stream in (sys.stdout, sys.stderr))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Print a final plain line with the progress reached."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._over = True
        if self.always or error is not None or time.monotonic() - self._began >= self.every_s:
            self._print()

    @property
    def due(self) -> bool:
        """Return whether the line is old enough to be redrawn; check it before computing metrics for `update`."""
        return time.monotonic() - self._shown >= (self.every_s if self._live is None else REFRESH_S)

    def advance(self, units: int = 1, **numbers: float) -> None:
        """Add finished units; a metric replaces the value shown so far under its name."""
        self.update(self.done + units, numbers)

    def update(self, done: int, numbers: Mapping[str, float] | None = None, note: str = "") -> None:
        """Set the units done, the metrics to show, and a note shown beside them."""
        self.done = done
        self.note = note
        self._numbers.update(numbers or {})
        if not self.due:
            return
        self._shown = time.monotonic()
        if self._live is None:
            self._print()
        else:
            self._live.update(self._render(), refresh=True)

    def line(self) -> str:
        """Return the plain form: `ppo 120/400 (30%) 2.1 step/s, 2:13 left  reward 0.412  kl 1.93`."""
        parts = [self.name, self._count(), self._pace()]
        numbers = "  ".join(f"{name} {short(value)}" for name, value in self._numbers.items())
        return "  ".join(part for part in [" ".join(p for p in parts if p), numbers, self.note] if part)

    def _count(self) -> str:
        if self.total is None:
            return str(self.done)
        return f"{self.done}/{self.total} ({100 * self.done // max(self.total, 1)}%)"

    def _pace(self) -> str:
        elapsed, new = time.monotonic() - self._began, self.done - self._start
        if new <= 0 or elapsed <= 0:
            return ""
        speed = new / elapsed
        rate = f"{speed:.1f} {self.unit}/s" if speed >= 1 else f"{1 / speed:.1f} s/{self.unit}"
        if self.total is None or self._over:
            return f"{rate}, {clock(elapsed)}"
        return f"{rate}, {clock((self.total - self.done) / speed)} left"

    def _print(self) -> None:
        print(self.line(), file=self._stream, flush=True)

    def _render(self) -> Table:
        row = Table.grid(padding=(0, 1))
        cells: list[Any] = [Text(self.name, style="bold"), Text(self._count())]
        if self.total:
            cells.append(Bar(total=self.total, completed=min(self.done, self.total), width=24))
        cells.append(Text(self._pace(), style="dim"))
        for name, value in self._numbers.items():
            cells.append(Text.assemble((f"{name} ", "dim"), (short(value), "cyan")))
        if self.note:
            cells.append(Text(self.note, style="yellow"))
        for _ in cells:
            row.add_column(no_wrap=True)
        row.add_row(*cells)
        return row


def work_of(stage: Any, doing: str, total: int, unit: str, start: int = 0, always: bool = False) -> Meter:
    """Return a meter for work of a stage outside training; it prints on the first rank only."""
    screen = None if stage.trainer.is_global_zero else io.StringIO()
    return Meter(f"{stage.name}: {doing}", total, unit, start=start, stream=screen, always=always)


class Progress(ProgressBar):
    """Callback that shows training progress: batches, speed, time left, and the stage's `progress_metrics`.

    Args:
        every_s: Seconds between plain lines where there is no terminal.
    """

    def __init__(self, every_s: Annotated[float, Field(gt=0)] = 10.0) -> None:
        super().__init__()
        self.every_s = every_s
        self._meter: Meter | None = None
        self._enabled = True

    def disable(self) -> None:
        """Disable the output. Lightning calls it on every rank but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Enable the output."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the meter at the batches that earlier attempts have finished."""
        if not self._enabled:
            return
        total = getattr(pl_module, "total_steps", None) or trainer.estimated_stepping_batches
        name = getattr(pl_module, "name", None) or type(pl_module).__name__
        self._meter = Meter(
            str(name),
            int(total) if math.isfinite(float(total)) and total > 0 else None,
            every_s=self.every_s,
            start=batches_done(trainer),
        )
        self._meter.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the line."""
        if self._meter is not None:
            self._update(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note the number of validated batches on the line."""
        if self._meter is not None and not trainer.sanity_checking:
            self._meter.update(batches_done(trainer), note=f"validating {batch_idx + 1}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the meter."""
        self._close(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the meter."""
        self._close(trainer, pl_module)

    def _update(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._meter is not None
        # Metrics may be on the GPU, and reading one waits for it: only when they will be shown.
        self._meter.update(batches_done(trainer), self._numbers(trainer, pl_module) if self._meter.due else None)

    def _numbers(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        logged = trainer.callback_metrics
        return {name: float(logged[name]) for name in getattr(pl_module, "progress_metrics", ()) if name in logged}

    def _close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._meter is None:
            return
        meter, self._meter = self._meter, None
        meter.done = batches_done(trainer)
        meter.note = ""
        meter._numbers.update(self._numbers(trainer, pl_module))
        meter.__exit__()


def short(value: float) -> str:
    """Return a number in about four characters: 0.412, 12.3, 1.2e-05."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    size = abs(value)
    if size >= 10_000 or size < 0.001:
        return f"{value:.1e}"
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.3f}"


def clock(seconds: float) -> str:
    """Return seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
