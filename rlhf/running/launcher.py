"""Launcher of sweeps (`-m`): every job is a separate process in Hydra's RUN mode.

A crashed job therefore harms no other, and a job may itself start several processes (DDP). A job that finished before
is recognised by its fingerprint, so the same sweep typed again resumes where it stopped. The only third-party
imports are Hydra and OmegaConf.
"""

import hashlib
import importlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from rlhf import discovery
from rlhf.errors import UserError
from rlhf.running.job import Interruption, Job, environment, program, stop
from rlhf.running.sweep_table import SweepTable, assigned

ROOT_CONFIG = "config"  # name of the config that the command composes by default
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
        for name, value, least in (("n_jobs", n_jobs, 1), ("retries", retries, 0), ("gpus_per_job", gpus_per_job, 1)):
            if value is not None and value < least:
                fix = f"type hydra.launcher.{name}={least}"
                raise UserError(f"must be at least {least}", fix, f"hydra.launcher.{name}", value)
        for name, seconds in (("timeout_s", timeout_s), ("grace_s", grace_s)):
            if seconds is not None and not 0 < seconds < math.inf:
                fix = f"type hydra.launcher.{name}=60"
                raise UserError("must be a number of seconds above 0", fix, f"hydra.launcher.{name}", seconds)
        self.table = SweepTable(Path())
        self.config: DictConfig | None = None
        self.context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store the sweep's config; Hydra calls this once, before the sweep is composed."""
        self.config, self.context = config, hydra_context
        self.table.folder = Path(str(config.hydra.sweep.dir))
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
        self.table.jobs += jobs
        waiting, running = list(jobs), list[Job]()
        interruption = Interruption()
        _say(f"{len(jobs)} jobs, {min(self.n_jobs, len(jobs))} at a time, in {self.table.folder}")
        try:
            with interruption:
                while (waiting or running) and not interruption.signal:
                    while waiting and len(running) < self.n_jobs:
                        running.append(self._start(waiting.pop(0), running))
                    for job in [job for job in running if job.ended(self.timeout_s, self.grace_s)]:
                        running.remove(job)
                        if job.status not in ("finished", "stopped") and job.attempts <= self.retries:
                            _say(f"{self.table.label(job)} {job.status}, starts again: {job.error}")
                            waiting.append(job)
                        else:
                            _say(self.table.outcome(job))
                        self.table.write()
                    time.sleep(0.05)
                if interruption.signal:
                    _say(f"stopping {len(running)} running jobs, each saves a checkpoint (again: kill them)")
                    stop(running, interruption, self.grace_s)
        finally:
            for job in running:
                job.kill()
            self.table.write()
        if interruption.signal:
            left = sum(job.status != "finished" for job in jobs)
            _say(f"interrupted: {left} of {len(jobs)} jobs not finished; type the same command again to continue")
            raise SystemExit(128 + interruption.signal)
        _say(self.table.summary(jobs))
        return [job.returned() for job in jobs]

    def _job(self, number: int, overrides: list[str]) -> Job:
        key = hashlib.sha256(json.dumps(sorted(filter_overrides(overrides))).encode()).hexdigest()[:6]
        # With an optimising sweeper the same number has other values the next time: hence the key.
        earlier = sorted(self.table.folder.glob(f"*_{key}"))
        return Job(number, overrides, earlier[0] if earlier else self.table.folder / f"{number:03d}_{key}")

    def _start(self, job: Job, running: list[Job]) -> Job:
        taken = {other.slot for other in running}
        job.slot = next(i for i in range(self.n_jobs) if i not in taken)
        job.start(self._command(job), environment(self.n_jobs, job.slot, self.gpus_per_job))
        _say(f"{self.table.label(job)} started")
        return job

    def _command(self, job: Job) -> list[str]:
        assert self.config is not None
        hydra = self.config.hydra
        words = program()
        for source in hydra.runtime.config_sources:
            words += ["--config-dir", source.path] if source.provider == "command-line" else []
        words += ["--config-name", hydra.job.config_name] if hydra.job.config_name != ROOT_CONFIG else []
        own = OmegaConf.to_container(hydra.overrides.hydra)
        assert isinstance(own, list)
        words += [str(o) for o in own if str(o).lstrip("+").startswith(("hydra.searchpath", "hydra.job."))]
        return [*words, *job.overrides, "hydra.mode=RUN"]


#: called before the first job starts, with (overrides, function that composes the config) of every job
prepare: Callable[[Sequence[tuple[list[str], Callable[[], DictConfig]]]], None] | None = None

_current: list[RlhfLauncher] = []  # the launcher of this process's sweep, if any


def finish() -> None:
    """End this process's sweep, if there was one.

    Its runs are compared: a table on the terminal, and report.html. A sweep without any job, because of a mistake in
    the command, leaves no files.
    """
    for launcher in _current:
        sweep = launcher.table.folder
        if any(job.result.get("run") for job in launcher.table.jobs):
            subprocess.run([*program(), "report", str(sweep)], check=False)
        elif not launcher.table.jobs:
            (sweep / "multirun.yaml").unlink(missing_ok=True)
            with suppress(OSError):  # not empty, or missing
                for folder in (sweep, *sweep.parents[:2]):
                    folder.rmdir()
    _current.clear()


def _say(line: str) -> None:
    print(line, flush=True)


def sweep_name(*, _root_: DictConfig) -> str:
    """Return the name of a sweep's directory: the stage, pipeline or experiment, and a key of all overrides."""
    choices = _root_.hydra.runtime.choices
    words = list(filter_overrides(_root_.hydra.overrides.task))
    typed = {k: v for k, v in assigned(words).items() if k in ("stage", "pipeline", "experiment", "sweep")}
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
    # Hydra imports a launcher by a name in this namespace. Every Hydra program of the environment would load a real
    # package hydra_plugins.rlhf; only ours sees an alias.
    RlhfLauncher.__module__ = NAMESPACE
    try:
        importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:
        sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
    sys.modules[NAMESPACE] = sys.modules[__name__]
    ConfigStore.instance().store(group="hydra/launcher", name="rlhf", node=Settings, provider="rlhf")
    Plugins.instance().register(RlhfLauncher)
    OmegaConf.register_new_resolver("sweep_name", sweep_name, replace=True)
