"""Plots of runs, drawn without a display: curves of training, effects of a knob, reward against KL."""

import base64
import io
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rlhf.functional.statistics import mean_and_error
from rlhf.metrics_file import read_series
from rlhf.report.members import Series, Value
from rlhf.report.sweep import Comparison, Group, short_names, show

# Okabe and Ito (2008): told apart by readers with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
INK, PALE = "#333333", "#D9D9D9"
_STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E8E8E8",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "path",  # looks alike wherever it is opened
    "svg.hashsalt": "rlhf",  # the same plot is the same file
}

# What metrics are called on an axis, with their units; the first pattern that matches.
_LABELS = (
    (r"(^|/|_)kl$", "KL (nats per reply)"),
    (r"k3|kl_k3", "KL, k3 estimate (nats per reply)"),
    (r"gold", "gold reward"),
    (r"(^|/)score$|^after_reward$", "reward model's score"),
    (r"text_loss", "loss on text (nats per token)"),
    (r"reward", "reward"),
    (r"perplexity", "perplexity"),
    (r"(^|/)loss$", "loss (nats)"),
    (r"entropy", "entropy (nats per token)"),
    (r"accuracy", "accuracy"),
    (r"length", "reply length (tokens)"),
    (r"ended|eos", "share of replies that end"),
    (r"learning_rate", "learning rate"),
    (r"gradient_norm", "gradient norm"),
    (r"tokens_per", "tokens/s"),
    (r"minutes", "minutes"),
    (r"memory", "GB"),
)


def label(metric: str) -> str:
    """Axis label of a metric, with its unit; its own name if none is known."""
    known = next((text for pattern, text in _LABELS if re.search(pattern, metric)), None)
    return known or metric


def run_curves(folder: Path) -> Path | None:
    """Writes `<run>/curves.png`: reward and KL of a stage that samples, losses of any other; None without metrics."""
    series = read_series(folder / "metrics.csv")
    if not series:
        return None
    path = folder / "curves.png"
    if _find(series, REWARDS) and _find(series, KLS):
        return reward_and_kl(folder / "metrics.csv", path)
    return losses(folder / "metrics.csv", path)


REWARDS = (r"(^|/)gold(_mean)?$", r"(^|/)score(_mean)?$", r"(^|/)reward(_mean)?$")
KLS = (r"(^|/)kl(_mean)?$", r"(^|/)kl")


def reward_and_kl(metrics: Path, path: Path) -> Path:
    """Plots reward and KL over training, and reward against KL, from a metrics.csv to a PNG file."""
    series = read_series(metrics)
    kl = _find(series, KLS)
    rewards = [name for name in dict.fromkeys(_find(series, (pattern,)) for pattern in REWARDS) if name]
    with style():
        figure = Figure(figsize=(11.0, 3.1), layout="constrained")
        over_time, kl_axes, frontier = figure.subplots(1, 3)
        for axes, name, colour in _scales(over_time, rewards):
            _curve(axes, *series[name], colour, name)
        over_time.set(title="Reward", xlabel="step")
        if kl is not None:
            _curve(kl_axes, *series[kl], COLOURS[3], kl)
            kl_axes.set_ylim(bottom=min(0.0, *kl_axes.get_ylim()))
            for axes, name, colour in _scales(frontier, rewards):
                if (way := way_there(series[name], series[kl])) is not None:
                    axes.plot(*way, color=colour, alpha=0.85)
                    axes.plot(way[0][-1:], way[1][-1:], "o", color=colour, markersize=5)
        kl_axes.set(title="Distance from the reference", xlabel="step", ylabel=label("kl"))
        frontier.set(title="Reward against KL (dot: the end)", xlabel=label("kl"))
        return save(figure, path)


def losses(metrics: Path, path: Path) -> Path:
    """Plots the losses and the most telling other metrics of a metrics.csv to a PNG file."""
    series = read_series(metrics)
    panels = _panels(series)
    with style():
        figure = Figure(figsize=(3.5 * max(len(panels), 1), 3.1), layout="constrained")
        for axes, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for name, colour in zip(names, COLOURS, strict=False):
                held_out = name.startswith("val")
                shown = "held out" if held_out else "training"
                _curve(axes, *series[name], COLOURS[1] if held_out else colour, shown, points=held_out)
            axes.set(title=names[0].removeprefix("val/"), xlabel="step", ylabel=label(names[0]))
            if len(names) > 1:
                axes.legend()
        return save(figure, path)


