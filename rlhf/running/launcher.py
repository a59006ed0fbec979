"""Launcher of sweeps (`-m`): every job is a separate process in Hydra's RUN mode.

A crashed job therefore harms no other, and a job may itself start several processes (DDP). A job that finished before
is recognised by its fingerprint, so the same sweep typed again resumes where it stopped. The only third-party
imports are Hydra and OmegaConf.
"""

import csv
import hashlib
import importlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from rlhf import discovery
from rlhf.errors import UserError
from rlhf.running import processes
from rlhf.running.job import STOPPED, Job
from rlhf.storage.files import read_json
from rlhf.storage.metrics_file import distinct_names

RESULT = "RLHF_RESULT"  # environment variable: file to which a job writes its result
# Hydra rejects launchers whose target is outside the namespace hydra_plugins.
NAMESPACE = "hydra_plugins.rlhf"


@dataclass
class Settings:
    """Options of hydra/launcher=rlhf, config keys hydra.launcher.*."""

    _target_: str = f"{NAMESPACE}.RlhfLauncher"
    n_jobs: int = 1  # jobs at a time
    retries: int = 0  # times a failed job is started again; it resumes from its last checkpoint
    timeout_s: float | None = None  # seconds a job may take, null: any
    grace_s: float = 60.0  # seconds a job gets to save a checkpoint when it is stopped
    gpus_per_job: int | None = None  # GPUs visible to each job, assigned by slot; null: all jobs see all


