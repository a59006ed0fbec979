"""What a run says on the screen: the plan, a line per step, tables at the end, and what to type next."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

from rlhf.console import Screen, clean


def console() -> Screen:
    """The console of the current standard output; no wrapping where there is no terminal."""
    found = Screen(soft_wrap=True)
    if not found.is_terminal:
        found.width = 200
    return found


def say(line: str, style: str = "") -> None:
    """One line, at once."""
    console().print(Text(clean(line), style=style))


def duration(seconds: float) -> str:
    """Seconds as people read them: 4.2 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: Any) -> str:
    """A metric in few characters."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def plan_line(names: Sequence[str], skipped: Mapping[str, str]) -> str:
    """`plan: sft -> align`, and which steps of the pipeline are left out and why."""
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        reasons.setdefault(reason, []).append(name)
    rest = "".join(f"; {', '.join(left)}: {reason}" for reason, left in reasons.items())
    return f"plan: {' -> '.join(names)}{rest}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table; nothing for no rows."""
    if not rows:
        return
    screen = console()
    lines = [[clean(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    if sum(widths) + 2 * len(widths) <= screen.width and not any("\n" in cell for row in lines for cell in row):
        # Nothing to fold: as rich would write it, which takes it seconds for thousands of rows.
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
    """What happened and where it lies.

    Args:
        rows: (step, run folder, "ran" or "reused", its summary, the name of its main metric).
        reads: step -> the steps whose results it read.
    """
    lines = []
    for name, folder, what, summary, headline in rows:
        value = summary.get("metrics", {}).get(headline)
        shown = f"{headline} {number(value)}" if value is not None else ""
        line = (name, what, duration(float(summary.get("wall_s", 0.0))), shown, str(folder))
        lines.append((*line, ", ".join((reads or {}).get(name, ()))) if reads else line)
    print_table("Runs", ("step", "", "time", "result", "folder", *(("made from",) if reads else ())), lines)


def next_commands(commands: Sequence[tuple[str, str]]) -> None:
    """(command, what it does), for typing next."""
    if not commands:
        return
    width = max(len(command) for command, _ in commands)
    say("Next:")
    for command, meaning in commands:
        say(f"  {command.ljust(width)}  # {meaning}")
