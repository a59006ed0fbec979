"""Checks that end in every way, for the tests of the runner. Imports no torch."""

import os
import signal
import subprocess
import sys
import time

from benchmarks.gpu.outcome import Context, Failed, Figures, Refused, Skipped


def well(context: Context, value: int = 1) -> Figures:
    return {"value": value, "device": context.device}


def raises(context: Context) -> Figures:
    raise ValueError("a fault")


def beyond(context: Context) -> Figures:
    raise Failed("beyond the tolerance: sft", {"difference": 2.0})


def refused(context: Context) -> Figures:
    raise Refused("trainer=fsdp: no such option")


def skipped(context: Context) -> Figures:
    raise Skipped("the package bitsandbytes is absent")


def hangs(context: Context) -> Figures:
    """Wait, and so does a process of its own, whose number is written to a file."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (context.folder / "pid").write_text(str(child.pid))
    print("waiting", flush=True)
    time.sleep(600)
    return {}


def exhausts(context: Context) -> Figures:
    raise MemoryError


def dies(context: Context) -> Figures:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def exits(context: Context) -> Figures:
    print("before the end", flush=True)
    os._exit(3)
