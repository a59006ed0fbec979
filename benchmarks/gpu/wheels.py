"""Wheels that the environment lacks: ``python -m benchmarks.gpu.wheels DIRECTORY`` prints their paths.

It needs no package but the standard library, as it runs before anything is installed.
"""

import sys
from importlib import metadata
from pathlib import Path


def missing(folder: Path) -> list[Path]:
    """Return the wheels of a directory whose packages are not installed."""
    return [path for path in sorted(folder.glob("*.whl")) if not is_installed(path.name.split("-")[0])]


def is_installed(name: str) -> bool:
    """Return whether a package is installed, in any version."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    print(*missing(Path(sys.argv[1])), sep="\n")
