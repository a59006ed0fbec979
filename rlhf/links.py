"""Links that lead out of a directory: nothing outside a run is read into an export or a report. No torch here."""

import os
from pathlib import Path


def leads_out(path: Path, root: Path) -> bool:
    """Return whether a path lies outside a directory once links are followed."""
    return not path.resolve().is_relative_to(root.resolve())


def first_out(folder: Path, root: Path) -> Path | None:
    """Return the first file right inside a directory that is outside ``root`` once links are followed, or None."""
    if not folder.is_dir():
        return None
    if folder == root or not leads_out(folder, root):  # then only links can
        found = [Path(entry.path) for entry in os.scandir(folder) if entry.is_symlink()]
    else:
        found = list(folder.iterdir())
    return next((file for file in sorted(found) if file.is_file() and leads_out(file, root)), None)
