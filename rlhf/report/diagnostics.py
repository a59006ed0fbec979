"""Plots that single stages leave in their run folder: calibration and scores of a reward model, gain of best of K."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from rlhf.functional.calibration import Reliability
from rlhf.report.plots import COLOURS, PALE, save, style


def calibration(curve: Reliability, path: Path) -> Path:
    """Predicted probability of a preference against its frequency, and how many pairs each point stands for."""
    with style():
        figure = Figure(figsize=(4.6, 4.4), layout="constrained")
        axes, below = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
        axes.plot([0.5, 1], [0.5, 1], color=PALE, linestyle="--", label="perfect")
        predicted, observed = [one.predicted for one in curve.bins], [one.observed for one in curve.bins]
        errors = [0.0 if math.isnan(one.error) else one.error for one in curve.bins]
        axes.errorbar(predicted, observed, yerr=errors, fmt="o-", color=COLOURS[0], markersize=4, label="reward model")
        axes.set(title=f"Calibration: expected error {curve.ece:.3f}, {curve.pairs} pairs", ylabel="share that held")
        axes.set(ylim=(0.0, 1.02))
        axes.legend(loc="lower right")
        middles = [(one.low + one.high) / 2 for one in curve.bins]
        below.bar(middles, [one.count for one in curve.bins], width=0.04, color=COLOURS[0], alpha=0.6)
        below.set(xlabel="predicted probability, sigmoid(|gap|)", ylabel="pairs", xlim=(0.49, 1.01))
        return save(figure, path)


def scores(counts: Mapping[str, Sequence[float]], path: Path) -> Path:
    """Histogram of the scores of chosen and of rejected replies."""
    edges = counts["edges"]
    with style():
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.subplots()
        for name, colour in (("chosen", COLOURS[0]), ("rejected", COLOURS[1])):
            axes.stairs(counts[name], edges, fill=True, color=colour, alpha=0.5, label=name)
        axes.set(title="Scores of held-out replies", xlabel="score", ylabel="replies")
        axes.legend()
        return save(figure, path)


def best_of_k(gains: Mapping[int, float], slope: float, path: Path) -> Path:
    """Gain of the best of k over the mean reply, against log k and against the KL bound log k - (k-1)/k."""
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
        right.set(title="Gain against the KL bound", xlabel="log k - (k-1)/k (nats per reply)", ylabel="gain (score)")
        return save(figure, path)
