"""Results of the benchmarks: a table, and a JSON file for each device.

The file has the keys ``started``, ``machine`` (``machine.describe``), ``settings`` and ``rows``. A row has ``case``,
``peer``, ``model``, ``config``, and unless the case could not begin ``data`` and ``matrix_rate`` (FLOP/s). For each
side (``ours_result``, ``peer_result``) it has either ``error``, or ``seconds`` per step (median, mean, std, min, max,
values), ``tokens_per_second``, ``samples_per_second``, ``peak_memory_bytes``, ``flops``, ``mfu`` and ``threads``. If
both sides ran, it has ``ratio`` (median and mean: the peer's seconds over ours; memory: ours over the peer's) and
``identical_rows`` (whether both trainers received the same tokens).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.storage import files

HEAD = (
    "case", "model", "side", "median s", "mean s", "ratio", "tokens/s", "samples/s", "peak GB", "MFU",
)  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the results as a Markdown table: two lines for each case, the ratios in ours."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for row in rows:
        for side in ("ours", "peer"):
            if f"{side}_result" not in row:
                continue
            name = row["peer"] if side == "peer" else "ours"
            lines.append("| " + " | ".join([row["case"], row["model"], name, *_cells(row, side)]) + " |")
    return "\n".join(lines)


def _cells(row: dict[str, Any], side: str) -> list[str]:
    numbers = row[f"{side}_result"]
    if "error" in numbers:
        return [numbers["error"].replace("|", "/"), *[""] * (len(HEAD) - 4)]
    ratio = ""
    if side == "ours" and "ratio" in row:
        ratio = f"{row['ratio']['median']:.2f}x, mean {row['ratio']['mean']:.2f}x, memory {row['ratio']['memory']:.2f}"
    return [
        f"{numbers['seconds']['median']:.3g}",
        f"{numbers['seconds']['mean']:.3g} ± {numbers['seconds']['std']:.2g}",
        ratio,
        f"{numbers['tokens_per_second']:.4g}",
        f"{numbers['samples_per_second']:.3g}",
        f"{numbers['peak_memory_bytes'] / 1e9:.2f}",
        f"{numbers['mfu']:.0%}",
    ]


def write(folder: Path, content: dict[str, Any]) -> Path:
    """Write the results to a file named after the device; return its path."""
    machine = content["machine"]
    name = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")
    files.write_json(path, content)
    return path
