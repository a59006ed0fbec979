"""Description of the device and the installed versions."""

import shutil
import subprocess
from importlib import metadata
from typing import Any

import torch

from benchmarks import machine

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "pytorch-lightning",
    "bitsandbytes",
    "hydra-core",
    "omegaconf",
    "pydantic",
    "datasets",
    "tokenizers",
    "safetensors",
)


def describe_device(device: str) -> dict[str, Any]:
    """Return the names and numbers of the device, its driver, the processor and the versions."""
    found = machine.describe(device)
    found["versions"] = {name: _version(name) for name in LIBRARIES}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"memory_gb": properties.total_memory / 1e9, "multiprocessors": properties.multi_processor_count}
        found |= {"compute_capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda}
        found["driver"] = _driver()
    return found


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(words, capture_output=True, encoding="utf-8", check=False).stdout.split()
    return lines[0] if lines else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
