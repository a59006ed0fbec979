"""Configs as plain dicts and lists. No torch here."""

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

Plain = dict[str, Any]


def merge(base: Plain, over: Plain) -> Plain:
    """Merge ``over`` into ``base``; a node with a ``_target_`` is a whole option of a group and replaces the base's."""
    merged = dict(base)
    for key, value in over.items():
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and "_target_" not in value:
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def plain(root: DictConfig) -> Plain:
    """Return a config as dicts and lists, interpolations unresolved."""
    content = OmegaConf.to_container(root, resolve=False)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every (dotted key, value) of a plain config; list positions are numbers."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def targets(node: Any, path: str = "") -> Iterator[tuple[str, Plain]]:
    """Yield every (dotted key, node) with a ``_target_``, outermost first."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from targets(value, f"{path}.{index}")


def sets(node: Any, key: str) -> bool:
    """Return whether a step's own node sets the value of a dotted key, so that the root's value is not used."""
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
        if isinstance(node, dict) and "_target_" in node:
            return True
    return not isinstance(node, dict)