class RlhfLauncher(Launcher):
    """Launcher with bounded local parallelism over processes."""

    def __init__(
        self, n_jobs: int, retries: int, timeout_s: float | None, grace_s: float, gpus_per_job: int | None
    ) -> None:
        self.n_jobs, self.retries, self.timeout_s, self.grace_s = n_jobs, retries, timeout_s, grace_s
        self.gpus_per_job = gpus_per_job
        self.jobs: list[Job] = []  # of all calls: an optimising sweeper launches in rounds
        for name, value, least in (("n_jobs", n_jobs, 1), ("retries", retries, 0), ("gpus_per_job", gpus_per_job, 1)):
            if value is not None and value < least:
                fix = f"type hydra.launcher.{name}={least}"
                raise UserError(f"must be at least {least}", fix, f"hydra.launcher.{name}", value)
        for name, seconds in (("timeout_s", timeout_s), ("grace_s", grace_s)):
            if seconds is not None and not 0 < seconds < math.inf:
                fix = f"type hydra.launcher.{name}=60"
                raise UserError("must be a number of seconds above 0", fix, f"hydra.launcher.{name}", seconds)
        self.folder = Path()
        self.config: DictConfig | None = None
        self.context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store the sweep's config; Hydra calls this once, before the sweep is composed."""
        self.config, self.context = config, hydra_context
        self.folder = Path(str(config.hydra.sweep.dir))
        _current[:] = [self]

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs, at most ``n_jobs`` at a time; a failed one is recorded and the others continue.

        Raises:
            UserError: before the first job, if ``prepare`` finds a config that cannot be run.
            SystemExit: 130 or 143, when interrupted; the running jobs were signalled to save a checkpoint.
        """
        assert self.config is not None and self.context is not None
        setup_globals()
        if prepare is not None:
            load = self.context.config_loader.load_sweep_config
            prepare([(list(words), partial(load, self.config, list(words))) for words in job_overrides])
        jobs = [self._job(initial_job_idx + i, list(words)) for i, words in enumerate(job_overrides)]
        self.jobs += jobs
        waiting, running = list(jobs), list[Job]()
        stop = _Stop()
        _say(f"{len(jobs)} jobs, {min(self.n_jobs, len(jobs))} at a time, in {self.folder}")
        try:
            with stop:
                while (waiting or running) and not stop.signal:
                    while waiting and len(running) < self.n_jobs:
                        running.append(self._start(waiting.pop(0), running))
                    for job in [job for job in running if self._ended(job)]:
                        running.remove(job)
                        if job.status not in ("finished", "stopped") and job.attempts <= self.retries:
                            _say(f"{self._label(job)} {job.status}, starts again: {job.error}")
                            waiting.append(job)
                        else:
                            self._tell(job)
                        self.write()
                    time.sleep(0.05)
                if stop.signal:
                    self._stop(running, stop)
        finally:
            for job in running:
                if job.process and job.process.poll() is None:
                    _signal(job.process, signal.SIGKILL)
            self.write()
        if stop.signal:
            left = sum(job.status != "finished" for job in jobs)
            _say(f"interrupted: {left} of {len(jobs)} jobs not finished; type the same command again to continue")
            raise SystemExit(128 + stop.signal)
        self._summary(jobs)
        return [job.returned() for job in jobs]

    # -- one job ----------------------------------------------------------------------------------------------------

    def _job(self, number: int, overrides: list[str]) -> Job:
        key = hashlib.sha256(json.dumps(sorted(filter_overrides(overrides))).encode()).hexdigest()[:6]
        # With an optimising sweeper the same number has other values the next time: hence the key.
        earlier = sorted(self.folder.glob(f"*_{key}"))
        return Job(number, overrides, earlier[0] if earlier else self.folder / f"{number:03d}_{key}")

    def _start(self, job: Job, running: list[Job]) -> Job:
        taken = {other.slot for other in running}
        job.slot = next(i for i in range(self.n_jobs) if i not in taken)
        job.folder.mkdir(parents=True, exist_ok=True)
        result = job.folder / "result.json"
        result.unlink(missing_ok=True)
        job.attempts, job.started, job.status, job.result = job.attempts + 1, time.monotonic(), "running", {}
        words = self._command(job)
        with job.console.open("a", encoding="utf-8") as console:
            console.write(f"$ {shlex.join(words)}\n")
            console.flush()
            # A new session: Ctrl-C reaches the job only through us, once, together with all processes that it started.
            job.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env=self._environment(job, result),
                start_new_session=True,
            )
        _say(f"{self._label(job)} started")
        return job

    def _command(self, job: Job) -> list[str]:
        assert self.config is not None
        typed, _ = get_args_parser().parse_known_args(sys.argv[1:])
        words = _program()
        for flag, value in (("--config-dir", typed.config_dir), ("--config-name", typed.config_name)):
            words += [flag, value] if value else []
        own = OmegaConf.to_container(self.config.hydra.overrides.hydra)
        assert isinstance(own, list)
        words += [str(o) for o in own if str(o).lstrip("+").startswith(("hydra.searchpath", "hydra.job."))]
        return [*words, *job.overrides, "hydra.mode=RUN"]

    def _environment(self, job: Job, result: Path) -> dict[str, str]:
        environment = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
        environment[RESULT] = str(result.absolute())
        environment |= processes.environment()
        if self.n_jobs > 1:
            # Parallel jobs that each use every core are slower than sequential ones.
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.n_jobs)))
        if self.gpus_per_job:
            first = job.slot * self.gpus_per_job
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(first + i) for i in range(self.gpus_per_job))
        return environment

    def _ended(self, job: Job) -> bool:
        assert job.process is not None
        code = job.process.poll()
        late = code is None and self.timeout_s is not None and time.monotonic() - job.started > self.timeout_s
        if late:
            _signal(job.process, signal.SIGTERM)
            try:
                job.process.wait(self.grace_s)
            except subprocess.TimeoutExpired:
                _signal(job.process, signal.SIGKILL)
                job.process.wait()
        elif code is None:
            return False
        self._read(job)
        if late and job.status != "finished":
            job.status = "timeout"
        return True

    def _read(self, job: Job) -> None:
        """Record the result of a process that has ended."""
        assert job.process is not None
        job.seconds = time.monotonic() - job.started
        code = job.process.returncode
        result = job.folder / "result.json"
        content = read_json(result)[0]
        job.result = content if isinstance(content, dict) else {}
        job.status = "finished" if code == 0 else "stopped" if code == STOPPED else "failed"
        run = job.result.get("run")
        if run and Path(run).is_dir():
            link = job.folder / "run"
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(Path(run).resolve(), job.folder.resolve()))

    def _stop(self, running: list[Job], stop: "_Stop") -> None:
        """Signal the running jobs to save a checkpoint; kill them after the grace period or at a second signal."""
        asked = stop.count
        _say(f"stopping {len(running)} running jobs, each saves a checkpoint (again: kill them)")
        for job in running:
            assert job.process is not None
            _signal(job.process, signal.SIGTERM)
        deadline = time.monotonic() + self.grace_s
        while any(job.process and job.process.poll() is None for job in running):
            if time.monotonic() > deadline or stop.count > asked:
                for job in running:
                    assert job.process is not None
                    _signal(job.process, signal.SIGKILL)
                    job.process.wait()
            time.sleep(0.05)
        for job in running:
            self._read(job)
            if job.status == "failed":
                job.status = "stopped"

    # -- output ------------------------------------------------------------------------------------------------------

    def _varied(self) -> list[str]:
        """Return the keys whose values differ between the jobs; all keys if none does."""
        table = [_pairs(job.overrides) for job in self.jobs]
        keys = list(dict.fromkeys(key for row in table for key in row))
        return [key for key in keys if len({row.get(key) for row in table}) > 1] or keys

    def _label(self, job: Job) -> str:
        pairs = _pairs(job.overrides)
        varied = " ".join(f"{key}={pairs[key]}" for key in self._varied() if key in pairs)
        width = len(str(self.jobs[-1].number))
        return f"[{job.number:>{width}}] {varied}"

    def _tell(self, job: Job) -> None:
        value = job.result.get("value")
        told = {
            "finished": f"finished{'' if value is None else f', {value:.4g}'}, {job.result.get('run') or job.folder}",
            "stopped": f"stopped, can be resumed; see {job.console}",
        }.get(job.status, f"FAILED: {job.error}")
        _say(f"{self._label(job)} {told} ({job.seconds:.0f} s)")

    def _summary(self, jobs: list[Job]) -> None:
        failed = [job for job in jobs if job.status != "finished"]
        _say(f"{len(jobs) - len(failed)} of {len(jobs)} jobs finished; results in {self.folder / 'results.csv'}")
        for job in failed:
            _say(f"  {self._label(job)} {job.status}; {job.console}")

    def write(self) -> None:
        """Write results.csv: one row per job, with the values that differ, the status and the final metrics."""
        varied = self._varied()
        metrics = list(dict.fromkeys(name for job in self.jobs for name in job.result.get("metrics") or {}))
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / ".results.csv"
        with scratch.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            own = ["job", *varied, "status", "value", "seconds", "run", "error"]
            named = distinct_names(own, metrics)[
                len(own) :
            ]  # a metric may be named value, too (the loss of a value head)
            writer.writerow([*own[:-3], *named, *own[-3:]])
            for job in self.jobs:
                pairs, found = _pairs(job.overrides), job.result.get("metrics") or {}
                writer.writerow(
                    [
                        job.folder.name,
                        *(pairs.get(key, "") for key in varied),
                        job.status,
                        job.result.get("value"),
                        *(found.get(name) for name in metrics),
                        round(job.seconds, 1),
                        job.result.get("run"),
                        job.error if job.status in ("failed", "timeout") else "",
                    ]
                )
        scratch.replace(self.folder / "results.csv")


#: called before the first job starts, with (overrides, function that composes the config) of every job
prepare: Callable[[Sequence[tuple[list[str], Callable[[], DictConfig]]]], None] | None = None

_current: list[RlhfLauncher] = []  # the launcher of this process's sweep, if any


def finish() -> None:
    """End this process's sweep, if there was one.

    Its runs are compared: a table on the terminal, and report.html. A sweep without any job, because of a mistake in
    the command, leaves no files.
    """
    for launcher in _current:
        if any(job.result.get("run") for job in launcher.jobs):
            subprocess.run([*_program(), "report", str(launcher.folder)], check=False)
        elif not launcher.jobs:
            (launcher.folder / "multirun.yaml").unlink(missing_ok=True)
            with suppress(OSError):  # not empty, or missing
                for folder in (launcher.folder, *launcher.folder.parents[:2]):
                    folder.rmdir()
    _current.clear()


def _program() -> list[str]:
    """Return the command that starts this program again."""
    script = Path(sys.argv[0])
    return [sys.executable, str(script)] if script.name == "rlhf" else [sys.executable, "-m", "rlhf.cli"]


class _Stop:
    """Context manager: record SIGINT and SIGTERM instead of raising."""

    def __init__(self) -> None:
        self.signal = 0
        self.count = 0
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal, self.count = self.signal or number, self.count + 1

    def __enter__(self) -> "_Stop":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to the job and to all processes that it started."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def _pairs(overrides: Sequence[str]) -> dict[str, str]:
    return {key.lstrip("+~"): value for key, _, value in (word.partition("=") for word in filter_overrides(overrides))}


def _say(line: str) -> None:
    print(line, flush=True)


def sweep_name(*, _root_: DictConfig) -> str:
    """Return the name of a sweep's directory: the stage, pipeline or experiment, and a key of all overrides."""
    choices = _root_.hydra.runtime.choices
    words = list(filter_overrides(_root_.hydra.overrides.task))
    typed = {k: v for k, v in _pairs(words).items() if k in ("stage", "pipeline", "experiment", "sweep")}
    named = typed.get("experiment") or typed.get("pipeline") or typed.get("stage") or choices.get("stage") or "sweep"
    swept = sorted([*words, f"sweep={choices.get('sweep')}"])
    key = hashlib.sha256(json.dumps(swept).encode()).hexdigest()[:6]
    return f"{str(named).replace(',', '-').replace('/', '-')}-{key}"


def register() -> None:
    """Register the plugins and hydra/launcher=rlhf with Hydra, so that a command's config can be composed.

    May be called any number of times.

    Raises:
        UserError: two providers offer the same option, or a YAML file of theirs is too large.
    """
    discovery.register()
    # Every Hydra program of the environment would load a package hydra_plugins.rlhf; only ours sees an alias.
    RlhfLauncher.__module__ = NAMESPACE
    try:
        importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:
        sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
    sys.modules[NAMESPACE] = sys.modules[__name__]
    ConfigStore.instance().store(group="hydra/launcher", name="rlhf", node=Settings, provider="rlhf")
    Plugins.instance().register(RlhfLauncher)
    OmegaConf.register_new_resolver("sweep_name", sweep_name, replace=True)
