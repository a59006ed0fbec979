"""Job of a sweep: a process of its own, its terminal output, its status and its result."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from rlhf.errors import RunFailed
from rlhf.running import processes
from rlhf.storage.files import read_json


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

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the job's process, once more if it ran before; its output is appended to ``console``.

        Args:
            command: Program and arguments.
            environment: Environment variables; the one that names the file of the result is added.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._result_file.unlink(missing_ok=True)
        self.attempts, self.started, self.status, self.result = self.attempts + 1, time.monotonic(), "running", {}
        with self.console.open("a", encoding="utf-8") as console:
            console.write(f"$ {shlex.join(command)}\n")
            console.flush()
            # A new session: Ctrl-C reaches the job only through us, once, together with all processes that it started.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={**environment, processes.RESULT: str(self._result_file.absolute())},
                start_new_session=True,
            )

    def ended(self, timeout_s: float | None, grace_s: float) -> bool:
        """Return whether the process has ended, with its result recorded.

        Args:
            timeout_s: Seconds after which it is stopped; None: never.
            grace_s: Seconds that it then gets to save a checkpoint.
        """
        assert self.process is not None
        code = self.process.poll()
        late = code is None and timeout_s is not None and time.monotonic() - self.started > timeout_s
        if late:
            self._signal(signal.SIGTERM)
            try:
                self.process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
                self.process.wait()
        elif code is None:
            return False
        self._read()
        if late and self.status != "finished":
            self.status = "timeout"
        return True

    def kill(self) -> None:
        """Kill the process, if it runs, and all processes that it started."""
        if self.process and self.process.poll() is None:
            self._signal(signal.SIGKILL)

    def returned(self) -> JobReturn:
        """Return the result in the form that Hydra's sweepers expect."""
        job = _Return()
        job.overrides, job.working_dir, job.task_name = self.overrides, str(self.folder), "rlhf"
        finished = self.status == "finished"
        job.status = JobStatus.COMPLETED if finished else JobStatus.FAILED
        job.return_value = self.result.get("value") if finished else RunFailed(self.error, where=f"job {self.number}")
        return job

    @property
    def _result_file(self) -> Path:
        return self.folder / "result.json"

    def _signal(self, number: int) -> None:
        """Send a signal to the job and to all processes that it started."""
        assert self.process is not None
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return

    def _read(self) -> None:
        """Record the result of a process that has ended."""
        assert self.process is not None
        self.seconds = time.monotonic() - self.started
        code = self.process.returncode
        content = read_json(self._result_file)[0]
        self.result = content if isinstance(content, dict) else {}
        self.status = "finished" if code == 0 else "stopped" if code == processes.INTERRUPTED else "failed"
        run = self.result.get("run")
        if run and Path(run).is_dir():
            link = self.folder / "run"
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(Path(run).resolve(), self.folder.resolve()))


class Interruption:
    """Context manager: record SIGINT and SIGTERM instead of raising.

    Attributes:
        signal: Number of the first signal; 0 if there was none.
        count: Number of signals so far.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.count = 0
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal, self.count = self.signal or number, self.count + 1

    def __enter__(self) -> "Interruption":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def stop(jobs: Sequence[Job], interruption: Interruption, grace_s: float) -> None:
    """Signal running jobs to save a checkpoint; kill them after the grace period or at another signal."""
    signals = interruption.count
    for job in jobs:
        job._signal(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while any(job.process and job.process.poll() is None for job in jobs):
        if time.monotonic() > deadline or interruption.count > signals:
            for job in jobs:
                assert job.process is not None
                job._signal(signal.SIGKILL)
                job.process.wait()
        time.sleep(0.05)
    for job in jobs:
        job._read()
        if job.status == "failed":
            job.status = "stopped"


def program() -> list[str]:
    """Return the command that starts this program again."""
    script = Path(sys.argv[0])
    return [sys.executable, str(script)] if script.name == "rlhf" else [sys.executable, "-m", "rlhf.cli"]


def environment(n_jobs: int, slot: int, gpus: int | None) -> dict[str, str]:
    """Return the environment variables of a job's process.

    Args:
        n_jobs: Jobs that run at a time.
        slot: Which of them this one is, from 0.
        gpus: GPUs that it sees, those of its slot; None: all.
    """
    variables = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    variables |= processes.environment()
    if n_jobs > 1:
        # Parallel jobs that each use every core are slower than sequential ones.
        variables.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_jobs)))
    if gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(str(slot * gpus + i) for i in range(gpus))
    return variables


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
