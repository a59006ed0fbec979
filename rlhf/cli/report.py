"""Compare runs: `rlhf report DIRECTORY...` prints one table and writes report.html and report.csv.

A DIRECTORY is a run directory, a sweep directory, any directory of runs, or the first letters of a fingerprint; by
default it is the newest sweep.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rlhf.cli import options
from rlhf.console import Screen, clean
from rlhf.errors import UserError, UserErrors
from rlhf.runs import run_files


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    options = _parser().parse_args(list(argv))
    with run_files.cache_reads():
        return _report(options)


def _report(options: argparse.Namespace) -> int:
    from rich.table import Table
    from rich.text import Text

    from rlhf.report.members import COSTS, newest_sweep
    from rlhf.report.sweep import cell, compare_runs, short_names, show

    references = list(options.runs)
    if not references:
        sweep = newest_sweep(options.outputs)
        if sweep is None:
            fix = "type rlhf report RUN... (rlhf runs list shows the runs)"
            raise UserError(f"no sweep in {options.outputs}", fix=fix)
        references = [str(sweep)]
    comparison = compare_runs(references, options.outputs, options.metric)
    shown, costs = comparison.main_metrics(6), comparison.costs()
    short = short_names(comparison.varying)

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ["run", *(short[key] for key in comparison.varying), *shown, *(COSTS[name] for name in costs)]:
        table.add_column(column, overflow="fold", justify="right" if column in (*shown, *costs) else "left")
    best_one = comparison.best(shown[0]) if shown else None
    for group in comparison.groups:
        names = [m.name if m.finished else f"{m.name} ({m.status})" for m in group.members]
        cells = [Text(clean(names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"))]
        cells += [Text(clean(show(group.hyperparameters.get(key)))) for key in comparison.varying]
        for metric in [*shown, *costs]:
            best = group is best_one and metric == shown[0]
            cells.append(Text(cell(group, metric), style="bold green" if best else ""))
        table.add_row(*cells)
    console = Screen()
    if not console.is_terminal:
        console = Screen(width=240)
    console.print(table)
    # Runs share ancestors: dict.fromkeys reads each once.
    runs = dict.fromkeys(run for member in comparison.members for run in (member.run, *member.ancestors.values()))
    for line in UserErrors(error for run in runs for error in run.problems()).lines:
        console.print(Text(line, style="yellow"))
    if comparison.seeds > 1:
        console.print(comparison.error_note, style="dim")

    for line in comparison.left_out(shown):
        console.print(clean(line), style="yellow")
    every = {name for member in comparison.members for name in member.metrics} - set(COSTS)
    if every - set(shown):
        console.print(f"{len(shown)} of {len(every)} metrics; report.csv has all (--metric NAME)", style="dim")

    from rlhf.report.html import failures, write_report

    folder = options.out or _place(references, options.outputs)
    folder.mkdir(parents=True, exist_ok=True)
    failed = [failure for ref in references if Path(ref).is_dir() for failure in failures(Path(ref))]
    for failure in failed:
        console.print(Text(f"not finished: {failure.job} ({failure.status}) {failure.error}", style="red"))
    title = options.title or (Path(references[0]).name if len(references) == 1 else f"{len(comparison.members)} runs")
    page = write_report(comparison, folder / "report.html", title, failed)
    comparison.write_csv(folder / "report.csv")
    print(f"\n{page}\n{folder / 'report.csv'}")
    if options.plot is not None:
        from rlhf.report.figure import write_figure

        print(write_figure(comparison, options.plot, options.x, options.y, options.along))
    return 0


def _place(references: Sequence[str], outputs: Path) -> Path:
    """Return a single sweep's own directory; otherwise a new directory below outputs/reports."""
    from rlhf.report.members import is_run

    only = Path(references[0])
    if len(references) == 1 and only.is_dir() and not is_run(only) and only.resolve() != outputs.resolve():
        return only
    return outputs / "reports" / time.strftime("%Y-%m-%d-%H%M%S")


def _parser() -> argparse.ArgumentParser:
    parser = options.Parser(prog="rlhf report", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "runs", nargs="*", metavar="DIRECTORY", help="run, sweep, directory of runs, fingerprint prefix"
    )
    parser.add_argument("--metric", action="append", default=[], metavar="NAME", help="show this metric (repeatable)")
    parser.add_argument("--title", metavar="TEXT", help="heading of the page")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw --y against --x (.png, .svg or .pdf)")
    parser.add_argument(
        "--x", default="step", metavar="NAME", help="a swept hyperparameter, a metric, or step (default)"
    )
    parser.add_argument("--y", action="append", default=[], metavar="METRIC", help="a panel of the plot (repeatable)")
    parser.add_argument("--along", action="store_true", help="plot --x and --y over training instead of at its end")
    parser.add_argument("--out", type=Path, metavar="DIRECTORY", help="directory for report.html and report.csv")
    options.outputs(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
