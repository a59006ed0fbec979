"""What a finished run says of itself: metrics, speed, memory, versions, hardware. torch is not imported for it."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlhf.config import Plain
from rlhf.plan import Step

_LIBRARIES = ("rlhf", "torch", "pytorch-lightning", "transformers", "peft", "bitsandbytes", "hydra-core", "omegaconf")
# Names among the metrics of a training that describe its speed -> their names in summary.json.
_SPEED = {
    "tokens_per_second": "tokens_per_s",
    "samples_per_second": "samples_per_s",
    "step_seconds_median": "median_step_s",
    "train_seconds": "train_s",
}
_WEIGHTS = "weights_bytes/"  # before the names of the sizes that rlhf.models.footprint counted


def command() -> str:
    """What was typed, ready to be typed again."""
    words = ["rlhf" if sys.argv[0].endswith(("rlhf", "__main__.py", "main.py")) else sys.argv[0], *sys.argv[1:]]
    return shlex.join(words)


def summary(step: Step, metrics: Mapping[str, float], memory: Plain, seconds: float, attempts: int) -> Plain:
    """The content of summary.json.

    Args:
        metrics: what the training returned; `headline` among them is the value that a sweep optimises.
        memory: peaks in bytes, of `peak_memory`.
        seconds: wall time of this attempt.
        attempts: how often the run was begun.
    """
    numbers = {name: float(value) for name, value in metrics.items()}
    value = numbers.pop("headline", numbers.get(step.headline))
    weights = {name: int(numbers.pop(name)) for name in list(numbers) if name.startswith(_WEIGHTS)}
    speed = {ours: numbers.pop(theirs) for theirs, ours in _SPEED.items() if theirs in numbers}
    return {
        "stage": step.stage,
        "headline": step.headline,
        "value": value,
        "metrics": numbers,
        "wall_s": seconds,
        **speed,
        "peak_memory_bytes": memory,
        "weights_bytes": {name.removeprefix(_WEIGHTS): value for name, value in weights.items()},
        "seed": step.config.get("seed"),
        "attempts": attempts,
        "command": command(),
        "versions": _versions(),
        "hardware": _hardware(),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _hardware() -> Plain:
    found: Plain = {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count()}
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        names = [
            line.partition(":")[2].strip()
            for line in cpu_info.read_text(encoding="utf-8").splitlines()
            if "model name" in line
        ]
        found["cpu"] = names[0] if names else platform.processor()
    cuda = _cuda()
    if cuda is not None:
        found["gpus"] = [cuda.get_device_name(index) for index in range(cuda.device_count())]
    return found


def _cuda() -> Any:
    """torch.cuda when torch is loaded and there is a device; torch is not imported for this."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def reset_peak_memory() -> None:
    """Peaks count from here on: this step's and not that of the whole process (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return
    cuda = _cuda()
    if cuda is not None:
        cuda.reset_peak_memory_stats()


def peak_memory() -> Plain:
    """Bytes: resident memory of this process, and memory of the first GPU in use."""
    found: Plain = {}
    status = Path("/proc/self/status")
    if status.exists():
        peaks = [
            line.split()[1] for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")
        ]
        if peaks:
            found["cpu"] = 1024 * int(peaks[0])
    cuda = _cuda()
    if cuda is not None:
        found["gpu"] = cuda.max_memory_allocated()
    return found
