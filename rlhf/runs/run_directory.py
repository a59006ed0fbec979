"""Run directory: status, files as they are read back, lock and manifest. No torch here.

status.json is written atomically and last, so a half-written run is never mistaken for a finished one.
"""

import os
import re
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

from rlhf.errors import RLHFError, UserError, first_line
from rlhf.runs import run_files
from rlhf.storage import checkpoint_files, locks, manifest, yaml_files, yaml_size
from rlhf.storage.files import no_file, write_json, write_text
from rlhf.storage.plain import Plain

LOCK = ".lock"


@dataclass(frozen=True)
class Run:
    """Run directory. Every property is read from its files on access."""

    folder: Path

    @property
    def status_file(self) -> Plain:
        """Valid fields of status.json; empty if it cannot be read."""
        return run_files.read(self.folder / "status.json", run_files.STATUS)[0]

    @property
    def status(self) -> str:
        """Status: new, running, killed, stopped (on request, resumable), failed, damaged or finished.

        The run is running if its lock is held; the lock ends with the process that holds it, on any host. A finished
        run whose files do not match its manifest is damaged.
        """
        status = self.last_status
        if status == "killed" and self.is_locked():
            return "running"
        return status

    @property
    def last_status(self) -> str:
        """Status for the holder of the lock: as an earlier process left it, where running means killed."""
        status = str(self.status_file.get("status", "new"))
        if status == "running":
            return "killed"
        return "damaged" if status == "finished" and self.damage() else status

    def damage(self, thorough: bool = False) -> dict[str, str]:
        """Return file -> defect of the results of a finished run; empty for a run without a manifest.

        Args:
            thorough: Whether to compare hashes, not only sizes.
        """
        if not (self.folder / manifest.FILE).exists():  # runs of older versions have none
            return {}
        return manifest.problems(self.folder, thorough)

    def is_locked(self) -> bool:
        """Return whether a process holds the lock of the run."""
        held = locks.is_locked(self.folder / LOCK)
        return _alive(self.status_file) if held is None else held

    def lock(self, wait: Callable[[], None] | None = None) -> AbstractContextManager[None]:
        """Hold the lock of the run, which marks that this process computes or removes it.

        Args:
            wait: As in `locks.lock`.
        """
        return locks.lock(self.folder / LOCK, wait)

    @property
    def finished(self) -> bool:
        """Return whether the run is finished and its results match its manifest."""
        return self.status == "finished"

    @property
    def summary(self) -> Plain:
        """Valid fields of summary.json; empty if it cannot be read."""
        return run_files.read(self.folder / "summary.json", run_files.SUMMARY)[0]

    @property
    def metrics(self) -> dict[str, float]:
        """Final metrics; empty for a run that is not finished."""
        return dict(self.summary.get("metrics", {}))

    @property
    def lineage(self) -> Plain:
        """Valid fields of lineage.json; empty if it cannot be read."""
        return run_files.read(self.folder / "lineage.json", run_files.LINEAGE)[0]

    @property
    def evaluations(self) -> list[Plain]:
        """Results of `rlhf.evaluation.compare.compare` in the run directory, oldest first."""
        found = (run_files.read(file, run_files.EVALUATION)[0] for file in self._evaluation_files())
        return [content for content in found if content]

    def _evaluation_files(self) -> list[Path]:
        return sorted(self.folder.glob("evaluation-*.json"), key=lambda file: file.stat().st_mtime)

    @property
    def stage(self) -> str:
        """Name of the stage, which is the name of the parent directory."""
        return self.folder.parent.name

    @property
    def fingerprint(self) -> str:
        """Fingerprint from the run's files if it begins with the directory's name, else the directory's name."""
        for name in (self.status_file.get("fingerprint"), self.lineage.get("fingerprint")):
            if name and name.startswith(self.folder.name):
                return str(name)
        return self.folder.name

    @property
    def plain_config(self) -> Plain:
        """Resolved config of the run; empty if it cannot be read."""
        return self._config()[0]

    def _config(self) -> tuple[Plain, list[RLHFError]]:
        path = self.folder / "config.yaml"
        try:
            stat = path.stat()
        except OSError:
            return {}, []
        if reason := no_file(path):
            return {}, [UserError(f"{path}: {reason}")]
        content, problems = _load_config(path, stat.st_size, stat.st_mtime_ns)
        return _copy(content), list(problems)

    def problems(self, *names: str) -> list[RLHFError]:
        """Return one error for everything unreadable in the run's files: those in `names`, or all if none is given."""
        found: list[RLHFError] = []
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
        """Checkpoints of the run, whole or not, oldest first."""
        return checkpoint_files.found(self.folder)

    def write_status(self, status: str, **fields: Any) -> None:
        """Write the status and further fields to status.json; other fields are kept, except when the run starts."""
        content = self.status_file if status != "running" else {}
        content |= {"status": status, "stage": self.stage, "fingerprint": self.fingerprint, **fields}
        write_json(self.folder / "status.json", content)

    def begin(self, config: Plain, lineage: Plain, command: str) -> None:
        """Mark the run as running in this process, and write its config and lineage."""
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
        """Write the run's config and lineage."""
        write_text(self.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
        write_json(self.folder / "lineage.json", lineage)

    def write_manifest(self) -> None:
        """Write sizes and hashes of the run's results: model, records, summary, config and lineage."""
        kinds = ("config.yaml", "lineage.json", "summary.json", "*.jsonl", "*.npy", "model/**/*")
        files = [path for kind in kinds for path in self.folder.glob(kind) if path.is_file()]
        manifest.write(self.folder, [path for path in files if not path.name.startswith(".")])

    def clear(self) -> None:
        """Remove the files of an earlier attempt, except the lock that this process holds, the status and the records.

        Stages write their records (``*.jsonl``) atomically, or line by line so that they can continue from them: an
        hour of samples is not discarded because there is no checkpoint yet.
        """
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name not in (LOCK, "status.json") and path.suffix != ".jsonl":
                remove(path)


@lru_cache(maxsize=4096)  # a report reads the same config many times
def _load_config(path: Path, size: int, changed_ns: int) -> tuple[Plain, list[RLHFError]]:
    try:
        yaml_size.check(path)
        content = yaml_files.load(path)
    except UserError as error:
        return {}, [finding.with_traceback(None) for finding in error.findings]
    except (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        return {}, [UserError(f"{path}: {first_line(error)}")]
    return run_files.good(path, content, run_files.CONFIG)


def _copy(node: Any) -> Any:
    """Return a copy of plain values that shares no dict or list with them; `deepcopy` takes ten times as long."""
    if isinstance(node, dict):
        return {key: _copy(value) for key, value in node.items()}
    return [_copy(value) for value in node] if isinstance(node, list) else node


def remove(path: Path) -> None:
    """Remove a file, link or directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def now() -> str:
    """Return the local time as YYYY-MM-DDTHH:MM:SS with the UTC offset."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _alive(status: Plain) -> bool:
    """Return whether the process named in a status may be alive, for file systems without locks."""
    if status.get("host") != socket.gethostname():
        return True  # a process on another host cannot be checked
    try:
        os.kill(status.get("pid", -1), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


LETTERS = 10  # digits of the fingerprint in a run directory's name


def find(outputs: Path) -> list[Run]:
    """Return all runs below an outputs directory, by stage and then by start time."""
    folders = [path.parent for path in outputs.glob("*/*/status.json")]
    found = [Run(folder) for folder in folders if folder.parent.name != "sweeps" and not _hidden(folder)]
    return sorted(found, key=lambda run: (run.stage, str(run.status_file.get("started")), run.folder.name))


def is_run_directory(folder: Path, outputs: Path) -> bool:
    """Return whether a directory is a run's by place and name, ``<outputs>/<stage>/<fingerprint>``, and not a link."""
    named = re.fullmatch(rf"[0-9a-f]{{{LETTERS}}}", folder.name) is not None
    inside = folder.resolve().parent.parent == outputs.resolve() and not folder.parent.name.startswith(".")
    linked = folder.is_symlink() or folder.parent.is_symlink()
    described = any((folder / name).is_file() for name in ("status.json", "config.yaml", "lineage.json"))
    return named and inside and not linked and described


def _hidden(folder: Path) -> bool:
    """Return whether a directory is the remainder of a removed run."""
    return folder.name.startswith(".") or folder.parent.name.startswith(".")


def run_of(path: Path) -> Run | None:
    """Return the run that contains a path, or None."""
    for folder in (path, *list(path.parents)[:3]):
        if (folder / "status.json").exists() and (folder / "config.yaml").exists():
            return Run(folder)
    return None
