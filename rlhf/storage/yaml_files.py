"""YAML files read as plain values, equal to OmegaConf's and many times as fast. No torch here."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader  # no public function gives OmegaConf's loader, only its results
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

_PLAIN = (str, int, float, type(None))  # bool is an int


def load(path: Path) -> Any:
    """Return the content of a YAML file, its interpolations unresolved, as `OmegaConf.load` does.

    The C library parses it. A file that is not YAML, or has more than plain values (aliases, tags, interpolations, keys
    that are not strings), is passed to OmegaConf, so that its values and errors are OmegaConf's.

    Raises:
        OSError, ValueError, yaml.YAMLError, OmegaConfBaseException: As `OmegaConf.load`.
    """
    text = path.read_text(encoding="utf-8")
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        content = None
    if isinstance(content, dict) and _is_plain(content, set()):
        return content
    return OmegaConf.to_container(OmegaConf.load(path))


def _is_plain(node: Any, seen: set[int]) -> bool:
    """Return whether OmegaConf would keep a value unchanged; an alias, the same object twice, is not plain."""
    if isinstance(node, dict | list):
        if id(node) in seen:
            return False
        seen.add(id(node))
        if isinstance(node, list):
            return all(_is_plain(value, seen) for value in node)
        return all(type(key) is str and _is_plain(value, seen) for key, value in node.items())
    return type(node) is bool or type(node) in _PLAIN and not (isinstance(node, str) and "${" in node)


def _fast_loader() -> Any:
    """Return OmegaConf's loader (1e-3 is a number, keys are unique), on the parser of the C library if available."""
    loader = get_yaml_loader()
    try:
        from yaml.cyaml import CParser
    except ImportError:
        return loader

    def start(self: Any, stream: Any) -> None:
        CParser.__init__(self, stream)
        SafeConstructor.__init__(self)
        Resolver.__init__(self)

    return type("FastLoader", (CParser, loader), {"__init__": start})


_Loader = _fast_loader()
