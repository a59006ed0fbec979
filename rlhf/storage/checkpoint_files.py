"""Checkpoint files of a run directory: names and integrity. No torch here.

A checkpoint is a zip file in torch's format, which holds a CRC-32 of each of its records and ends with their list; or,
for strategies that shard, a directory with a manifest. So a truncated or modified file is detected.
"""

import shlex
import shutil
import zipfile
import zlib
from functools import cache
from pathlib import Path

from rlhf.errors import UserError
from rlhf.storage import manifest


def place(folder: Path, batches: int) -> Path:
    """Return the path of a run's checkpoint after ``batches`` batches."""
    return Path(folder) / "checkpoints" / f"step={batches:08d}.ckpt"


def found(folder: Path) -> list[Path]:
    """Return the checkpoints of a run directory, whole or not, oldest first."""
    paths = (Path(folder) / "checkpoints").glob("step=*.ckpt")
    return sorted((path for path in paths if _number(path) is not None), key=lambda path: _number(path) or 0)


def _number(path: Path) -> int | None:
    digits = path.stem.removeprefix("step=")
    return int(digits) if digits.isascii() and digits.isdigit() else None


def problem(path: Path) -> str | None:
    """Return the defect of a checkpoint, or None if it is whole."""
    try:
        if path.is_dir():
            return manifest.problem(path, thorough=True)
        stat = path.stat()
        return _zip_problem(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        return error.strerror or type(error).__name__


@cache  # a process checks twice: before it resumes, and when it loads
def _zip_problem(path: Path, size: int, changed_ns: int) -> str | None:
    if size == 0:
        return "is empty"
    try:
        with zipfile.ZipFile(path) as file:
            record = file.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        return f"is cut off or is not a checkpoint ({error})"
    return None if record is None else f"its record {record} is damaged"


def newest_whole(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest whole checkpoint of a run directory, or None, and the defect of each newer one by path.

    Raises:
        UserError: If there are checkpoints and none is whole.
    """
    torn: dict[Path, str] = {}
    for path in reversed(found(folder)):
        wrong = problem(path)
        if wrong is None:
            return path, torn
        torn[path] = wrong
    if torn:
        newest, command = next(iter(torn)), shlex.join(["rlhf", "runs", "rm", str(folder)])
        raise UserError(
            f"{newest}: {torn[newest]}, and no other checkpoint of this run is whole",
            fix=f"type `{command}` and then the same command again to compute it from the start",
        )
    return None, torn


def remove(path: Path) -> None:
    """Remove a checkpoint, whether file or directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
