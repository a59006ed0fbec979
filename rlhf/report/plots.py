"""Plots of runs, drawn without a display: training curves, effects of a hyperparameter, reward against KL."""

import base64
import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rlhf.functional.statistics import mean_and_error
from rlhf.report.members import Value
from rlhf.report.sweep import Comparison, Group, short_names, show
from rlhf.running.curves import reward_against_kl
from rlhf.stage.figures import COLOURS, KLS, REWARDS, draw_curve, find_metric, label, smooth, style


def curves(comparison: Comparison, metrics: Sequence[str]) -> str:
    """Plot metrics over steps as SVG: one panel per metric, one line per group of runs.

    Bands are one standard error over seeds.
    """
    with style():
        figure, panels = grid(len(metrics), height=2.9)
        colours = _colours(comparison)
        for axes, metric in zip(panels, metrics, strict=True):
            for group in comparison.groups:
                _group_curve(axes, group, metric, colours[group.label])
            axes.set(title=metric, xlabel="step", ylabel=label(metric))
        _legend(figure, comparison, colours)
        return _svg(figure)


def effects(comparison: Comparison, metrics: Sequence[str]) -> str:
    """Plot final metrics against the swept hyperparameter as SVG; return "" if nothing was swept.

    With several swept hyperparameters the first one is the x axis.
    """
    swept = hyperparameters(comparison)
    if not swept:
        return ""
    with style():
        return _svg(against_hyperparameter(comparison, swept[0], metrics))


