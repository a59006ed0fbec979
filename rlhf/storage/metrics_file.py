"""Metrics file of a run: `metrics.csv`, one row per step, written during the run.

Standard library only, so that commands which only read runs start quickly.
"""

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

STEP = "step"
Row = dict[str, float]


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a metrics file in file order, without empty cells; a missing file has no rows.

    A last line that was cut short (the writer was killed) is ignored, and so is a line without a step; `unreadable`
    counts the latter.
    """
    return _parse(path)[0]


def unreadable(path: Path) -> int:
    """Return the number of complete lines of a metrics file that cannot be read as a row."""
    return _parse(path)[1]


def _parse(path: Path) -> tuple[list[Row], int]:
    if not path.is_file():
        return [], 0
    text = path.read_bytes().decode("utf-8", errors="replace")
    complete = text[: text.rfind("\n") + 1]
    rows: list[Row] = []
    records = csv.reader(io.StringIO(complete))
    lines = 0
    try:
        names = next(records, [])
        for cells in records:
            if not cells:  # an empty line
                continue
            lines += 1
            try:
                row = {name: float(cell) for name, cell in zip(names, cells, strict=False) if cell}
            except ValueError:
                numbers = zip(names, map(_number, cells), strict=False)
                row = {name: number for name, number in numbers if number is not None}
            if math.isfinite(row.get(STEP, math.nan)):
                rows.append(row)
    except csv.Error:  # a line longer than csv's limit
        lines = complete.count("\n") - 1
    return rows, lines - len(rows)


def read_series(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Return the columns of a metrics file: name -> (steps, values), only for steps at which the metric was logged."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    rows = read_rows(path)
    for name in dict.fromkeys(name for row in rows for name in row if name != STEP):
        having = [row for row in rows if name in row]
        series[name] = [row[STEP] for row in having], [row[name] for row in having]
    return series


def distinct_names(columns: Sequence[str], metrics: Sequence[str]) -> list[str]:
    """Return the header of a table: its columns, then its metrics.

    A metric with the name of a column gets the prefix `metric.`.
    """
    return [*columns, *(f"metric.{name}" if name in columns else name for name in metrics)]


class MetricsFile:
    """Writer of a metrics file, one row per step, each on disk as soon as it is written.

    Metrics logged twice at one step (training, then validation) share its row; a new metric gets a new column. The
    first write of a writer at step s drops every row at or after s: a resumed run continues the file as if the killed
    run had stopped at its checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._columns: list[str] = []
        self._row: Row = {}
        self._row_start = 0  # byte offset at which the newest row begins
        self._open = False

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics to the row of a step; a step before the newest one drops all rows from that step on."""
        if not self._open or step < self._row.get(STEP, step):
            self.drop_from(step)
        new_row = step != self._row.get(STEP)
        row: Row = {STEP: step} if new_row else dict(self._row)
        row.update({name: float(value) for name, value in metrics.items() if name != STEP})
        unknown = [name for name in row if name not in self._columns]
        if unknown:
            self._rewrite([*read_rows(self.path)[: None if new_row else -1], row], [*self._columns, *unknown])
            return
        if row == self._row:  # Lightning logs the same metrics again that were written with the checkpoint
            return
        if new_row:
            self._row_start = self.path.stat().st_size
        # Overwrite the old row in one write, then truncate: a kill in between loses no row.
        with self.path.open("r+b", buffering=0) as file:
            file.seek(self._row_start)
            file.write(self._line(row))
            file.truncate()
        self._row = row

    def drop_from(self, step: int) -> None:
        """Drop the rows at or after a step, which a run wrote after the checkpoint that is being resumed."""
        rows = [row for row in read_rows(self.path) if row[STEP] < step]
        columns: list[str] = []
        for row in rows:
            columns.extend(name for name in row if name not in columns)
        self._rewrite(rows, columns or [STEP])
        self._row = {}
        self._open = True

    def _rewrite(self, rows: list[Row], columns: list[str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._columns = columns
        lines = [_encode(columns), *(self._line(row) for row in rows)]
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_bytes(b"".join(lines))
        os.replace(temporary, self.path)
        self._row = dict(rows[-1]) if rows else {}
        self._row_start = sum(map(len, lines[:-1]))

    def _line(self, row: Row) -> bytes:
        return _encode([_text(row.get(name)) for name in self._columns])


def _encode(cells: list[str]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue().encode()


def _text(value: float | None) -> str:
    if value is None:
        return ""
    if math.isfinite(value) and value == int(value) and abs(value) < 2**53:
        return str(int(value))
    return format(value, ".9g")  # nine digits preserve any float32


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


Series = dict[str, tuple[list[float], list[float]]]