def curves(comparison: Comparison, metrics: Sequence[str]) -> str:
    """Metrics over steps, one panel each and one line per group of runs; bands are one standard error over seeds.

    Returns an SVG document.
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
    """Final metrics against the knob that was swept, as an SVG document; an empty string when nothing was swept.

    With several knobs the first one is the x axis.
    """
    swept = knobs(comparison)
    if not swept:
        return ""
    with style():
        return _svg(against_knob(comparison, swept[0], metrics))


def against_knob(comparison: Comparison, x_key: str, metrics: Sequence[str]) -> Figure:
    """Final metrics against one knob: a line for numbers, dots for choices, a panel per metric.

    Other knobs are told apart by colour. Bars are one standard error over seeds. Call it within `style()`.
    """
    # A knob that follows from this one tells nothing more.
    others = [key for key in knobs(comparison) if key != x_key and not _follows(comparison, key, x_key)]
    short = short_names(comparison.varying)
    lines: dict[str, list[Group]] = {}
    for group in comparison.groups:
        name = ", ".join(f"{short[k]}={show(group.knobs[k])}" for k in others if group.knobs.get(k) is not None)
        lines.setdefault(name, []).append(group)
    values = list(dict.fromkeys(group.knobs.get(x_key) for group in comparison.groups))
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numeric:
        values.sort(key=show)
    place = {value: float(value) if numeric else float(i) for i, value in enumerate(values)}  # type: ignore[arg-type]
    figure, panels = grid(len(metrics), height=2.9)
    for axes, metric in zip(panels, metrics, strict=True):
        for i, (name, groups) in enumerate(lines.items()):
            shown = [group for group in groups if not math.isnan(group.mean(metric))]
            # Choices stand side by side, so that their bars do not hide each other.
            shift = 0.0 if numeric else (i - (len(lines) - 1) / 2) * min(0.6 / len(lines), 0.18)
            x = [place[group.knobs.get(x_key)] + shift for group in shown]
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
            # The single runs behind the means.
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
        # Of all panels: a line may have no value in the first.
        found = {
            name: handle for axes in panels for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        legend(figure, list(found.values()), list(found))
    return figure


def bar(error: float) -> float:
    """Return the length of an error bar: none where the error is not known."""
    return 0.0 if math.isnan(error) else error


def _follows(comparison: Comparison, key: str, from_key: str) -> bool:
    """Whether all groups with the same value of one knob have the same value of another."""
    found: dict[Value, set[Value]] = {}
    for group in comparison.groups:
        found.setdefault(group.knobs.get(from_key), set()).add(group.knobs.get(key))
    return all(len(values) == 1 for values in found.values())


def frontier(comparison: Comparison, reward: str, kl: str) -> str:
    """Final reward against final KL, one point per group, with standard errors; SVG, or "" without such metrics.

    The better algorithm or setting is up and to the left: more reward for the same distance from the reference.
    """
    shown = [g for g in comparison.groups if not math.isnan(g.mean(reward)) and not math.isnan(g.mean(kl))]
    if not shown:
        return ""
    colours = _colours(comparison)
    with style():
        figure = Figure(figsize=(6.2, 4.0), layout="constrained")
        axes = figure.subplots()
        for group in shown:  # the way there, as a thin line
            series = group.counted[0].series
            if reward in series and kl in series and (way := way_there(series[reward], series[kl])) is not None:
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
    """Return the names of the reward and the KL that runs ended with, measured on the same prompts where they can be.

    After training on held-out prompts first, then held out in training, as the columns of the table are ordered.
    """
    names = {name: ([0.0], [0.0]) for member in comparison.members for name in member.metrics}
    for prefix in ("after_", "val/", ""):
        reward = next((f"{prefix}{kind}" for kind in ("gold", "score", "reward") if f"{prefix}{kind}" in names), None)
        if reward is not None and f"{prefix}kl" in names:
            return reward, f"{prefix}kl"
    reward, kl = _find(names, (r"^gold$", *REWARDS)), _find(names, KLS[:1])
    return None if reward is None or kl is None else (reward, kl)


def data_uri(svg: str) -> str:
    """An SVG document as the source of an <img>."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average over about a twentieth of the curve, without the bias to its first value."""
    keep = 1 - 1 / max(len(values) / 20, 1.0)
    total = weight = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight if weight else math.nan)
    return result


def _curve(axes: Axes, steps: list[float], values: list[float], colour: str, name: str, points: bool = False) -> None:
    """A noisy curve, pale, under its moving average; a few points as they are."""
    if points or len(values) <= 20:
        # A line through one point shows nothing.
        axes.plot(steps, values, "o-" if points or len(values) == 1 else "-", color=colour, markersize=3.5, label=name)
        return
    axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.9)
    axes.plot(steps, smooth(values), color=colour, label=name)


