"""Check of installed library versions: against the tested range, and against those of a finished run. No torch here."""

from collections.abc import Mapping
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

# Libraries whose release can change the numbers of a run. They are recorded and compared, and rename no run: a patch
# release would train everything again, so the user decides.
NUMERIC = ("torch", "transformers", "peft", "bitsandbytes")


def differing(recorded: Mapping[str, str]) -> str:
    """Return a clause that names the numeric libraries whose version a run was not made with; "" without any.

    Args:
        recorded: Library -> version, from the run's summary.json.
    """
    pairs = [(name, recorded[name], _version(name)) for name in NUMERIC if name in recorded]
    changed = [f"{name} {before}, now {after or 'not installed'}" for name, before, after in pairs if before != after]
    return f" (made with {'; '.join(changed)})" if changed else ""


def untested() -> str | None:
    """Return one line that names the libraries outside the tested range; None if there are none.

    Only requirements with an upper bound count: those are the libraries whose internals this project uses. pip respects
    the range by itself; a version installed later, or by other means, may be outside it.
    """
    try:
        requirements = [Requirement(line) for line in metadata.requires("rlhf") or ()]
    except metadata.PackageNotFoundError:  # run from sources, not installed
        return None
    outside = [
        f"{one.name} {found} (tested: {_range(one)})"
        for one in requirements
        if one.marker is None and any(part.operator in ("<", "==") for part in one.specifier)
        if (found := _version(one.name)) is not None
        # public drops the local label (2.13.0+cpu is 2.13.0); prereleases=True accepts a pre-release within the range.
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
