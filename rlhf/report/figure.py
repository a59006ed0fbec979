"""Single figure of a comparison (`rlhf report --plot FILE`): metrics against a hyperparameter, a metric or the step."""

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf.errors import UserError, suggest
from rlhf.functional.statistics import estimate
from rlhf.report import plots
from rlhf.report.sweep import Comparison, Group, short_names, show
from rlhf.stage import figures

SUFFIXES = (".png", ".svg", ".pdf")


def write_figure(comparison: Comparison, path: Path, x: str, y: Sequence[str], along: bool = False) -> Path:
    """Draw ``y`` against ``x``, one panel for each metric of ``y``, and write it as PNG, SVG or PDF; return its path.

    Points are means over seeds; bars and bands are one standard error over seeds. Runs that differ in something other
    than the seed (and ``x``, if it is a hyperparameter) have different colours.

    Args:
        comparison: The runs.
        path: File to write; its suffix selects the format.
        x: A swept hyperparameter, by its whole name or its last words; a metric; or ``step``.
        y: Metrics.
        along: Read ``x`` and ``y`` over training, not at its end (always so if ``x`` is ``step``).

    Raises:
        UserError: The suffix is unknown, ``y`` is empty, or no run has a named metric or hyperparameter.
    """
    if path.suffix not in SUFFIXES:
        problem = f"its name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise UserError(problem, fix="type --plot NAME.png", option="--plot", value=path)
    if not y:
        raise UserError("needs a metric to draw", fix="type --y METRIC (repeatable)", option="--plot")
    along = along or x == "step"
    hyperparameter = None if along else _hyperparameter(comparison, x)
    if hyperparameter is None and x != "step":
        _check_metric(comparison, "--x", x, along)
    for name in y:
        _check_metric(comparison, "--y", name, along)
    with figures.style():
        if hyperparameter is not None:
            figure = plots.against_hyperparameter(comparison, hyperparameter, y)
        else:
            figure = _along(comparison, x, y) if along else _final(comparison, x, y)
        path.parent.mkdir(parents=True, exist_ok=True)
        return figures.save(figure, path)


def _hyperparameter(comparison: Comparison, name: str) -> str | None:
    """Return the swept hyperparameter that ``name`` selects; None if it selects none."""
    meant = [key for key in comparison.varying if key == name or key.replace(":", ".").endswith(f".{name}")]
    if not meant and not any(name in member.metrics for member in comparison.members):
        # Accept `margin` if only objective.margin.significantly was swept.
        meant = [key for key in comparison.varying if f".{name}." in f".{key.replace(': ', '.')}"]
    if len(meant) > 1:
        fix = f"type one of: {', '.join(meant)}"
        raise UserError("names more than one hyperparameter", fix=fix, option="--x", value=name)
    return meant[0] if meant else None


def _check_metric(comparison: Comparison, option: str, name: str, along: bool) -> None:
    """Raise for a metric that no run has."""
    places = [member.series if along else member.metrics for member in comparison.members]
    if any(name in place for place in places):
        return
    names = sorted({key for place in places for key in place})
    where = "logged over training" if along else "among the final metrics"
    fix = f"type one of: {', '.join(names)}"
    if option == "--x" and not along:
        fix += f" (or a swept hyperparameter: {', '.join(comparison.varying) or 'none'})"
    raise UserError(f"is not {where}{suggest(name, names)}", fix=fix, option=option, value=name)


def _lines(comparison: Comparison) -> tuple[dict[str, list[Group]], list[str]]:
    """Return the groups by their categorical hyperparameters, and the numeric ones, which vary along each line."""
    texts = [
        k
        for k in comparison.varying
        if any(isinstance(g.hyperparameters.get(k), str | bool) for g in comparison.groups)
    ]
    short = short_names(comparison.varying)
    lines: dict[str, list[Group]] = {}
    for group in comparison.groups:
        known = [(key, group.hyperparameters[key]) for key in texts if group.hyperparameters.get(key) is not None]
        name = ", ".join(show(v) if k in ("stage", "objective") else f"{short[k]}={show(v)}" for k, v in known)
        lines.setdefault(name, []).append(group)
    return lines, [key for key in comparison.varying if key not in texts]


