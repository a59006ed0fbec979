"""Figures in run directories: style, labels and curves, drawn without a display."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rlhf.functional.calibration import Reliability
from rlhf.storage.metrics_file import Series

# Okabe and Ito (2008): distinguishable with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")


INK, PALE = "#333333", "#D9D9D9"
DPI = 160


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
    "svg.fonttype": "path",  # renders the same without the font installed
    "svg.hashsalt": "rlhf",  # makes the file deterministic
}


# Axis labels of metrics, with units; the first matching pattern wins.
_LABELS = (
    (r"(^|/|_)kl$", "KL (nats per response)"),
    (r"k3|kl_k3", "KL, k3 estimate (nats per response)"),
    (r"gold", "gold reward"),
    (r"(^|/)score$|^after_reward$", "reward model's score"),
    (r"text_loss", "loss on text (nats per token)"),
    (r"reward", "reward"),
    (r"perplexity", "perplexity"),
    (r"(^|/)loss$", "loss (nats)"),
    (r"entropy", "entropy (nats per token)"),
    (r"accuracy", "accuracy"),
    (r"length", "response length (tokens)"),
    (r"ended|eos", "share of responses that end"),
    (r"learning_rate", "learning rate"),
    (r"gradient_norm", "gradient norm"),
    (r"tokens_per", "tokens/s"),
    (r"minutes", "minutes"),
    (r"memory", "GB"),
)


def label(metric: str) -> str:
    """Return the axis label of a metric, with its unit; the metric's own name if no pattern matches."""
    known = next((text for pattern, text in _LABELS if re.search(pattern, metric)), None)
    return known or metric


REWARDS = (r"(^|/)gold(_mean)?$", r"(^|/)score(_mean)?$", r"(^|/)reward(_mean)?$")


KLS = (r"(^|/)kl(_mean)?$", r"(^|/)kl")


def smooth(values: list[float]) -> list[float]:
    """Return the exponential moving average over about a twentieth of the curve, without bias to its first value."""
    keep = 1 - 1 / max(len(values) / 20, 1.0)
    total = weight = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight if weight else math.nan)
    return result


def draw_curve(
    axes: Axes, steps: list[float], values: list[float], colour: str, name: str, points: bool = False
) -> None:
    """Draw a noisy curve in a pale colour under its moving average; a curve of up to 20 points unsmoothed."""
    if points or len(values) <= 20:
        # A line through one point shows nothing.
        axes.plot(steps, values, "o-" if points or len(values) == 1 else "-", color=colour, markersize=3.5, label=name)
        return
    axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.9)
    axes.plot(steps, smooth(values), color=colour, label=name)


def find_metric(series: Series, patterns: Sequence[str]) -> str | None:
    """Return the first metric that matches one of the patterns, tried in order; None if none does."""
    for pattern in patterns:
        for name in series:
            if re.search(pattern, name):
                return name
    return None


@contextmanager
def style() -> Iterator[None]:
    """Context manager that applies the project's matplotlib style."""
    with matplotlib.rc_context(_STYLE):
        yield


# Metadata to leave out, by file type: date and software. Each format rejects the keys of the others.
_OMITTED = {".png": ("Software",), ".svg": ("Date", "Creator"), ".pdf": ("CreationDate", "Creator", "Producer")}


def save(figure: Figure, path: Path) -> Path:
    """Write a figure at 160 dpi without date and software metadata, and return its path."""
    metadata = dict.fromkeys(_OMITTED[path.suffix])
    if path.suffix == ".png":  # savefig draws a figure twice; the canvas draws it once, with the same pixels
        figure.set_dpi(DPI)
        FigureCanvasAgg(figure).print_png(str(path), metadata=metadata)
    else:
        figure.savefig(path, dpi=DPI, metadata=metadata)
    return path


def plot_calibration(curve: Reliability, path: Path) -> Path:
    """Plot predicted against observed frequency of preferences, and the number of pairs in each bin."""
    with style():
        figure = Figure(figsize=(4.6, 4.4), layout="constrained")
        axes, below = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
        axes.plot([0.5, 1], [0.5, 1], color=PALE, linestyle="--", label="perfect")
        predicted, observed = [one.predicted for one in curve.bins], [one.observed for one in curve.bins]
        errors = [0.0 if math.isnan(one.error) else one.error for one in curve.bins]
        axes.errorbar(predicted, observed, yerr=errors, fmt="o-", color=COLOURS[0], markersize=4, label="reward model")
        axes.set(title=f"Calibration: expected error {curve.ece:.3f}, {curve.pairs} pairs", ylabel="observed frequency")
        axes.set(ylim=(0.0, 1.02))
        axes.legend(loc="lower right")
        middles = [(one.low + one.high) / 2 for one in curve.bins]
        below.bar(middles, [one.count for one in curve.bins], width=0.04, color=COLOURS[0], alpha=0.6)
        below.set(xlabel="predicted probability, sigmoid(|gap|)", ylabel="pairs", xlim=(0.49, 1.01))
        return save(figure, path)


def plot_scores(counts: Mapping[str, Sequence[float]], path: Path) -> Path:
    """Plot a histogram of the scores of chosen and of rejected responses."""
    edges = counts["edges"]
    with style():
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.subplots()
        for name, colour in (("chosen", COLOURS[0]), ("rejected", COLOURS[1])):
            axes.stairs(counts[name], edges, fill=True, color=colour, alpha=0.5, label=name)
        axes.set(title="Scores of held-out responses", xlabel="score", ylabel="responses")
        axes.legend()
        return save(figure, path)


def plot_best_of_k(gains: Mapping[int, float], slope: float, path: Path) -> Path:
    """Plot the gain of best-of-k over the mean response against log k and against the KL bound log k - (k-1)/k."""
    ks = sorted(gains)
    values = [gains[k] for k in ks]
    with style():
        figure = Figure(figsize=(8.4, 3.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        logs = [math.log(k) for k in ks]
        left.plot(logs, values, "o-", color=COLOURS[0], markersize=4, label="best of k - mean")
        left.plot(logs, [slope * x for x in logs], "--", color=COLOURS[1], label=f"{slope:.3g} log k")
        left.set_xticks(logs, [str(k) for k in ks])
        left.set(title="Gain against log k", xlabel="k (log scale)", ylabel="gain (score)")
        left.legend()
        bounds = [math.log(k) - (k - 1) / k for k in ks]
        right.plot(bounds, values, "o-", color=COLOURS[2], markersize=4)
        right.set(
            title="Gain against the KL bound", xlabel="log k - (k-1)/k (nats per response)", ylabel="gain (score)"
        )
        return save(figure, path)
