"""Figures of the cost curves: small multiples of time, share of the matrix rate and memory; and the roofline."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.roofline import Roofline
from rlhf.stage.figures import COLOURS, INK, save, style

GOALS = {"sft": 0.7, "grpo": 0.5}  # least share of the floor that the cases of 12M weights are to reach
#: curve -> (title, label of the horizontal axis)
PANELS = {
    "model": ("SFT, 8 x 128 tokens", "weights"),
    "length": ("SFT 12m, 4 rows", "tokens in a row"),
    "batch": ("SFT 12m, 256 tokens", "rows in a batch"),
    "samples": ("GRPO 12m, 2 prompts of 192", "responses K to a prompt"),
}
GIGABYTES = (0.05, 0.1, 0.2, 0.5, 1, 2, 4)  # ticks of the memory
SUFFIXES = (".svg", ".png")


def draw(content: dict[str, Any], folder: Path) -> list[Path]:
    """Draw both figures from the content of curves.json; return their files."""
    limits = Roofline({int(size): rate for size, rate in content["rates"].items()}, content["bandwidth"])
    points = [point for point in content["points"].values() if "seconds" in point]
    with style():
        figures = {"curves": curves(points, limits), "roofline": roofline(points, limits)}
        return [save(figure, folder / f"{name}{end}") for name, figure in figures.items() for end in SUFFIXES]


def curves(points: Sequence[dict[str, Any]], limits: Roofline) -> Figure:
    """Draw a column for each curve: seconds per step above its floor, share of the matrix rate, peak memory."""
    figure = Figure(figsize=(12.4, 7.6), layout="constrained")
    panels = figure.subplots(3, len(PANELS), sharex="col", sharey="row")
    for column, (curve, (title, label)) in enumerate(PANELS.items()):
        own = sorted((point for point in points if point["curve"] == curve), key=_across)
        if not own:
            continue
        time, share, memory = (panels[row][column] for row in range(3))
        across = [_across(point) for point in own]
        _line(time, across, own, lambda point: point["seconds"], 0, "measured")
        floor = [point["flops"] / limits.rate for point in own]
        time.plot(across, floor, "--", color=INK, linewidth=1.2, label="floor: FLOPs at the matrix rate")
        traffic = [point["bytes"] / limits.bandwidth for point in own]
        time.plot(across, traffic, ":", color=COLOURS[1], linewidth=1.4, label="floor: bytes at the bandwidth")
        _line(share, across, own, lambda point: point["share"], 0, "")
        share.axhline(
            GOALS[own[0]["config"]["stage"]], linestyle="--", color=COLOURS[1], linewidth=1.2, label="goal of the floor"
        )
        _line(memory, across, own, lambda point: point["peak_memory_bytes"] / 1e9, 0, "")
        for axes in (time, memory):
            axes.set(xscale="log", yscale="log")
        share.set(xscale="log", ylim=(0, 1))
        time.set(title=title)
        memory.set_xlabel(label)
        names = [point["value"] for point in own]
        memory.set_xticks(across, names if curve != "model" else [f"{_short(x)}" for x in across])
        memory.minorticks_off()
    panels[0][0].set_ylabel("seconds per step")
    panels[1][0].set_ylabel("share of the matrix rate")
    panels[2][0].set_ylabel("peak memory (GB)")
    panels[2][0].set_yticks(GIGABYTES, [f"{size:g}" for size in GIGABYTES])
    handles, names = panels[0][-1].get_legend_handles_labels()
    goal, name = panels[1][-1].get_legend_handles_labels()
    figure.legend([*handles, *goal], [*names, *name], loc="outside upper right", ncols=4)
    return figure


def roofline(points: Sequence[dict[str, Any]], limits: Roofline) -> Figure:
    """Draw the roofline, every measured step at its intensity and rate, and the matrix products that give the roof."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    lowest = min([point["intensity"] for point in points] + [limits.ridge]) / 5
    highest = max([point["intensity"] for point in points] + [limits.ridge, 400]) * 2
    axes.plot(
        [lowest, limits.ridge, highest],
        [limits.bound(lowest) / 1e9, limits.rate / 1e9, limits.rate / 1e9],
        color=INK,
        label=f"{limits.rate / 1e9:.0f} GFLOP/s, {limits.bandwidth / 1e9:.1f} GB/s",
    )
    axes.axvline(limits.ridge, color=INK, linestyle=":", linewidth=1)
    axes.annotate(
        f"ridge {limits.ridge:.1f} FLOP/byte",
        (limits.ridge, 0.96),
        (-92, 0),
        ("data", "axes fraction"),
        "offset points",
    )
    sizes = sorted(limits.rates)
    axes.plot(
        [size / 6 for size in sizes],  # 2 n^3 FLOPs and 3 n^2 numbers of four bytes
        [limits.rates[size] / 1e9 for size in sizes],
        "x",
        color=INK,
        markersize=5,
        label=f"square products, {sizes[0]} to {sizes[-1]} rows",
    )
    for index, (curve, (title, label)) in enumerate(PANELS.items()):
        own = sorted((point for point in points if point["curve"] == curve), key=_across)
        axes.plot(
            [point["intensity"] for point in own],
            [point["rate"] / 1e9 for point in own],
            "osD^"[index] + "-",
            color=COLOURS[index],
            linewidth=0.8,
            markersize=5,
            label=f"{title}: {label}",
        )
        for point in own[:1] + own[-1:]:
            place = (point["intensity"], point["rate"] / 1e9)
            axes.annotate(point["value"], place, (5, -9), textcoords="offset points", color=COLOURS[index], fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="arithmetic intensity (FLOP per byte)", ylabel="GFLOP/s")
    axes.legend(loc="lower right")
    return figure


def _line(
    axes: Axes,
    across: Sequence[float],
    points: Sequence[dict[str, Any]],
    value: Callable[[dict[str, Any]], float],
    colour: int,
    name: str,
) -> None:
    axes.plot(across, [value(point) for point in points], "o-", color=COLOURS[colour], markersize=4.5, label=name)


def _across(point: dict[str, Any]) -> float:
    """Return the place of a point on the horizontal axis; a model's is its number of weights."""
    return float(point["parameters"] if point["curve"] == "model" else point["value"])


def _short(count: float) -> str:
    return f"{count / 1e6:.0f}M" if count >= 1e6 else f"{count / 1e3:.0f}k"
