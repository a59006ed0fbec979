"""A run's folder: its status, its files as they are read back, its lock, and its manifest. No torch here.

status.json is written whole and last: a half-written run is never taken for a finished one.
"""

import os
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from rlhf import checkpoint_files, locks, manifest, run_files, yaml_files, yaml_size
from rlhf.config import Plain
from rlhf.errors import UserError, first_line
from rlhf.files import no_file, write_json, write_text

LOCK = ".lock"


@dataclass(frozen=True)
class Run:
    """A run folder. Everything is read from its files when asked for."""

    folder: Path

    @property
    def status_file(self) -> Plain:
        return run_files.read(self.folder / "status.json", run_files.STATUS)[0]

    @property
    def status(self) -> str:
        """Return new, running, killed, stopped (asked to, resumable), failed, damaged or finished.

        Whether it is running is known by its lock, which ends with the process that holds it, on whatever host. A
        finished run whose files do not match its manifest is damaged.
        """
        status = self.last_status
        if status == "killed" and self.is_locked():
            return "running"
        return status

    @property
    def last_status(self) -> str:
        """Return the status for the one that holds the lock: what an earlier process left, running being killed."""
        status = str(self.status_file.get("status", "new"))
        if status == "running":
            return "killed"
        return "damaged" if status == "finished" and self.damage() else status

    def damage(self, thorough: bool = False) -> dict[str, str]:
        """Return what is wrong with the results of a finished run, by file; empty for one without a manifest.

        Args:
            thorough: Compare hashes and not sizes alone.
        """
        if not (self.folder / manifest.FILE).exists():  # as runs of older versions
            return {}
        return manifest.problems(self.folder, thorough)

    def is_locked(self) -> bool:
        """Whether a process holds the lock of the run."""
        held = locks.is_locked(self.folder / LOCK)
        return _alive(self.status_file) if held is None else held

    def lock(self, wait: Callable[[], None] | None = None) -> AbstractContextManager[None]:
        """Hold the lock of the run, which says that this process computes or removes it; arguments as `locks.lock`."""
        return locks.lock(self.folder / LOCK, wait)

    @property
    def finished(self) -> bool:
        """Whether it is finished and its results are there."""
        return self.status == "finished"

    @property
    def summary(self) -> Plain:
        return run_files.read(self.folder / "summary.json", run_files.SUMMARY)[0]

    @property
    def metrics(self) -> dict[str, float]:
        """Final metrics; empty for a run that is not finished."""
        return dict(self.summary.get("metrics", {}))

    @property
    def lineage(self) -> Plain:
        return run_files.read(self.folder / "lineage.json", run_files.LINEAGE)[0]

    @property
    def evaluations(self) -> list[Plain]:
        """What `rlhf.evaluation.compare` left in the run folder, oldest first."""
        found = (run_files.read(file, run_files.EVALUATION)[0] for file in self._evaluation_files())
        return [content for content in found if content]

    def _evaluation_files(self) -> list[Path]:
        return sorted(self.folder.glob("evaluation-*.json"), key=lambda file: file.stat().st_mtime)

    @property
    def stage(self) -> str:
        return self.folder.parent.name

    @property
    def fingerprint(self) -> str:
        """The name of what it computes; the folder's where no file of the run has one that begins so."""
        for name in (self.status_file.get("fingerprint"), self.lineage.get("fingerprint")):
            if name and name.startswith(self.folder.name):
                return str(name)
        return self.folder.name

    @property
    def plain_config(self) -> Plain:
        """The resolved config, as it was run; empty where it cannot be read."""
        return self._config()[0]

    def _config(self) -> tuple[Plain, list[str]]:
        path = self.folder / "config.yaml"
        try:
            stat = path.stat()
        except OSError:
            return {}, []
        if reason := no_file(path):
            return {}, [f"{path}: {reason}"]
        content, problems = _load_config(path, stat.st_size, stat.st_mtime_ns)
        return _copy(content), list(problems)

    def problems(self, *names: str) -> list[str]:
        """Return a line for whatever cannot be read in its files, those of `names` or all."""
        found: list[str] = []
        for name, fields in (
            ("status.json", run_files.STATUS),
            ("summary.json", run_files.SUMMARY),
            ("lineage.json", run_files.LINEAGE),
        ):
            if not names or name in names:
                found += run_files.read(self.folder / name, fields)[1]
        if not names or "config.yaml" in names:
            found += self._config()[1]
        if not names or "evaluations" in names:
            for file in self._evaluation_files():
                found += run_files.read(file, run_files.EVALUATION)[1]
        return found

    @property
    def checkpoints(self) -> list[Path]:
        return checkpoint_files.found(self.folder)

    def write_status(self, status: str, **fields: Any) -> None:
        content = self.status_file if status != "running" else {}
        content |= {"status": status, "stage": self.stage, "fingerprint": self.fingerprint, **fields}
        write_json(self.folder / "status.json", content)

    def begin(self, config: Plain, lineage: Plain, command: str) -> None:
        """Marks the run as running in this process and writes what it is."""
        attempt = self.status_file.get("attempt", 0) + 1
        self.folder.mkdir(parents=True, exist_ok=True)
        self.describe(config, lineage)
        self.write_status(
            "running",
            pid=os.getpid(),
            host=socket.gethostname(),
            started=now(),
            attempt=attempt,
            command=command,
        )

    def describe(self, config: Plain, lineage: Plain) -> None:
        """Write what the run is: its config and where it comes from."""
        write_text(self.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
        write_json(self.folder / "lineage.json", lineage)

    def write_manifest(self) -> None:
        """Write sizes and hashes of what the run made: what others read, and what it says of itself."""
        kinds = ("config.yaml", "lineage.json", "summary.json", "*.jsonl", "*.npy", "model/**/*")
        files = [path for kind in kinds for path in self.folder.glob(kind) if path.is_file()]
        manifest.write(self.folder, [path for path in files if not path.name.startswith(".")])

    def clear(self) -> None:
        """Removes what an earlier attempt left, except the lock that this process holds, and records.

        Stages write their records (``*.jsonl``) whole, or line by line to go on from them: what has been sampled for
        an hour is not thrown away because there is no checkpoint yet.
        """
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name not in (LOCK, "status.json") and path.suffix != ".jsonl":
                remove(path)


@lru_cache(maxsize=4096)  # a report asks for the same config many times
def _load_config(path: Path, size: int, changed_ns: int) -> tuple[Plain, list[str]]:
    try:
        yaml_size.check(path)
        content = yaml_files.load(path)
    except UserError as error:
        return {}, [str(error)]
    except (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        return {}, [f"{path}: {first_line(error)}"]
    return run_files.good(path, content, run_files.CONFIG)


def _copy(node: Any) -> Any:
    """Return a copy of plain values that shares no dict or list with them; `deepcopy` takes ten times as long."""
    if isinstance(node, dict):
        return {key: _copy(value) for key, value in node.items()}
    return [_copy(value) for value in node] if isinstance(node, list) else node


def remove(path: Path) -> None:
    """Removes a file, link or folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _alive(status: Plain) -> bool:
    """Whether the process that a status names is there, for where locks do not tell."""
    if status.get("host") != socket.gethostname():
        return True  # another machine's process cannot be looked at
    try:
        os.kill(status.get("pid", -1), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
