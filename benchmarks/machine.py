"""The machine: its processor, measured matrix rate, and installed versions."""

import os
import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "transformers", "peft", "trl", "pytorch-lightning", "accelerate")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16_true": torch.bfloat16}


def matrix_rate(device: str, dtype: str, seconds: float = 1.0) -> float:
    """Measure the rate of ``torch.mm`` on square matrices, FLOP/s: the best of as many products as fit the time.

    The matrices have 2048 rows on a CPU and 8192 on a GPU, where larger ones are not faster.
    """
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    best, started = float("inf"), time.perf_counter()
    torch.mm(a, b)
    while time.perf_counter() - started < seconds or best == float("inf"):
        _synchronize(device)
        begin = time.perf_counter()
        torch.mm(a, b)
        _synchronize(device)
        best = min(best, time.perf_counter() - begin)
    del a, b
    if device == "cuda":
        torch.cuda.empty_cache()  # the workers need the memory
    return 2 * size**3 / best


def seconds() -> float:
    """Return a clock: on one thread CPU seconds of this process, which other load disturbs less, else wall time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def describe(device: str) -> dict[str, Any]:
    """Return the names of device and processor, the thread count, the commit and the versions."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _processor() -> str:
    """Return the processor's name, with family and model, as names can be generic."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name", platform.processor())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def _commit() -> str:
    """Return the commit of the sources, with "+" if files differ from it; "" without git or outside of a repository."""
    if shutil.which("git") is None:
        return ""
    root = Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, encoding="utf-8", check=False)
    changed = subprocess.run(
        ["git", "status", "--porcelain"], cwd=root, capture_output=True, encoding="utf-8", check=False
    )
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
