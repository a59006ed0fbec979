"""Job of a sweep: its overrides, its process, and its result."""

import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from rlhf.errors import RunFailed

STOPPED = 75  # exit status of a job that saved a checkpoint and stopped on a signal (EX_TEMPFAIL)


@dataclass
class Job:
    """Job of a sweep: its overrides, its directory, its process and its status."""

    number: int
    overrides: list[str]
    folder: Path
    attempts: int = 0
    started: float = 0.0
    seconds: float = 0.0
    process: subprocess.Popen[bytes] | None = None
    slot: int = 0
    status: str = "waiting"  # waiting, running, finished, failed, timeout, stopped
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def console(self) -> Path:
        """Return the file that holds the job's terminal output."""
        return self.folder / "console.log"

    @property
    def error(self) -> str:
        """Return the reason why the job failed, in one line."""
        if self.status == "timeout":
            return f"took longer than hydra.launcher.timeout_s; see {self.console}"
        if self.result.get("error"):
            return str(self.result["error"]).splitlines()[0]
        code = self.process.returncode if self.process else None
        if code is not None and code < 0:
            return f"killed by signal {signal.Signals(-code).name}; see {self.console}"
        lines = [
            line for line in self.console.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        return lines[-1] if lines else f"exit status {code}; see {self.console}"

    def returned(self) -> JobReturn:
        """Return the result in the form that Hydra's sweepers expect."""
        job = _Return()
        job.overrides, job.working_dir, job.task_name = self.overrides, str(self.folder), "rlhf"
        finished = self.status == "finished"
        job.status = JobStatus.COMPLETED if finished else JobStatus.FAILED
        job.return_value = self.result.get("value") if finished else RunFailed(self.error, where=f"job {self.number}")
        return job


class _Return(JobReturn):
    """JobReturn that raises a failed job's error without printing it, because the launcher has printed it already."""

    @property
    def return_value(self) -> Any:
        if self.status == JobStatus.FAILED:
            raise self._return_value
        return self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value
