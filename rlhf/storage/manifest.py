"""Manifest of a directory: size and SHA-256 of each of its files, written when they are complete.

A directory whose files do not match its manifest is incomplete or was modified. Comparing sizes costs one stat call per
file; comparing hashes reads all files. Standard library only.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf.storage.files import read_json, write_json

FILE = "manifest.json"


def write(folder: Path, files: Iterable[Path], add: bool = False) -> None:
    """Write the manifest of some files of a directory, after flushing each of them to the disk.

    Args:
        folder: Directory that the manifest describes and is written to.
        files: Files in it.
        add: Whether to keep the manifest's entries of other files.
    """
    entries = read_json(folder / FILE)[0]["files"] if add else {}
    for path in sorted(files):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        entries[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _digest(path)}
    write_json(folder / FILE, {"files": entries})


def problem(folder: Path, thorough: bool = False) -> str | None:
    """Return the defect of the first file that does not match, with its name; None if all match.

    Args:
        folder: Directory with a manifest.
        thorough: Whether to compare hashes, not only sizes.
    """
    return next((f"{name} {wrong}" for name, wrong in problems(folder, thorough).items()), None)


def problems(folder: Path, thorough: bool = False) -> dict[str, str]:
    """Return name -> defect of each file that does not match the manifest; empty if all match.

    Args:
        folder: Directory with a manifest.
        thorough: Whether to compare hashes, not only sizes.
    """
    content, reason = read_json(folder / FILE)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        return {FILE: reason or "has no list of files"}
    found = {name: _problem(folder, name, entry, thorough) for name, entry in files.items()}
    return {name: wrong for name, wrong in found.items() if wrong is not None}


def _problem(folder: Path, name: str, entry: Any, thorough: bool) -> str | None:
    path = folder / name
    if not isinstance(entry, dict) or Path(name).is_absolute() or ".." in Path(name).parts:
        return f"is not a file that {FILE} can list"
    try:
        size = path.stat().st_size
        if size != entry.get("size"):
            return f"has {size} bytes, {entry.get('size')} when it was written"
        if thorough and _digest(path) != entry.get("sha256"):
            return "has other content than when it was written"
    except OSError as error:
        return f"cannot be read ({error.strerror or type(error).__name__})"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
