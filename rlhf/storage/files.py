"""Atomic writes and tolerant reads of small files. Standard library only."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: the file exists as a whole or not at all."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a temporary file in the same directory, flush it to the disk and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Flush the names in a directory to the disk, so that a rename survives a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def no_file(path: Path) -> str | None:
    """Return the reason if a path is a pipe or a device, whose reading may never end; else None."""
    kinds = (path.is_fifo, path.is_char_device, path.is_block_device)
    return "is a named pipe or a device, not a file" if any(kind() for kind in kinds) else None


def read_json(path: Path) -> tuple[Any, str | None]:
    """Return (content, None) for a JSON file, or (None, reason) if it cannot be read."""
    try:
        if reason := no_file(path):
            return None, reason
        return json.loads(path.read_bytes().decode("utf-8")), None
    except OSError as error:
        return None, error.strerror or type(error).__name__
    except RecursionError:
        return None, "is nested too deeply"
    except ValueError as error:
        return None, f"is not JSON in UTF-8 ({error})"
