"""User code: the Python files that a config names and the files that these import, outside installed packages.

The code is parsed, never run: imports are found in the syntax trees. An import whose name is computed at run time, and
files other than Python that the code reads, are not found.
"""

import ast
import re
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from pkgutil import get_importer
from typing import Any

from rlhf.storage.plain import leaves, targets

_FUNCTION = re.compile(r"([A-Za-z_][\w.]*):[A-Za-z_]\w*")  # the syntax of reward.function and data.format


def named(config: Any) -> list[str]:
    """Return the dotted names of Python objects and modules in a config: classes, and functions as `module:name`."""
    found = []
    for _, node in targets(config):
        found.append(str(node["_target_"]))
        if found[-1].startswith("hydra.utils.get_") and isinstance(node.get("path"), str):
            found.append(node["path"])
    matches = (_FUNCTION.fullmatch(value) for _, value in leaves(config) if isinstance(value, str))
    return list(dict.fromkeys([*found, *(match[1] for match in matches if match)]))


def files(names: Iterable[str]) -> dict[str, Path]:
    """Return the user's modules behind dotted names, and the user's modules that these import, with their files.

    Args:
        names: Dotted names of modules, or of objects in them.
    """
    found: dict[str, Path] = {}
    waiting = list(names)
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for module, path in _modules(name, tuple(sys.path)):
            if module not in found:
                found[module] = path
                waiting += imported_names(path, module, path.stat().st_mtime_ns)
    return dict(sorted(found.items()))


@cache
def _modules(name: str, places: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Return the user's modules that importing a dotted name runs; empty for installed modules.

    Args:
        name: As in an import; a part after the last module is an object in it.
        places: `sys.path`, on which the result depends.
    """
    top, *below = name.split(".")
    try:
        spec: ModuleSpec | None = find_spec(top)
    except (ImportError, ValueError):  # such as __main__, or an invalid name
        return []
    found: list[tuple[str, Path]] = []
    module = top
    while spec is not None:
        inside = [spec.origin] if spec.has_location and spec.origin else list(spec.submodule_search_locations or ())
        if not inside or not all(_is_users(Path(place)) for place in inside):
            return []
        if spec.has_location and spec.origin and spec.origin.endswith(".py"):
            found.append((module, Path(spec.origin)))
        if not below or spec.submodule_search_locations is None:
            break
        module = f"{module}.{below.pop(0)}"
        spec = _below(module, list(spec.submodule_search_locations))
    return found


def _below(module: str, folders: list[str]) -> ModuleSpec | None:
    """Return the spec of a module inside a package.

    Python's own search fails in nested directories without ``__init__.py`` that are not imported.
    """
    parts: list[str] = []
    for folder in folders:
        finder = get_importer(folder)
        spec = None if finder is None else finder.find_spec(module)
        if spec is not None and spec.loader is not None:
            return spec
        parts += [] if spec is None else list(spec.submodule_search_locations or ())
    whole = ModuleSpec(module, None)
    whole.submodule_search_locations = parts
    return whole if parts else None


@cache
def _is_users(path: Path) -> bool:
    """Return whether a path belongs neither to Python, nor to an installed package, nor to rlhf."""
    ways = {path.absolute(), path.resolve()}  # a link to an installed package counts as installed
    if any({"site-packages", "dist-packages"} & set(way.parts) for way in ways):
        return False
    known = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders = [*known, *site.getsitepackages(), site.getusersitepackages(), str(Path(__file__).parents[1])]
    places = [place for folder in folders for place in (folder, Path(folder).resolve())]
    return not any(way.is_relative_to(place) for way in ways for place in places)


@cache
def imported_names(path: Path, module: str, changed_ns: int) -> list[str]:
    """Return the dotted names that a file imports, inside functions too; for `from a import b`, both a and a.b."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return list(dict.fromkeys(name for node in ast.walk(tree) for name in _imported(node, package)))


def _imported(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".") if package else []
        start = above[: len(above) - node.level + 1] if node.level else []
        base = ".".join([*start, *([node.module] if node.module else [])])
        if base:
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            yield node.args[0].value
