"""Runner of the checks: one process for each, a limit of seconds for each, a budget for all. Imports no torch.

The file is written after every check, so that a run that is cut off loses none. Checks that measure neither time nor
memory run beside each other.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from benchmarks.gpu.checks import Check
from rlhf.storage.files import read_json

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 10.0  # factor on the limits of tiny models on the CPU, which may be slow and have other work
LEAST = 15.0  # seconds below which no check is started: the imports alone take them
LAST_LINES = 12


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Attributes:
        device: cuda or cpu.
        small: Whether to run tiny models.
        budget: Seconds of the whole run.
        jobs: Checks beside each other, of those that measure neither time nor memory.
        folder: Scratch directory; the logs of the checks stay there.
        threads: Threads of each process on the CPU.
    """

    device: str
    small: bool
    budget: float
    jobs: int
    folder: Path
    threads: int


def run_checks(checks: Sequence[Check], settings: Settings, write: Callable[[list[dict[str, Any]]], None]) -> None:
    """Run the checks; call ``write`` with the results so far after each.

    Results are in the order of the checks. One that no time is left for has the status "not run: time".
    """
    deadline = time.monotonic() + settings.budget
    results: dict[str, dict[str, Any]] = {}
    lock = Lock()

    def attempt(check: Check) -> None:
        result = run_check(check, settings, deadline - time.monotonic())
        with lock:
            results[check.name] = result
            print(f"{check.name}: {result['status']} ({result['seconds']:.0f} s)", file=sys.stderr, flush=True)
            write([results[one.name] for one in checks if one.name in results])

    with ThreadPoolExecutor(settings.jobs) as pool:
        first, *rest = checks
        attempt(first)
        list(pool.map(attempt, (check for check in rest if not check.alone)))
    for check in rest:
        if check.alone:
            attempt(check)


def run_check(check: Check, settings: Settings, left: float) -> dict[str, Any]:
    """Run one check; return its result.

    Args:
        check: The check.
        settings: Settings of the run.
        left: Seconds left of the budget.
    """
    result: dict[str, Any] = {"check": check.name, "title": check.title, "seconds": 0.0}
    if left < min(LEAST, check.limit):
        return result | {"status": "not run: time"}
    folder = settings.folder / check.name
    folder.mkdir(parents=True)
    task: dict[str, Any] = {"function": check.function, "arguments": check.arguments, "folder": str(folder)}
    task |= {"device": settings.device, "small": settings.small, "outcome": str(folder / "outcome.json")}
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    limit, log = min(check.limit * (PATIENCE if settings.small else 1.0), left), folder / "log.txt"
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.child", str(folder / "task.json")],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment(settings),
            start_new_session=True,  # a check that is ended takes its own processes along
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result["seconds"] = round(time.monotonic() - began, 1)
    if code is None:
        return result | {"status": "timeout", "limit": round(limit, 1), "error": last_lines(log)}
    outcome = read_json(folder / "outcome.json")[0]
    if isinstance(outcome, dict):
        return result | outcome
    ending = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return result | {"status": "killed" if code < 0 else "failed", "error": [ending, *last_lines(log)]}


def environment(settings: Settings) -> dict[str, str]:
    """Return the environment variables of a check."""
    paths = [str(ROOT), str(ROOT / "plugins"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "MPLBACKEND": "Agg",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(settings.threads),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # the same sums in every run
        "RLHF_CACHE": os.environ.get("RLHF_CACHE", str(settings.folder / "cache")),
    }


def last_lines(log: Path) -> list[str]:
    """Return the last lines of a log that are not empty."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.rstrip()[:300] for line in lines if line.strip()][-LAST_LINES:]
