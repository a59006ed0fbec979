"""Page docs/gpu.md, made from docs/gpu.json. Imports no torch."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf.storage.files import read_json, write_text

COMMAND = "python -m benchmarks.gpu --page"
HEAD = f"""# On a GPU

What was checked on a GPU: that the arithmetic is that of the CPU, that a run resumes, what 16 bits change, and how fast
and how large training steps are. `benchmarks/gpu.sh` runs the checks in nine minutes and writes `docs/gpu.json`; this
page is made from that file by `{COMMAND}`.

```
make wheels                # once, with a network: what a machine with PyTorch and transformers may lack, into wheels/
benchmarks/gpu.sh          # on the machine with a GPU; --small on a CPU shows that every check runs
{COMMAND}
```
"""
NOTHING = "There is no run on a GPU yet.\n"
#: name of a figure of a training step -> column
STEP = {
    "seconds_per_step": "s per step",
    "tokens_per_s": "tokens/s",
    "samples_per_s": "samples/s",
    "mfu": "MFU",
    "peak_memory_gb": "peak GB",
    "predicted_memory_gb": "predicted GB",
}
MACHINE = ("device", "driver", "cuda", "memory_gb", "processor", "cores", "python", "matrix_rate_tflops", "versions")


def render(content: Mapping[str, Any] | None) -> str:
    """Return the page for the content of the file; None: there is no file."""
    if content is None:
        return f"{HEAD}\n{NOTHING}"
    results = content["checks"]
    parts = [HEAD, _run(content), "## Checks", _checks(results)]
    steps = [result for result in results if STEP.keys() <= result.get("figures", {}).keys()]
    if steps:
        parts += [
            "## Training steps",
            "Random weights in bf16 (fp32 master weights). MFU is the share of the matrix rate measured in the same "
            "process. The predicted memory is the total of `rlhf inspect plan`.",
            _table(
                ("check", *STEP.values()),
                ((result["check"], *(_cell(result["figures"][name]) for name in STEP)) for result in steps),
            ),
        ]
    others = [
        (result["check"], *row)
        for result in results
        if result not in steps and result["check"] != "device"
        for row in _flat(result.get("figures", {}))
    ]
    if others:
        parts += ["## Figures", _table(("check", "figure", "value"), others)]
    errors = [result for result in results if result.get("error")]
    if errors:
        parts.append("## Errors")
        parts += [f"`{result['check']}`:\n\n```\n" + "\n".join(result["error"]) + "\n```" for result in errors]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def write_page(folder: Path) -> Path:
    """Write gpu.md from gpu.json in a directory; return its path."""
    path = folder / "gpu.md"
    content = read_json(folder / "gpu.json")[0]
    write_text(path, render(content if isinstance(content, dict) else None))
    return path


def _run(content: Mapping[str, Any]) -> str:
    figures: Mapping[str, Any] = {}
    for result in content["checks"]:
        if result["check"] == "device":
            figures = result.get("figures", {})
    rows = _flat({name: figures[name] for name in MACHINE if figures.get(name) is not None})
    rows += [(name, _cell(content[name])) for name in ("command", "commit", "started", "seconds")]
    return _table(("run", ""), rows)


def _checks(results: Iterable[Mapping[str, Any]]) -> str:
    rows = ((result["check"], result["title"], result["status"], f"{result['seconds']:.0f}") for result in results)
    return _table(("check", "what", "status", "s"), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


def _flat(figures: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return (name, value as text) of figures; names of nested ones are joined by a point."""
    rows: list[tuple[str, str]] = []
    for name, value in figures.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", _cell(value))]
    return rows


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
