"""YAML files of options: their nodes, the keys without a comment, and keys and values that differ from constructors."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import OmegaConf

from rlhf import signatures
from rlhf.planning.recipe import values_by_recipe
from rlhf.planning.validation.nodes import RESERVED
from rlhf.planning.validation.values import holds_object
from rlhf.storage.plain import leaves, targets


def unexplained_keys(path: Path) -> list[str]:
    """Return the lines of a YAML whose key has no comment on its line, above it, or above its enclosing block.

    Exempt are keys that only hold others, `_target_`, `_partial_`, defaults lists and `${inputs.ROLE}`.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for i, line in enumerate(lines):
        match = re.match(r"\s*([\w./@-]+):( .*|$)", line)
        if not match or match[1] in ("_target_", "_partial_", "defaults") or "#" in line or not match[2].strip():
            continue
        reference = re.fullmatch(r"\s*\$\{(inputs\.|artifact:|optional_input:)\w+\}", match[2])
        if not reference and not (i and lines[i - 1].strip().startswith("#")) and not _block_explained(lines, i):
            found.append(f"{path.name}:{i + 1}: {line.strip()}")
    return found


def _block_explained(lines: list[str], index: int) -> bool:
    indent = len(lines[index]) - len(lines[index].lstrip())
    for i in range(index - 1, -1, -1):
        if lines[i].strip() and len(lines[i]) - len(lines[i].lstrip()) < indent:
            return "#" in lines[i] or (i > 0 and lines[i - 1].strip().startswith("#"))
    return False


def nodes(path: Path) -> Iterator[tuple[str, dict[str, Any], Callable[..., Any]]]:
    """Yield the nodes of a YAML that build something: (dotted key, node, constructor)."""
    for where, node in targets(OmegaConf.to_container(OmegaConf.load(path))):
        yield where, node, get_object(node["_target_"])


def foreign_keys(path: Path) -> list[str]:
    """Return the keys of a YAML that its constructors do not accept."""
    found = []
    for where, node, target in nodes(path):
        known = signatures.parameters(target) or {}
        if any(p.kind is p.VAR_KEYWORD for p in known.values()):
            continue
        groups = set(signatures.groups(target)) if where == "stage" else set()
        allowed = (set(known) - groups) | {*RESERVED, "defaults"} | ({"name"} if where == "stage" else set())
        found += [
            f"{path.name}: {where or 'the file'} has {name}, which is not a parameter of {target.__name__}"
            for name in set(node) - allowed
        ]
    return found


def defaults_compared(path: Path) -> Iterator[tuple[str, str, bool, Any, Any]]:
    """Yield, for every YAML value whose constructor has a default: (target, name, same, value, default).

    A value that depends on the recipe is the same if it is with one of them.
    """
    for _, node, target in nodes(path):
        for name, parameter in (signatures.parameters(target) or {}).items():
            value = node.get(name, parameter.empty)
            if value is parameter.empty or parameter.default is parameter.empty:
                continue
            values = values_by_recipe(value)
            computed = any(isinstance(v, str) and ("${" in v or v == "???") for _, v in leaves(values, "v"))
            if not computed and not holds_object(value):
                default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
                yield node["_target_"], name, default in values, value, parameter.default
