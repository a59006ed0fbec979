"""Parent side of the measurement: two workers per case, which alternate repetition by repetition."""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks import models
from benchmarks.cases import Case, count_amounts
from benchmarks.gate import Job
from benchmarks.peer_environment import peer_python
from benchmarks.rows import build_rows
from rlhf.errors import RLHFError, RunFailed, UserError

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("ours", "peer")


@dataclass(frozen=True)
class Settings:
    """Settings of a run that all cases share."""

    device: str = "cpu"
    dtype: str = "fp32"
    warmup: int = 1
    steps: int = 1
    repeats: int = 5
    sides: tuple[str, ...] = SIDES
    apart: bool = False  # one side after the other, for models of which two do not fit the device
    profile: Path | None = None  # directory for operator profiles


class Worker:
    """Running side of a case."""

    def __init__(self, job: Job, python: str, folder: Path) -> None:
        self.job, self._log = job, folder / f"{job.side}.log"
        file = folder / f"{job.side}.json"
        file.write_text(json.dumps(asdict(job)), encoding="utf-8")
        paths = [str(ROOT), str(ROOT / "plugins"), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self._log.open("w", encoding="utf-8") as log:
            pages = os.environ.get("THP_MEM_ALLOC_ENABLE", "1")
            own = {"THP_MEM_ALLOC_ENABLE": pages} if job.side == "ours" else {}  # as the command `rlhf` does
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.worker", str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", **own},
            )

    def read(self) -> dict[str, Any]:
        """Return the next report.

        Raises:
            RunFailed: The worker ended without one; the message is the last line that it wrote.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RunFailed(self._failure())
        report: dict[str, Any] = json.loads(line)
        return report

    def repeat(self) -> dict[str, Any]:
        """Let the worker run one repetition, and return its report."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `read` reports why the worker ended
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return self.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()  # ends a worker that waits at its gate
        if kind is not None:
            self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def _failure(self) -> str:
        code = self._process.wait()
        if code < 0:
            return f"killed by signal {signal.Signals(-code).name} (the system kills a process that exhausts memory)"
        with self._log.open(encoding="utf-8", errors="replace") as log:
            last = deque((line.strip() for line in log if line.strip()), maxlen=1)
        return last[0] if last else f"exit status {code}"


def run_case(case: Case, settings: Settings, rate: float) -> dict[str, Any]:
    """Measure a case; return its row for the report.

    A side that fails has an ``error`` in place of its numbers, and the other is measured alone.

    Args:
        case: The case.
        settings: Settings of the run.
        rate: The machine's rate of matrix products in the run's arithmetic, FLOP/s.
    """
    row: dict[str, Any] = {"case": case.name, "peer": case.peer, "model": case.model, "config": asdict(case)}
    try:
        folder = models.model_folder(case.model)
        reward = models.reward_folder(folder) if case.stage == "ppo" else None
        shape = models.shape(folder)
        case = case.fitted(json.loads((folder / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"])
        from transformers import AutoTokenizer

        rows, source = build_rows(case, AutoTokenizer.from_pretrained(folder))
    except RLHFError as error:
        return row | {f"{side}_result": {"error": str(error)} for side in settings.sides}
    row |= {"config": asdict(case), "data": source, "matrix_rate": rate}
    reports, errors = _measure(case, settings, str(folder), None if reward is None else str(reward), rows)
    for side in settings.sides:
        if errors[side]:
            row[f"{side}_result"] = {"error": errors[side]}
            continue
        ready, *measured = reports[side]
        lengths = [report["response"] for report in measured if "response" in report]
        amounts = count_amounts(case, shape, rows, statistics.mean(lengths) if lengths else None)
        seconds = [report["seconds"] for report in measured]
        median = statistics.median(seconds)
        row[f"{side}_result"] = {
            "seconds": _statistics(seconds),
            "tokens_per_second": amounts.tokens / median,
            "samples_per_second": amounts.samples / median,
            "peak_memory_bytes": max(report["memory"] for report in measured),
            "flops": amounts.flops,
            "mfu": amounts.flops / median / rate,
            "threads": ready["threads"],
        }
    if settings.sides == SIDES and not any(errors.values()):
        mine, theirs = (row[f"{side}_result"] for side in SIDES)
        row["ratio"] = {name: theirs["seconds"][name] / mine["seconds"][name] for name in ("median", "mean")}
        row["ratio"]["memory"] = mine["peak_memory_bytes"] / max(1, theirs["peak_memory_bytes"])
        row["identical_rows"] = reports["ours"][0]["rows"] == reports["peer"][0]["rows"]
    return row


def _measure(
    case: Case, settings: Settings, model: str, reward: str | None, rows: Sequence[dict[str, Any]]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Return the reports of each side, the first one after its warm-up, and each side's error or ""."""
    reports: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    errors = dict.fromkeys(SIDES, "")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, workers = Path(name), {}

        def attempt(side: str, start: bool = False) -> None:
            if errors[side]:
                return
            try:
                if start:
                    python = peer_python() if side == "peer" and case.peer == "trl 0.24" else sys.executable
                    job = _job(case, side, settings, model, reward, rows, folder)
                    workers[side] = stack.enter_context(Worker(job, python, folder))
                    reports[side].append(workers[side].read())
                else:
                    reports[side].append(workers[side].repeat())
            except (RunFailed, UserError, OSError) as error:
                errors[side] = str(error) or type(error).__name__

        if settings.apart:
            for side in settings.sides:
                attempt(side, start=True)
                for _ in range(settings.repeats):
                    attempt(side)
                stack.close()
            return reports, errors
        for side in settings.sides:
            attempt(side, start=True)
        for index in range(settings.repeats):
            for side in settings.sides if index % 2 == 0 else reversed(settings.sides):
                attempt(side)
    return reports, errors


def _job(
    case: Case,
    side: str,
    settings: Settings,
    model: str,
    reward: str | None,
    rows: Sequence[dict[str, Any]],
    folder: Path,
) -> Job:
    profile = None
    if settings.profile is not None:
        settings.profile.mkdir(parents=True, exist_ok=True)
        profile = str(settings.profile.resolve() / f"{case.name}-{side}.txt")
    return Job(
        case=asdict(case),
        side=side,
        model=model,
        reward=reward,
        rows=list(rows),
        device=settings.device,
        dtype=settings.dtype,
        warmup=settings.warmup,
        steps=settings.steps,
        repeats=settings.repeats,
        folder=str(folder),
        profile=profile,
    )


def _statistics(values: Sequence[float]) -> dict[str, Any]:
    """Return median, mean, standard deviation, extremes, and the values."""
    return {
        "median": statistics.median(values),
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }


def with_model(case: Case, model: str | None, batch: int | None) -> Case:
    """Return the case with another model or batch; None keeps the case's own."""
    return replace(case, model=model or case.model, batch=batch or case.batch)
