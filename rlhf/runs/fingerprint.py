"""Fingerprints: a run is identified by what it computes.

A run directory is ``outputs/<stage>/<fingerprint>/`` with config.yaml, lineage.json, status.json, metrics.csv,
summary.json, manifest.json, checkpoints/ and model/ (`rlhf.runs.run_directory`). No torch here.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import hydra.utils
from omegaconf import OmegaConf

from rlhf.errors import renaming
from rlhf.importing import build_option
from rlhf.runs import user_code
from rlhf.runs.data_source import is_data
from rlhf.runs.run_directory import run_of
from rlhf.runs.source_code import code_digest, package_digest, package_folder, plugin_imports, source_digest
from rlhf.storage.plain import Plain, leaves, targets

# Keys of a step's config that cannot change what it computes; the values that a recipe selects are in other keys.
_IRRELEVANT = ("logger", "callbacks", "outputs", "until", "progress", "inputs", "experiment", "debug", "recipe")
# Files identified by their content even if typed without a directory.
_NAMED_BY_CONTENT = (".jinja", ".gguf")
_HASHED_WHOLE = 256 * 2**20  # bytes; a larger file is identified by its size, modification time and first MiB


def compute(
    config: Plain,
    inputs: Mapping[str, list[str]],
    planned: Mapping[str, str],
    digests: Iterable[str] | None = None,
) -> str:
    """Compute the fingerprint of a resolved step config: 64 hexadecimal digits, the first of them a letter from a to f.

    Args:
        config: The resolved config; logger, callbacks, output paths and similar keys are excluded.
        inputs: Role -> identities (a run's fingerprint, a hash of files, a hub id) of the inputs that are read.
        planned: Run directory -> fingerprint of runs that the config may name by path, which need not exist yet.
        digests: Result of `keys_with_digest(config)` if it is known already, so that no other class is imported.
    """
    relevant = _relevant(config)
    payload = {
        "config": _canonical(relevant, planned),
        "inputs": {role: list(names) for role, names in sorted(inputs.items())},
        "data": data_digests(relevant, planned, keys_with_digest(config) if digests is None else digests),
        "source": _code(relevant),
    }
    text = json.dumps(payload, sort_keys=True)
    # The first character must be a letter: a typed prefix such as 625e06 would be read as a number.
    names = (hashlib.sha256(f"{attempt}{text}".encode()).hexdigest() for attempt in count())
    return next(name for name in names if name[0].isalpha())


def _relevant(config: Plain) -> Plain:
    """Return the part of a step's config that can change what it computes."""
    relevant = {key: value for key, value in config.items() if key not in _IRRELEVANT}
    callbacks = {key: node for key, node in (config.get("callbacks") or {}).items() if user_sources(node)}
    if callbacks:  # user callbacks may change the result; the built-in ones only observe
        relevant["callbacks"] = callbacks
    model = relevant.get("model")
    if isinstance(model, dict) and model.get("path"):
        # The directory's config.json determines the architecture.
        relevant["model"] = {key: value for key, value in model.items() if key != "architecture"}
    return relevant


def _canonical(node: Any, planned: Mapping[str, str]) -> Any:
    """Return an equal value for configs of equal meaning: 1 and 1.0, a run by any path, a file by its content."""
    if isinstance(node, dict):
        return {str(key): _canonical(value, planned) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_canonical(value, planned) for value in node]
    if isinstance(node, float) and node.is_integer():
        return int(node)
    if isinstance(node, str) and ("/" in node or node.endswith(_NAMED_BY_CONTENT)):
        for folder, name in planned.items():
            if node == folder or node.startswith(folder + "/"):
                return name + node[len(folder) :]
        with suppress(OSError):
            if Path(node).expanduser().exists():
                return identity(Path(node).expanduser())
    return node


def identity(path: Path) -> str:
    """Return the identity of a path in a fingerprint: the run that contains it, else a hash of its content."""
    run = run_of(path)
    if run is not None:
        return f"{run.fingerprint}/{path.relative_to(run.folder)}"
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        # A single file is identified by its content alone, at any path and under any name.
        total.update(f"{file.relative_to(path) if path.is_dir() else ''}\0{_file_digest(file)}\0".encode())
    return f"sha256:{total.hexdigest()}"


def _file_digest(path: Path) -> str:
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns)


@cache
def _digest(path: Path, size: int, changed_ns: int) -> str:
    with path.open("rb") as file:
        if size <= _HASHED_WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        return f"{size}-{changed_ns}-{hashlib.sha256(file.read(2**20)).hexdigest()}"


def keys_with_digest(config: Plain) -> tuple[str, ...]:
    """Return the keys of the nodes that build data; import the classes of all nodes."""
    return tuple(key for key, node in targets(config) if is_data(hydra.utils.get_object(node["_target_"])))


def data_digests(config: Plain, planned: Mapping[str, str], keys: Iterable[str]) -> dict[str, str]:
    """Return the digests of the data that nodes read, computed by their ``digest()``.

    Nodes that name a planned run are left out: that run identifies their data.

    Args:
        config: The resolved config.
        planned: Run directory -> fingerprint of runs that need not exist yet.
        keys: Keys of the nodes with a ``digest``.

    Raises:
        UserError: If the data of a node cannot be read; the message names the config key.
    """
    found: dict[str, str] = {}
    for key, node in targets(config):
        if key not in keys:
            continue
        strings = [value for _, value in leaves(node, key) if isinstance(value, str)]
        if any(value == folder or value.startswith(folder + "/") for value in strings for folder in planned):
            continue
        with renaming("data", key):
            found[key] = str(build_option(OmegaConf.create(node)).digest())
    return found


def code(config: Plain) -> dict[str, str]:
    """Return the digests of the code that a step's config reaches, by package and by module of the user."""
    return _code(_relevant(config))


def _code(config: Plain) -> dict[str, str]:
    """Return the digests of the code that computes: rlhf's, the plugins', and the user's modules'."""
    names = [str(node["_target_"]) for _, node in targets(config)]
    found: dict[str, str] = {}
    for package in sorted({name.partition(".")[0] for name in names} - {"rlhf"}):
        digest = package_digest(package)
        if digest is not None:
            found[package] = digest
            names += plugin_imports(package)
    return {"rlhf": source_digest(names)} | found | user_sources(config)


def user_sources(config: Plain) -> dict[str, str]:
    """Return the digest of each user module that a config names, or that such a module or a plugin imports."""
    digests = {}
    for module, path in user_code.files(user_code.named(config)).items():
        if package_folder(module.partition(".")[0]) is None:  # a plugin counts as a whole
            digests[f"module {module}"] = code_digest(path, path.stat().st_mtime_ns)
    return digests
