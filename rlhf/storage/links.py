"""Links that lead out of a directory, so that no export or report reads a file outside its run. No torch here."""

import os
from pathlib import Path


def leads_out(path: Path, root: Path) -> bool:
    """Return whether a path, with links resolved, is outside a directory."""
    return not path.resolve().is_relative_to(root.resolve())


def first_outside(folder: Path, root: Path) -> Path | None:
    """Return the first file directly inside a directory that is outside ``root`` once links are resolved, or None."""
    if not folder.is_dir():
        return None
    if folder == root or not leads_out(folder, root):  # then only links can lead out
        found = [Path(entry.path) for entry in os.scandir(folder) if entry.is_symlink()]
    else:
        found = list(folder.iterdir())
    return next((file for file in sorted(found) if file.is_file() and leads_out(file, root)), None)