def _group_curve(axes: Axes, group: Group, metric: str, colour: str) -> None:
    series = [member.series[metric] for member in group.counted if metric in member.series]
    points = metric.startswith("val")
    shared = set.intersection(*(set(steps) for steps, _ in series)) if series else set()
    if len(series) == 1 or not shared:  # no step that all have: each run for itself
        for one in series:
            _curve(axes, *one, colour, group.label, points=points)
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


def way_there(
    reward: tuple[list[float], list[float]], kl: tuple[list[float], list[float]]
) -> tuple[list[float], list[float]] | None:
    """How a run came to its end: smoothed KL and reward at the steps that have both."""
    at = dict(zip(*reward, strict=True))
    shared = [(distance, at[step]) for step, distance in zip(*kl, strict=True) if step in at]
    if len(shared) < 3:
        return None
    x, y = zip(*shared, strict=True)
    return smooth(list(x)), smooth(list(y))


def _scales(axes: Axes, rewards: Sequence[str]) -> Iterator[tuple[Axes, str, str]]:
    """Axes, metric and colour: the first reward on the left scale, the second, in units of its own, on the right."""
    for i, (name, colour) in enumerate(zip(rewards[:2], COLOURS, strict=False)):
        if i == 1:
            axes = axes.twinx()
            axes.grid(False)
            axes.spines["right"].set_visible(True)
        axes.set_ylabel(label(name), color=colour)
        axes.tick_params(axis="y", colors=colour)
        yield axes, name, colour


def knobs(comparison: Comparison) -> list[str]:
    """The knobs swept, those with most numbers first: a number makes the better x axis."""

    def key(name: str) -> tuple[bool, int]:
        values = [group.knobs.get(name) for group in comparison.groups]
        numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        return not numeric, -len(set(values))

    return sorted(comparison.varying, key=key)


def _colours(comparison: Comparison) -> dict[str, str]:
    """A colour per group: a scale where one number was swept, distinct colours otherwise."""
    groups = comparison.groups
    only = comparison.varying[0] if len(comparison.varying) == 1 else None
    numbers: list[Value] = [group.knobs.get(only) for group in groups] if only else []
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
    """Put a legend below the panels, every label whole: in as many columns as fit, wrapped, the figure made taller."""
    room = int(figure.get_figwidth() / 0.075)  # characters, at the size of the legend
    labels = ["\n".join(textwrap.wrap(text, room - 8)) or text for text in labels]
    widest = max(len(line) for text in labels for line in text.split("\n"))
    columns = max(1, min(len(labels), room // (widest + 7)))
    lines = math.ceil(sum(text.count("\n") + 1 for text in labels) / columns)
    figure.set_figheight(figure.get_figheight() + 0.17 * lines)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def grid(count: int, height: float) -> tuple[Figure, list[Axes]]:
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


def _panels(series: Series) -> list[list[str]]:
    """Up to three panels: the training curve of a metric with the held-out one, most telling metrics first."""
    first = [
        name for name in ("loss", "accuracy", "margin", "perplexity", "kl") if name in series or f"val/{name}" in series
    ]
    rest = [name for name in sorted(series) if name not in first and not name.startswith("val/")]
    skipped = ("epoch", "learning_rate", "gradient_norm")
    chosen = [*first, *(name for name in rest if name not in skipped)][: 3 if first else 1]
    return [[name for name in (base, f"val/{base}") if name in series] for base in chosen]


def _find(series: Series, patterns: Sequence[str]) -> str | None:
    for pattern in patterns:
        for name in series:
            if re.search(pattern, name):
                return name
    return None


def scale_of(axes: Axes, values: list[float]) -> None:
    """A logarithmic x axis for numbers that span more than a factor of eight; a 0 among them stands at its left."""
    positive = [value for value in values if value > 0]
    if min(values) < 0 or len(positive) < 2 or max(positive) / min(positive) <= 8:
        return
    if 0 in values:
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.6)
    else:
        axes.set_xscale("log")
    axes.minorticks_off()


@contextmanager
def style() -> Iterator[None]:
    with matplotlib.rc_context(_STYLE):
        yield


# What each kind of file would say of when and by what it was made; each refuses the words of the others.
_UNSAID = {".png": ("Software",), ".svg": ("Date", "Creator"), ".pdf": ("CreationDate", "Creator", "Producer")}


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=160, metadata=dict.fromkeys(_UNSAID[path.suffix]))
    return path


def _svg(figure: Figure) -> str:
    # savefig would draw the figure once to nowhere for its layout, curves and all.
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
