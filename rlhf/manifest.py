"""Manifest of a folder: size and SHA-256 of each of its files, written when they are complete.

A folder whose files do not match its manifest is torn or was changed. Comparing sizes costs a look at each file;
comparing hashes reads them all. Standard library only.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from rlhf.files import read_json, write_json

FILE = "manifest.json"


def write(folder: Path, files: Iterable[Path]) -> None:
    """Write the manifest of some files of a folder, each of which is flushed to the disk first."""
    entries = {}
    for path in sorted(files):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
    write_json(folder / FILE, {"files": entries})


def problem(folder: Path, thorough: bool = False) -> str | None:
    """Return how the first file that does not match the manifest differs from it; None if all match.

    Args:
        folder: Folder with a manifest.
        thorough: Compare hashes and not sizes alone.
    """
    content, reason = read_json(folder / FILE)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        return f"{FILE}: {reason or 'holds no list of files'}"
    for name, entry in files.items():
        path = folder / name
        if not isinstance(entry, dict) or not path.resolve().is_relative_to(folder.resolve()):
            return f"{FILE}: the entry {name} is none of a file in this folder"
        try:
            size = path.stat().st_size
            if size != entry.get("size"):
                return f"{name} has {size} bytes, {entry.get('size')} when it was written"
            if thorough and _digest(path) != entry.get("sha256"):
                return f"{name} has other content than when it was written"
        except OSError as error:
            return f"{name}: {error.strerror or type(error).__name__}"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
