"""Curves of one run's metrics, drawn when the run ends."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf.stage.figures import COLOURS, KLS, REWARDS, draw_curve, find_metric, label, save, smooth, style
from rlhf.storage.metrics_file import Series, read_series


def run_curves(folder: Path) -> Path | None:
    """Draw `<run>/curves.png`: reward and KL of a stage that samples, losses of any other.

    Returns:
        The path of the file; None without metrics.
    """
    series = read_series(folder / "metrics.csv")
    if not series:
        return None
    path = folder / "curves.png"
    if find_metric(series, REWARDS) and find_metric(series, KLS):
        return reward_and_kl(folder / "metrics.csv", path)
    return losses(folder / "metrics.csv", path)


def reward_and_kl(metrics: Path, path: Path) -> Path:
    """Plot reward and KL over training, and reward against KL, from a metrics.csv to a PNG file."""
    series = read_series(metrics)
    kl = find_metric(series, KLS)
    rewards = [name for name in dict.fromkeys(find_metric(series, (pattern,)) for pattern in REWARDS) if name]
    with style():
        figure = Figure(figsize=(11.0, 3.1), layout="constrained")
        over_time, kl_axes, frontier = figure.subplots(1, 3)
        for axes, name, colour in reward_axes(over_time, rewards):
            draw_curve(axes, *series[name], colour, name)
        over_time.set(title="Reward", xlabel="step")
        if kl is not None:
            draw_curve(kl_axes, *series[kl], COLOURS[3], kl)
            kl_axes.set_ylim(bottom=min(0.0, *kl_axes.get_ylim()))
            for axes, name, colour in reward_axes(frontier, rewards):
                if (way := reward_against_kl(series[name], series[kl])) is not None:
                    axes.plot(*way, color=colour, alpha=0.85)
                    axes.plot(way[0][-1:], way[1][-1:], "o", color=colour, markersize=5)
        kl_axes.set(title="Distance from the reference", xlabel="step", ylabel=label("kl"))
        frontier.set(title="Reward against KL (dot: the end)", xlabel=label("kl"))
        return save(figure, path)


def losses(metrics: Path, path: Path) -> Path:
    """Plot the losses and the most informative other metrics of a metrics.csv to a PNG file."""
    series = read_series(metrics)
    panels = _panels(series)
    with style():
        figure = Figure(figsize=(3.5 * max(len(panels), 1), 3.1), layout="constrained")
        for axes, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for name, colour in zip(names, COLOURS, strict=False):
                held_out = name.startswith("val")
                shown = "held out" if held_out else "training"
                draw_curve(axes, *series[name], COLOURS[1] if held_out else colour, shown, points=held_out)
            axes.set(title=names[0].removeprefix("val/"), xlabel="step", ylabel=label(names[0]))
            if len(names) > 1:
                axes.legend()
        return save(figure, path)


def reward_against_kl(
    reward: tuple[list[float], list[float]], kl: tuple[list[float], list[float]]
) -> tuple[list[float], list[float]] | None:
    """Return the run's path in the plane of KL and reward: both, smoothed, at the steps that have both.

    None if fewer than three steps have both.
    """
    at = dict(zip(*reward, strict=True))
    shared = [(distance, at[step]) for step, distance in zip(*kl, strict=True) if step in at]
    if len(shared) < 3:
        return None
    x, y = zip(*shared, strict=True)
    return smooth(list(x)), smooth(list(y))


def reward_axes(axes: Axes, rewards: Sequence[str]) -> Iterator[tuple[Axes, str, str]]:
    """Yield (axes, metric, colour): the first reward on the left scale, the second on a separate right scale."""
    for i, (name, colour) in enumerate(zip(rewards[:2], COLOURS, strict=False)):
        if i == 1:
            axes = axes.twinx()
            axes.grid(False)
            axes.spines["right"].set_visible(True)
        axes.set_ylabel(label(name), color=colour)
        axes.tick_params(axis="y", colors=colour)
        yield axes, name, colour


def _panels(series: Series) -> list[list[str]]:
    """Return up to three panels, most informative first: each a metric's training curve and its held-out curve."""
    first = [
        name for name in ("loss", "accuracy", "margin", "perplexity", "kl") if name in series or f"val/{name}" in series
    ]
    rest = [name for name in sorted(series) if name not in first and not name.startswith("val/")]
    skipped = ("epoch", "learning_rate", "gradient_norm")
    chosen = [*first, *(name for name in rest if name not in skipped)][: 3 if first else 1]
    return [[name for name in (base, f"val/{base}") if name in series] for base in chosen]
