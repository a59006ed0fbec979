"""Manifest of a folder: size and SHA-256 of each of its files, written when they are complete.

A folder whose files do not match its manifest is torn or was changed. Comparing sizes costs a look at each file;
comparing hashes reads them all. Standard library only.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf.files import read_json, write_json

FILE = "manifest.json"


def write(folder: Path, files: Iterable[Path], add: bool = False) -> None:
    """Write the manifest of some files of a folder, each of which is flushed to the disk first.

    Args:
        folder: Folder that the manifest is of, and lies in.
        files: Files in it.
        add: Keep the entries of other files that the manifest has.
    """
    entries = read_json(folder / FILE)[0]["files"] if add else {}
    for path in sorted(files):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        entries[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _digest(path)}
    write_json(folder / FILE, {"files": entries})


def problem(folder: Path, thorough: bool = False) -> str | None:
    """Return what is wrong with the first file that does not match; None if all match. Arguments as `problems`."""
    return next((f"{name} {wrong}" for name, wrong in problems(folder, thorough).items()), None)


def problems(folder: Path, thorough: bool = False) -> dict[str, str]:
    """Return what is wrong with the files that do not match the manifest, by name; empty if all match.

    Args:
        folder: Folder with a manifest.
        thorough: Compare hashes and not sizes alone.
    """
    content, reason = read_json(folder / FILE)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        return {FILE: reason or "holds no list of files"}
    found = {name: _problem(folder, name, entry, thorough) for name, entry in files.items()}
    return {name: wrong for name, wrong in found.items() if wrong is not None}


def _problem(folder: Path, name: str, entry: Any, thorough: bool) -> str | None:
    path = folder / name
    if not isinstance(entry, dict) or Path(name).is_absolute() or ".." in Path(name).parts:
        return f"is no file that {FILE} can list"
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