def against_hyperparameter(comparison: Comparison, x_key: str, metrics: Sequence[str]) -> Figure:
    """Plot final metrics against one hyperparameter: a line for numbers, dots for choices, one panel per metric.

    Other hyperparameters are distinguished by colour. Bars are one standard error over seeds. Call it within `style()`.
    """
    # A hyperparameter that is a function of this one adds no information.
    others = [key for key in hyperparameters(comparison) if key != x_key and not _follows(comparison, key, x_key)]
    short = short_names(comparison.varying)
    lines: dict[str, list[Group]] = {}
    for group in comparison.groups:
        name = ", ".join(
            f"{short[k]}={show(group.hyperparameters[k])}" for k in others if group.hyperparameters.get(k) is not None
        )
        lines.setdefault(name, []).append(group)
    values = list(dict.fromkeys(group.hyperparameters.get(x_key) for group in comparison.groups))
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numeric:
        values.sort(key=show)
    place = {value: float(value) if numeric else float(i) for i, value in enumerate(values)}  # type: ignore[arg-type]
    figure, panels = grid(len(metrics), height=2.9)
    for axes, metric in zip(panels, metrics, strict=True):
        for i, (name, groups) in enumerate(lines.items()):
            shown = [group for group in groups if not math.isnan(group.mean(metric))]
            # Points of a categorical axis are shifted, so that their bars do not overlap.
            shift = 0.0 if numeric else (i - (len(lines) - 1) / 2) * min(0.6 / len(lines), 0.18)
            x = [place[group.hyperparameters.get(x_key)] + shift for group in shown]
            axes.errorbar(
                x,
                [group.mean(metric) for group in shown],
                yerr=[bar(group.error(metric)) for group in shown],
                fmt="o-" if numeric else "o",
                color=COLOURS[i % len(COLOURS)],
                capsize=3,
                markersize=5.5,
                label=name,
            )
            # Single runs, as small dots behind the means.
            several = [(at, group.values(metric)) for at, group in zip(x, shown, strict=True) if len(group.members) > 1]
            places = [at for at, values in several for _ in values]
            single = [value for _, values in several for value in values]
            if single:
                axes.plot(places, single, ".", color=COLOURS[i % len(COLOURS)], alpha=0.35, ms=4)
        if numeric:
            scale_of(axes, [float(v) for v in values])  # type: ignore[arg-type]
        if numeric and len(values) <= 8 or not numeric:
            texts = [show(value) if value is not None else "none" for value in values]
            crowded = sum(map(len, texts)) > 34
            axes.set_xticks([place[value] for value in values], texts, rotation=20 if crowded else 0)
        if not numeric:
            axes.set_xlim(-0.5, len(values) - 0.5)
        axes.set(title=metric, xlabel=short[x_key], ylabel=label(metric))
    if len(lines) > 1:
        # Collected over all panels: a line may have no value in the first.
        found = {
            name: handle for axes in panels for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        legend(figure, list(found.values()), list(found))
    return figure


def bar(error: float) -> float:
    """Return the length of an error bar; 0 if the error is unknown (nan)."""
    return 0.0 if math.isnan(error) else error


def _follows(comparison: Comparison, key: str, from_key: str) -> bool:
    """Return whether one hyperparameter is a function of another over all groups."""
    found: dict[Value, set[Value]] = {}
    for group in comparison.groups:
        found.setdefault(group.hyperparameters.get(from_key), set()).add(group.hyperparameters.get(key))
    return all(len(values) == 1 for values in found.values())


def frontier(comparison: Comparison, reward: str, kl: str) -> str:
    """Plot final reward against final KL as SVG, one point per group with standard errors; "" without such metrics.

    The better algorithm or setting is up and to the left: more reward for the same distance from the reference.
    """
    shown = [g for g in comparison.groups if not math.isnan(g.mean(reward)) and not math.isnan(g.mean(kl))]
    if not shown:
        return ""
    colours = _colours(comparison)
    with style():
        figure = Figure(figsize=(6.2, 4.0), layout="constrained")
        axes = figure.subplots()
        for group in shown:  # the path during training, as a thin line
            series = group.counted[0].series
            if reward in series and kl in series and (way := reward_against_kl(series[reward], series[kl])) is not None:
                axes.plot(*way, color=colours[group.label], alpha=0.35, linewidth=1.1)
        x, y = [group.mean(kl) for group in shown], [group.mean(reward) for group in shown]
        own = [colours[group.label] for group in shown]
        xerr, yerr = ([bar(group.error(name)) for group in shown] for name in (kl, reward))
        axes.errorbar(x, y, yerr, xerr, fmt="none", ecolor=own, zorder=3)
        axes.scatter(x, y, s=49, color=own, zorder=3)
        axes.set(title=f"{reward} against {kl}, at the end of training", xlabel=label(kl), ylabel=label(reward))
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        _legend(figure, comparison, colours)
        return _svg(figure)


def reward_and_kl_names(comparison: Comparison) -> tuple[str, str] | None:
    """Return the names of the final reward and KL, measured on the same prompts if possible; None without them.

    Metrics on held-out prompts after training come first, then held-out metrics during training, in the order of the
    table's columns.
    """
    names = {name: ([0.0], [0.0]) for member in comparison.members for name in member.metrics}
    for prefix in ("after_", "val/", ""):
        reward = next((f"{prefix}{kind}" for kind in ("gold", "score", "reward") if f"{prefix}{kind}" in names), None)
        if reward is not None and f"{prefix}kl" in names:
            return reward, f"{prefix}kl"
    reward, kl = find_metric(names, (r"^gold$", *REWARDS)), find_metric(names, KLS[:1])
    return None if reward is None or kl is None else (reward, kl)


def data_uri(svg: str) -> str:
    """Return an SVG document as a data URI for the source of an <img>."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _group_curve(axes: Axes, group: Group, metric: str, colour: str) -> None:
    series = [member.series[metric] for member in group.counted if metric in member.series]
    points = metric.startswith("val")
    shared = set.intersection(*(set(steps) for steps, _ in series)) if series else set()
    if len(series) == 1 or not shared:  # no step in common: plot each run alone
        for one in series:
            draw_curve(axes, *one, colour, group.label, points=points)
        return
    smoothed = [
        dict(zip(steps, smooth(values) if len(values) > 20 else values, strict=True)) for steps, values in series
    ]
    steps = sorted(shared)
    means, errors = zip(*(mean_and_error([one[step] for one in smoothed]) for step in steps), strict=True)
    low, high = [m - e for m, e in zip(means, errors, strict=True)], [m + e for m, e in zip(means, errors, strict=True)]
    if points or len(steps) == 1:
        axes.plot(steps, means, "o-", color=colour, markersize=3.5, label=group.label)
        axes.vlines(steps, low, high, color=colour)  # errorbar takes five times as long
        return
    axes.plot(steps, means, color=colour, label=group.label)
    axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)


def hyperparameters(comparison: Comparison) -> list[str]:
    """Return the swept hyperparameters, numeric ones with most values first, since they make the best x axis."""

    def key(name: str) -> tuple[bool, int]:
        values = [group.hyperparameters.get(name) for group in comparison.groups]
        numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        return not numeric, -len(set(values))

    return sorted(comparison.varying, key=key)


def _colours(comparison: Comparison) -> dict[str, str]:
    """Return a colour per group: a colour scale if a single number was swept, distinct colours otherwise."""
    groups = comparison.groups
    only = comparison.varying[0] if len(comparison.varying) == 1 else None
    numbers: list[Value] = [group.hyperparameters.get(only) for group in groups] if only else []
    if len(groups) > 2 and numbers and all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers):
        scale = colormaps["viridis"]
        return {
            group.label: matplotlib.colors.to_hex(scale(0.05 + 0.8 * i / (len(groups) - 1)))
            for i, group in enumerate(groups)
        }
    if len(groups) > len(COLOURS):
        scale = colormaps["turbo"]
        return {
            g.label: matplotlib.colors.to_hex(scale(0.05 + 0.9 * i / (len(groups) - 1))) for i, g in enumerate(groups)
        }
    return {group.label: colour for group, colour in zip(groups, COLOURS, strict=False)}


def _legend(figure: Figure, comparison: Comparison, colours: dict[str, str]) -> None:
    if len(comparison.groups) > 1:
        handles = [matplotlib.lines.Line2D([], [], color=colours[g.label], marker="o", ms=4) for g in comparison.groups]
        legend(figure, handles, [g.label for g in comparison.groups])


def legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Draw a legend below the panels: full labels, wrapped, in as many columns as fit; increase the figure's height."""
    room = int(figure.get_figwidth() / 0.075)  # characters, at the size of the legend
    labels = ["\n".join(textwrap.wrap(text, room - 8)) or text for text in labels]
    widest = max(len(line) for text in labels for line in text.split("\n"))
    columns = max(1, min(len(labels), room // (widest + 7)))
    lines = math.ceil(sum(text.count("\n") + 1 for text in labels) / columns)
    figure.set_figheight(figure.get_figheight() + 0.17 * lines)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def grid(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``count`` panels in at most three columns, and its axes.

    ``height`` is that of one row, in inches.
    """
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(3.6 * max(columns, 1), height * rows + 0.4), layout="constrained")
    axes = [a for row in figure.subplots(rows, columns, squeeze=False) for a in row]
    for unused in axes[count:]:
        unused.set_axis_off()
    for axis in axes[:count]:
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(nbins=6))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure, axes[:count]


def scale_of(axes: Axes, values: list[float]) -> None:
    """Set a logarithmic x axis for numbers that span more than a factor of 8; a 0 among them is placed at the left."""
    positive = [value for value in values if value > 0]
    if min(values) < 0 or len(positive) < 2 or max(positive) / min(positive) <= 8:
        return
    if 0 in values:
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.6)
    else:
        axes.set_xscale("log")
    axes.minorticks_off()


def _svg(figure: Figure) -> str:
    # Compute the layout first: savefig would draw the whole figure an extra time to compute it.
    FigureCanvasSVG(figure)
    figure.set_dpi(FigureCanvasSVG.fixed_dpi)
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
