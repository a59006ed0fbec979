"""Worker side of the measurement: one training loop that the parent process lets pass step by step.

The parent holds both sides of a case in two processes and alternates them, so that other load on the machine hits both.
A worker that waits at its gate uses no processor. This module imports torch alone: it also runs in the environment of
an older peer library.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Job:
    """Work of one worker, as the parent wrote it to a JSON file."""

    case: dict[str, Any]  # fields of the `Case`
    side: str  # "ours" or "peer"
    model: str  # directory of the language model
    reward: str | None  # directory of the reward model, for the cases that read one
    rows: list[dict[str, Any]]  # token rows or prompts, the same for both sides
    device: str  # cpu or cuda
    dtype: str  # fp32, bf16 (fp32 weights, bf16 products) or bf16_true
    warmup: int  # optimizer steps that are not measured
    steps: int  # optimizer steps in a repetition
    repeats: int  # repetitions
    folder: str  # directory for what the trainers write
    profile: str | None = None  # file for the operator profile of all measured steps

    @classmethod
    def read(cls, path: str | Path) -> "Job":
        """Read a job."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    @property
    def total(self) -> int:
        """Optimizer steps in all, and one that is begun but not finished."""
        return self.warmup + self.steps * self.repeats + 1


class Gate:
    """Gate at the end of each step: reports a repetition, then waits for the parent.

    A repetition is ``steps`` whole iterations of the training loop: data loading, callbacks and logging included. Peak
    memory is that of the process less its memory before the model was loaded (``start``): the largest resident set on
    the CPU, ``torch.cuda.max_memory_allocated`` on a GPU.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # what libraries print goes to the log
        self._passed = 0
        self._began = 0.0
        self._base = 0
        self._profiler: Any = None
        self.trained: list[list[int]] = []  # token rows of the warm-up, as the trainer received them

    def start(self) -> None:
        """Record the memory before the model is loaded; call after the imports."""
        self._base = resident_bytes()

    @property
    def warming(self) -> bool:
        """Return whether the warm-up goes on; rows are recorded only then, so measured steps pay nothing for it."""
        return self._passed < self.job.warmup

    def record_rows(self, rows: Iterable[list[int]]) -> None:
        """Keep the token rows that the trainer received, which the parent compares between the sides."""
        self.trained = sorted(map(list, rows))

    def end_step(self, **measured: float) -> None:
        """Count a finished step; at the end of a repetition report it and wait.

        Args:
            measured: Further numbers of the last step, such as the mean length of its responses.
        """
        self._passed += 1
        done, steps = self._passed - self.job.warmup, self.job.steps
        if done < 0 or done % steps:
            return
        if self.job.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        if done == 0:
            self._report(ready=True, rows=self.trained, threads=torch.get_num_threads())
            if self.job.profile:
                self._profiler = torch.profiler.profile(with_stack=False)
                self._profiler.start()
        else:
            self._report(seconds=seconds / steps, memory=self.peak_bytes(), **measured)
        if not sys.stdin.readline():
            self._finish()
        if self.job.device == "cuda":
            torch.cuda.synchronize()
        self._began = time.perf_counter()

    def peak_bytes(self) -> int:
        """Return the peak memory so far, in bytes."""
        if self.job.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return max(0, largest_resident_bytes() - self._base)

    def _report(self, **values: Any) -> None:
        print(json.dumps(values), file=self._reports, flush=True)

    def _finish(self) -> None:
        """End the process without what trainers do after training: saving, evaluation, reports."""
        if self._profiler is not None:
            self._profiler.stop()
            order = "self_cuda_time_total" if self.job.device == "cuda" else "self_cpu_time_total"
            table = self._profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=48)
            Path(self.job.profile or "").write_text(table, encoding="utf-8")
        sys.stderr.flush()
        os._exit(0)


def largest_resident_bytes() -> int:
    """Return the largest resident memory of this process so far, in bytes.

    Not ``ru_maxrss``, which a process inherits from the one that started it.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def resident_bytes() -> int:
    """Return the resident memory of this process, in bytes."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * resource.getpagesize()
