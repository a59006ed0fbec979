"""Summary of a finished run: metrics, speed, memory, versions, hardware. This module imports no torch."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlhf.planning.step import Step
from rlhf.storage.plain import Plain

_LIBRARIES = ("rlhf", "torch", "pytorch-lightning", "transformers", "peft", "bitsandbytes", "hydra-core", "omegaconf")
# Names of the speed metrics that training returns -> their names in summary.json.
_SPEED = {
    "tokens_per_second": "tokens_per_s",
    "samples_per_second": "samples_per_s",
    "step_seconds_median": "median_step_s",
    "train_seconds": "train_s",
}
_WEIGHTS = "weights_bytes/"  # prefix of the sizes that rlhf.models.footprint counts


def command() -> str:
    """Return the typed command, quoted so that it can be typed again."""
    words = ["rlhf" if sys.argv[0].endswith(("rlhf", "__main__.py", "main.py")) else sys.argv[0], *sys.argv[1:]]
    return shlex.join(words)


def summary(step: Step, metrics: Mapping[str, float], memory: Plain, seconds: float, attempts: int) -> Plain:
    """Return the content of summary.json.

    Args:
        step: the step that ran.
        metrics: the metrics that training returned; `headline` among them is the value that a sweep optimises.
        memory: peaks in bytes, from `peak_memory`.
        seconds: wall time of this attempt.
        attempts: how many times the run was started.
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
    """Return torch.cuda if torch is already imported and there is a device; never imports torch."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def reset_peak_memory() -> None:
    """Reset the memory peaks, so that they measure this step and not the whole process (Linux only)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return
    cuda = _cuda()
    if cuda is not None:
        cuda.reset_peak_memory_stats()


def peak_memory() -> Plain:
    """Return the peaks in bytes: resident memory of this process, and allocated memory of the current GPU."""
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
