"""Links that lead out of a directory: nothing outside a run is read into an export or a report. No torch here."""

from pathlib import Path


def leads_out(path: Path, root: Path) -> bool:
    """Return whether a path lies outside a directory once links are followed."""
    return not path.resolve().is_relative_to(root.resolve())


def first_out(folder: Path, root: Path) -> Path | None:
    """Return the first file right inside a directory that is outside ``root`` once links are followed, or None."""
    if not folder.is_dir():
        return None
    return next((file for file in sorted(folder.iterdir()) if file.is_file() and leads_out(file, root)), None)
