"""Screen output that shows control characters instead of obeying them, and that no encoding error can stop.

Data, configs, models and errors hold untrusted text, and a terminal obeys the escape sequences in it: they move the
cursor, change the title, hide lines. `screen` therefore replaces standard output and error by a cleaning stream for all
writers, and `Screen` cleans what rich renders. Tables and lines of commands are printed through it, too. Standard
library and rich only.
"""

import io
import logging
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

# C0 without tab and line feed as their Unicode pictures; DEL, C1, and characters that override text direction (UAX 9).
_PICTURES: dict[int, str] = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}
_PICTURES |= {0x7F: "\u2421"} | dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "�")


def shell(*words: object) -> str:
    """Return words as a command line that can be typed, quoted where a shell would split or expand them."""
    return shlex.join(str(word) for word in words)


def clean(text: str) -> str:
    """Return the text with each control character replaced by a visible sign, except tabs and line feeds."""
    return text.translate(_PICTURES)


class CleanStream:
    """Text stream that cleans what is written to it and otherwise delegates to the stream that it wraps.

    A carriage return at the very beginning of a write is kept: progress bars of libraries redraw their line with it.
    """

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = raw(stream)  # rich writes here, so that its own escapes pass
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the cleaned text and return the length of the given one."""
        body = text.removeprefix("\r")
        self._stream.write(text[: len(text) - len(body)] + clean(body))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each line cleaned."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def raw(stream: Any) -> Any:
    """Return the underlying stream, below cleaning streams and rich's live displays."""
    while (below := getattr(stream, "rich_proxied_file", None)) is not None:
        stream = below
    return stream


class Screen(Console):
    """Rich console that cleans the text it renders and interprets no markup: `[red]` in data is five characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**({"markup": False, "emoji": False, "highlight": False} | options))

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of a renderable, cleaned unless they are rich's own control codes."""
        for segment in super().render(renderable, options):
            as_it_is = segment.control or segment.text.isprintable() and segment.text.isascii()
            yield segment if as_it_is else Segment(clean(segment.text), segment.style)


@contextmanager
def screen() -> Iterator[None]:
    """Context manager: clean standard output and error, and print `?` for characters that they cannot encode."""
    before = sys.stdout, sys.stderr
    for stream in map(raw, before):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.stdout, sys.stderr = (cast(TextIO, CleanStream(raw(stream))) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def console() -> Screen:
    """Return a console on the current standard output; 200 columns wide where there is no terminal."""
    found = Screen(soft_wrap=True)
    if not found.is_terminal:
        found.width = 200
    return found


def say(line: str, style: str = "") -> None:
    """Print one cleaned line."""
    console().print(Text(clean(line), style=style))


def duration(seconds: float) -> str:
    """Return seconds in readable form: 4.2 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: Any) -> str:
    """Return a metric with four significant digits; "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def format_plan(names: Sequence[str], skipped: Mapping[str, str]) -> str:
    """Return the line `plan: sft -> align`, followed by the skipped steps of the pipeline with their reasons.

    Args:
        names: Steps that run, in order.
        skipped: Step -> reason.
    """
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        reasons.setdefault(reason, []).append(name)
    rest = "".join(f"; {', '.join(left)}: {reason}" for reason, left in reasons.items())
    return f"plan: {' -> '.join(names)}{rest}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a plain table; print nothing if there are no rows."""
    if not rows:
        return
    screen = console()
    lines = [[clean(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    if sum(widths) + 2 * len(widths) <= screen.width and not any("\n" in cell for row in lines for cell in row):
        # Nothing to fold: print the same text as rich, which takes seconds for thousands of rows.
        filled = ["  ".join(set_cell_size(*cell) for cell in zip(row, widths, strict=True)) for row in lines]
        for line in [*([clean(title)] if title else []), filled[0]]:
            screen.print(Text(line, style="bold"))
        print("\n".join(filled[1:]))
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(clean(cell)) for cell in row))
    screen.print(table)


def end(
    rows: Sequence[tuple[str, Path, str, Mapping[str, Any], str]], reads: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Print the runs of a command with their results and run directories.

    Args:
        rows: (step, run directory, "ran" or "reused", its summary, the name of its main metric).
        reads: Step -> the steps whose results it read.
    """
    lines = []
    for name, folder, what, summary, headline in rows:
        value = summary.get("metrics", {}).get(headline)
        shown = f"{headline} {number(value)}" if value is not None else ""
        line = (name, what, duration(float(summary.get("wall_s", 0.0))), shown, str(folder))
        lines.append((*line, ", ".join((reads or {}).get(name, ()))) if reads else line)
    print_table("Runs", ("step", "", "time", "result", "directory", *(("made from",) if reads else ())), lines)


def print_next_commands(commands: Sequence[tuple[str, str]]) -> None:
    """Print commands to type next, each with its purpose as a comment.

    Args:
        commands: (command, purpose).
    """
    if not commands:
        return
    width = max(len(command) for command, _ in commands)
    say("Next:")
    for command, meaning in commands:
        say(f"  {command.ljust(width)}  # {meaning}")


def silence_libraries() -> None:
    """Suppress log messages and warnings of libraries that carry no information for the user."""
    for name in ("pytorch_lightning", "lightning", "bitsandbytes", "transformers", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for pattern in ("many workers", "not resumable", "log_every_n_steps", "LeafSpec", "predict returned None"):
        warnings.filterwarnings("ignore", message=f".*{pattern}.*")