def _final(comparison: Comparison, x: str, y: Sequence[str]) -> Figure:
    """Plot final metrics against another final metric: a line per choice, its points marked with the swept numbers."""
    lines, numbers = _lines(comparison)
    figure, panels = _panels(len(y))
    for axes, metric in zip(panels, y, strict=True):
        for colour, (name, groups) in zip(cycle(figures.COLOURS), lines.items(), strict=False):
            points = [g for g in groups if not math.isnan(g.mean(x)) and not math.isnan(g.mean(metric))]
            points.sort(key=lambda group: [_number(group.hyperparameters.get(key)) for key in numbers])
            axes.errorbar(
                [g.mean(x) for g in points],
                [g.mean(metric) for g in points],
                xerr=[plots.bar(g.error(x)) for g in points],
                yerr=[plots.bar(g.error(metric)) for g in points],
                fmt="o-",
                color=colour,
                capsize=3,
                markersize=5.5,
                label=name,
            )
            for group in points:
                marks = [
                    show(group.hyperparameters[key]) for key in numbers if group.hyperparameters.get(key) is not None
                ]
                at = (group.mean(x), group.mean(metric))
                axes.annotate(
                    ", ".join(marks), at, (5, 5), textcoords="offset points", color=colour, fontsize=8, alpha=0.9
                )
        if x == "after_kl" and (start := _start(comparison, metric)) is not None:
            axes.plot([0], [start], "D", color=figures.INK, markerfacecolor="white", markersize=6, label="before")
        axes.set(title=metric, xlabel=figures.label(x), ylabel=figures.label(metric))
    _legend(figure, panels[0])
    return figure


def _start(comparison: Comparison, metric: str) -> float | None:
    """Return the mean of a metric of the policies before training, where their KL is 0; None if unknown."""
    difference = f"{metric.removeprefix('after_')}_difference"
    pairs = [m.metrics for m in comparison.members if metric in m.metrics and difference in m.metrics]
    return math.fsum(one[metric] - one[difference] for one in pairs) / len(pairs) if pairs else None


def _along(comparison: Comparison, x: str, y: Sequence[str]) -> Figure:
    """Plot metrics over training, against the step or against another metric logged at the same steps."""
    figure, panels = _panels(len(y))
    for axes, metric in zip(panels, y, strict=True):
        for colour, group in zip(cycle(figures.COLOURS), comparison.groups, strict=False):
            _plot_group(axes, group, x, metric, colour)
        axes.set(title=metric, xlabel="step" if x == "step" else figures.label(x), ylabel=figures.label(metric))
    _legend(figure, panels[0])
    return figure


def _plot_group(axes: Axes, group: Group, x: str, metric: str, colour: str) -> None:
    """Plot the mean over seeds at shared steps, and each seed as a thin line."""
    ways = []
    for member in group.counted:
        if metric not in member.series or (x != "step" and x not in member.series):
            continue
        steps, values = member.series[metric]
        smoothed = dict(zip(steps, figures.smooth(values), strict=True))
        across = dict(zip(steps, steps, strict=True)) if x == "step" else _smoothed(member.series[x])
        way = {step: (across[step], smoothed[step]) for step in steps if step in across}
        if way:
            ways.append(way)
            axes.plot(*zip(*way.values(), strict=True), color=colour, alpha=0.25, linewidth=0.8)
    if not ways:
        return
    shared = sorted(set.intersection(*(set(way) for way in ways)))
    xs = [math.fsum(way[step][0] for way in ways) / len(ways) for step in shared]
    ys = [math.fsum(way[step][1] for way in ways) / len(ways) for step in shared]
    axes.plot(xs, ys, "o-" if len(xs) == 1 else "-", color=colour, markersize=4, label=group.label)
    if len(ways) > 1:
        errors = [estimate([way[step][1] for way in ways]).se for step in shared]
        low, high = [m - e for m, e in zip(ys, errors, strict=True)], [m + e for m, e in zip(ys, errors, strict=True)]
        axes.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)


def _smoothed(series: tuple[list[float], list[float]]) -> dict[float, float]:
    return dict(zip(series[0], figures.smooth(series[1]), strict=True))


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.6 * count, 3.6), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _legend(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    if len([name for name in names if name]) > 1:
        plots.legend(figure, handles, names)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.inf
