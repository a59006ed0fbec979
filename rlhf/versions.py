"""Installed versions against the tested range, which is the one that pyproject.toml gives. No torch."""

from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version


def untested() -> str | None:
    """Return one line that names the libraries outside the tested range; None if there are none.

    Only requirements with an upper bound count: those are the libraries whose internals this project touches. pip keeps
    to the range by itself; what was installed later, or by other means, may lie outside.
    """
    try:
        requirements = [Requirement(line) for line in metadata.requires("rlhf") or ()]
    except metadata.PackageNotFoundError:  # run from its sources, not installed
        return None
    outside = [
        f"{one.name} {found} (tested: {_range(one)})"
        for one in requirements
        if one.marker is None and any(part.operator in ("<", "==") for part in one.specifier)
        if (found := _version(one.name)) is not None
        # Without the local label: 2.13.0+cpu is 2.13.0. Of a release to come, the range says nothing.
        if not one.specifier.contains(Version(found).public, prereleases=True)
    ]
    if not outside:
        return None
    return f"warning: not tested with {', '.join(outside)}; for the tested versions type pip install --upgrade rlhf"


def _range(requirement: Requirement) -> str:
    return ",".join(str(part) for part in sorted(requirement.specifier, key=lambda part: Version(part.version)))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
